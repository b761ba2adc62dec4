"""``make gpu-cache`` and ``make gpu-pack``: spare a machine with a GPU compilation and downloads.

    python -O bench/gpu_cache.py [--pack] [--verify]

Triton caches compiled kernels under a key of the source, the signature and constants of a launch,
its options, the architecture, the version of ptxas and the bytes of its own compiler. The key does
not contain a device. So this script captures the launches of the stages (launches.py) and compiles
them for sm_90 into ``out/gpu-pack/triton``: machine code and metadata, and the C module that Triton
3.6 builds for each kernel signature, for each Python here that has its headers. ``--pack`` adds the
peer, a newer ptxas and compute-sanitizer, and writes ``out/gpu-pack.tar.xz``, which the first stage
that finds it unpacks. ``--verify`` launches the table again in another process, also with a driver
that has no device, and counts the kernels that are not in the cache.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from gpu_pack import PACK, PLACES, ROOT, pack

# -- what is launched -----------------------------------------------------------------------------


@contextlib.contextmanager
def launching() -> Iterator[None]:
    """Ops on CPU tensors and on tensors without data go to Triton's launchers."""
    from unittest import mock

    import torch

    from fastvdm.ops import _call
    from fastvdm.runtime import dispatch

    everywhere = {"triton": ("cuda", "cpu", "meta")}
    autocast = torch.autocast

    def known(device: str, *args: Any, **options: Any) -> Any:
        """Compositions ask for autocast on the device of their tensors; "meta" has none."""
        return autocast("cpu" if device == "meta" else device, *args, **options)

    with (
        mock.patch.object(torch, "autocast", known),
        mock.patch.dict(dispatch._DEVICES, everywhere),
        mock.patch.dict(_call._AUTO, {"cpu": "triton", "meta": "triton"}),
        mock.patch.object(_call, "_on_device", lambda launch: launch),
        mock.patch.object(dispatch, "no_launch", lambda: None),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def networks_of_the_stages() -> list[Any]:
    """A sampling step, a guided step and a training step of the networks of the check and of the
    measurements, at their batch sizes."""
    from network_launches import DTYPES, WAYS, Net, network_call
    from unet_bench import CASES, LARGE

    from fastvdm import UNet3D

    known = CASES | LARGE
    nets = {
        ("unet", 1): partial(UNet3D, 64, cond_drop_prob=0.0),
        ("unet", 2): partial(UNet3D, 64, cond_drop_prob=0.0),
        ("ucf101", 1): partial(UNet3D.from_preset, "ucf101"),
    }
    for case, batches in (("readme", (1, 2, 8)), ("dim-128", (8,)), ("dim-256", (1,))):
        net = known[case]
        make = partial(UNet3D, net.dim, dim_mults=net.dim_mults, norm="rms", cond_drop_prob=0.0)
        nets |= {(case, batch): make for batch in batches}
    return [
        network_call(f"{name} {batch} {dtype} {way}", Net(make, 16, 64), dtype, way, batch)
        for (name, batch), make in nets.items()
        for dtype in DTYPES
        for way in WAYS
    ]


def ops_of_the_check() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Forward and backward of the op items of gpu_check.py, on tensors without data."""
    import gpu_check
    import torch
    from op_cases import ROWS, make

    from fastvdm import use_backend

    def both(row: str, edge: dict[str, Any], dtype: torch.dtype) -> None:
        case = make(ROWS[row], dtype, "meta", edge)
        with use_backend("triton"):
            leaves = [t.requires_grad_(case.row.gradient) for t in case.tensors.values()]
            out = case(*leaves)[0]
            if case.row.gradient:
                torch.autograd.grad(out, leaves, torch.empty_like(out))

    wanted = [(e, tuple(gpu_check.SHORT)) for e in gpu_check.at_the_networks()]
    wanted += [(e, (torch.bfloat16,)) for e in gpu_check.many_sequences(False)]
    for (row, label, edge), dtypes in wanted:
        for dtype in dtypes:
            yield f"{row} {label} {dtype}", partial(both, row, edge, dtype)


PARTS = ("table", "networks", "ops", "suite")


def launches(parts: Sequence[str] = PARTS) -> list[Any]:
    """The kernels of all stages, each once, the most used first. Calls of the test suite fail when
    they read results that nobody has computed, but by then they have launched: ``python -O`` leaves
    out the ``assert`` statements that come between two launches."""
    import torch
    from calls import Call, by_name
    from calls import networks as table
    from launches import captured

    from fastvdm.runtime.device import H200

    refused: dict[str, str] = {}

    def call(name: str, device: str, run: Callable[[], Any]) -> Call:
        def quietly() -> Any:
            try:
                run()
            except Exception as error:
                refused[name] = f"{type(error).__name__}: {error}"[:200]

        return Call(name, lambda _: quietly, torch.bfloat16, device)

    found = []
    if "table" in parts:
        found += [*table(), *by_name()]
    if "networks" in parts:
        found += networks_of_the_stages()
    if "ops" in parts:
        found += [call(name, "meta", run) for name, run in ops_of_the_check()]
    if "suite" in parts:
        import gpu_check

        found += [call(name, "cpu", run) for name, run in gpu_check.cells()]
    with launching():
        taken = captured(found, H200)
    for name, why in refused.items():
        if "triton" not in name:  # not a cell of the suite
            print(f"  {name}: {why}", file=sys.stderr)
    return taken


# -- the cache ------------------------------------------------------------------------------------


def build(launch: Any) -> tuple[str, str] | None:
    """Compile one launch into the cache. Returns its folder there and the C of its launcher; None
    if Triton refuses."""
    from unittest import mock

    from launches import compiled
    from triton.backends.nvidia import driver
    from triton.runtime.cache import get_cache_manager

    sources: list[str] = []

    def take(src: str, **_: Any) -> Any:
        sources.append(src)
        return mock.Mock()

    try:
        made = compiled(launch)
    except Exception as error:
        print(f"  {launch.name}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return None
    with mock.patch.multiple(driver, compile_module_from_src=take, library_dirs=list):
        driver.CudaLauncher(made.src, made.metadata)
    return get_cache_manager(made.hash).cache_dir, sources[0]


def pythons() -> list[Path]:
    """Python interpreters on this machine that have headers, one per version from 3.10 on."""
    found = {sys.version_info[:2]: Path(sys.executable)}
    for path in Path(sys.base_prefix).parent.glob("3.*/bin/python3"):
        version = tuple(map(int, path.parents[1].name.split(".")[:2]))
        if version >= (3, 10) and any(path.parents[1].glob("include/python3.*/Python.h")):
            found.setdefault(version, path)
    return list(found.values())


_ASK = "import sysconfig as s; print(s.get_paths()['include'], s.get_config_var('EXT_SUFFIX'))"


def build_launchers(sources: Sequence[str]) -> tuple[set[str], int]:
    """Build a module with Triton's own build for each C source and Python, under the name and key
    that Triton looks up (triton/runtime/build.py). The version is in the file name, not in the key.
    Returns their folders in the cache, and how many were not there yet."""
    import triton
    from triton.runtime.build import platform_key
    from triton.runtime.cache import get_cache_manager

    folder = Path(triton.__file__).parent / "backends" / "nvidia"
    modules = {source: "__triton_launcher" for source in sources}
    modules[(folder / "driver.c").read_text()] = "cuda_utils"
    folders, built = set(), 0
    with tempfile.TemporaryDirectory() as scratch:
        # A module contains only the library's name; the library is that of the other machine.
        stub = Path(scratch) / "libcuda.so.1"
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{stub.name}", "-x", "c", os.devnull]
        subprocess.run(["gcc", *flags, "-o", str(stub)], check=True)
        for python in pythons():
            told = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True)
            include, suffix = told.stdout.split()
            for source, name in modules.items():
                key = hashlib.sha256((source + platform_key()).encode()).hexdigest()
                manager = get_cache_manager(key)
                folders.add(manager.cache_dir)
                if manager.get_file(name + suffix) is not None:
                    continue
                c, so = Path(scratch) / "module.c", Path(scratch) / "module.so"
                c.write_text(source)
                command = ["gcc", str(c), "-O3", "-shared", "-fPIC", "-w", "-Wno-psabi", "-s"]
                command += ["-o", str(so), "-l:libcuda.so.1", f"-L{scratch}", f"-I{include}"]
                subprocess.run([*command, f"-I{folder / 'include'}"], check=True)
                manager.put(so.read_bytes(), name + suffix, binary=True)
                built += 1
    return folders, built


def make_cache(parts: Sequence[str], processes: int) -> None:
    """Fill ``out/gpu-pack/triton``, without what earlier versions of the kernels left there, and
    print what it contains."""
    import triton
    from tqdm import tqdm
    from triton.runtime.cache import triton_key

    start = time.monotonic()
    taken = launches(parts)
    print(f"{len(taken)} kernels to compile ({time.monotonic() - start:.0f} s to capture them)")
    with ProcessPoolExecutor(processes) as pool:
        built = tqdm(pool.map(build, taken, chunksize=4), total=len(taken), unit="kernel")
        made = [m for m in built if m is not None]
    sources = sorted({source for _, source in made})
    folders, count = build_launchers(sources)
    folders |= {folder for folder, _ in made}
    for path in PLACES["triton"].iterdir():
        if str(path) not in folders:
            shutil.rmtree(path)
    facts = {
        "triton": triton.__version__,
        "key": triton_key(),
        "kernels": len(made),
        "launchers": len(sources),
        "python": [p.resolve().parents[1].name for p in pythons()],
    }
    (PACK / "triton.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{len(made)} kernels, {len(sources)} launchers for {len(pythons())} versions of Python")
    print(f"({count} built now) in {time.monotonic() - start:.0f} s")


def verify(parts: Sequence[str]) -> int:
    """Launch the table in this process with a driver that has no device. Returns the number of
    kernels that were compiled although they should be in the cache."""
    from launches import compiled
    from triton import knobs

    missed: list[str] = []
    seen = 0

    def listen(*, src: Any, cache_hit: bool, **_: Any) -> None:
        nonlocal seen
        seen += 1
        if not cache_hit:
            missed.append(src.name)

    knobs.compilation.listener = listen
    for launch in launches(parts):
        with contextlib.suppress(Exception):
            compiled(launch)
    print(f"{seen} kernels asked for, {len(missed)} not in the cache: {sorted(set(missed))[:20]}")
    return len(missed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    sys.path[:0] = [str(ROOT / p) for p in (".", "bench", "tests", "tests/ops")]
    PLACES["triton"].mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "TRITON_CACHE_DIR": str(PLACES["triton"]),
        "TRITON_STORE_BINARY_ONLY": "1",
        "FASTVDM_EMULATE": "90",  # the suite then treats kernels as compiled
    }
    if args.verify:
        return 1 if verify(args.parts) else 0
    make_cache(args.parts, args.jobs)
    return pack() if args.pack else 0


if __name__ == "__main__":
    sys.exit(main())

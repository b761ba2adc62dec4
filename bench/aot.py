"""Every shipped Triton configuration compiled without a GPU: ``python bench/aot.py``.

A kernel file exports ``aot_cases() -> list[AotCase]``: its kernels with the constexprs that its
launchers choose. The table shows, for sm_80, sm_90 and sm_100, registers, spills, shared memory,
occupancy and the matrix instruction; ``--json`` prints the same for the tests. Compiler and
cuobjdump ship in Triton's wheel. Must run without TRITON_INTERPRET: under it there are no JIT
functions to compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import linecache
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvdm.kernels.aot_case import ARCHS, AotCase

# Per multiprocessor: largest shared memory of a block, of all blocks, warps. CUDA C++ Programming
# Guide, table "Technical Specifications per Compute Capability"; a block reserves 1 KiB more.
_LIMITS = {80: (163, 164, 64), 90: (227, 228, 64), 100: (227, 228, 64)}
_REGISTERS = 65536
_MINMAX = re.compile(r"\s+(?:@!?%p\d+ )?((?:max|min)\.[\w.]*?(?:f16|f16x2|bf16|bf16x2|f32))\s")
_HELPERS = ("standard.py", "common.py")  # a minimum is told by the line that asks for it
_MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class AotResult:
    """What the compiler made of a case for one architecture. shared and spills in bytes; blocks is
    the occupancy in thread blocks per multiprocessor, warps the same in warps; minmax as the
    function of that name finds them."""

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    blocks: int
    warps: int
    matrix: str
    tma: bool
    uses_dot: bool
    uses_tma: bool
    minmax: Sequence[tuple[str, str]] = ()
    error: str = ""

    def faults(self) -> list[str]:
        """What is wrong with it; empty when it may ship."""
        if self.error:
            return [self.error]
        found = []
        limit = _LIMITS[self.arch][0] * 1024
        if self.spills:
            found.append(f"{self.spills} bytes of spills")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, limit {limit}")
        if self.uses_dot and not self.matrix:
            found.append("a dot without a matrix instruction")
        if self.uses_tma and self.arch >= 90 and not self.tma:
            found.append("no bulk tensor copy")
        if not self.blocks:
            found.append("no block fits on a multiprocessor")
        return found


def occupancy(arch: int, registers: int, shared: int, num_warps: int) -> int:
    """Thread blocks per multiprocessor: registers are handed out per warp in units of 256."""
    _, total, max_warps = _LIMITS[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = _REGISTERS // per_warp // num_warps
    by_shared = total * 1024 // (shared + 1024)
    return min(by_registers, by_shared, max_warps // num_warps, 32)


def _resources(cubin: bytes, ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spill bytes). A kernel without a stack frame spills nothing; one with a frame is
    assembled again for ptxas to tell spills from local arrays (those of cos and sin, for one)."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        binary, source = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        binary.write_bytes(cubin)
        source.write_text(ptx)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", log)
        if found is None:
            raise RuntimeError(f"cuobjdump printed no resource usage: {log[:200]!r}")
        registers, stack, local = map(int, found.groups())
        if stack + local == 0:
            return registers, 0
        tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
        name = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        command = [tool.path, "-v", name, str(source), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log))


def minmax(ptx: str) -> tuple[tuple[str, str], ...]:
    """(instruction, source line) of each floating-point minimum and maximum, each pair once.

    Without .NaN they return the operand that is a number (PTX ISA, "max"): a NaN is lost, which no
    run under the interpreter shows, as NumPy keeps it. Not those of fp64: it has no .NaN, and where
    one is asked for a select follows.
    """
    folder = Path(importlib.import_module("fastvdm.kernels").__path__[0])
    # Sites are named without their folder: two kernels' shared.py never meet in one PTX. What
    # Triton's cache holds may come from another checkout: the file is looked for in this one.
    named = re.findall(r'\.file\s+\d+\s+"[^"]*/kernels/([^"]+)"', ptx)
    files = {Path(f).name: str(folder / f) for f in named}
    found, line = set(), ""
    for text in ptx.splitlines():
        if ".loc" in text:
            sites = re.findall(r"(\w+\.py):(\d+):\d+", text)
            own = [s for s in sites if s[0] not in _HELPERS]
            name, number = own[0] if own else ("", "0")
            path = files.get(name, str(folder / name))
            line = linecache.getline(path, int(number)).strip() if own else ""
        elif instruction := _MINMAX.match(text):
            found.add((instruction[1], line))
    return tuple(sorted(found))


def compile_case(case: AotCase, arch: int) -> AotResult:
    """Compile one case for one architecture; a compiler error becomes ``AotResult.error``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    signature = {n: case.signature.get(n, "constexpr") for n in names}
    missing = [n for n in names if n not in case.signature and n not in case.constexprs]
    if missing:
        raise ValueError(f"{case.name}: neither signature nor constexprs has {', '.join(missing)}")
    divisible = set(case.divisible) | {n for n, t in case.signature.items() if t.startswith("*")}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in divisible}
    facts: dict[str, Any] = dict(
        name=case.name, arch=arch, uses_dot=case.uses_dot, uses_tma=case.uses_tma
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if case.maxnreg is not None:
        options["maxnreg"] = case.maxnreg
    try:
        compiled = triton.compile(
            ASTSource(case.kernel, signature, constexprs=dict(case.constexprs), attrs=attrs),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
        ptx = compiled.asm["ptx"]
        registers, spills = _resources(compiled.asm["cubin"], ptx, arch)
    except Exception as error:  # whatever the compiler throws is the finding
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return AotResult(**facts, **_NOTHING, error=text)
    shared = compiled.metadata.shared
    blocks = occupancy(arch, registers, shared, case.num_warps)
    return AotResult(
        **facts,
        registers=registers,
        spills=spills,
        shared=shared,
        blocks=blocks,
        warps=blocks * case.num_warps,
        matrix=next((m for m in _MATRIX if m in ptx), ""),
        tma="cp.async.bulk.tensor" in ptx,
        minmax=minmax(ptx),
    )


_NOTHING: dict[str, Any] = dict(
    registers=0, spills=0, shared=0, blocks=0, warps=0, matrix="", tma=False
)


def stems() -> list[str]:
    """The kernel modules that declare cases: "guidance", "norm_act.group" ..."""
    folder = Path(importlib.import_module("fastvdm.kernels").__path__[0])
    files = (p for p in folder.rglob("*.py") if "def aot_cases" in p.read_text())
    names = (p.relative_to(folder).with_suffix("").as_posix().replace("/", ".") for p in files)
    return sorted(name.removesuffix(".__init__") for name in names)


def cases(stem: str) -> list[AotCase]:
    return importlib.import_module(f"fastvdm.kernels.{stem}").aot_cases()


def _compile_one(job: tuple[str, int, int]) -> AotResult:
    stem, index, arch = job
    return compile_case(cases(stem)[index], arch)


def heaviest(results: Sequence[AotResult]) -> set[str]:
    """Names of the cases with most registers and with most shared memory of each kernel, with and
    without matrix instructions and bulk copies: what another architecture would refuse first."""
    found: dict[tuple, AotResult] = {}
    for r in results:
        for resource in ("registers", "shared"):
            key = r.name.split("/")[0], r.uses_dot, r.uses_tma, resource
            if key not in found or getattr(r, resource) > getattr(found[key], resource):
                found[key] = r
    return {r.name for r in found.values()}


def run(
    wanted: Iterable[str],
    archs: Sequence[int],
    jobs: int,
    *,
    rare: bool = True,
    names: Container[str] | None = None,
) -> list[AotResult]:
    """Compile the cases of the wanted stems, or of those the named ones, for ``archs`` in ``jobs``
    processes."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    todo = [
        (stem, i, arch)
        for stem in wanted
        for i, case in enumerate(cases(stem))
        for arch in archs
        if arch in case.archs and (rare or not case.rare)
        if names is None or case.name in names
    ]
    if jobs == 1:
        return [_compile_one(job) for job in todo]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(_compile_one, todo))


def table(results: Sequence[AotResult]) -> str:
    head = ("kernel", "sm", "registers", "spills", "shared", "blocks", "warps", "matrix", "tma", "")
    rows = [head] + [
        (r.name, str(r.arch), str(r.registers), str(r.spills), str(r.shared), str(r.blocks))
        + (str(r.warps), r.matrix or "-", "yes" if r.tma else "-", "; ".join(r.faults()))
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 when a case may not ship."""
    parser = argparse.ArgumentParser(prog="python bench/aot.py", description=__doc__)
    parser.add_argument(
        "stems", nargs="*", help="kernel modules by the start of their name; default: all"
    )
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS, choices=ARCHS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="a list of objects, one per line")
    parser.add_argument(
        "--common", action="store_true",
        help="without the rare configurations, and of each kernel the heaviest alone for all but "
        "one architecture; the tests' choice",
    )  # fmt: skip
    args = parser.parse_args(argv)
    wanted = [s for s in stems() if s.startswith(tuple(args.stems) or "")]
    if args.common:
        whole = 90 if 90 in args.arch else args.arch[0]
        results = run(wanted, [whole], args.jobs, rare=False)
        first = {r.name: r for r in results}
        for arch in (a for a in args.arch if a != whole):
            ships = [c.name for stem in wanted for c in cases(stem) if arch in c.archs]
            names = heaviest([first[n] for n in ships if n in first])
            names |= {n for n in ships if n not in first}  # its own, which nothing stands for
            results += run(wanted, [arch], args.jobs, rare=False, names=names)
    else:
        results = run(wanted, args.arch, args.jobs)
    if args.json:
        for r in results:
            print(json.dumps(dataclasses.asdict(r) | {"faults": r.faults()}))
    else:
        print(table(results))
    return 1 if any(r.faults() for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())

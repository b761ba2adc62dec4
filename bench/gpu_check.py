"""``make gpu-check``: does a device compute what was so far only interpreted and emulated?

In this order, while there is time: facts about the machine; whole networks; the default kernels at
the networks' shapes, forward and backward, in bf16, fp32 and fp16; sampling by CUDA graphs; the
table of launches, twice, compared bit by bit; more sequences than a grid's axis takes; a compiled
network; the suite of the ops (tests/ops); bf16 attention by another ptxas; compute-sanitizer. The
references are in fp64, with the three-way tolerance (fastvdm.testing); fp32 runs without TF32.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_networks import compiled_network, graphed_sample, like_the_peer, whole
from gpu_pack import PACK, ROOT
from gpu_worker import Context, Item, Skip
from torch import Tensor

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DEVICE = "cuda"
SHORT = {BF16: "bf16", FP32: "fp32", FP16: "fp16"}  # in this order; a dry run has no bf16
# Checks of the suite that a device may fail although an interpreter passes them.
OF_THE_DEVICE = (
    "parity", "bit_equal", "exact", "not_a_number", "mixed", "poison", "strides", "expanded_dy",
    "each_alone", "frozen", "autocast", "empty", "no_grad", "inference_mode",
)  # fmt: skip


_held = ExitStack()


def prepare() -> None:
    """Disable TF32 for the rest of the process."""
    from harness import exact_fp32

    _held.enter_context(exact_fp32())
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # otherwise the bits of cuBLAS may vary


# -- the machine ----------------------------------------------------------------------------------


def facts(without: tuple[str, ...]) -> dict[str, Any]:
    """Versions, clocks, and the measured rates of copies and products."""
    from conftest import machine_info

    from fastvdm import info

    found = machine_info(DEVICE)
    said = [f"{found.get('gpu')}", f"copies {found['limit_gbs']} GB/s"]
    said += [f"{v} {k.removeprefix('limit_')}" for k, v in found.items() if "tflops" in k]
    said += [f"torch {found['torch']}", f"triton {found['triton']}", f"ptxas {ptxas()}"]
    found["tf32"] = [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
    return {"facts": found, "info": info.collect(), "say": ", ".join(said)}


def ptxas() -> str | None:
    """The version of ptxas that Triton uses."""
    from triton import knobs

    tool = knobs.nvidia.ptxas
    return tool.version if tool is not None else None


# -- ops ------------------------------------------------------------------------------------------


def at_the_networks(two: int = 2) -> list[tuple[str, str, dict[str, Any]]]:
    """(row of tests/ops/op_cases.py, label, edge): the default kernels at the shapes of
    bench/calls.py, for ``two`` videos, or for one if attention over space needs the memory in fp64.
    """
    from calls import PAPER, PEER, shape

    def video(case: str, batch: int = two, **more: Any) -> dict[str, Any]:
        s = shape(case)
        return dict(B=batch, F=s.frames, H=s.height, W=s.width, C=s.channels) | more

    def heads(case: str, batch: int = two, **more: Any) -> dict[str, Any]:
        s = shape(case)
        return video(case, batch, A=s.heads, D=s.head_dim, **more)

    found = []
    film = ("weight", "bias", "scale", "shift", "residual")
    for c in ("l0", "l1", "l2"):
        found.append(("temporal_block/bias", c, heads(c, given=("bias", "rotary"))))
    for c in ("l0", "l1"):
        found.append(("linear_attention_block/block", c, heads(c)))
    for c in PEER:
        found.append(("linear_attention/linear_attention", c, heads(c)))
    for c in (*PEER, *PAPER):
        found.append(("norm_act/group", c, video(c, groups=shape(c).groups, given=film)))
    for c in PEER:
        found.append(("norm_act/rms", c, video(c, given=("weight", "scale", "shift"))))
    found.append(("norm_act/layer", "l0", video("l0", given=("weight",))))
    found.append(("axis_attention/time", "l3", heads("l3", given=("bias", "rotary"))))
    for c in ("ucf-16", "t2v128-32"):
        table = heads(c, R=2 * shape(c).frames - 1, given=("rel_k", "rel_v"))
        found.append(("axis_attention/all", c, table))
    for c in ("l3", *PAPER):
        found.append(("axis_attention/long_space", c, heads(c, 1, given=())))
    s = shape("l3")
    found.append(("linear_residual/linear_residual", "l3", video("l3", K=s.inner, N=s.channels)))
    size = {k: v for k, v in video("l0").items() if k in "BFHW"}
    found.append(("guidance/seed", "l0", size | dict(given=("known", "slot"))))
    found.append(("guidance/update", "l0", size | dict(given=("grad", "known", "slot", "rng"))))
    return found


# More than the 65 535 that the second axis of a grid takes.
MANY = [
    ("axis_attention/time", dict(B=1, F=3, A=1, D=16, given=("bias",))),
    ("temporal_block/bias", dict(B=1, F=3, C=20, A=1, D=16, given=("bias",))),
]


def many_sequences(dry: bool) -> list[tuple[str, str, dict[str, Any]]]:
    sizes = {"65536": (256, 256), "70001": (1, 70001)} if not dry else {"small": (3, 5)}
    found = []
    for label, (h, w) in sizes.items():
        found += [(row, label, edge | dict(H=h, W=w)) for row, edge in MANY]
        frames = dict(B=1, F=h * w, A=1, D=16)
        found.append(("axis_attention/long_space", label, frames | dict(H=1, W=3, given=())))
        found.append(("linear_attention/linear_attention", label, frames | dict(H=1, W=2)))
    return found


def parity(row: str, edge: dict[str, Any], dtype: torch.dtype, without: tuple[str, ...]) -> None:
    from op_cases import ROWS, check_parity, make

    from fastvdm.runtime.config import use_backend

    with use_backend("triton", strict=True):
        check_parity(make(ROWS[row], dtype, DEVICE, edge))


def by_torch(case: str, without: tuple[str, ...]) -> None:
    """Attention over space as sampling runs it: networks are compared with deterministic
    algorithms, which exclude torch's attention."""
    from calls import shape

    from fastvdm.ops.axis_attention import axis_attention
    from fastvdm.reference.axis_attention import axis_attention_ref
    from fastvdm.testing import assert_close3

    qkv = torch.randn(*shape(case).qkv_shape, device=DEVICE).to(BF16)
    plain, exact = (axis_attention_ref(t, axis="space") for t in (qkv, qkv.double()))
    assert_close3(axis_attention(qkv, axis="space"), plain, exact)


def launched(call: Any, without: tuple[str, ...]) -> None:
    """Run a call of bench/calls.py twice: the bits must be equal, and there must be no NaN."""
    run = call.build(DEVICE)
    first, second = ([t for t in _flat(run())] for _ in range(2))
    for i, (a, b) in enumerate(zip(first, second)):
        if a.is_floating_point() and not a.isfinite().all():
            raise AssertionError(f"result {i} is not finite")
        if not torch.equal(a, b):
            raise AssertionError(f"result {i}: two runs differ")


def _flat(out: Any) -> list[Tensor]:
    found = [out] if isinstance(out, Tensor) else list(out)
    return [t for t in found if isinstance(t, Tensor)]


def cells() -> list[tuple[str, Callable[[], None]]]:
    """(label, check) of the suite's cells for Triton kernels, the most informative first."""
    from suite_test import cells

    from fastvdm.runtime.config import use_backend

    def run(cell: Any, check: Callable[..., None], how: dict[str, Any]) -> None:
        torch.manual_seed(0)
        with use_backend("triton", strict=True):
            check(cell, **how)

    found = []
    for parameter in cells():
        cell, check, how = parameter.values
        rank = OF_THE_DEVICE.index(check.__name__) if check.__name__ in OF_THE_DEVICE else None
        if cell.lane.backend != "triton" or "triton" not in cell.row.kernels or rank is None:
            continue
        later = (bool(how.get("edge")), how.get("dtype") != BF16) if how else (rank > 4, rank)
        found.append((later, str(parameter.id), partial(run, cell, check, how)))
    return [(label, run) for _, label, run in sorted(found, key=lambda f: f[0])]


# -- another compiler, the sanitizer --------------------------------------------------------------

ATTENTION = (
    ("axis_attention/time", {"F": 16, "D": 32, "given": ("bias",)}),
    ("axis_attention/all", {"F": 16, "R": 31, "D": 64, "given": ("rel_k", "rel_v")}),
    ("axis_attention/long_space", {"H": 8, "W": 9, "D": 64, "given": ()}),
    ("temporal_block/bias", {"F": 16, "C": 64, "D": 32, "given": ("bias",)}),
    ("linear_attention/linear_attention", {"H": 9, "W": 16, "D": 32}),
    ("linear_attention_block/block", {"H": 9, "W": 16, "C": 64, "D": 32}),
)


def bits(row: str, edge: dict[str, Any], path: Any, other: bool, without: tuple[str, ...]) -> Any:
    """Output and gradients of attention in bf16, written to ``path``; with ``other``, compared."""
    from op_cases import ROWS, make

    from fastvdm.runtime.config import use_backend
    from fastvdm.testing import grads, max_error

    if other and not path.exists():
        raise Skip("the first ptxas left no result")
    case = make(ROWS[row], BF16, DEVICE, edge)
    with use_backend("triton", strict=True):
        out = case(*case.tensors.values())[0]
        seed = torch.ones_like(out.float()).cumsum(-1).cos()
        (out,), found = grads(case.first, list(case.tensors.values()), seed)
    mine = [t.cpu() for t in (out, *found) if t is not None]
    if not other:
        path.parent.mkdir(exist_ok=True)
        # As bytes, because numpy has no bf16.
        with path.open("wb") as file:
            np.savez(file, *(t.contiguous().view(-1).view(torch.uint8).numpy() for t in mine))
        return {"ptxas": ptxas()}
    with np.load(path) as saved:
        raw = [torch.from_numpy(saved[name]) for name in saved.files]
    theirs = [r.view(t.dtype).view(t.shape) for r, t in zip(raw, mine)]
    wrong = [i for i, (a, b) in enumerate(zip(mine, theirs)) if not torch.equal(a, b)]
    if wrong:
        errors = ", ".join(f"{i}: {max_error(mine[i], theirs[i]):.1e}" for i in wrong)
        raise AssertionError(f"other bits than with the first ptxas, by result: {errors}")
    return {"ptxas": ptxas()}


def sanitized(context: Context, tool: str, name: str, without: tuple[str, ...]) -> dict[str, Any]:
    """Run an item under compute-sanitizer in its own process."""
    program = shutil.which("compute-sanitizer") or str(PACK / "compute-sanitizer/compute-sanitizer")
    if not os.path.exists(program):
        raise Skip("no compute-sanitizer here")
    script = str(ROOT / "bench" / "gpu_worker.py")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, script]
    command += ["gpu_check", str(context.out), *(["--dry-run"] if context.dry else [])]
    asked = f'{{"item": "{name}", "without": []}}\n'
    # torch's caching allocator would hide accesses next to a tensor.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, input=asked, capture_output=True, text=True)
    said = [s for s in (done.stdout + done.stderr).splitlines() if s.startswith("=========")]
    if done.returncode or '"verdict": "ok"' not in done.stdout:
        raise AssertionError(f"exit status {done.returncode}: {' '.join(said)[:600]}")
    return {"said": said[-1:]}


# -- the list -------------------------------------------------------------------------------------


def items(context: Context) -> list[Item]:
    from calls import by_name, networks

    found = [Item("facts/machine", facts, 60.0, alone=True)]

    def nets(names: tuple[str, ...], wanted: tuple[torch.dtype, ...], **how: Any) -> list[Item]:
        return [
            Item(
                f"network/{name}-{'train' if train else 'forward'}-{SHORT[dtype]}",
                partial(whole, name, dtype, train), 90.0, **how,
            )
            for train in (False, True) for dtype in wanted for name in names
        ]  # fmt: skip

    found += nets(("unet", "unet-rms"), (*SHORT,)[:2])
    mixed = partial(whole, "unet", BF16, True, autocast=True)
    found.append(Item("network/unet-train-autocast", mixed, 120.0))
    found.append(Item("network/like-the-peer", like_the_peer))
    real = at_the_networks()
    for dtype in SHORT:
        found += [
            Item(f"op/{row}-{label}-{SHORT[dtype]}", partial(parity, row, edge, dtype), 60.0)
            for row, label, edge in real
        ]
    found += [
        Item(f"op/attention-by-torch-{case}-bf16", partial(by_torch, case))
        for case in ("ucf-16", "ucf-32")
    ]
    found += nets(("ucf101",), (*SHORT,)[:2], alone=True)
    found += [
        Item("sample/graph", partial(graphed_sample, False)),
        Item("sample/graph-guided", partial(graphed_sample, True)),
    ]
    found += [
        Item(f"launch/{call.name}", partial(launched, call)) for call in (*networks(), *by_name())
    ]
    found += [
        Item(f"many/{row}-{label}-{SHORT[BF16]}", partial(parity, row, edge, BF16))
        for row, label, edge in many_sequences(context.dry)
    ]
    found.append(Item("compile/unet-fullgraph", compiled_network, 100.0))
    found += [Item(f"suite/{label}", lambda _, run=run: run()) for label, run in cells()]
    other = shutil.which("ptxas-next") or str(PACK / "ptxas")
    for environment in ((), (("TRITON_PTXAS_PATH", other),)):
        if environment and not os.path.exists(other):
            break
        for row, edge in ATTENTION:
            name = row.replace("/", "-")
            check = partial(bits, row, edge, context.out / "bits" / name, bool(environment))
            kind = "ptxas" if environment else "bits"
            found.append(Item(f"{kind}/{name}", check, 60.0, environment=environment))
    smallest = [f"bits/{row.replace('/', '-')}" for row, _ in ATTENTION[:2]]
    for tool in ("memcheck", "racecheck"):
        for name in smallest:
            check = partial(sanitized, context, tool, name)
            found.append(Item(f"sanitizer/{tool}-{name.split('/')[1]}", check, 100.0))
    return found

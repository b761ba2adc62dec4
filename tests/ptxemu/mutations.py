"""PTX with a defect put in must be noticed, or the checks prove nothing.

    FASTVDM_EMULATE=90 python -m pytest tests/ptxemu/mutations_test.py

An edit breaks one instruction. A line of a kernel becomes many instructions, in several subjects,
and some of them do not matter (a mask that keeps no lane, a value that is then discarded, one
barrier next to another). So each line must be noticed at one of its instructions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from op_cases import ROWS, check_parity, make

from fastvdm.runtime.config import use_backend
from fastvdm.testing import poison_empty

from .emulator import emulate

Edit = Callable[[str], str | None]  # a line of PTX: the broken one, or None where it is not of it


def drop(pattern: str) -> Edit:
    return lambda line: "" if re.search(pattern, line) else None


def swap(pattern: str, new: str) -> Edit:
    return lambda line: re.sub(pattern, new, line, count=1) if re.search(pattern, line) else None


def _other_swizzle(line: str) -> str | None:
    """Of a wgmma's matrix descriptor: its two highest bits."""
    if not (m := re.search(r"(or\.b64\s+%rd\d+, %rd\d+, )(-?\d{19});", line)):
        return None
    bits = (int(m[2]) & (2**64 - 1)) ^ (1 << 62)
    return f"{line[: m.start()]}{m[1]}{bits - 2**64 if bits >> 63 else bits};"


@dataclass(frozen=True)
class Mutation:
    """``guarded``: only where the guard kept a lane from the access; ``nan``: in the subjects with
    one; ``share``: of the lines that it must be noticed in, as measured, rounded down."""

    edit: Edit
    archs: tuple[int, ...] = (80, 90, 100)
    guarded: bool = False
    nan: bool = False
    share: float = 1.0


_FRAGMENTS = r"\{ (%r\d+), (%r\d+), ([^}]*) \}, \{ (%r\d+), (%r\d+) \}"
MUTATIONS = {
    "no barrier": Mutation(drop(r"^\s*bar\.sync"), share=0.8),
    "no wait for cp.async": Mutation(drop(r"cp\.async\.wait_group"), share=0.9),
    "no store to shared memory": Mutation(drop(r"^\s*st\.shared"), share=0.95),
    "no mask of a load": Mutation(
        swap(r"^(\s*)@%p\d+ (ld\.global)", r"\1\2"), guarded=True, share=0.8
    ),
    "no mask of a store": Mutation(
        swap(r"^(\s*)@%p\d+ (st\.global)", r"\1\2"), guarded=True, share=0.95
    ),
    "load 4 bytes further": Mutation(swap(r"(ld\.global.*\+) 0 \]", r"\1 4 ]"), share=0.95),
    "shared load 2 bytes further": Mutation(swap(r"(ld\.shared\.\S*b32.*\[%r\d+)\]", r"\1+2]")),
    "exchanged registers of an mma": Mutation(
        swap(r"(mma\.sync.*)" + _FRAGMENTS, r"\1{ \3, \2, \4 }, { \5, \6 }"), archs=(80,)
    ),
    "every CTA is the first": Mutation(
        swap(r"mov\.u32 (\s*%r\d+), %ctaid\.x", r"mov.b32 \1, 0"), share=0.95
    ),
    "fp16 for bf16": Mutation(swap(r"cvt\.rn\.bf16x2", "cvt.rn.f16x2"), share=0.95),
    "NaN dropped by a maximum": Mutation(
        swap(r"(max|min)\.NaN\.f32", r"\1.f32"), nan=True, share=0.85
    ),
    "no fence before wgmma": Mutation(drop(r"fence\.proxy"), archs=(90, 100), share=0.65),
    "no wait for wgmma": Mutation(drop(r"wgmma\.wait_group"), archs=(90,), share=0.95),
    "no wait for an mbarrier": Mutation(drop(r"@!complete bra"), archs=(90, 100)),
    "no wait for tensor memory": Mutation(drop(r"tcgen05\.wait"), archs=(100,)),
    "another column": Mutation(swap(r"(tcgen05\.ld.*) \+ 0\]", r"\1 + 1]"), archs=(100,)),
    "another swizzle": Mutation(_other_swizzle, archs=(90,), share=0.9),
}


@dataclass(frozen=True)
class Subject:
    """A row of the op suite at an edge, in bf16; with ``value``, a NaN or an infinity, in its first
    tensor: then those of the result are compared."""

    row: str
    edge: str = ""
    value: float | None = None

    def run(self) -> None:
        row = ROWS[self.row]
        sizes = (ONE | row.edges | row.tiles)[self.edge] if self.edge else None
        case = make(row, torch.bfloat16, edge=sizes)
        with use_backend("triton", strict=True):
            if self.value is None:
                return check_parity(case)
            tensors = list(case.tensors.values())
            flat, n = tensors[0].view(-1), tensors[0].numel()
            for at in (n // 5, n // 2, n // 2 + n // 13, n // 2 + n // 9):
                flat[at] = self.value
            with poison_empty():
                found = case(*tensors)
            with use_backend("reference"):
                expected = case(*tensors)
        for a, b in zip(found, expected):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())


# One pixel, and with it one row of every tensor: what a mask does not keep is beyond its end.
ONE = {"one": dict(B=1, F=1, H=1, W=1), "frames": dict(B=1, F=5, H=1, W=1, A=1)}
SUBJECTS = (
    *(
        Subject(f"norm_act/{kind}", edge)
        for kind in ("group", "layer", "rms")
        for edge in ("one", "")
    ),
    Subject("norm_act/group", "l0"),
    Subject("norm_act/group", "small"),
    Subject("norm_act/group_pair"),
    Subject("norm_act/layer_pair", "one"),
    Subject("norm_act/rms_x_bias", "one"),
    Subject("space_conv/plain", "one"),
    Subject("space_conv/plain", "64"),
    Subject("axis_attention/all"),
    Subject("axis_attention/all", "frames"),
    Subject("axis_attention/long"),
    Subject("axis_attention/long", "focus_mask"),
    Subject("axis_attention/long_space", "8x9x64"),
    Subject("temporal_block/masks"),
    Subject("temporal_block/masks", "focus"),
    Subject("temporal_block/bias", "one_frame"),
    Subject("temporal_block/bias", "wide"),
    Subject("temporal_block/shaw"),
    Subject("linear_attention/linear_attention", "one_pixel"),
    Subject("linear_attention/linear_attention", "two_tiles"),
    Subject("linear_attention_block/block", "two_tiles"),
    Subject("linear_attention_block/block", "l1"),
    Subject("linear_residual/linear_residual", "one_row"),
    Subject("linear_residual/linear_residual", "l1"),
    Subject("guidance/seed", "one_frame"),
    Subject("guidance/seed", "clip"),
    Subject("guidance/seed", "clip", math.nan),
    Subject("guidance/update", "one_frame"),
    Subject("guidance/update", "clip", math.nan),
    Subject("norm_act/rms", "", math.nan),
    Subject("linear_attention/linear_attention", "", math.nan),
)

# What the gate compiles anyway.
FEW = tuple(
    s for s in SUBJECTS if s.edge in ("64", "8x9x64") or s.value or s.row == "norm_act/layer"
)

Place = tuple[Subject, str, int]  # a line of the PTX of a kernel


def places(mutation: Mutation, arch: int, subjects: Sequence[Subject]) -> dict[str, list[Place]]:
    """By kernel and line of its source: where the edit applies and, by its guard, matters; first
    where the guard kept most lanes."""
    found: dict[str, list[tuple[int, Place]]] = {}
    for subject in subjects:
        if mutation.nan != (subject.value is not None):
            continue
        with emulate(arch) as emulator:
            torch.manual_seed(0)
            subject.run()
        assert not emulator.bad(), f"{subject}: {emulator.bad()[0]}"
        for launch in emulator.launches:
            program = launch.program
            for pc, line in enumerate(program.lines[:-1]):
                text, statistics = program.text[line - 1], launch.statistics[pc]
                masked = int(statistics["masked"]) if mutation.guarded else 0
                if not statistics["issued"] or (mutation.guarded and not masked):
                    continue
                if mutation.edit(text) not in (None, text):
                    at = f"{launch.kernel} {program.sites[pc]}"
                    place = (subject, launch.kernel, line - 1)
                    found.setdefault(at, []).append((-masked, place))
    return {at: [p for _, p in sorted(e, key=lambda e: e[0])] for at, e in found.items()}


def _run(subject: Subject, arch: int, mutate: Callable[[str, str], str] | None) -> set:
    with emulate(arch, mutate=mutate) as emulator:
        torch.manual_seed(0)
        subject.run()
    return {(f.kernel, f.kind) for f in emulator.findings}


def noticed(mutation: Mutation, arch: int, place: Place) -> bool:
    """Whether that one edit shows in the numbers, or in a finding of any kind that is new."""
    subject, kernel, at = place

    def broken(name: str, ptx: str) -> str:
        text = ptx.splitlines()
        if name == kernel and at < len(text) and (new := mutation.edit(text[at])) is not None:
            text[at] = new
        return "\n".join(text)

    try:
        return not _run(subject, arch, broken) <= _run(subject, arch, None)
    except Exception:  # wrong numbers, or code that the decoder refuses
        return True


def missed(mutation: Mutation, arch: int, tries: int) -> tuple[list[str], int]:
    """The lines at which none of so many places was noticed, and how many there are."""
    found = places(mutation, arch, SUBJECTS)
    silent = []
    for at, everywhere in found.items():
        spread = everywhere[:: max(1, len(everywhere) // tries)][:tries]
        if not any(noticed(mutation, arch, p) for p in [*everywhere[:tries], *spread]):
            silent.append(at)
    return silent, len(found)

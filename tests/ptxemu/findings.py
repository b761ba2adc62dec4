"""The findings that the engine reports."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .program import Program

# As in engine/layout.h.
KINDS = {
    1: "out of bounds (global)",
    2: "outside the tensor's view, inside its storage",
    3: "misaligned access",
    4: "outside shared or local memory",
    5: "uninitialised value used",
    6: "race in shared memory",
    7: "lanes of a warp not synchronised (shared)",
    8: "race in global memory within a CTA",
    9: "race in global memory between CTAs",
    10: "access to data in flight (cp.async, TMA, wgmma)",
    11: "generic write not fenced for the async proxy",
    12: "register of a wgmma in flight",
    13: "divergence",
    14: "deadlock",
    15: "unsupported by the emulator",
    16: "mbarrier misused",
    17: "same value written by several threads",
    18: "descriptor that the driver would refuse",
    19: "operand register of a wgmma in flight overwritten",
    20: "cp.async to wgmma without a proxy fence",
}
# What Triton 3.6 writes for every kernel of that form, and what is harmless: see README.md.
HARMLESS = {7, 17, 19, 20}
REFUSED = 18


@dataclass(frozen=True)
class Finding:
    kernel: str
    kind: int
    count: int
    text: str

    def __str__(self) -> str:
        return f"{self.kernel}: {KINDS[self.kind]} (x{self.count})\n    {self.text}"


def describe(report: np.void, program: Program, allocations: np.ndarray) -> str:
    """Where, by PTX and source line, and at what distance from which tensor."""
    kind, pc2, address = (int(report[n]) for n in ("kind", "pc2", "address"))
    text = f"CTA {report['cta']}, warp {report['warp']}, lane {report['lane']}; "
    text += program.where(int(report["pc"]))
    if pc2 >= 0:
        text += f"\n    with {program.where(pc2)}"
    if kind in (1, 2, 3) and len(allocations):
        starts, ends = allocations["base"], allocations["base"] + allocations["size"]
        distance = [min(abs(int(s) - address), abs(int(e) - address)) for s, e in zip(starts, ends)]
        near = allocations[int(np.argmin(distance))]
        at = f"{address - int(near['base'])} bytes into an allocation of {int(near['size'])}"
        return f"{text}\n    address is {at}; info {int(report['info']):#x}"
    if kind in (12, 19) or (kind == 5 and pc2 == -3):
        return f"{text}\n    register {program.registers[address]}"
    return f"{text}\n    address {address}, info {int(report['info'])}"

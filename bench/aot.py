"""What the launches of the table of calls compile to, without a GPU: ``python bench/aot.py``.

Each kernel that bench/calls.py launches is compiled for sm_80, sm_90 and sm_100, as its launcher
starts it there. The table shows registers, spills, shared memory, occupancy and the matrix
instruction; ``--json`` prints the same for the tests. Compiler and cuobjdump ship in Triton's
wheel. Must run without TRITON_INTERPRET: under it there are no JIT functions to compile.
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
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calls import by_name, classes, edges, networks
from launches import Launch, captured, compiled, lowered

from fastvdm.runtime.device import A100, B200, H100

GPUS = {80: A100, 90: H100, 100: B200}

# Bytes that ptxas spills, by launch and architecture: they may only fall, and none may be added.
KNOWN_SPILLS = {
    ("space_conv.conv/conv 4x64x64 c100 8x32", 100): 8,
}

# Per multiprocessor: largest shared memory of a block, of all blocks, warps. CUDA C++ Programming
# Guide, table "Technical Specifications per Compute Capability"; a block reserves 1 KiB more.
_LIMITS = {80: (163, 164, 64), 90: (227, 228, 64), 100: (227, 228, 64)}
_REGISTERS = 65536
_MINMAX = re.compile(r"\s+(?:@!?%p\d+ )?((?:max|min)\.[\w.]*?(?:f16|f16x2|bf16|bf16x2|f32))\s")
_HELPERS = ("standard.py", "common.py")  # a minimum is told by the line that asks for it
_MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
# A product that the matrix cores are to do: fp32 as it is ("ieee") goes to the plain ones.
_DOT = re.compile(r"tt\.dot .*(?:tf32x3|xb?f16> \*)")


@dataclass(frozen=True)
class AotResult:
    """What the compiler made of a launch. shared and spills in bytes; blocks is the occupancy in
    thread blocks per multiprocessor, warps the same in warps; minmax as the function of that name
    finds them. Of one that was only lowered there is no more than the error."""

    name: str
    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    blocks: int = 0
    warps: int = 0
    matrix: str = ""
    tma: bool = False
    uses_dot: bool = False
    uses_tma: bool = False
    minmax: Sequence[tuple[str, str]] = ()
    error: str = ""
    lowered: bool = False

    @property
    def kernel(self) -> str:
        return self.name.split("/")[0]

    def faults(self) -> list[str]:
        """What is wrong with it; empty when it may ship."""
        if self.error or self.lowered:
            return [self.error] if self.error else []
        found = []
        limit, known = _LIMITS[self.arch][0] * 1024, KNOWN_SPILLS.get((self.name, self.arch), 0)
        if self.spills > known:
            found.append(f"{self.spills} bytes of spills" + (f", not {known}" if known else ""))
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, limit {limit}")
        if self.uses_dot and not self.matrix:
            found.append("a dot without a matrix instruction")
        if self.uses_tma and not self.tma:
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


def measure(launch: Launch, **options: Any) -> AotResult:
    """Compile one launch; a compiler error becomes ``AotResult.error``."""
    try:
        made = compiled(launch, **options)
        ptx, arch = made.asm["ptx"], launch.arch
        registers, spills = _resources(made.asm["cubin"], ptx, arch)
    except Exception as error:
        return _refused(launch, error)
    shared, num_warps = made.metadata.shared, made.metadata.num_warps
    blocks = occupancy(arch, registers, shared, num_warps)
    return AotResult(
        launch.name,
        arch,
        registers,
        spills,
        shared,
        blocks,
        blocks * num_warps,
        matrix=next((m for m in _MATRIX if m in ptx), ""),
        tma="cp.async.bulk.tensor" in ptx,
        uses_dot=_DOT.search(made.asm["ttir"]) is not None,
        uses_tma=launch.uses_tma,
        minmax=minmax(ptx),
    )


def lower(launch: Launch) -> AotResult:
    """The front end alone."""
    try:
        lowered(launch)
    except Exception as error:
        return _refused(launch, error)
    return AotResult(launch.name, launch.arch, lowered=True)


def _refused(launch: Launch, error: Exception) -> AotResult:
    """Whatever the compiler throws is the finding."""
    text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"[-600:]
    return AotResult(launch.name, launch.arch, error=text)


def heaviest(results: Sequence[AotResult]) -> set[str]:
    """Names of the launches with most registers of each kernel, with and without matrix
    instructions: what another architecture would refuse first."""
    found: dict[tuple[str, bool], AotResult] = {}
    for r in results:
        most = found.setdefault((r.kernel, r.uses_dot), r)
        if r.registers > most.registers:
            found[r.kernel, r.uses_dot] = r
    return {r.name for r in found.values()}


def table(results: Sequence[AotResult]) -> str:
    head = ("kernel", "sm", "registers", "spills", "shared", "blocks", "warps", "matrix", "tma", "")
    rows = [head] + [
        (r.name, str(r.arch), str(r.registers), str(r.spills), str(r.shared), str(r.blocks))
        + (str(r.warps), r.matrix or "-", "yes" if r.tma else "-", "; ".join(r.faults()))
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


Job = tuple[Callable[[Launch], AotResult], Launch]


def _do(job: Job) -> AotResult:
    return job[0](job[1])


def run(jobs: Sequence[Job], processes: int) -> list[AotResult]:
    """The results, in order, of that many processes."""
    if processes == 1:
        return [_do(job) for job in jobs]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_do, jobs))


def report(archs: Sequence[int], wanted: tuple[str, ...], processes: int) -> list[AotResult]:
    """Every launch whose name starts with one of ``wanted``; the edges for one architecture."""
    jobs: list[Job] = []
    for arch in archs:
        table = [*networks(), *by_name(), *classes(), *(edges() if arch == 90 else ())]
        jobs += [(measure, m) for m in captured(table, GPUS[arch]) if m.name.startswith(wanted)]
    return run(jobs, processes)


def gate(processes: int) -> list[AotResult]:
    """What every change is held to: the launches of the networks and one by name for sm_90, those
    of them with most registers of each kernel for the others, and the edges through Triton's front
    end."""
    table = [*networks(), by_name()[1]]
    jobs: list[Job] = [(measure, launch) for launch in captured(table, H100)]
    jobs += [(lower, launch) for launch in captured(edges(), H100)]
    results = run(jobs, processes)
    names = heaviest([r for r in results if not (r.lowered or r.error)])
    heavy = {(m.kernel, m.calls[0]) for _, m in jobs if m.name in names}
    jobs = []
    for gpu in (A100, B200):
        for m in captured(table, gpu):
            # A kernel of that architecture alone has nothing that stands for it.
            if any((m.kernel, c) in heavy for c in m.calls) or m.kernel not in {
                k for k, _ in heavy
            }:
                jobs.append((measure, m))
    return results + run(jobs, processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; exit status 1 when a launch may not ship."""
    parser = argparse.ArgumentParser(prog="python bench/aot.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="kernels by the start of their name; default: all")
    parser.add_argument("--arch", type=int, nargs="*", default=list(GPUS), choices=GPUS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="a list of objects, one per line")
    parser.add_argument("--gate", action="store_true", help=" ".join((gate.__doc__ or "").split()))
    args = parser.parse_args(argv)
    if args.gate:
        results = gate(args.jobs)
    else:
        results = report(args.arch, tuple(args.names) or ("",), args.jobs)
    if args.json:
        for r in results:
            print(json.dumps(dataclasses.asdict(r) | {"faults": r.faults()}))
    else:
        print(table(results))
    return 1 if any(r.faults() for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())

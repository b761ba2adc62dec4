"""What the launches of networks compile to, without a GPU: ``python bench/aot.py``.

Each kernel that a network launches (network_launches.py), and those that only options launch
(calls.py), is compiled for sm_80, sm_90 and sm_100 as its launcher would start it there. The table
shows registers, spills, local memory, shared memory, occupancy, the matrix instruction, advice of
ptxas, and products whose operands are overwritten while they run (sass.py). ``--json`` prints the
same for the tests. The tools are in Triton's wheel. It must run without TRITON_INTERPRET, under
which there are no JIT functions to compile.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import linecache
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calls import Call, by_name, classes, edges, networks
from launches import Launch, captured, compiled, lowered
from network_launches import network_calls, network_of
from sass import disassembled, exposed

from fastvdm.kernels.limits import RMS
from fastvdm.kernels.tuned import path_of
from fastvdm.runtime.device import A100, B200, H100, H200, Facts

GPUS = {80: A100, 90: H100, 100: B200}

# Bytes that ptxas spills, by kernel and network or call, and architecture; the most of several
# launches. They may only fall, and none may be added.
KNOWN_SPILLS = {
    ("axis_attention.short_bwd/t2v-128", 100): 12,  # in fp32, for which the preset is not made
    ("space_conv.conv/conv 4x64x64 c100 8x32", 100): 8,
}
# Advice of ptxas, in the same form.
KNOWN_ADVISORIES: dict[tuple[str, int], set[str]] = {}

# Per multiprocessor: largest shared memory of a block, of all blocks, warps. CUDA C++ Programming
# Guide, table "Technical Specifications per Compute Capability"; a block reserves 1 KiB more. An
# A100 has 163 KiB, but sm_86, sm_89 and sm_120, which get the same tiles, have 99.
_LIMITS = {80: (99, 164, 64), 90: (227, 228, 64), 100: (227, 228, 64)}
_REGISTERS, _MOST_REGISTERS = 65536, 255
_MINMAX = re.compile(r"\s+(?:@!?%p\d+ )?((?:max|min)\.[\w.]*?(?:f16|f16x2|bf16|bf16x2|f32))\s")
_HELPERS = ("standard.py", "common.py")  # a minimum is identified by the line that calls these
_COUNTED = ("error", "spills", "stack", "advisories", "exposed")
_MATRIX = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
_OPERANDS_IN_REGISTERS = re.compile(r"wgmma\.mma_async[^;]*\},\s*\{")
# A product for the matrix cores; unsplit fp32 ("ieee") goes to the plain cores.
_DOT = re.compile(r"tt\.dot .*(?:tf32x3|xb?f16> \*)")


@dataclass(frozen=True)
class AotResult:
    """What the compiler made of a launch. spills, stack and shared are in bytes, stack without the
    arrays of cos and sin. blocks is the occupancy in thread blocks per multiprocessor, warps the
    same in warps. advisories are numbers of ptxas, exposed is as ``sass.exposed`` finds it, minmax
    as the function of that name does. calls are all calls that make the launch. A launch that was
    only lowered has no more than its error."""

    name: str
    arch: int
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    blocks: int = 0
    warps: int = 0
    matrix: str = ""
    tma: bool = False
    uses_dot: bool = False
    uses_tma: bool = False
    advisories: Sequence[str] = ()
    exposed: Sequence[str] = ()
    minmax: Sequence[tuple[str, str]] = ()
    calls: Sequence[str] = ()
    error: str = ""
    lowered: bool = False

    @property
    def kernel(self) -> str:
        return self.name.split("/")[0]

    @property
    def places(self) -> list[tuple[str, int]]:
        """The names that the tables above may use for it, the preferred one first."""
        calls = self.calls or [re.sub(r" #\d+$", "", self.name).partition("/")[2]]
        return [(f"{self.kernel}/{network_of(call) or call}", self.arch) for call in calls]

    @property
    def default(self) -> bool:
        """Whether a network launches it; for other launches advice of ptxas is ignored."""
        return any(map(network_of, self.calls))

    def faults(self) -> list[str]:
        """The reasons why it may not ship; empty if there are none."""
        if self.error or self.lowered:
            return [self.error] if self.error else []
        found = []
        limit = _LIMITS[self.arch][0] * 1024
        known = max(KNOWN_SPILLS.get(place, 0) for place in self.places)
        if self.spills > known:
            found.append(f"{self.spills} bytes of spills" + (f", not {known}" if known else ""))
        if self.stack and not self.spills:
            found.append(f"{self.stack} bytes of local memory")
        if self.default:
            advised = set[str]().union(*(KNOWN_ADVISORIES.get(p, ()) for p in self.places))
            if new := set(self.advisories) - advised:
                found.append(f"ptxas advises: {', '.join(sorted(new))}")
        found += self.exposed
        if self.registers > _MOST_REGISTERS:
            found.append(f"{self.registers} registers, limit {_MOST_REGISTERS}")
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
    """Thread blocks per multiprocessor. Registers are allocated per warp in units of 256."""
    _, total, max_warps = _LIMITS[arch]
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = _REGISTERS // per_warp // num_warps
    by_shared = total * 1024 // (shared + 1024)
    return min(by_registers, by_shared, max_warps // num_warps, 32)


@dataclass(frozen=True)
class Assembly:
    """The output of ptxas -v for one kernel, in registers per thread and bytes."""

    registers: int
    stack: int
    spills: int
    advisories: tuple[str, ...]

    @classmethod
    def read(cls, log: str) -> Assembly:
        """Raises ValueError if the log is incomplete."""
        registers = re.search(r"Used (\d+) registers", log)
        stack = re.search(r"(\d+) bytes stack frame", log)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
        if registers is None or stack is None or not spills:
            raise ValueError(f"not the log of ptxas -v: {log[:200]!r}")
        advisories = tuple(sorted(set(re.findall(r"\((C751\d)\)", log))))
        return cls(int(registers[1]), int(stack[1]), sum(map(int, spills)), advisories)


def trigonometric(ptx: str) -> int:
    """Bytes of local memory for the arrays with which cos and sin of large angles are computed, if
    a kernel has their table of 2/pi. A frame is a multiple of 8."""
    if "__cudart_i2opi" not in ptx:
        return 0
    return sum(
        -(-int(n) // 8) * 8 for n in re.findall(r"\.local \.align \d+ \.b8\s+\S+\[(\d+)\]", ptx)
    )


def minmax(ptx: str) -> tuple[tuple[str, str], ...]:
    """(instruction, source line) of each floating-point minimum and maximum, each pair once.

    Without .NaN they return the operand that is a number (PTX ISA, "max"), so a NaN is lost. No run
    under the interpreter shows this, because NumPy keeps NaN. fp64 is excluded: it has no .NaN, and
    a select follows where NaN must be kept.
    """
    folder = Path(importlib.import_module("fastvdm.kernels").__path__[0])
    # Sites are named without their folder; two files shared.py never occur in one PTX. Entries of
    # Triton's cache may come from another checkout, so the file is looked up in this one.
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
        found = Assembly.read(made.metadata.ptxas_log)
        ptx, arch = made.asm["ptx"], launch.arch
        risky = _OPERANDS_IN_REGISTERS.search(ptx) is not None
        overwritten = exposed(disassembled(made.asm["cubin"])) if risky else []
    except Exception as error:
        return _refused(launch, error)
    shared, num_warps = made.metadata.shared, made.metadata.num_warps
    blocks = occupancy(arch, found.registers, shared, num_warps)
    return AotResult(
        launch.name,
        arch,
        found.registers,
        found.spills,
        max(0, found.stack - trigonometric(ptx)),
        shared,
        blocks,
        blocks * num_warps,
        matrix=next((m for m in _MATRIX if m in ptx), ""),
        tma="cp.async.bulk.tensor" in ptx,
        uses_dot=_DOT.search(made.asm["ttir"]) is not None,
        uses_tma=launch.uses_tma,
        advisories=found.advisories,
        exposed=overwritten,
        minmax=minmax(ptx),
        calls=launch.calls,
    )


def lower(launch: Launch) -> AotResult:
    """Run only the front end."""
    try:
        lowered(launch)
    except Exception as error:
        return _refused(launch, error)
    return AotResult(launch.name, launch.arch, lowered=True)


def _refused(launch: Launch, error: Exception) -> AotResult:
    """Any error of the compiler is the result."""
    text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"[-600:]
    return AotResult(launch.name, launch.arch, error=text)


def heaviest(results: Sequence[AotResult]) -> set[str]:
    """Names of the launches with the most registers per kernel, with and without matrix
    instructions; another architecture would refuse these first."""
    found: dict[tuple[str, bool], AotResult] = {}
    for r in results:
        most = found.setdefault((r.kernel, r.uses_dot), r)
        if r.registers > most.registers:
            found[r.kernel, r.uses_dot] = r
    return {r.name for r in found.values()}


def table(results: Sequence[AotResult]) -> str:
    words = [
        "kernel",
        "sm",
        "registers",
        "spills",
        "stack",
        "shared",
        "blocks",
        "warps",
        "matrix",
        "tma",
        "advice",
        "exposed",
    ]
    rows = [(*words, "")] + [
        (r.name, *map(str, (r.arch, r.registers, r.spills, r.stack, r.shared, r.blocks, r.warps)))
        + (r.matrix or "-", "yes" if r.tma else "-", "+".join(r.advisories) or "-")
        + (str(len(r.exposed)), "; ".join(r.faults()))
        for r in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(words) + 1)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows)


def summary(results: Sequence[AotResult]) -> str:
    """For each architecture the number of launches and of faulty ones; then the number of launches
    of each network."""
    found = []
    for arch in sorted({r.arch for r in results}):
        mine = [r for r in results if r.arch == arch and not r.lowered]
        count = {w: sum(bool(getattr(r, w)) for r in mine) for w in _COUNTED}
        found.append(
            f"sm_{arch}: {len(mine)} launches; " + ", ".join(f"{w} {n}" for w, n in count.items())
        )
        networks = Counter(n for r in mine for n in {network_of(c) for c in r.calls} - {None})
        found += [f"  {name}: {n}" for name, n in networks.items()]
    return "\n".join(found)


Job = tuple[Callable[[Launch], AotResult], Launch]


def _do(job: Job) -> AotResult:
    return job[0](job[1])


def run(jobs: Sequence[Job], processes: int) -> list[AotResult]:
    """The results, in order, computed by that many processes."""
    if processes == 1:
        return [_do(job) for job in jobs]
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(_do, jobs))


def report(
    gpus: Sequence[Facts], wanted: tuple[str, ...], processes: int, measured: bool = False
) -> list[AotResult]:
    """Every launch whose name starts with one of ``wanted``; the edges for one architecture."""
    jobs: list[Job] = []
    for gpu in gpus:
        table = [*network_calls(), *networks(), *by_name(), *classes()]
        table += edges() if gpu.capability == 90 else []
        found = captured(table, gpu, measured=measured)
        jobs += [(measure, m) for m in found if m.name.startswith(wanted)]
    return run(jobs, processes)


def gated() -> list[Call]:
    """The networks that represent all others in the tests, calls that only options of a guided
    step launch, one of the peer's norms, and a convolution by name."""
    return [
        *network_calls("UNet3D(64)", dtypes=("bf16",)),
        *network_calls("UNet3D(64)", dtypes=("autocast",), ways=("train",)),
        *network_calls("ucf101", dtypes=("bf16",), ways=("guided",)),
        *(c for c in networks() if c.name.startswith(("guided", f"norm l0 kind={RMS}"))),
        by_name()[1],
    ]


def gate(processes: int) -> list[AotResult]:
    """Check what every change must pass. For sm_90: the launches of UNet3D(64) in bf16 and in
    training under autocast, those of a guided step of ucf101, and a few calls. For the other
    architectures: those with the most registers of each kernel. The edges are checked in Triton's
    front end only. Launches that differ only in the specialisation of integers are checked once."""
    first = {m.apart_from_integers: m for m in reversed(captured(gated(), H100))}
    jobs: list[Job] = [(measure, launch) for launch in reversed(first.values())]
    jobs += [(lower, launch) for launch in captured(edges(), H100)]
    results = run(jobs, processes)
    names = heaviest([r for r in results if not (r.lowered or r.error)])
    jobs = []
    for gpu in (A100, B200):
        found = captured(gated(), gpu)
        same = {m.kernel for m in found if m.name in names}
        for m in found:
            # If none has the name, the kernel's first launch represents it.
            if m.name in names or m.kernel not in same:
                jobs.append((measure, m))
                same.add(m.kernel)
    return results + run(jobs, processes)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a launch may not ship."""
    parser = argparse.ArgumentParser(prog="python bench/aot.py", description=__doc__)
    parser.add_argument("names", nargs="*", help="kernels by the start of their name; default: all")
    parser.add_argument("--arch", type=int, nargs="*", default=list(GPUS), choices=GPUS)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", action="store_true", help="a list of objects, one per line")
    measured = "with what was measured: on the GPUs that have a file in kernels/configs"
    parser.add_argument("--measured", action="store_true", help=measured)
    parser.add_argument("--gate", action="store_true", help=" ".join((gate.__doc__ or "").split()))
    args = parser.parse_args(argv)
    if args.gate:
        results = gate(args.jobs)
    else:
        gpus = [GPUS[arch] for arch in args.arch]
        if args.measured:
            gpus = [g for g in (A100, H100, H200, B200) if path_of(g.name).exists()]
            if not gpus:
                parser.error("kernels/configs has no file of an A100, H100, H200 or B200")
        results = report(gpus, tuple(args.names) or ("",), args.jobs, args.measured)
    if args.json:
        for r in results:
            print(json.dumps(dataclasses.asdict(r) | {"faults": r.faults()}))
    else:
        print(table(results))
        print(summary(results))
    return 1 if any(r.faults() for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())

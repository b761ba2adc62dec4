"""What the tests ran: python tests/ptxemu/report.py [--masks]

A table of kernel x architecture with tests, launches, CTAs, instructions of warps and findings by
dtype; with ``--masks`` the masks of kernels that kept no lane from an access in any test.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .emulator import Emulator

FOLDER = Path(__file__).resolve().parents[2] / "build" / "ptxemu"
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def record(test: str, emulator: Emulator) -> None:
    """A line of what a test launched. Workers append to one file."""
    if not emulator.launches:
        return
    kernels: dict[str, dict] = {}
    for launch in emulator.launches:
        op = re.search(r"/kernels/(\w+)", launch.program.file)
        name = launch.kernel.strip("_").removesuffix("_kernel")
        seen = kernels.setdefault(
            f"{op[1]}.{name}" if op else name,
            dict(launches=0, ctas=0, instructions=0, seconds=0.0, masks={}),
        )
        seen["launches"] += 1
        seen["ctas"] += launch.ran
        seen["instructions"] += int(launch.statistics["issued"].sum())
        seen["seconds"] += launch.seconds
        for pc, guard in enumerate(launch.program.code["guard_offset"]):
            opcode = launch.program.opcodes[pc]
            if guard >= 0 and re.match(r"(ld|st)\.global|cp\.async\.c", opcode):
                masks = seen["masks"]
                site = launch.program.sites[pc]
                masks[site] = masks.get(site, 0) + int(launch.statistics[pc]["masked"])
    findings = Counter(f.kind for f in emulator.findings)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / f"{emulator.arch}.jsonl").open("a", encoding="utf-8") as sink:
        sink.write(json.dumps(dict(test=test, kernels=kernels, findings=findings)) + "\n")


def dtype_of(test: str) -> str:
    return next((short for name, short in DTYPES.items() if f"-{name}-" in test), "other")


def table(archs: list[str]) -> str:
    """Rows of op and kernel; tests by dtype and architecture."""
    columns = [f"{d} sm_{a}" for a in archs for d in (*DTYPES.values(), "other")]
    tests: dict[str, Counter] = defaultdict(Counter)
    totals: dict[str, Counter] = defaultdict(Counter)
    for arch in archs:
        for line in lines(arch):
            for kernel, seen in line["kernels"].items():
                tests[kernel][f"{dtype_of(line['test'])} sm_{arch}"] += 1
                for what in ("launches", "ctas", "instructions", "seconds"):
                    totals[kernel][what] += seen[what]
    head = ["kernel", *columns, "launches", "CTAs", "10^6 instr.", "s"]
    rows = [head]
    for kernel in sorted(tests):
        sums = totals[kernel]
        cells = [str(tests[kernel][c] or "-") for c in columns]
        cells += [str(sums["launches"]), str(sums["ctas"])]
        rows.append([kernel, *cells, f"{sums['instructions'] / 1e6:.1f}", f"{sums['seconds']:.1f}"])
    return "\n".join(
        "| " + " | ".join(row) + " |" + ("\n|" + "---|" * len(row)) * (row is head) for row in rows
    )


def idle_masks(archs: list[str]) -> list[str]:
    """Accesses whose mask kept no lane from them in any test: shapes are missing."""
    kept: dict[str, int] = defaultdict(int)
    for arch in archs:
        for line in lines(arch):
            for kernel, seen in line["kernels"].items():
                for site, masked in seen["masks"].items():
                    kept[f"{kernel} {site}"] += masked
    return sorted(at for at, masked in kept.items() if not masked)


def lines(arch: str) -> list[dict]:
    path = FOLDER / f"{arch}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--masks", action="store_true")
    args = parser.parse_args()
    archs = sorted(p.stem for p in FOLDER.glob("*.jsonl"))
    print(table(archs))
    if args.masks:
        print("", "Masks that kept no lane:", *idle_masks(archs), sep="\n")


if __name__ == "__main__":
    main()

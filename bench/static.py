"""How fast the kernels and networks can be on a GPU, by counting, without a GPU.

    python bench/static.py [--networks | --kernels] [--update]

Kernels: SASS instructions of the inner loop as launched (sm_90), registers, spills, warps per
multiprocessor. "cycles" are issue cycles: instructions x warps / 4 schedulers, over the items of a
tile. No kernel can be faster; latency and occupancy add to it. Networks: the launches of a forward
and the bytes they move (walk.py), the roofline time on an H200, the same for the least that each op
must move (floor.py), and the host's time (host.py), the only one that depends on the machine.

``bench/static.json`` has the last counts; a test refuses counts more than 5 % above them.
``--update`` writes it, and ``bench/results/static.md`` with the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aot import Assembly, occupancy
from calls import PEERS, SHAPES, SHAW, Call, _call, attention, conv, linear_block, norm, temporal
from floor import network_costs
from host import host_ms
from launches import Launch, captured, compiled
from network_launches import NETS, Case
from sass import counted, disassembled, loops, parsed
from walk import Work, walk

from fastvdm.kernels.limits import GROUP, SPACE, TIME
from fastvdm.runtime.device import H100

ROOT = Path(__file__).resolve().parents[1]
KNOWN, REPORT = ROOT / "bench" / "static.json", ROOT / "bench" / "results" / "static.md"
MARGIN = 1.05

# A copy and a product reach this much of the data sheet's 4.8 TB/s and 989 TFLOP/s.
BANDWIDTH, RATE = 4.3e12, 790e12  # bytes and bf16 FLOP a second, H200

Constants = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A kernel of a call. ``items``: number per tile, from the kernel's constants; ``trips``: of
    the loops inside the longest one, the longest first; ``cycles``: whether to multiply by
    warps / 4."""

    name: str
    call: Call
    kernel: str
    unit: str
    items: Callable[[Constants], float]
    trips: tuple[int, ...] = ()
    cycles: bool = True
    innermost: bool = False  # take the shortest of the loops with products, not the longest loop


@dataclass(frozen=True)
class Count:
    count: float
    unit: str
    barriers: int  # in the loop
    registers: int
    spills: int
    warps: int  # per multiprocessor


def _values(c: Constants) -> float:
    """Values per thread, in units of 16."""
    return c["BLOCK_L"] * c["BLOCK_C"] / (32 * c["num_warps"]) / 16


def rows() -> list[Row]:
    def group(case: str, **options: Any) -> Call:
        return _call(norm, case, kind=GROUP, **options)

    values, pixel, sequence = "instructions / 16 values", "cycles / pixel", "cycles / sequence"
    tile, step = "cycles / 128 x 64 scores", "instructions / step"
    odd = replace(SHAPES["ucf-16"], frames=15, batch=8)
    many = replace(SHAPES["ucf-32"], batch=8)
    scores = lambda c: c["BM"] * c["BN"] / (128 * 64)  # noqa: E731
    one = lambda c: 1.0  # noqa: E731
    p = lambda c: c["P"]  # noqa: E731
    found = [
        Row("norm apply", group("l0"), "norm_act.group_fwd", values, _values, cycles=False),
        Row("norm backward, sums", group("l0", backward=True), "norm_act.group_bwd_sums", values,
            _values, cycles=False),
        Row("norm backward, dx", group("l0", backward=True), "norm_act.group_bwd_dx", values,
            _values, cycles=False),
        Row("norm statistics", group("l0"), "norm_act.stats", values, _values, cycles=False),
        Row("temporal block", _call(temporal, "l0"), "temporal_block.fwd", pixel, p, (8,)),
    ]  # fmt: skip
    for frozen in (True, False):
        call = _call(temporal, "l0", backward=True, frozen=frozen)
        name = f"temporal block backward, {'frozen' if frozen else 'trained'}"
        found.append(Row(name, call, "temporal_block.bwd", pixel, p, (8, 12)))
    for name, shape in (("16 frames", "ucf-16"), ("15 frames", odd)):
        call = _call(attention, shape, axis=TIME, given=SHAW, backward=True)
        found.append(
            Row(f"attention with tables backward, {name}", call, "axis_attention.short_bwd",
                sequence, p)
        )  # fmt: skip
    call = _call(attention, "l3", axis=TIME, given=PEERS, backward=True)
    found.append(Row("attention over time backward", call, "axis_attention.short_bwd", sequence, p))
    for kernel in ("fwd", "bwd_dq", "bwd_dkv"):
        call = _call(attention, many, axis=SPACE, backward=kernel != "fwd")
        name = f"attention over space, {kernel.replace('bwd_', '')}"
        found.append(Row(name, call, f"axis_attention.long_{kernel}", tile, scores))
    call = _call(conv, "l1", bare=True)
    found.append(
        Row("3x3 by TMA", call, "space_conv.conv_tma", step, one, cycles=False, innermost=True)
    )
    part = lambda c: c["BN"] / 64 * c["BF"] / 256  # noqa: E731
    for kernel in ("sum", "apply", "dx"):
        call = _call(linear_block, "l0", backward=kernel == "dx")
        found.append(
            Row(f"linear attention block, {kernel}", call, f"linear_attention_block.{kernel}",
                "cycles / 64 pixels", part)
        )  # fmt: skip
    return found


def count(row: Row) -> Count:
    launch = next(m for m in captured([row.call], H100) if m.kernel == row.kernel)
    made = compiled(launch)
    said = Assembly.read(made.metadata.ptxas_log)
    text = disassembled(made.asm["cubin"])
    code, _ = parsed(text)
    nested = loops(text)
    if row.innermost:
        with_products = [n for n in nested if counted(code[n.start : n.stop])["HGMMA"]]
        nested = with_products[-1:]
    outer, inner = (nested[0], nested[1:]) if nested else (range(len(code)), [])
    total = len(outer)
    for loop, trips in zip(inner, row.trips):
        total += (trips - 1) * len(loop)
    warps = made.metadata.num_warps
    per_item = total / row.items(_constants(launch) | {"num_warps": warps})
    barriers = counted(code[outer.start : outer.stop])["BAR"]
    blocks = occupancy(90, said.registers, made.metadata.shared, warps)
    return Count(
        round(per_item * (warps / 4 if row.cycles else 1), 1), row.unit, barriers, said.registers,
        said.spills, blocks * warps,
    )  # fmt: skip


def _constants(launch: Launch) -> Constants:
    import importlib

    kernel = getattr(importlib.import_module(launch.module), launch.function)
    return {kernel.arg_names[place[0]]: value for place, value in launch.constants.items()}


@dataclass(frozen=True)
class Whole:
    """A network's forward in bf16, or a training step under autocast. ``kernels``: number of our
    kernels compiled for it. In milliseconds: ``roof`` is the roofline time of its launches,
    ``floor`` that of the ops of the forward (three times that in a training step)."""

    launches: int
    kernels: int
    megabytes: float
    gflop: float
    roof: float
    floor: float


def _at_roof(moved: float, flops: float) -> float:
    return 1e3 * max(moved / BANDWIDTH, flops / RATE)


def whole(name: str, batch: int, train: bool) -> tuple[Whole, list[Work]]:
    import torch

    net, dtype = NETS[name], "autocast" if train else "bf16"
    works = walk(net, batch, H100, dtype, train)
    with torch.device("meta"):
        model = net.make()
        x = torch.empty(batch, 3, net.frames, net.size, net.size)
        costs = network_costs(model, x, torch.empty(batch), torch.bfloat16)
    case = Case(net, dtype, batch)

    def run() -> None:
        case.run("train") if train else case.forward(nullcontext, lambda: None)

    made = Whole(
        launches=len(works),
        kernels=len(captured([Call(name, lambda _: run, torch.bfloat16)], H100)),
        megabytes=round(sum(w.bytes for w in works) / 1e6, 1),
        gflop=round(sum(w.flops for w in works) / 1e9, 1),
        roof=round(sum(_at_roof(w.bytes, w.flops) for w in works), 3),
        floor=round(sum(_at_roof(c.bytes, c.flops) for c in costs) * (3 if train else 1), 3),
    )
    return made, works


WHOLES = {
    f"{name}, batch {batch}{', training' if train else ''}": (name, batch, train)
    for train in (False, True)
    for name in ("UNet3D(64)", "ucf101")
    for batch in (1, 8)
}


# -- tables ----------------------------------------------------------------------------------------


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def kernel_table(found: dict[str, Count]) -> str:
    head = ["kernel", "count", "", "barriers", "registers", "spills", "warps"]
    body = [
        (name, c.count, c.unit, c.barriers, c.registers, c.spills, c.warps)
        for name, c in found.items()
    ]
    return _table(head, body)


def network_table(found: dict[str, Whole]) -> str:
    head = ["network", "launches", "kernels", "MB", "GFLOP", "ms at the roof", "floor, ms"]
    body = [
        (name, w.launches, w.kernels, w.megabytes, w.gflop, w.roof, w.floor)
        for name, w in found.items()
    ]
    return _table(head, body)


def roofline(works: Sequence[Work]) -> str:
    """By class of launch, the longest roofline time first."""
    classes: dict[str, list[Work]] = {}
    for w in works:
        classes.setdefault(w.kind, []).append(w)

    def time(found: list[Work]) -> float:
        return sum(_at_roof(w.bytes, w.flops) for w in found)

    body = [
        (
            kind, len(found), f"{sum(w.bytes for w in found) / 1e6:.0f}",
            f"{sum(w.flops for w in found) / 1e9:.0f}", f"{time(found):.3f}",
        )
        for kind, found in sorted(classes.items(), key=lambda item: -time(item[1]))
    ]  # fmt: skip
    return _table(["class", "launches", "MB", "GFLOP", "ms at the roof"], body)


# -- the bounds ------------------------------------------------------------------------------------


def worse(known: dict[str, dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """Counts more than 5 % above their bound, any increase of spills, fewer warps, and counts
    without a bound."""
    said = []
    for name, new in found.items():
        old = known.get(name)
        if old is None:
            said.append(f"{name}: no bound")
            continue
        for field, value in asdict(new).items():
            if field in ("unit", "floor", "gflop", "registers", "barriers"):
                continue
            bound = old[field]
            less = field == "warps" and value < bound / MARGIN
            more = field != "warps" and value > bound * (1 if field == "spills" else MARGIN)
            if less or more:
                said.append(f"{name}: {field} {value}, was {bound}")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; the exit status is 1 if a count is above its bound."""
    parser = argparse.ArgumentParser(prog="python bench/static.py", description=__doc__)
    parser.add_argument("--kernels", action="store_true", help="only these")
    parser.add_argument("--networks", action="store_true", help="only these")
    parser.add_argument("--update", action="store_true", help="write the bounds and the report")
    args = parser.parse_args(argv)
    both = args.kernels == args.networks
    found: dict[str, Any] = {}
    parts = ["# What can be counted without a GPU", f"sm_90, {_versions()}, bf16."]
    if both or args.kernels:
        kernels = {row.name: count(row) for row in rows()}
        parts += ["## Kernels", kernel_table(kernels)]
        found |= kernels
    if both or args.networks:
        wholes = {name: whole(*what) for name, what in WHOLES.items()}
        networks = {name: w for name, (w, _) in wholes.items()}
        found |= networks
        parts += ["## Networks", network_table(networks)]
        parts += [f"### {name}\n\n{roofline(works)}" for name, (_, works) in wholes.items()]
        host = [(name, f"{host_ms(NETS[name], H100):.1f}") for name in ("UNet3D(64)", "ucf101")]
        parts += ["## Host", _table(["forward, batch 1", "ms of one CPU thread"], host)]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if args.update:
        known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
        known |= {name: asdict(value) for name, value in found.items()}
        KNOWN.write_text(json.dumps(known, indent=1) + "\n")
        if both:
            REPORT.write_text(text)
        return 0
    said = worse(json.loads(KNOWN.read_text()), found)
    print("\n".join(said))
    return 1 if said else 0


def _versions() -> str:
    import torch
    import triton

    return f"torch {torch.__version__}, Triton {triton.__version__}"


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())

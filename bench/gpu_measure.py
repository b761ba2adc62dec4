"""``make gpu-measure``: the contests of bench/*_bench.py, the most important ones first.

Each item is a contest (harness.py): its providers are compared with the reference, then timed in
turns by events of the device. It reports medians, ratios, rates, and percentages of limits measured
on the same card. A provider that crashes the process is left out, and the rest of its contest runs
again. DIR also gets ``bench.json``, as pytest-benchmark writes it, ``RESULTS.md`` and a chart
(waterfall.py).
"""

from __future__ import annotations

import datetime
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from gpu_worker import Context, Item, note

DEVICE = "cuda"
TRAINED = ("peer", "peer-bf16", "torch-bf16", "fastvdm", "fastvdm-autocast", "fastvdm-bf16")
EAGER = ("peer", "peer-bf16", "torch", "torch-bf16", "fastvdm", "fastvdm-bf16")


@dataclass(frozen=True)
class Asked:
    """A contest and its providers (all by default); ``limit`` is that of an item."""

    bench: str
    case: str
    options: dict[str, Any]
    names: Sequence[str] = ()
    function: str = "contest"
    limit: float = 60.0
    operation: str = "forward"

    @property
    def group(self) -> str:
        train = self.options.get("train") or self.operation == "train"
        words = [v for k, v in self.options.items() if k != "train"]
        operation = "training" if train else self.operation
        return "-".join([self.bench, operation, self.case, *map(str, words)])


def asked() -> list[Asked]:
    """Networks, then ops, then what takes minutes to compile."""
    slow = {"limit": 140.0}

    def net(case: str, *names: str, train: bool = False, **how: Any) -> Asked:
        return Asked("unet", case, {}, names, operation="train" if train else "forward", **how)

    both: list[dict[str, Any]] = [{}, {"train": True}]
    found = [
        net("readme", *EAGER, "fastvdm-bf16-graph"),
        net("readme-1", *EAGER, "fastvdm-bf16-graph"),
        net("readme", *TRAINED, train=True, **slow),  # autocast has 41 kernels of its own
        net(
            "readme-1",
            "peer-bf16",
            "torch-bf16-compiled",
            "fastvdm-bf16",
            "fastvdm-bf16-compiled",
            "fastvdm-bf16-graph",
            **slow,
        ),
        Asked("guidance", "l0", {"checkpointing": "none"}, (), "steps_contest"),
        *(
            Asked("attention_block", "l0", {"core": c} | t)
            for c in ("time", "linear")
            for t in both
        ),
        *(Asked("axis_attention", "ucf-32", {"kind": "space"} | t) for t in both),
        *(Asked("axis_attention", "ucf-16", {"kind": "time+bias"} | t) for t in both),
        *(Asked("conv_group_norm", "l0", {"part": "norm"} | t) for t in both),
        *(Asked("linear_attention", "l0", t) for t in both),
        net("ucf101", "torch-bf16", "fastvdm-bf16", "fastvdm-bf16-graph", limit=100.0),
        net("dim-128", "peer-bf16", "torch-bf16", "fastvdm-bf16", "fastvdm-bf16-graph"),
        net("dim-128", "peer-bf16", "torch-bf16", "fastvdm-bf16", train=True),
        net("dim-256", "peer-bf16", "torch-bf16", "fastvdm-bf16", "fastvdm-bf16-graph"),
        net("dim-256", "peer-bf16", "torch-bf16", "fastvdm-bf16", train=True),
        net("readme-1", "peer-bf16", "torch-bf16", "fastvdm-bf16", train=True),
        *(Asked("conv_group_norm", "l0", {"part": p}) for p in ("fused", "block")),
        *(Asked("space_conv", "l1", {"kind": "3x3"} | t) for t in both),
        Asked("guidance", "l0", {}, (), "ends_contest", operation="ends"),
        Asked("guidance", "l0", {"checkpointing": "level"}, (), "steps_contest"),
    ]
    for case in ("l1", "l2", "l3"):
        found += [
            *(Asked("attention_block", case, {"core": c}) for c in ("time", "linear")),
            Asked("conv_group_norm", case, {"part": "norm"}),
            Asked("linear_attention", case, {}),
        ]
    for case in ("l2", "ucf-8", "ucf-16", "t2v128-32"):
        found += [
            Asked("axis_attention", case, {"kind": k} | t) for k in ("time", "space") for t in both
        ]
    found += [
        net("readme", "peer-bf16", "torch-bf16-compiled", "fastvdm-bf16-compiled", **slow),
        net("readme-1", "peer", "peer-compiled", "fastvdm", **slow),
        net("readme-1", "torch-bf16", "torch-bf16-autotuned", "fastvdm-bf16", **slow),
    ]  # fmt: skip
    return found


def prepare() -> None:
    import torch

    torch.backends.cudnn.benchmark = True  # give the baselines the best algorithm per shape


def facts(without: tuple[str, ...]) -> dict[str, Any]:
    from conftest import machine_info

    found = machine_info(DEVICE)
    said = [f"{v} {k.removeprefix('limit_')}" for k, v in found.items() if k.startswith("limit_")]
    return {"facts": found, "say": ", ".join([str(found["gpu"]), *said])}


def contest(one: Asked, without: tuple[str, ...]) -> dict[str, Any]:
    """Rows by provider, as in pytest-benchmark; providers that were not timed, and why."""
    import torch
    from harness import run_contest, summary

    torch.manual_seed(0)
    module = importlib.import_module(f"{one.bench}_bench")
    options = dict(one.options)
    if one.operation == "train":
        options["step"] = module.train
    made = getattr(module, one.function)(one.case, DEVICE, **options)
    names = [n for n in one.names or made.providers if n not in without]
    noted = {
        name: replace(p, build=lambda name=name, p=p: (note(name), p.build())[1])
        for name, p in made.providers.items()
    }
    made = replace(made, providers=noted)
    results = run_contest(made, names=names, budget=0.7, min_rounds=7, max_rounds=50)
    rows = [summary(made, results, n) for n, r in results.items() if r.times]
    for row in rows:
        row |= {"case": one.case, "operation": one.operation}
    absent = {n: r.skipped or r.failed for n, r in results.items() if not r.times}
    wrong = {n: r.failed for n, r in results.items() if r.failed}
    said = ", ".join(_short(row) for row in rows)
    record = {"rows": rows, "absent": absent, "say": said}
    if wrong:  # keep the figures of the others
        why = "; ".join(f"{n}: {w}" for n, w in wrong.items())
        return record | {"verdict": "failed", "why": why, "say": f"{said}; {why}"}
    return record


def _short(row: dict[str, Any]) -> str:
    ratio = f" {row['ratio']:.2f}x" if "ratio" in row else ""
    floor = f" {row['floor_pct']:.0f}%" if "floor_pct" in row else ""
    return f"{row['provider']} {row['median_ms']:.3g} ms{ratio}{floor}"


def items(context: Context) -> list[Item]:
    found, seen = [Item("facts/machine", facts)], dict[str, int]()
    for one in asked():
        seen[one.group] = seen.get(one.group, 0) + 1
        again = f" ({seen[one.group]})" if seen[one.group] > 1 else ""
        kind = "network" if one.bench == "unet" else "op"
        found.append(Item(f"{kind}/{one.group}{again}", partial(contest, one), one.limit))
    return found


def summary(context: Context, records: list[dict[str, Any]]) -> str:
    """The page of results; it is also written."""
    import waterfall

    machine = next((r["facts"] for r in records if "facts" in r), {})
    benchmarks = [
        {"group": r["item"].split("/", 1)[1], "extra_info": row}
        for r in records
        for row in r.get("rows", ())
    ]
    when = datetime.datetime.now().isoformat()
    data = {"machine_info": {"fastvdm": machine}, "datetime": when, "benchmarks": benchmarks}
    path, page = context.out / "bench.json", context.out / "RESULTS.md"
    path.write_text(json.dumps(data) + "\n", encoding="utf-8")
    runs = waterfall.load([path])
    page.write_text(waterfall.render(runs, page), encoding="utf-8")
    waterfall.write_charts(runs)
    lines = ["", "## Figures", ""]
    lines += [f"- {r['item']}: {r['say']}" for r in records if r.get("rows")]
    return "\n".join(lines) + "\n"

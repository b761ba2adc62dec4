"""``make gpu-tune``: bench/tune.py, starting with what takes most of a network's time.

An item consists of the calls of one op in one direction, whose candidates are compiled together.
Each outcome is written at once, to kernels/configs/<gpu>.json and DIR/<gpu>.json.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gpu_worker import Context, Item

DEVICE = "cuda"
LIMIT = 70.0
# The beginning and end of a call's name; the first match gives its turn.
ORDER = (
    ("temporal", "backward"), ("attention", "backward"), ("norm", "backward"), ("norm", ""),
    ("temporal", ""), ("linear", ""), ("linear", "backward"), ("attention", ""), ("conv", ""),
    ("", ""),
)  # fmt: skip
_answers: dict[Any, Any] = {}  # answers of this process, for later calls


def tuned_calls(context: Context, calls: list[Any], without: tuple[str, ...]) -> dict[str, Any]:
    import torch
    from tune import keeper, tune

    from fastvdm.kernels import tuned

    if context.dry:
        tuned.FOLDER = context.out / "configs"
    said: list[str] = []
    keep = keeper(torch.cuda.get_device_name(), context.out, said.append)
    report = tune(calls, keep, device=DEVICE, budget=LIMIT - 15.0, answers=_answers)
    record = {"found": said, "missed": report.missed, "say": "; ".join(said)}
    if report.failed:
        why = "; ".join(f"{name}: {what}" for name, what in report.failed.items())
        return record | {"verdict": "failed", "why": why}
    return record


def items(context: Context) -> list[Item]:
    from calls import by_name, networks

    groups: dict[tuple[str, str], list[Any]] = {}
    for call in (*networks(), *by_name()):
        op = call.name.split()[0]
        groups.setdefault((op, "backward" if call.name.endswith("backward") else ""), []).append(
            call
        )

    def turn(group: tuple[str, str]) -> int:
        return next(
            i for i, (op, way) in enumerate(ORDER) if op in ("", group[0]) and way in ("", group[1])
        )

    return [
        Item(f"tune/{' '.join(g).strip()}", partial(tuned_calls, context, groups[g]), LIMIT)
        for g in sorted(groups, key=turn)
    ]


def summary(context: Context, records: list[dict[str, Any]]) -> str:
    lines = ["", "## Found", ""]
    lines += [f"- {said}" for r in records for said in r.get("found", ())]
    missed = [name for r in records for name in r.get("missed", ())]
    if missed:
        lines += ["", f"No time for: {', '.join(missed)}"]
    return "\n".join(lines) + "\n"

"""Turns pytest-benchmark's JSON into ``bench/RESULTS.md`` and a chart.

    python bench/waterfall.py bench/results/latest.json [more.json ...] [--out bench/RESULTS.md]

The files are rewritten without the single rounds, to keep them small; the statistics stay.

Every figure on the page comes from the files named on the command line. A ratio is the median over
interleaved rounds; above 1 is faster than the baseline of the case, its first provider.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS, PLAIN, PEER = "#1f6feb", "#8b98a5", "#d9730d"


def load(paths: Iterable[Path]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """(machine, rows) of each file; a row is a provider's extra_info with its group."""
    runs = []
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        if any(b.get("stats", {}).pop("data", None) for b in data["benchmarks"]):
            whole = path.with_suffix(".part")
            whole.write_text(json.dumps(data) + "\n", encoding="utf-8")
            whole.replace(path)
        machine = data.get("machine_info", {}).get("fastvdm", {})
        machine = machine | {"file": path.name, "date": data.get("datetime", "")[:10]}
        machine["cpu"] = data.get("machine_info", {}).get("cpu", {}).get("brand_raw", "")
        rows = [b["extra_info"] | {"group": b["group"]} for b in data["benchmarks"]]
        runs.append((machine, [r for r in rows if "median_ms" in r]))
    return runs


def _number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, without an exponent if that is short."""
    if value is None:
        return ""
    text = f"{value:.{digits}g}"
    return f"{value:.0f}" if "e+" in text else text


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One group as a Markdown table, in the order the providers ran."""
    lines = [
        "| provider | dtype | ms | ratio | TFLOP/s | GB/s | % of floor | max error | peak MiB | |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for r in rows:
        notes = []
        if "graphs" in r:
            notes.append(f"{r['graphs']} graphs, {r['graph_breaks']} breaks, {r['compile_s']} s")
        if r.get("fallbacks"):
            notes.append(f"falls back: {'; '.join(r['fallbacks'])}")
        ratio = f"{_number(r.get('ratio'))}x" if "ratio" in r else ""
        rate = r["gflops"] / 1e3 if "gflops" in r else None
        cells = (
            r["provider"],
            r["dtype"],
            _number(r["median_ms"]),
            f"**{ratio}**" if r["provider"].startswith("fastvdm") and ratio else ratio,
            _number(rate),
            _number(r.get("gbs")),
            _number(r.get("floor_pct"), 2),
            "" if r.get("max_error") is None else f"{r['max_error']:.1e}",
            _number(r.get("peak_mib")),
            "; ".join(notes),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    name = machine.get("gpu") or machine.get("cpu") or "an unnamed machine"
    packages = ("torch", "triton", "openvino")
    versions = ", ".join(f"{k} {machine[k]}" for k in packages if machine.get(k))
    lines = [
        f"## {name} ({machine.get('device', '?')})",
        "",
        f"{machine['date']}, commit {machine.get('commit')}"
        f"{' with local changes' if machine.get('dirty') else ''}, {versions}, "
        f"{machine.get('threads')} threads. Source: `{machine['file']}`.",
        "",
    ]
    limits = [
        f"{machine[f'limit_tflops_{d}']:g} TFLOP/s in {d}"
        for d in ("float32", "bfloat16")
        if f"limit_tflops_{d}" in machine
    ]
    if limits:
        lines += [
            f"The floor of this machine, measured in the same run: {', '.join(limits)} (a large "
            f"matrix product or convolution), {machine.get('limit_gbs')} GB/s (a large copy).",
            "",
        ]
    return lines


def render(runs: list[tuple[dict[str, Any], list[dict[str, Any]]]], chart: str | None) -> str:
    """The page."""
    lines = [
        "# Results",
        "",
        "Made by `make bench` (or `make gpu-measure`). Each provider is held to an fp64 reference "
        "before it is timed; all of a case run in turns in one process; ms is the median round and "
        "ratio the median of the rounds' ratios to the first row. % of floor is the time that the "
        "machine's own measured limits would allow, divided by the time measured.",
        "",
    ]
    if chart is not None:
        lines += [
            f"![ratio to the baseline of each case]({chart})",
            "",
            "The chart has, of every op, the baseline, the best of the others and ours; the tables "
            "have all.",
            "",
        ]
    for machine, rows in runs:
        lines += _machine_lines(machine)
        for group, found in grouped(rows).items():
            lines += [f"### {group}", "", *table(found), ""]
    return "\n".join(lines)


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by group; the network first, then the ops."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    return dict(sorted(groups.items(), key=lambda kv: (not kv[0].startswith("unet"), kv[0])))


def _colour(provider: str) -> str:
    if provider.startswith("fastvdm"):
        return OURS
    return PEER if provider.startswith("peer") else PLAIN


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a group for the chart: for an op the baseline, the best of the others and ours;
    for a whole network all rows."""
    rated = [r for r in rows if "ratio" in r]
    if not rated or rated[0]["group"].startswith("unet"):
        return rated
    ours = [r for r in rated if r["provider"].startswith("fastvdm")]
    others = [r for r in rated[1:] if r not in ours]
    best = [max(others, key=lambda r: r["ratio"])] if others else []
    return [rated[0], *best, *ours]


def draw(runs: list[tuple[dict[str, Any], list[dict[str, Any]]]], path: Path) -> bool:
    """Horizontal bars: how much faster than the first provider; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": "fastvdm",
            "svg.fonttype": "none",  # text stays text
            "font.size": 9,
            "font.family": "sans-serif",
        }
    )
    bars: list[tuple[str, str, float] | None] = []
    for _, rows in runs:
        for group, found in grouped(rows).items():
            shown = _shown(found)
            if len(shown) < 2 or "-tiny" in group:
                continue
            bars.append(None)  # a gap with the name of the group
            bars += [(group, r["provider"], r["ratio"]) for r in shown]
    if not bars:
        return False
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.2 * len(bars)))
    heading = ""
    for y, bar in enumerate(bars):
        if bar is None:
            continue
        group, provider, ratio = bar
        if group != heading:
            heading = group
            axes.text(0, y - 0.85, group, weight="bold", va="center")
        axes.barh(y, ratio, height=0.72, color=_colour(provider))
        axes.text(ratio, y, f" {ratio:.2f}x", va="center")
    axes.set_yticks(
        [y for y, bar in enumerate(bars) if bar], [bar[1] for bar in bars if bar is not None]
    )
    axes.axvline(1, color="#5c6875", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, 1.15 * max(bar[2] for bar in bars if bar))
    axes.set_ylim(len(bars) - 0.4, -1.6)
    axes.set_xlabel("times as fast as the first provider of the case")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "RESULTS.md")
    args = parser.parse_args()
    runs = load(args.json)
    chart = args.out.with_suffix(".svg")
    drawn = draw(runs, chart)
    args.out.write_text(render(runs, chart.name if drawn else None), encoding="utf-8")
    print(f"wrote {args.out}" + (f" and {chart}" if drawn else " (no matplotlib: no chart)"))


if __name__ == "__main__":
    main()

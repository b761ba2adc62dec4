"""Turns pytest-benchmark's JSON into ``bench/RESULTS.md`` and a chart beside each file.

    python bench/waterfall.py bench/results/latest.json [more.json ...] [--out bench/RESULTS.md]

The files are rewritten to keep them small: what is read here, the fastest and the slowest round.

Every figure on the page comes from the files named on the command line. A ratio is the median over
interleaved rounds; above 1 is faster than the baseline of the case, its first provider.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Run = tuple[dict[str, Any], list[dict[str, Any]]]


def _kept(benchmark: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one benchmark."""
    stats = {k: v for k, v in benchmark.get("stats", {}).items() if k in ("min", "max")}
    kept = {k: benchmark[k] for k in ("group", "extra_info")}
    return kept | ({"stats": stats} if stats else {})


def load(paths: Iterable[Path]) -> list[Run]:
    """(machine, rows) of each file; a row is a provider's extra_info with its group."""
    runs = []
    for path in paths:
        data = json.loads(path.read_text(encoding="utf-8"))
        small = data | {"benchmarks": [_kept(b) for b in data["benchmarks"]]}
        if small != data:
            whole = path.with_suffix(".part")
            whole.write_text(json.dumps(small) + "\n", encoding="utf-8")
            whole.replace(path)
        machine = data.get("machine_info", {}).get("fastvdm", {})
        machine = machine | {"file": path, "date": data.get("datetime", "")[:10]}
        machine["cpu"] = data.get("machine_info", {}).get("cpu", {}).get("brand_raw", "")
        rows = [b["extra_info"] | {"group": b["group"]} for b in data["benchmarks"]]
        runs.append((machine, [r for r in rows if "median_ms" in r]))
    return runs


def _number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant ones, without an exponent where it stays short."""
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


def _name(machine: dict[str, Any]) -> str:
    if machine.get("gpu") or not machine.get("cpu"):
        return str(machine.get("gpu") or "an unnamed machine")
    return ", ".join(filter(None, (machine["cpu"], machine.get("cpu_capability"))))


def _versions(machine: dict[str, Any]) -> str:
    packages = ("torch", "triton", "openvino")
    return ", ".join(f"{k} {machine[k]}" for k in packages if machine.get(k))


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    lines = [
        f"## {_name(machine)} ({machine.get('device', '?')})",
        "",
        f"{machine['date']}, commit {machine.get('commit')}"
        f"{' with local changes' if machine.get('dirty') else ''}, {_versions(machine)}, "
        f"{machine.get('threads')} threads. Source: `{machine['file'].name}`.",
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


def _by_provider(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {r["provider"]: r for r in rows}


def overview(runs: list[Run]) -> list[str]:
    """The whole networks of all machines as one Markdown table."""
    lines = [
        "| machine | network | the peer, ms | fastvdm, ms | fastvdm-bf16, ms | peak MiB of each |",
        "|---|---|--:|--:|--:|--:|",
    ]
    shown = ("peer", "fastvdm", "fastvdm-bf16")
    for machine, rows in runs:
        for group, found in grouped(rows).items():
            by = _by_provider(found)
            if not group.startswith("unet-") or "-tiny" in group or not by.keys() >= set(shown):
                continue
            ours = [f"{_number(by[p]['median_ms'])}, **{_number(by[p]['ratio'])}x**" for p in shown]
            peaks = " / ".join(_number(by[p].get("peak_mib")) or "?" for p in shown)
            cells = (_name(machine), group, _number(by["peer"]["median_ms"]), *ours[1:], peaks)
            lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""] if len(lines) > 2 else []


def render(runs: list[Run], page: Path) -> str:
    """The page, whose charts are where ``write_charts`` leaves them."""
    lines = [
        "# Results",
        "",
        "Made by `make bench` (or `make gpu-measure`). Each provider is held to an fp64 reference "
        "before it is timed; all of a case run in turns in one process; ms is the median round and "
        "ratio the median of the rounds' ratios to the first row. % of floor is the time that the "
        "machine's own measured limits would allow, divided by the time measured. The peer is "
        "video-diffusion-pytorch.",
        "",
        *overview(runs),
    ]
    for machine, rows in runs:
        lines += _machine_lines(machine)
        if chart(machine, rows) is not None:
            link = os.path.relpath(_chart_path(machine), page.parent).replace(os.sep, "/")
            lines += [f"![a forward pass of a whole network]({link})", ""]
        for group, found in grouped(rows).items():
            lines += [f"### {group}", "", *table(found), ""]
    return "\n".join(lines)


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by group; the network first, then the ops."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["group"]].append(row)
    return dict(sorted(groups.items(), key=lambda kv: (not kv[0].startswith("unet"), kv[0])))


# -- the chart ------------------------------------------------------------------------------------

# By group, the first that a run has: the network, frames and size, videos on a CPU and on a GPU.
NETWORKS = {
    "unet-forward-readme": ("Unet3D(dim=64)", 16, 64, 1, 8),
    "unet-forward-small": ("Unet3D(dim=32)", 8, 32, 1, 8),
}
# By provider: the peer, of the others the first two that a run has, ours.
PEER = {"peer": "video-diffusion-pytorch, fp32"}
OTHERS = {
    "peer-openvino": "video-diffusion-pytorch in OpenVINO, fp32",
    "peer-openvino-bf16": "video-diffusion-pytorch in OpenVINO, bf16",
    "peer-bf16": "video-diffusion-pytorch, bf16 autocast",
    "torch": "fastvdm in plain torch, fp32",
    "torch-compiled": "fastvdm in plain torch, compiled, fp32",
}
OURS = {"fastvdm": "fastvdm, fp32", "fastvdm-bf16": "fastvdm, bf16"}
WIDTH, MARGIN, TOP, ROW = 600, 16, 92, 42
STYLE = """\
svg{font:15px system-ui,sans-serif}text{fill:#1f2328}.end{text-anchor:end}
rect{fill:#8b98a5}.page{fill:#fff}.ours{fill:#1f6feb}
.small{font-size:14px;fill:#59636e}.bold{font-weight:600}.title{font-size:18px;font-weight:600}
@media(prefers-color-scheme:dark){rect{fill:#6e7681}.page{fill:#0d1117}.ours{fill:#4493f8}
text{fill:#f0f6fc}.small{fill:#9198a1}}"""


def chart(machine: dict[str, Any], rows: list[dict[str, Any]]) -> str | None:
    """A forward pass of the largest network in NETWORKS, as an SVG of five bars; None where a run
    has no such network or lacks the peer."""
    groups = grouped(rows)
    group = next((g for g in NETWORKS if g in groups), None)
    by = _by_provider(groups.get(group or "", []))
    if group is None or "peer" not in by or not by.keys() >= OURS.keys():
        return None
    bars = PEER | {p: OTHERS[p] for p in [p for p in OTHERS if p in by][:2]} | OURS
    network, frames, size, on_cpu, on_gpu = NETWORKS[group]
    videos = on_cpu if machine.get("device") == "cpu" else on_gpu
    many = "" if videos == 1 else f"{videos} videos of "
    where = f"{_name(machine)}, {machine.get('threads')} threads"
    heading = (
        ("title", f"{network}, {many}{frames} frames of {size}x{size}: a forward pass"),
        ("small", f"{where}. {machine['date']}, commit {machine.get('commit')}"),
        ("small", f"{_versions(machine)}. Shorter is faster; MiB: peak"),
    )
    slowest = max(by[p]["median_ms"] for p in bars)
    height = TOP + ROW * len(bars)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{escape(heading[0][1])}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>',
    ]
    for (kind, text), y in zip(heading, (30, 52, 72)):
        parts.append(f'<text class="{kind}" x="{MARGIN}" y="{y}">{escape(text)}</text>')
    for i, (provider, label) in enumerate(bars.items()):
        row, y, ours = by[provider], TOP + ROW * i, provider in OURS
        told = [f"{_number(row['median_ms'])} ms", f"{_number(row['ratio'])}x"]
        told += [f"{_number(row['peak_mib'])} MiB"] if row.get("peak_mib") else []
        width = (WIDTH - 2 * MARGIN) * row["median_ms"] / slowest
        parts += [
            '<g class="bold">' if ours else "<g>",
            f'<text x="{MARGIN}" y="{y + 14}">{escape(label)}</text>',
            f'<text class="end" x="{WIDTH - MARGIN}" y="{y + 14}">{" · ".join(told)}</text>',
            f'<rect class="{"ours" if ours else "bar"}" x="{MARGIN}" y="{y + 21}" '
            f'width="{width:.1f}" height="11" rx="2"/>',
            "</g>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def _chart_path(machine: dict[str, Any]) -> Path:
    return machine["file"].with_suffix(".svg")


def write_charts(runs: list[Run]) -> list[Path]:
    """Each beside the file that it is of."""
    drawn = [(m, text) for m, rows in runs if (text := chart(m, rows)) is not None]
    for machine, text in drawn:
        _chart_path(machine).write_text(text, encoding="utf-8")
    return [_chart_path(machine) for machine, _ in drawn]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "RESULTS.md")
    args = parser.parse_args()
    runs = load(args.json)
    args.out.write_text(render(runs, args.out), encoding="utf-8")
    print("wrote", *(args.out, *write_charts(runs)))


if __name__ == "__main__":
    main()

"""The page that ``make demo`` leaves behind: one self-contained HTML file, nothing fetched."""

from __future__ import annotations

import base64
import html
import itertools
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvdm.video import write_video

STYLE = """
:root { --ink: #1c2430; --soft: #5c6875; --line: #dfe4ea; --paper: #fbfcfd; --accent: #1f6feb;
        --warm: #d9730d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf0; --soft: #9aa6b2; --line: #303944; --paper: #14181d; --accent: #6cb0ff;
          --warm: #f2a65a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 20px; margin: 44px 0 6px; }
p { margin: 6px 0 14px; max-width: 70ch; }
.soft { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 14px; margin: 24px 0 8px; }
.tile { border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tile b { display: block; font-size: 25px; line-height: 1.2; font-weight: 650; }
.tile span { color: var(--soft); font-size: 14px; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 16px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 16px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
figure { margin: 0; }
figure img { width: 100%; aspect-ratio: 1; border-radius: 8px; display: block;
             background: var(--line); }
figure img.raw { image-rendering: pixelated; }
figcaption { color: var(--soft); font-size: 14px; padding-top: 5px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 9px 12px; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th { color: var(--soft); font-weight: 500; font-size: 14px; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td.win { color: var(--accent); font-weight: 650; }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 13px; }
code { font: 14px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { border: 1px solid var(--line); border-radius: 8px; padding: 12px 16px; overflow-x: auto; }
del { color: var(--soft); }
@media (max-width: 640px) { .tiles { grid-template-columns: repeat(2, 1fr); } }
"""


def gif(video: Tensor, fps: float = 8) -> str:
    """(C, F, H, W) in [0, 1] as a data URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.gif"
        write_video(path, video, fps=fps)
        return "data:image/gif;base64," + base64.b64encode(path.read_bytes()).decode()


def figure(video: Tensor, caption: str, raw: bool = False) -> str:
    kind = ' class="raw"' if raw else ""
    return (
        f'<figure><img{kind} src="{gif(video)}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def ticks(high: float, count: int, smallest: float) -> list[float]:
    """From 0 to ``high`` in at most ``count`` steps of 1, 2 or 5 times a power of ten."""
    step = smallest
    factors = itertools.cycle((2.0, 2.5, 2.0))
    while high / step > count:
        step *= next(factors)
    return [i * step for i in range(int(high / step + 1e-6) + 1)]


def curve(losses: list[float], smoothed: list[float]) -> str:
    """The loss over the steps: every step faint, the running mean bold."""
    width, height, left, right, top, bottom = 912, 300, 52, 14, 12, 46
    high = sorted(losses)[int(0.99 * (len(losses) - 1))] * 1.08
    inner_w, inner_h = width - left - right, height - top - bottom

    def at(i: int, value: float) -> str:
        x = left + inner_w * i / max(1, len(losses) - 1)
        return f"{x:.1f},{top + inner_h * (1 - min(value, high) / high):.1f}"

    rows = []
    for v in ticks(high, 5, 1e-6):
        y = top + inner_h * (1 - v / high)
        rows.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="var(--line)"/><text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">'
            f"{v:.3g}</text>"
        )
    for v in ticks(len(losses), 8, 1.0):
        x = left + inner_w * v / len(losses)
        rows.append(f'<text x="{x:.1f}" y="{height - 26}" text-anchor="middle">{v:.0f}</text>')
    rows.append(f'<text x="{left + inner_w / 2}" y="{height - 6}" text-anchor="middle">step</text>')
    faint = " ".join(at(i, v) for i, v in enumerate(losses))
    bold = " ".join(at(i, v) for i, v in enumerate(smoothed))
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="training loss">'
        + "".join(rows)
        + f'<polyline points="{faint}" fill="none" stroke="var(--accent)" opacity="0.28"/>'
        + f'<polyline points="{bold}" fill="none" stroke="var(--accent)" stroke-width="2.5" '
        + 'stroke-linejoin="round"/></svg>'
    )


def comparison(rows: list[dict[str, Any]]) -> str:
    body = "".join(
        f"<tr><td>{row['what']}, dim {row['dim']}, 16&times;{row['size']}&times;{row['size']}</td>"
        f"<td>{1e3 * row['peer']:.0f} ms</td><td>{1e3 * row['ours']:.0f} ms</td>"
        f'<td class="win">{row["peer"] / row["ours"]:.2f}&times;</td>'
        f"<td>{row['error']:.1e}</td></tr>"
        for row in rows
    )
    return (
        '<div class="scroll"><table><tr><th></th><th>peer</th><th>fastvdm</th><th>speed-up</th>'
        f"<th>largest difference</th></tr>{body}</table></div>"
    )


def tiles(out: Any) -> str:
    forward = max((r for r in out.parity if r["what"] == "forward"), key=lambda r: r["dim"])
    training = out.training
    entries = [
        (f"{forward['peer'] / forward['ours']:.2f}&times;", f"forward, dim {forward['dim']}"),
        (f"{max(r['error'] for r in out.parity):.0e}", "largest difference, fp32"),
        (f"{training['first']:.2f} &rarr; {training['last']:.2f}", "loss"),
        (f"{out.machine['seconds'] / 60:.1f} min", "for all of this"),
    ]
    return "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in entries)


def predictions(out: Any) -> str:
    """A row a clip: the real one and what each method drew, with the two errors below."""
    rows = []
    for p in out.predicted:
        real = f"{p.name}; own step {p.jump['truth']:.3f}"
        cells = [figure(p.truth, real, raw=True)]
        for method, video in p.videos.items():
            words = f"{method}: step {p.jump[method]:.3f}, error {p.error[method]:.3f}"
            cells.append(figure(video, words, raw=True))
        rows.append(f'<div class="strip">{"".join(cells)}</div>')
    return "".join(rows)


def write_report(
    path: Path, out: Any, smoothed: list[float], previews: list[tuple[str, Tensor]]
) -> Path:
    """Write the page; returns its path."""
    training = out.training
    frames, size, _ = training["shape"].split(" x ")
    real = "".join(figure(video, name) for name, video in previews[:4])
    seen = "".join(
        figure(clip[:, : int(frames)], f"{name}, {size} x {size}", raw=True)
        for name, clip in out.clips[:4]
    )
    made = "".join(
        figure(video, f"sample {i + 1}", raw=True) for i, video in enumerate(out.samples[:8])
    )
    pairs = "".join(
        f'<div class="pair">{figure(noisy, "noise added", raw=True)}'
        f"{figure(x_hat, f'{name}, restored', raw=True)}</div>"
        for name, noisy, x_hat in out.restored
    )
    peer = out.checkpoint["peer"]
    threads = f"{out.machine['threads']} thread{'s' if out.machine['threads'] > 1 else ''}"
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastvdm demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>
<h1>A faster network in your own trainer</h1>
<p class="soft">Real clips, the peer's <code>GaussianDiffusion</code>, and <code>UNet3D</code>
dropped in by one line. torch {html.escape(out.machine["torch"])}, {out.machine["device"]},
{threads}.</p>
<div class="tiles">{tiles(out)}</div>

<h2>The one line</h2>
<pre><code><del>from video_diffusion_pytorch import Unet3D</del>
from fastvdm import UNet3D as Unet3D</code></pre>

<h2>Same weights, same result, less time</h2>
<p>Both networks hold the same weights and see the same input. They run in turns in one process, so
that both meet the same machine; the times are medians. The difference is relative to the largest
value; for the backward pass it is the worst over all parameter gradients.</p>
{comparison(out.parity)}

<h2>The clips</h2>
<div class="strip">{real}</div>
<p class="soft" style="margin-top:14px">And what the network is trained on:</p>
<div class="strip">{seen}</div>

<h2>Training</h2>
<p>{training["steps"]} steps of {training["batch"]} windows in {training["seconds"]:.0f} s; dim
{training["dim"]}, {training["parameters"] / 1e6:.1f} M parameters. The faint line is the loss of
each step, which jumps with the noise level drawn; the bold one its running mean.</p>
{curve(out.losses, smoothed)}

<h2>What it learnt</h2>
<p>Each clip with noise at 0.6 of the schedule (left), and the network's estimate of the clip from
one call (right).</p>
<div class="pairs">{pairs}</div>

<h2>Samples</h2>
<p>Drawn from pure noise by the peer's own sampler from the saved and reloaded network in
{training["sampling_seconds"]:.0f} s. After so few steps they show that learning works, and no
more.</p>
<div class="strip">{made}</div>

<h2>The rest of a clip</h2>
<p>The first {out.prediction["known"]} of {out.prediction["frames"]} frames are given, the others
drawn by <code>fastvdm.diffusion.sample</code>: left the real clip, then replacement, then
reconstruction guidance (Ho et al. 2022, Eq. 7), from the same noise. The step is the RMS change
from the last given to the first drawn frame, the error that against the real continuation. The
guided sampling took
{out.prediction["seconds"]["reconstruction"] / out.prediction["seconds"]["replacement"]:.1f}
times as long as replacement.</p>
{predictions(out)}

<h2>The checkpoint</h2>
<p>Saved in the peer's format ({out.checkpoint["bytes"] / 1e6:.0f} MB), read back by us bit for bit,
and by the peer's own <code>Unet3D</code> through <code>to_peer_state_dict()</code> with a largest
difference of {peer:.1e}.</p>
</main></body></html>
""",
        encoding="utf-8",
    )
    return path

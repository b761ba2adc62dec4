"""The page that ``make demo`` leaves behind: one self-contained HTML file, nothing fetched."""

from __future__ import annotations

import base64
import html
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from demo_chart import curves
from demo_digits import KNOWN, Digits
from demo_train import Side, agreement
from torch import Tensor

from fastvdm.video import write_video

GIVEN, DRAWN = (0.85, 0.45, 0.05), (0.12, 0.43, 0.92)  # RGB of the frame around a clip
STYLE = (Path(__file__).parent / "demo_report.css").read_text(encoding="utf-8")


@dataclass
class Findings:
    """What the demo learnt, in the order it learnt it."""

    machine: str = ""
    clips: list[tuple[str, Tensor]] = field(default_factory=list)  # name, (C, F, H, W) in [0, 1]
    previews: list[tuple[str, Tensor]] = field(default_factory=list)
    parity: list[dict[str, Any]] = field(default_factory=list)
    sides: dict[str, Side] = field(default_factory=dict)
    training: dict[str, int] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    restored: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # name, noisy, x_hat
    digits: Digits | None = None


def data_uri(video: Tensor, fps: float = 8) -> str:
    """(4, F, H, W) in [0, 1], the fourth channel alpha, as an animation inside the page."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.webp"
        write_video(path, video, fps=fps)
        return "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()


def bordered(video: Tensor, known: int, width: int = 1) -> Tensor:
    """A frame around a clip: one colour while its frames are given, another once they are drawn."""
    out = torch.nn.functional.pad(video, (width,) * 4)
    colour = torch.tensor([GIVEN] * known + [DRAWN] * (video.shape[1] - known)).T[..., None, None]
    edge = torch.nn.functional.pad(torch.zeros_like(video[:1]), (width,) * 4, value=1.0)
    return torch.where(edge > 0, colour.to(out), out)


def row(videos: Sequence[tuple[str, Tensor]]) -> str:
    """Clips of one size side by side as one picture, so that they start together."""
    frames, size = min(v.shape[1] for _, v in videos), videos[0][1].shape[-1]
    gap = max(1, size // 24)
    opaque = [torch.cat((v[:, :frames], torch.ones_like(v[:1, :frames]))) for _, v in videos]
    sheet = torch.cat([torch.nn.functional.pad(v, (0, gap)) for v in opaque], dim=3)[..., :-gap]
    names = ", ".join(name for name, _ in videos)
    captions = "".join(f"<span>{html.escape(name)}</span>" for name, _ in videos)
    return (
        f'<figure><img src="{data_uri(sheet)}" alt="{html.escape(names)}">'
        f'<figcaption style="grid-template-columns: repeat({len(videos)}, 1fr)">{captions}'
        "</figcaption></figure>"
    )


def comparison(rows: list[dict[str, Any]]) -> str:
    body = "".join(
        f"<tr><td>{r['what']}<br><small>dim {r['dim']}, 16&times;{r['size']}&times;{r['size']}"
        f"</small></td><td>{1e3 * r['peer']:.0f}</td><td>{1e3 * r['ours']:.0f}</td>"
        f'<td class="win">{r["peer"] / r["ours"]:.2f}&times;</td><td>{r["error"]:.0e}</td></tr>'
        for r in rows
    )
    return (
        "<table><tr><th></th><th>peer, ms</th><th>fastvdm, ms</th><th>speed-up</th>"
        f"<th>difference</th></tr>{body}</table>"
    )


def in_the_same_time(sides: dict[str, Side]) -> float:
    """How many steps ours makes while the peer makes one."""
    peer, ours = sides["peer"], sides["fastvdm"]
    return (len(ours.losses) / ours.clock) / (len(peer.losses) / peer.clock)


def tiles(out: Findings) -> str:
    forward = max((r for r in out.parity if r["what"] == "forward"), key=lambda r: r["dim"])
    error = max(r["error"] for r in out.parity if r["what"] == "forward")
    entries = [
        (f"{forward['peer'] / forward['ours']:.1f}&times;", f"forward, dim {forward['dim']}"),
        (f"{in_the_same_time(out.sides):.1f}&times;", "training steps in the same time"),
        (f"{error:.0e}", "largest difference, fp32"),
    ]
    return "".join(f'<div class="tile"><b>{a}</b><span>{b}</span></div>' for a, b in entries)


def continued(found: Digits) -> str:
    rows = []
    for i in range(len(found.truth)):
        known = {"true clip": found.truth.shape[2]} | dict.fromkeys(found.drawn, KNOWN)
        videos = {"true clip": found.truth} | found.drawn
        words = {
            m: f"{m}: step {found.seam[m][i]:.2f}, colour off by {found.colour[m][i]:.2f}"
            for m in found.drawn
        } | {"true clip": f"true clip: step {found.seam['true'][i]:.2f}"}
        rows.append(row([(words[m], bordered(v[i], known[m])) for m, v in videos.items()]))
    return "".join(rows)


def write_report(path: Path, out: Findings) -> Path:
    """Write the page; returns its path."""
    assert out.digits is not None
    peer, ours = out.sides["peer"], out.sides["fastvdm"]
    frames, found = out.training["frames"], out.digits
    pairs = "".join(
        row([("noise added", noisy), (f"{name}, restored", x_hat)])
        for name, noisy, x_hat in out.restored
    )
    machine = "".join(f"<span>{html.escape(p)}</span> " for p in out.machine.split(" · "))
    numbered = [(str(i + 1), v) for i, v in enumerate(found.samples)]
    samples = "".join(row(numbered[i : i + 3]) for i in range(0, len(numbered), 3))
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>fastvdm demo</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><main>
<h1>A faster network in your own trainer</h1>
<p class="soft machine">{machine}</p>
<div class="tiles">{tiles(out)}</div>

<h2>The one line</h2>
<pre><code><del>from video_diffusion_pytorch import Unet3D</del>
from fastvdm import UNet3D as Unet3D</code></pre>
<p>The peer on this page is <code>video-diffusion-pytorch</code> 0.7.0, whose network is
<code>Unet3D(..., norm="rms")</code> here.</p>

<h2>Same weights, same result, less time</h2>
<p>Both networks hold the same weights and see the same input. They run in turns in one process, so
that both meet the same machine; the times are medians of a few rounds. The difference is relative
to the largest value; of a training step it is the worst over all parameter gradients.</p>
{comparison(out.parity)}

<h2>Training, by the clock</h2>
<p>Both networks start from the same weights in the peer's own <code>GaussianDiffusion</code>, and
see the same clips and the same noise: step for step it is the same training, to
{max(agreement(out.sides), 1e-7):.0e} in the first losses. The peer made {len(peer.losses)} steps in
{peer.clock:.0f} s of its own, fastvdm {len(ours.losses)} in {ours.clock:.0f} s; batches of
{out.training["batch"]}, dim {out.training["dim"]}. Lines are means over 20 steps.</p>
{curves({name: (s.times, s.losses) for name, s in out.sides.items()})}
<p class="soft">The clips, and what the networks see of them:</p>
{row(out.previews) if out.previews else ""}
{row([(n, c[:, :frames]) for n, c in out.clips[:3]])}

<h2>What was learnt</h2>
<p>Each clip that they were trained on, with noise at 0.4 of the schedule, and what one call of the
network makes of it, after
{len(ours.losses)} steps.</p>
<div class="pairs">{pairs}</div>

<h2>Videos from a trained network</h2>
<p>That training is far too short to draw video. This network ships trained, as
<code>examples/digits/model</code>: moving digits, 16&times;24&times;24, 436 000 parameters in 0.9
MB. Drawn from noise:</p>
{samples}

<h2>The rest of a clip</h2>
<p>The first {KNOWN} frames are given (<b class="given">orange</b> frame), all others are drawn
(<b class="drawn">blue</b>), in windows of 16 frames that overlap by {KNOWN}. Replacement is held
to the given frames by the network alone, reconstruction guidance (Ho et al. 2022, Eq. 7) by its
gradient, too. Both start from the same noise. The step is the RMS change from the last given to the
first drawn frame, of 1 between black and white; the colour is compared with the true one over all
drawn frames.</p>
{continued(found)}

<h2>The checkpoint</h2>
<p>Saved as the peer's <code>Trainer</code> saves it, under our names
({out.checkpoint["bytes"] / 1e6:.0f} MB), read back by us bit for bit,
and by the peer's own <code>Unet3D</code> through <code>to_peer_state_dict()</code> with a largest
difference of {out.checkpoint["peer"]:.0e}.</p>

<h2>Next</h2>
<p>With <code>.venv/bin</code> on the path, or after <code>pip install ".[cli,train]"</code>:</p>
<pre><code># a video of your own from the network above
fastvdm sample examples/digits/model digits.mp4 --num 4
# a training run on your own videos
fastvdm train runs/clips --data videos --size 64
# every benchmark on this machine
make bench</code></pre>
</main></body></html>
""",
        encoding="utf-8",
    )
    return path

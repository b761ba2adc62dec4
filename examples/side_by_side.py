"""The picture of the README: the same videos drawn by both networks, in the time each took.

    python examples/side_by_side.py --out docs/images/side_by_side.gif

``video_diffusion_pytorch.Unet3D`` and ``fastvdm.UNet3D`` hold the same weights, those of
``examples/digits/model``, and draw from the same seed with the same sampler. They run in turns, one
whole run after the other; shown is the median run of each, at the speed at which it happened.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from machine import describe  # noqa: E402
from peer import import_peer  # noqa: E402

from fastvdm import UNet3D  # noqa: E402
from fastvdm.diffusion import DiscreteSchedule, sample  # noqa: E402

MODEL = ROOT / "examples" / "digits" / "model"
DELAY = 0.12  # seconds a picture; GIF counts hundredths
WIDTH, ZOOM, COLUMNS, GAP = 640, 4, 3, 4
PAPER, INK, SOFT, BAR, DONE = "#0d1117", "#e6edf3", "#8b949e", "#1f6feb", "#3fb950"


@dataclass
class Run:
    """One whole sampling: after each step its time, and what the network took the videos for."""

    times: list[float]
    seen: list[Tensor]  # (B, F, H, W, 3) uint8
    videos: Tensor  # (B, C, F, H, W) in [-1, 1]

    @property
    def seconds(self) -> float:
        return self.times[-1]

    def at(self, second: float) -> int:
        """How many steps were done by then."""
        return sum(t <= second for t in self.times)


def draw(network: Any, settings: Any, count: int, steps: int, seed: int) -> Run:
    """``count`` videos, every step timed."""
    shape = (count, 3, settings["num_frames"], *settings["image_size"])
    times: list[float] = []
    states: list[Tensor] = []

    def keep(step: Any) -> None:
        states.append(step.x_tilde.cpu())  # on a GPU this waits for the step
        times.append(time.perf_counter() - start)

    device = next(network.parameters()).device
    start = time.perf_counter()
    videos = sample(
        network, shape, schedule=DiscreteSchedule(settings["timesteps"]), num_steps=steps,
        prediction=settings["prediction"], seed=seed, callback=keep, device=device,
    )  # fmt: skip
    pixels = [((x.clamp(-1, 1) + 1) * 127.5).round().byte() for x in states]
    return Run(times, [p.permute(0, 2, 3, 4, 1).contiguous() for p in pixels], videos.cpu())


def sheet(run: Run, steps: int, frame: int) -> Image.Image:
    """The videos at one frame, in rows of ``COLUMNS``; before the first step they are grey."""
    some = run.seen[max(steps, 1) - 1][:, frame]
    if steps == 0:
        some = torch.full_like(some, 24)
    count, height, width, _ = some.shape
    rows = -(-count // COLUMNS)
    size = (COLUMNS * (width * ZOOM + GAP) - GAP, rows * (height * ZOOM + GAP) - GAP)
    out = Image.new("RGB", size, PAPER)
    for i, picture in enumerate(some):
        tile = Image.fromarray(picture.numpy()).resize((width * ZOOM, height * ZOOM), 0)
        row, column = divmod(i, COLUMNS)
        out.paste(tile, (column * (width * ZOOM + GAP), row * (height * ZOOM + GAP)))
    return out


def picture(runs: dict[str, Run], second: float, frame: int, footer: list[str]) -> Image.Image:
    """Both sides at one moment."""
    title, big, small = (ImageFont.load_default(size=s) for s in (17, 27, 13))
    first = sheet(next(iter(runs.values())), 0, 0)
    top = 78
    out = Image.new("RGB", (WIDTH, top + first.height + 14 + 18 * len(footer)), PAPER)
    pen = ImageDraw.Draw(out)
    for side, (name, run) in enumerate(runs.items()):
        left = 14 + side * (WIDTH - 2 * 14 - first.width)
        right, done = left + first.width, run.at(second)
        over = done == len(run.times)
        clock = f"{min(second, run.seconds):.1f} s"
        pen.text((left, 10), name, INK, title)
        pen.text((left, 34), f"step {done} of {len(run.times)}", SOFT, small)
        pen.text((right, 27), clock, DONE if over else INK, big, anchor="ra")
        pen.rectangle((left, 60, right - 1, 65), "#21262d")
        width = round(first.width * done / len(run.times))
        if width:
            pen.rectangle((left, 60, left + width - 1, 65), DONE if over else BAR)
        out.paste(sheet(run, done, frame), (left, top))
    for i, line in enumerate(footer):
        pen.text((14, top + first.height + 8 + 18 * i), line, SOFT, small)
    return out


def animate(runs: dict[str, Run], footer: list[str], path: Path, hold: float = 3.0) -> None:
    """Writes the GIF, from the start to ``hold`` seconds after the slower one ended."""
    slow = max(run.seconds for run in runs.values())
    frames = next(iter(runs.values())).videos.shape[2]
    count = int((slow + hold) / DELAY) + 1
    pictures = [picture(runs, i * DELAY, i % frames, footer) for i in range(count)]
    some = [pictures[len(pictures) * i // 4] for i in range(1, 4)] + [pictures[-1]]
    stacked = Image.new("RGB", (WIDTH, sum(p.height for p in some)))
    for i, p in enumerate(some):
        stacked.paste(p, (0, i * p.height))
    colours = stacked.quantize(96, dither=Image.Dither.NONE)
    flat = [p.quantize(palette=colours, dither=Image.Dither.NONE) for p in pictures]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    flat[0].save(
        part, "GIF", save_all=True, append_images=flat[1:], duration=round(1000 * DELAY), loop=0
    )
    part.replace(path)


def race(count: int, steps: int, rounds: int, seed: int) -> dict[str, Run]:
    """The median run of each, after one run of each that is not counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = UNet3D.from_pretrained(MODEL).to(device)
    settings = ours.settings
    config = json.loads((MODEL / "config.json").read_text())
    theirs = import_peer("0.7.0").Unet3D(
        config["dim"], dim_mults=config["dim_mults"], attn_heads=config["attn_heads"],
        attn_dim_head=config["attn_dim_head"],
    )  # fmt: skip
    theirs.load_state_dict(ours.to_peer_state_dict())
    networks = {"video-diffusion-pytorch 0.7.0": theirs.to(device).eval(), "fastvdm": ours}
    runs: dict[str, list[Run]] = {name: [] for name in networks}
    for i in range(rounds + 1):
        for name, network in networks.items():
            run = draw(network, settings, count, 2 if i == 0 else steps, seed)
            runs[name] += [run] if i else []
            print(f"{name}: {run.seconds:.2f} s", flush=True)
    median = {n: sorted(r, key=lambda run: run.seconds)[rounds // 2] for n, r in runs.items()}
    a, b = (run.videos for run in median.values())
    error = (a - b).abs().max().item()
    print(f"largest difference of the videos: {error:.1e}")
    if not error < 1e-2:
        raise SystemExit("the videos differ")
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "side_by_side.gif")
    parser.add_argument("--videos", type=int, default=6)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("videos", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    runs = race(args.videos, args.steps, args.rounds, args.seed)
    a, b = (run.videos for run in runs.values())
    frames, height, width = a.shape[2:]
    error = (a - b).abs().max().item()
    footer = [
        f"{args.videos} videos of {frames} x {height} x {width}, fp32, same weights, same seed; "
        f"largest difference {error:.0e}",
        describe(),
    ]
    animate(runs, footer, args.out)
    slow, fast = (run.seconds for run in runs.values())
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, {slow / fast:.2f}x")


if __name__ == "__main__":
    main()

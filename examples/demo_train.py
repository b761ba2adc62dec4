"""The demo's third and fourth parts: both networks trained side by side, and the checkpoint."""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from demo_compare import sync
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from fastvdm import UNet3D as Unet3D

Clips = list[tuple[str, Tensor]]  # name, (C, F, H, W) in [0, 1]
WARMUP = 20  # steps


@dataclass
class Side:
    """One network in the peer's ``GaussianDiffusion``, on a clock of its own."""

    diffusion: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of its own steps, added up

    @property
    def clock(self) -> float:
        return self.times[-1] if self.times else 0.0


def draw_batch(
    clips: Clips, batch: int, frames: int, generator: torch.Generator | None = None
) -> Tensor:
    """(B, C, F, H, W): random windows of random clips, half of them mirrored."""

    def integer(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    windows = []
    for _ in range(batch):
        clip = clips[integer(len(clips))][1]
        start = integer(clip.shape[1] - frames + 1)
        window = clip[:, start : start + frames]
        windows.append(window.flip(-1) if integer(2) else window)
    return torch.stack(windows)


def sides(peer: Any, args: Any, device: str) -> dict[str, Side]:
    """Both networks, with the same first weights."""
    torch.manual_seed(args.seed)
    theirs = peer.Unet3D(dim=args.dim, dim_mults=(1, 2, 4))
    ours = Unet3D.from_unet3d(theirs).train()
    found = {}
    for name, net in (("peer", theirs), ("fastvdm", ours)):
        diffusion = peer.GaussianDiffusion(
            net, image_size=args.size, num_frames=args.frames, timesteps=args.timesteps,
            loss_type="l2",
        ).to(device)  # fmt: skip
        found[name] = Side(diffusion, torch.optim.Adam(diffusion.parameters(), lr=args.lr))
    return found


def step(side: Side, clips: Clips, args: Any, device: str) -> None:
    """Step k of either network sees the same clips, noise levels and noise."""
    number = len(side.losses)
    generator = torch.Generator().manual_seed(1_000_003 * args.seed + number)
    video = draw_batch(clips, args.batch, args.frames, generator).to(device)
    for group in side.optimizer.param_groups:
        group["lr"] = args.lr * min(1.0, (number + 1) / WARMUP)
    torch.manual_seed(1_000_003 * args.seed + number)  # what the peer's diffusion draws from
    sync(video)
    start = time.perf_counter()
    loss = side.diffusion(video)
    side.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(side.diffusion.parameters(), 1.0)
    side.optimizer.step()
    sync(loss)
    side.times.append(side.clock + time.perf_counter() - start)
    side.losses.append(loss.item())


def train(
    peer: Any, clips: Clips, args: Any, device: str, console: Console
) -> tuple[dict[str, Side], Any]:
    """Both in turns, for ``args.seconds`` of their own; if given, ours for ``args.steps``.

    Returns:
        The two sides, and an average of our weights for sampling.

    Raises:
        SystemExit: the first losses differ by more than rounding, or the loss did not fall.
    """
    both = sides(peer, args, device)
    ours = both["fastvdm"]
    average = copy.deepcopy(ours.diffusion)
    columns = (TextColumn("  training"), BarColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=1.0, words="")
        while True:
            done = len(ours.losses) / args.steps if args.steps else ours.clock / args.seconds
            behind = both["peer"].clock < ours.clock
            if done >= 1.0 and not behind:
                break
            side = both["peer"] if behind else ours
            step(side, clips, args, device)
            if side is ours:
                decay = min(0.98, len(ours.losses) / (10 + len(ours.losses)))
                with torch.no_grad():
                    for p, q in zip(average.parameters(), ours.diffusion.parameters()):
                        p.lerp_(q, 1 - decay)
            words = "  ".join(
                f"{name} {len(s.losses)} steps, loss {statistics.mean(s.losses[-20:]):.3f}"
                for name, s in both.items()
                if s.losses
            )
            progress.update(task, completed=min(done, 1.0), words=words)
    for name, s in both.items():
        console.print(
            f"  {name}: {len(s.losses)} steps in {s.clock:.0f} s, "
            f"loss {s.losses[0]:.3f} -> {statistics.mean(s.losses[-20:]):.3f}"
        )
    check(both)
    return both, average


def agreement(both: dict[str, Side], count: int = 10) -> float:
    """Largest relative difference of the first losses, before rounding has been amplified."""
    pairs = list(zip(*(s.losses[:count] for s in both.values())))
    return max(abs(a - b) / a for a, b in pairs)


def check(both: dict[str, Side]) -> None:
    if not agreement(both) < 1e-3:
        raise SystemExit(f"the losses of both differ by {agreement(both):.1e} in the first steps")
    losses = both["fastvdm"].losses
    if len(losses) >= 50 and not statistics.mean(losses[-20:]) < 0.7 * statistics.mean(losses[:5]):
        raise SystemExit("the loss did not fall")


def smooth(values: list[float], window: int = 20) -> list[float]:
    """Running mean over the last ``window``."""
    return [statistics.mean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def save_and_reload(
    peer: Any, side: Side, average: Any, clips: Clips, args: Any, device: str
) -> dict[str, Any]:
    """The peer's checkpoint format, read back by us and, through its own keys, by the peer.

    Raises:
        SystemExit: an output changed.
    """
    path = args.out / "model-1.pt"
    state = {"model": side.diffusion.state_dict(), "ema": average.state_dict()}
    torch.save({"step": len(side.losses)} | state, path)
    average.denoise_fn.save_pretrained(args.out / "model")
    loaded = Unet3D.from_pretrained(args.out / "model").to(device).eval()
    back = peer.Unet3D(dim=args.dim, dim_mults=(1, 2, 4)).to(device).eval()
    back.load_state_dict(loaded.to_peer_state_dict())
    diffusion = copy.deepcopy(average)
    diffusion.denoise_fn = Unet3D(dim=args.dim, dim_mults=(1, 2, 4), norm="rms").to(device).eval()
    diffusion.load_state_dict(torch.load(path, weights_only=True)["ema"])
    x = draw_batch(clips, 1, args.frames).to(device)
    t = torch.zeros(1, device=device)
    with torch.no_grad():
        a, b, c = loaded(x, t), diffusion.denoise_fn(x, t), back(x, t)
    found = {
        "bytes": path.stat().st_size,
        "reloaded": torch.equal(a, b),
        "peer": ((a - c).abs().max() / a.abs().max()).item(),
    }
    if not found["reloaded"] or not found["peer"] < 1e-5:
        raise SystemExit(f"the checkpoint did not survive: {found}")
    return found


@torch.no_grad()
def restore(average: Any, clip: Tensor, args: Any, device: str) -> tuple[Tensor, Tensor]:
    """A clip with noise at 0.4 of the schedule, and what one call of the network makes of it."""
    average.eval()
    x = 2 * clip[None, :, : args.frames].to(device) - 1
    t = torch.full((1,), int(0.4 * args.timesteps), device=device)
    torch.manual_seed(args.seed)
    noisy = average.q_sample(x, t)
    x_hat = average.predict_start_from_noise(noisy, t, average.denoise_fn(noisy, t))
    first, second = ((v[0].clamp(-1, 1).cpu() + 1) / 2 for v in (noisy, x_hat))
    return first, second

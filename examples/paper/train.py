"""Networks for the tables: small 3D U-Nets, trained until they know more than single frames tell.

The bar is the held-out loss of the best denoiser that treats every frame separately: a network
above it need not have learned that anything persists. Training resumes from its last checkpoint,
and an interrupted run gives the same network.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fastvdm import UNet3D
from fastvdm.diffusion import CosineSchedule, diffusion_loss
from fastvdm.diffusion.joint import append_images, joint_loss
from paper import data
from paper.measure import Mean

# No sampler here sees cleaner clips (24 steps end at 5.4), and a small network cannot tell what
# noise is left in them: it would spend its time on that.
SCHEDULE = CosineSchedule(logsnr_max=5.0)


@dataclass(frozen=True)
class Recipe:
    """One network."""

    name: str
    seed: int = 0
    steps: int = 2000
    batch: int = 8
    dim: int = 16
    average: float = 0.995
    num_images: int = 0  # independent image frames after each clip
    conditional: bool = True
    coarse: bool = False  # every fourth frame at half the size: the base of the cascade
    every: int = 100  # steps between looks at the held-out clips, and checkpoints


def coarse(video: Tensor) -> Tensor:
    """What the base of the cascade draws: every fourth frame, averaged over blocks of 2 x 2."""
    return F.avg_pool3d(video[:, :, ::4], (1, 2, 2))


def clips(recipe: Recipe, batch: int, generator: torch.Generator) -> data.Batch:
    """Clips of 8 frames as this network sees them."""
    if not recipe.coarse:
        return data.draw(batch, data.FRAMES, generator)
    drawn = data.draw(batch, 4 * data.FRAMES - 3, generator)
    return drawn._replace(video=coarse(drawn.video))


def network(recipe: Recipe) -> UNet3D:
    """The untrained network; a condition of zeros is no condition."""
    torch.manual_seed(recipe.seed)
    return UNet3D(
        recipe.dim,
        dim_mults=(1, 2, 4),
        attn_heads=4,
        attn_dim_head=16,
        init_kernel_size=3,
        cond_dim=10 if recipe.conditional else None,
        cond_drop_prob=0.0,  # dropped here, from the generator that a checkpoint keeps
        null_cond="zeros",
        norm="rms",
        time_input="logsnr",
        use_sparse_linear_attn=False,
    )


class HeldOut:
    """Fixed clips, noise levels (one of each of N equal parts of [0, 1]) and noise."""

    def __init__(
        self, recipe: Recipe, count: int, frames: int = data.FRAMES, seed: int = 1
    ) -> None:
        generator = torch.Generator().manual_seed(9_000_000 + seed)
        batch = clips(recipe, count, generator)
        self.video, self.cond = batch.video[:, :, :frames], data.one_hot(batch.glyph)
        self.t = (torch.randperm(count, generator=generator) + 0.5) / count
        self.noise = torch.randn(self.video.shape, generator=generator)

    def loss(self, model: Any, by_class: bool | None = False) -> Tensor:
        """(N,) v-losses; ``by_class`` None is a network without classes."""
        parts = []
        for i in range(0, len(self.t), 32):
            some = slice(i, i + 32)
            given = None if by_class is None else self.cond[some] * by_class
            options: dict[str, Any] = dict(schedule=SCHEDULE, t=self.t[some], cond=given)
            options |= dict(prediction="v", loss_space="v", time_input="logsnr", reduction="none")
            with torch.no_grad():
                parts.append(
                    diffusion_loss(model, self.video[some], noise=self.noise[some], **options)
                )
        return torch.cat(parts)

    def mean(self, loss: Tensor) -> Mean:
        """Of (N,) losses. Most of a loss depends on the level alone, so that only differences
        between clips of neighbouring levels tell how well the mean is known."""
        error = loss[self.t.argsort()].double().unflatten(0, (-1, 2)).diff(dim=1).norm()
        return Mean(loss.mean().item(), 1.96 * error.item() / len(loss))


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al. 2024), for weights of any rank.

    It needs a third to a half fewer steps than Adam here: held-out loss 0.068 after 250, not 450.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "initial_lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                kept = self.state[p].setdefault("mean", torch.zeros_like(p))
                kept.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(kept, group["momentum"]).flatten(1)
                scale = max(1.0, x.shape[0] / x.shape[1]) ** 0.5
                p.add_(orthogonal(x).view_as(p), alpha=-group["lr"] * scale)


def orthogonal(x: Tensor) -> Tensor:
    """About U V^T of x = U S V^T, by five Newton-Schulz steps of fifth order."""
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x) / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, Adam for vectors and for what has no more than 256 numbers."""
    inside, others = [], []
    for p in net.parameters():
        (others if p.ndim < 2 or p.numel() <= 256 else inside).append(p)
    adam = torch.optim.Adam([{"params": others, "initial_lr": 3e-3}], 3e-3, betas=(0.9, 0.99))
    return [Muon(inside, 0.02), adam]


def factor(recipe: Recipe, step: int) -> float:
    """Of the learning rates: 50 steps of warm-up; the last 60 % are half a cosine, to zero."""
    done = max(0.0, step / recipe.steps - 0.4) / 0.6
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))


class Training:
    """A network on its way, and all that a checkpoint holds."""

    def __init__(self, recipe: Recipe, held_out: HeldOut) -> None:
        self.recipe, self.held_out = recipe, held_out
        self.net = network(recipe)
        self.average = copy.deepcopy(self.net).eval()
        self.optimizers = optimizers(self.net)
        # A stream each, so that networks with more image frames see the same clips and noise.
        self.streams = [torch.Generator().manual_seed(1000 * recipe.seed + i) for i in range(4)]
        self.step, self.cpu, self.wall = 0, 0.0, 0.0
        self.curve: list[tuple[int, float]] = []

    @property
    def done(self) -> bool:
        return self.step >= self.recipe.steps

    def advance(self) -> None:
        r, (of_clips, of_noise, of_images, of_image_noise) = self.recipe, self.streams
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor(r, self.step)
        batch = clips(r, r.batch, of_clips)
        video = batch.video
        t = (torch.rand((), generator=of_noise) + torch.arange(r.batch) / r.batch) % 1
        noise = torch.randn(video.shape, generator=of_noise)
        keep = torch.rand(r.batch, 1, generator=of_noise) < 0.5
        if r.num_images:
            others = clips(r, r.batch * r.num_images, of_images).video[:, :, 0]
            images = others.unflatten(0, (r.batch, r.num_images)).transpose(1, 2)
            video = append_images(video, images)
            more = torch.randn(images.shape, generator=of_image_noise)
            noise = torch.cat((noise, more), dim=2)
        loss = joint_loss(
            self.net,
            video,
            r.num_images,
            prediction="v",
            loss_space="v",
            schedule=SCHEDULE,
            cond=data.one_hot(batch.glyph) * keep if r.conditional else None,
            t=t,
            noise=noise,
        )
        self.net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        rate = min(r.average, self.step / (self.step + 10))
        with torch.no_grad():
            for a, p in zip(self.average.parameters(), self.net.parameters()):
                a.lerp_(p, 1 - rate)
        self.step += 1

    def look(self) -> float:
        """The held-out loss of the averaged weights."""
        by_class = False if self.recipe.conditional else None
        loss = self.held_out.loss(self.average, by_class).mean().item()
        self.curve.append((self.step, loss))
        return loss

    def state(self) -> dict[str, Any]:
        return {
            "recipe": asdict(self.recipe),
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "streams": [g.get_state() for g in self.streams],
            "numbers": (self.step, self.cpu, self.wall),
            "curve": self.curve,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(kept)
        for generator, kept in zip(self.streams, state["streams"]):
            generator.set_state(kept)
        self.step, self.cpu, self.wall = state["numbers"]
        self.curve = [tuple(point) for point in state["curve"]]


def train(recipe: Recipe, out: Path, held_out_clips: int = 128) -> Training:
    """The trained network, from ``out/name.pt`` where it is there already.

    Raises:
        ValueError: the file there is of another recipe.
    """
    path = out / f"{recipe.name}.pt"
    job = Training(recipe, HeldOut(recipe, held_out_clips))
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(recipe):
            raise ValueError(f"{path} is of {state['recipe']}, not {asdict(recipe)}: remove it")
        job.load(state)
    out.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=recipe.steps, initial=job.step, desc=recipe.name, mininterval=5)
    wall, cpu = time.perf_counter(), time.process_time()
    while not job.done:
        job.advance()
        bar.update()
        if job.step % recipe.every == 0 or job.step % recipe.steps == 0:
            bar.set_postfix_str(f"held-out {job.look():.4f}")
            now = time.perf_counter(), time.process_time()
            job.wall, job.cpu = job.wall + now[0] - wall, job.cpu + now[1] - cpu
            wall, cpu = now
            partial = path.with_suffix(".part")
            torch.save(job.state(), partial)
            partial.replace(path)
    bar.close()
    job.average.eval().requires_grad_(False)
    return job

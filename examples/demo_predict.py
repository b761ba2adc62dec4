"""The demo's last part: the rest of a real clip from its first frames, by both methods."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion import Condition, DiscreteSchedule, sample

METHODS = ("replacement", "reconstruction")


@dataclass
class Predicted:
    """One clip and what each method made of it; videos (C, F, H, W) in [0, 1]."""

    name: str
    truth: Tensor
    videos: dict[str, Tensor]
    jump: dict[str, float]  # RMS between the last given and the first drawn frame; "truth" too
    error: dict[str, float]  # RMS against the real continuation


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def predict(
    network: Any, clips: list[tuple[str, Tensor]], *, frames: int, known: int, timesteps: int,
    steps: int, device: str, seed: int = 0,
) -> tuple[list[Predicted], dict[str, float]]:  # fmt: skip
    """The first ``known`` frames of each clip are given, the others drawn.

    Replacement and reconstruction guidance (Ho et al. 2022, §3.1, Eq. 7) see the
    same noise. Returns the videos and the seconds each method took.
    """
    names = [name for name, _ in clips]
    truth = torch.stack([clip[:, :frames] for _, clip in clips]).to(device)
    x = 2 * truth - 1
    seconds, drawn = {}, {}
    for method in METHODS:
        condition = Condition(frames=x[:, :, :known], method=method)
        start = time.monotonic()
        z = sample(
            network, tuple(x.shape), schedule=DiscreteSchedule(timesteps), num_steps=steps,
            condition=condition, seed=seed,
        )  # fmt: skip
        seconds[method] = time.monotonic() - start
        drawn[method] = (z.clamp(-1, 1) + 1) / 2
    found = []
    for i, name in enumerate(names):
        videos = {m: drawn[m][i].cpu() for m in METHODS}
        real = truth[i].cpu()
        every = {"truth": real} | videos
        found.append(
            Predicted(
                name,
                real,
                videos,
                {m: rms(v[:, known] - real[:, known - 1]) for m, v in every.items()},
                {m: rms(v[:, known:] - real[:, known:]) for m, v in videos.items()},
            )  # fmt: skip
        )
    return found, seconds

"""The demo's fifth part: what a trained network draws, and how clips go on by both methods."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from digits import data
from torch import Tensor

from fastvdm import UNet3D
from fastvdm.diffusion import extend, sample

MODEL = Path(__file__).parent / "digits" / "model"
METHODS = ("replacement", "reconstruction")
KNOWN = 5  # frames given, of 16 in a window: the paper's Kinetics-600


@dataclass
class Digits:
    """Videos are (B, C, F, H, W) in [0, 1]."""

    samples: Tensor
    truth: Tensor
    drawn: dict[str, Tensor]
    # For each clip, and for the true one: RMS change from the last given to the first drawn frame,
    # and how far the colour of the drawn frames is from the true one, RMS over channels.
    seam: dict[str, list[float]]
    colour: dict[str, list[float]]
    seconds: dict[str, float] = field(default_factory=dict)


def draw_digits(
    *, samples: int, clips: int, frames: int, steps: int, device: str, seed: int = 0
) -> Digits:
    """Samples from noise, and true clips continued from their first ``KNOWN`` frames.

    Replacement and reconstruction guidance (Ho et al. 2022, section 3.1) see the same noise. They
    go on in windows of 16 frames, each conditioned on the last ``KNOWN`` frames.
    """
    network: Any = UNet3D.from_pretrained(MODEL).to(device)
    start = time.monotonic()
    drawn = sample(network, samples, num_steps=steps, seed=seed, value_range=(0, 1))
    seconds = {"samples": time.monotonic() - start}
    generator = torch.Generator().manual_seed(seed + 1)
    truth = data.clips(clips, frames, generator)
    known = truth[:, :, :KNOWN].to(device)
    continued = {}
    for method in METHODS:
        start = time.monotonic()
        continued[method] = extend(
            network, known, frames, window=data.FRAMES, overlap=KNOWN, num_steps=steps,
            method=method, seed=seed,
        )  # fmt: skip
        seconds[method] = time.monotonic() - start
    unit = {m: (v.clamp(-1, 1) + 1) / 2 for m, v in ({"true": truth} | continued).items()}
    seam = {m: (v[:, :, KNOWN] - v[:, :, KNOWN - 1]).square() for m, v in unit.items()}
    colour = {m: (mean_colour(v) - mean_colour(unit["true"])).square() for m, v in unit.items()}
    return Digits(
        drawn.cpu(),
        unit.pop("true"),
        unit,
        {m: x.mean(dim=(1, 2, 3)).sqrt().tolist() for m, x in seam.items()},
        {m: x[:, :, KNOWN:].mean(dim=(1, 2)).sqrt().tolist() for m, x in colour.items()},
        seconds,
    )


def mean_colour(video: Tensor) -> Tensor:
    """(B, 3, F) of (B, 3, F, H, W) in [0, 1]: the mean colour, weighted by brightness."""
    weight = video.amax(dim=1, keepdim=True).square()
    return (video * weight).sum(dim=(3, 4)) / weight.sum(dim=(3, 4)).clamp_min(1e-6)

"""What the tables measure: persistence, seams, and Fréchet distances with their floor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvdm.metrics import frechet_feature_distance
from paper import data

# Two-sided 95 % points of Student's t with 1, 2, .. degrees of freedom.
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


class Mean(NamedTuple):
    """A mean and the half-width of its 95 % interval; prints as ``0.12 ± 0.03``."""

    value: float
    half: float

    def __str__(self) -> str:
        digits = 1 if abs(self.value) >= 10 else 3 if abs(self.value) >= 0.01 else 4
        if math.isnan(self.half):
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Mean:
    """Of independent repetitions (networks, sets of clips), by Student's t; one has no interval."""
    x = torch.tensor(list(values), dtype=torch.float64)
    if len(x) == 1:
        return Mean(x.item(), math.nan)
    student = _STUDENT[min(len(x) - 2, len(_STUDENT) - 1)]
    return Mean(x.mean().item(), student * x.std().item() / math.sqrt(len(x)))


def windows(start: int, length: int, new: int) -> list[slice]:
    """The frames that each window of an extension adds: ``new``, or what is left at the end."""
    return [slice(i, min(i + new, length)) for i in range(start, length, new)]


Score = dict[str, list[list[float]]]


def score(video: Tensor, truth: data.Batch, parts: Sequence[slice]) -> Score:
    """Of continuations (B, 3, F, 16, 16) of the clips of ``truth``: for every part of the frames a
    list with a number for each clip.

    background, colour (of the glyph), error (of the pixels): squared errors relative to those
    between two random clips, 0 is perfect and 1 a clip that has nothing to do with the one given.
    glyph, position: share of frames with the right glyph (chance is 0.1), and with it in its place.
    """
    true = data.continued(truth, video.shape[2])
    got = data.read(video)
    wrong = (got.colours - truth.colours[:, None]).square().mean(-1)  # (B, F, part)
    place = data.positions(truth.moving, truth.phase, video.shape[2])
    random = (true - true.roll(1, 0)).square().mean()
    frames = {
        "background": wrong[..., :2].mean(-1) / (2 * data.SD[0] ** 2),
        "colour": wrong[..., 2] / (2 * data.SD[2] ** 2),
        "glyph": got.glyph == truth.glyph[:, None],
        "position": (got.position == place).all(-1),
        "error": (video - true).square().mean((1, 3, 4)) / random,
    }
    return {k: [x[:, p].float().mean(1).tolist() for p in parts] for k, x in frames.items()}


TRUE_CLIPS = 4096  # that Fréchet distances of attributes are to


def attributes(video: Tensor, frames: Sequence[int]) -> Tensor:
    """(B, 19 n): colours in units of their deviation and the glyph (one-hot) of these frames."""
    got = data.read(video[:, :, list(frames)])
    colours = got.colours / torch.tensor(data.SD)[:, None]
    return torch.cat((colours.flatten(2), data.one_hot(got.glyph)), dim=2).flatten(1)


def true_attributes(frames: int = 2) -> Tensor:
    """(TRUE_CLIPS, 19 * frames) of true clips, which have the same in every frame."""
    true = data.draw(TRUE_CLIPS, 1, torch.Generator().manual_seed(31))
    colours = true.colours / torch.tensor(data.SD)[:, None]
    return torch.cat((colours.flatten(1), data.one_hot(true.glyph)), dim=1).repeat(1, frames)


def seam(video: Tensor, starts: Sequence[int]) -> float:
    """Mean square change to the first frame of a window, over that between the other frames.

    1 is a seam that does not show. Frames before the first start are not counted.
    """
    change = (video[:, :, 1:] - video[:, :, :-1]).square().mean(dim=(0, 1, 3, 4))
    at = torch.zeros(len(change), dtype=torch.bool)
    at[torch.tensor(list(starts)) - 1] = True
    inside = ~at
    inside[: starts[0] - 1] = False
    return (change[at].mean() / change[inside].mean()).item()


def ends(video: Tensor) -> Tensor:
    """(B, 18): the colours of the first frame and of the last, background first."""
    return data.read(video[:, :, [0, -1]]).colours.transpose(1, 2).flatten(1)


class Pictures:
    """Fréchet distance of short clips in the leading components of true clips' pixels."""

    def __init__(self, true: Tensor, components: int = 16) -> None:
        flat = true.flatten(1)
        self.mean = flat.mean(0)
        self.basis = torch.linalg.svd(flat - self.mean, full_matrices=False).Vh[:components].T
        self.true = self.features(true)

    def features(self, video: Tensor) -> Tensor:
        return (video.flatten(1) - self.mean) @ self.basis

    def distance(self, video: Tensor) -> float:
        return frechet_feature_distance(self.true, self.features(video)).item()


def frechet(true: Tensor, drawn: Tensor) -> float:
    """Between features (N, n) of true clips and of drawn ones."""
    return frechet_feature_distance(true, drawn).item()


def jackknife(true: Tensor, drawn: Tensor, groups: int = 24) -> Mean:
    """Fréchet distance of all clips, and its 95 % interval from leaving out a part of them."""
    parts = torch.arange(len(drawn)) % min(groups, len(drawn))
    without = [frechet(true, drawn[parts != g]) for g in range(int(parts.max()) + 1)]
    spread = torch.tensor(without, dtype=torch.float64).var(unbiased=False)
    return Mean(frechet(true, drawn), 1.96 * math.sqrt((len(without) - 1) * spread.item()))

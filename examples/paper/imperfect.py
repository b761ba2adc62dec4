"""Exact denoisers that know only a part, as networks do: a part of what the class tells, or of what
frames share. A network with the same loss can be expected to draw what they draw."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion import Prediction, extend, sample
from paper import data, measure
from paper.common import Table
from paper.exact import Exact
from paper.intervals import frechet, mean_of
from paper.measure import Mean
from paper.train import HeldOut, Recipe

# --- Classifier-free guidance ---------------------------------------------------------------------

SCALES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)


def by_class(clips: int, calls: int, scale: float) -> dict[str, Any]:
    """Clips of each glyph in turn."""
    glyph = torch.arange(clips) % 10
    video = sample(
        Exact(),
        (clips, 3, data.FRAMES, data.SIZE, data.SIZE),
        cond=data.one_hot(glyph),
        guidance_scale=scale,
        num_steps=calls,
        seed=0,
    )
    right = (data.read(video).glyph == glyph[:, None]).float().mean(1)
    found = measure.attributes(video, (0, data.FRAMES - 1))
    return {"glyph": mean_of(right), "frechet": frechet(measure.true_attributes(), found)}


def class_table(clips: int, calls: int, results: list[dict[str, Any]]) -> Table:
    rows = [
        [f"{x:g}", *(str(Mean(*r[k])) for k in ("glyph", "frechet"))]
        for x, r in zip(SCALES, results)
    ]
    return Table(
        "Table 5 with the exact denoiser: classifier-free guidance by glyph",
        ["scale (1 + w of Eq. 6)", "right glyph", "Fréchet distance"],
        rows,
        f"{clips} clips, {calls} steps. Scale 1 is the conditional denoiser. Below it is one that "
        "has learned that share of what the class tells: what a network with a share s does at "
        "scale 1 / s is what scale 1 does here.",
    )


# --- Frames on their own --------------------------------------------------------------------------


class Alone:
    """A denoiser that takes frames on their own with weight ``part``, and together with the rest.

    Its squared error lies between those of the two as the square of ``part``.
    """

    time_input = "logsnr"

    def __init__(self, part: float, prediction: Prediction = "x") -> None:
        self.part = part
        self.together, self.alone = Exact(data.FRAMES, prediction), Exact(1, prediction)
        self.settings = self.together.settings

    def __call__(self, z: Tensor, log_snr: Tensor, cond: Tensor | None = None) -> Tensor:
        out = self.together(z, log_snr)
        return torch.lerp(out, self.alone(z, log_snr), self.part) if self.part else out


ALONE = [(part, guided) for part in (0.0, 0.25, 0.5, 0.65, 0.8) for guided in (False, True)]


def alone(clips: int, calls: int, part: float, guided: bool) -> dict[str, Any]:
    """Held-out loss, and the scores of clips extended from 8 frames to 32."""
    given = data.draw(clips, data.FRAMES, torch.Generator().manual_seed(20))
    options: dict[str, Any] = {} if guided else {"method": "replacement"}
    video = extend(
        Alone(part), given.video, 32, window=data.FRAMES, overlap=3, seed=0, num_steps=calls,
        **options,
    )  # fmt: skip
    parts = measure.windows(data.FRAMES, 32, data.FRAMES - 3)
    loss = HeldOut(Recipe("held out"), 8 * clips).loss(Alone(part, "v")).mean().item()
    return {"loss": loss, **measure.score(video, given, parts)}


def alone_table(calls: int, results: list[dict[str, Any]]) -> Table:
    rows = []
    for (part, guided), r in zip(ALONE, results):
        cells = [
            str(mean_of(torch.tensor(r[k][w]))) for k in ("glyph", "background") for w in (0, 2, -1)
        ]
        rows.append([f"{part:g}", f"{r['loss']:.4f}", ("replacement", "auto")[guided], *cells])
    windows = ("window 1", "3", str(len(results[0]["glyph"])))
    head = [f"{name}, {w}" for name in ("right glyph", "background") for w in windows]
    return Table(
        "How much a denoiser must know of what frames share",
        ["frames on their own", "loss in v", "", *head],
        rows,
        "The extension above with (1 - a) times the denoiser of all frames together plus a times "
        f"that of every frame on its own. {len(results[0]['glyph'][0])} clips, {calls} calls. The "
        "loss is what tells how the trained networks compare.",
    )

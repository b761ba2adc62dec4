"""The results in the cache as curves and as clips side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from paper import data, tables
from paper.tables import Place, Row

Result = dict[str, Any]


class Results:
    """What the jobs have left in the cache."""

    def __init__(self, place: Place) -> None:
        self.place, self.seeds = place, range(place.budget.seeds)

    def one(self, name: str) -> Result:
        return json.loads((self.place.cache / "rows" / f"{name}.json").read_text())

    def has(self, name: str) -> bool:
        return (self.place.cache / "rows" / f"{name}.json").exists()

    def over_seeds(self, name: str) -> list[Result]:
        """Those that there are: all of them, unless a report is written before the end."""
        names = [f"{name}-{seed}" for seed in self.seeds]
        return [self.one(n) for n in names if self.has(n)]


def side_by_side(clips: Sequence[torch.Tensor], zoom: int = 3) -> np.ndarray:
    """(F, H, W, 3) from several (B, 3, F, h, w) uint8: a column each, clips below one another."""
    rows = [torch.cat([_framed(c) for c in clip], dim=2) for clip in clips]  # (3, F, B h, w)
    sheet = torch.cat(rows, dim=3).permute(1, 2, 3, 0)
    return sheet.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()


def _framed(clip: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(clip, (1, 1, 1, 1), value=255)


def write_gif(path: Path, frames: np.ndarray, milliseconds: int = 120) -> None:
    images = [Image.fromarray(f) for f in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, loop=0)


def write_pictures(place: Place, out: Path) -> None:
    def kept(name: str) -> torch.Tensor:
        return torch.load(place.cache / "clips" / f"{name}.pt", weights_only=True)

    given = data.draw(place.budget.clips, data.FRAMES, tables.generator(20, 0))
    true = ((data.continued(given, tables.LENGTH)[:3] + 1) * 127.5).round().byte()
    names = [r.name for r in (Row(None), Row(1.0), Row("auto"))]
    drawn = [kept(f"extension-{tables.LENGTH}-{n}-0")[:3] for n in names]
    frames = side_by_side([true, *drawn])
    write_gif(out / "paper_tables_extension.gif", frames)
    stills = np.concatenate(frames[:: data.FRAMES], axis=1)
    Image.fromarray(stills).save(out / "paper_tables_extension.png")
    low, fine = kept("cascade-low-0"), kept("cascade-auto-1-0")
    for dim, factor in ((2, tables.FACTOR), (3, 2), (4, 2)):
        low = low.repeat_interleave(factor, dim)
    write_gif(out / "paper_tables_cascade.gif", side_by_side([low, fine]))
    scales = [kept(f"scale-{x:g}-0") for x in tables.SCALES]
    middle = side_by_side(scales)[data.FRAMES // 2]
    Image.fromarray(middle).save(out / "paper_tables_scale.png")


def write_curves(place: Place, out: Path) -> None:
    """Held-out losses while training, and the bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    r = Results(place)
    figure, axes = plt.subplots(figsize=(6, 3.4))
    for seed in r.seeds:
        steps, losses = zip(*r.one(f"held-out-main-{seed}")["curve"])
        axes.plot(steps, losses, label=f"network, seed {seed}")
    for frames, label in ((1, "single frames"), (8, "perfect")):
        axes.axhline(r.one(f"held-out-exact-{frames}")["loss"], color="gray", lw=1, ls="--")
        axes.text(0, r.one(f"held-out-exact-{frames}")["loss"], label, fontsize=8, va="bottom")
    axes.set(xlabel="step", ylabel="held-out v-loss", yscale="log")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out / "paper_tables_curves.png", dpi=90)
    plt.close(figure)

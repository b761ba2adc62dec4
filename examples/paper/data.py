"""Clips with a known distribution: one of ten coloured glyphs bounces over a colour gradient.

All that is drawn persists for ever (the glyph, three colours, the motion), so the true continuation
of a clip is known, and ``read`` finds it in any frame in closed form, without a judge network. A
window has the same distribution at every place of a long clip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FRAMES, SIZE = 8, 16
CELL = 3  # pixels
HEIGHT, WIDTH = 3 * CELL, 3 * CELL  # of a glyph
ROOM = (SIZE - HEIGHT, SIZE - WIDTH)  # the largest position, (y, x)
PLACES = (ROOM[0] + 1) * (ROOM[1] + 1)  # a position as one number: y * 8 + x
# Of the colours: upper end of the background, its lower end, the glyph.
MEAN, SD = (-0.25, -0.25, 0.4), (0.25, 0.25, 0.2)

# Of 3 x 3 cells: two glyphs differ in at least two of them, as 18 pixels.
_CELLS = """
.#. #.# ### ### #.. ### ##. .## #.# .#.
### .#. #.# .#. #.. ..# .#. .#. #.# .#.
.#. #.# ### .#. ### ..# .## ##. #.# ###
"""


def _masks() -> Tensor:
    rows = [line.split() for line in _CELLS.split("\n") if line]
    cells = torch.tensor([[[c == "#" for c in row[i]] for row in rows] for i in range(10)])
    return cells.repeat_interleave(CELL, dim=1).repeat_interleave(CELL, dim=2)


GLYPHS = _masks()  # (10, 9, 9) bool


def one_hot(glyph: Tensor) -> Tensor:
    """(...) → (..., 10)."""
    return torch.nn.functional.one_hot(glyph, 10).float()


def placed_masks() -> Tensor:
    """(10, 64, 16, 16): each glyph at each position, 1 inside and 0 outside."""
    out = torch.zeros(10, ROOM[0] + 1, ROOM[1] + 1, SIZE, SIZE)
    for y in range(ROOM[0] + 1):
        for x in range(ROOM[1] + 1):
            out[:, y, x, y : y + HEIGHT, x : x + WIDTH] = GLYPHS.float()
    return out.flatten(1, 2)


def gradient() -> Tensor:
    """(16,) from 0 at the top to 1 at the bottom: how much of the lower colour a row has."""
    return torch.arange(SIZE) / (SIZE - 1)


class Batch(NamedTuple):
    """Clips and all that they were drawn from."""

    video: Tensor  # (B, 3, F, 16, 16) in [-1, 1]
    glyph: Tensor  # (B,)
    colours: Tensor  # (B, 3, 3) [part, rgb]: upper background, lower background, glyph
    moving: Tensor  # (B, 2) bool, whether it moves along (y, x)
    phase: Tensor  # (B, 2) at frame 0: of the unfolded motion, or where it stands


def positions(moving: Tensor, phase: Tensor, frames: int, start: int = 0) -> Tensor:
    """(..., F, 2) of frames ``start`` .. ``start + frames - 1``, from (..., 2) each.

    Along an axis the glyph stands still, or walks one pixel a frame and turns round at the walls:
    a phase on a circle of 2 room, folded.
    """
    room = torch.tensor(ROOM)
    time = torch.arange(start, start + frames)[:, None]
    at = phase[..., None, :] + time * moving[..., None, :]
    return room - (at % (2 * room) - room).abs()


def render(glyph: Tensor, colours: Tensor, position: Tensor) -> Tensor:
    """(B, 3, F, 16, 16) from (B,), (B, 3, 3), (B, F, 2)."""
    place = position[..., 0] * (ROOM[1] + 1) + position[..., 1]
    mask = placed_masks().to(colours)[glyph[:, None], place][:, None]
    g = gradient().to(colours)[:, None]
    upper, lower, front = (c[:, :, None, None, None] for c in colours.unbind(1))
    return torch.where(mask > 0, front, upper * (1 - g) + lower * g)


def draw(batch: int, frames: int = FRAMES, generator: torch.Generator | None = None) -> Batch:
    """Independent clips of any length.

    A third of the axes stand still, never both of a clip; a colour outside [-1, 1] (0.13 % of the
    coefficients) is drawn again.
    """

    def integers(high: int) -> Tensor:
        return torch.randint(high, (batch,), generator=generator)

    glyph, still = integers(10), integers(3)
    moving = torch.stack((still != 0, still != 1), dim=1)
    phase = torch.stack(
        [torch.where(moving[:, i], integers(2 * r), integers(r + 1)) for i, r in enumerate(ROOM)], 1
    )
    mean, sd = (torch.tensor(p)[:, None] for p in (MEAN, SD))
    colours = torch.full((batch, 3, 3), 2.0)
    while bool((colours.abs() > 1).any()):
        again = mean + sd * torch.randn(batch, 3, 3, generator=generator)
        colours = torch.where(colours.abs() > 1, again, colours)
    video = render(glyph, colours, positions(moving, phase, frames))
    return Batch(video, glyph, colours, moving, phase)


def continued(batch: Batch, frames: int) -> Tensor:
    """The clips of ``batch`` from their first frame on, (B, 3, frames, 16, 16)."""
    return render(batch.glyph, batch.colours, positions(batch.moving, batch.phase, frames))


class Tables:
    """Values of glyphs at places that ``read`` and the exact denoiser share.

    A frame of glyph d at place p is a sum of three pictures: the two ends of the background outside
    the mask, and the mask. The mask is orthogonal to the other two.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        g = gradient().double()[:, None].expand(SIZE, SIZE).flatten()
        self.ends = torch.stack((1 - g, g), dim=1)  # (256, 2)
        mask = placed_masks().double().flatten(0, 1).flatten(1)  # (640, 256)
        inside = torch.stack((mask * (1 - g), mask * g), dim=2)  # (640, 256, 2)
        # (640, 2, 2): inner products of the two ends outside the mask
        self.gram = self.ends.T @ self.ends - torch.einsum("nki,kj->nij", inside, self.ends)
        self.area = mask.sum(1)  # (640,)
        self.inside = inside.permute(1, 2, 0).reshape(SIZE * SIZE, -1)  # (256, 2 * 640)
        for name, value in vars(self).items():
            setattr(self, name, value.to(dtype).contiguous())


class Reading(NamedTuple):
    """What ``read`` finds in every frame."""

    glyph: Tensor  # (B, F)
    position: Tensor  # (B, F, 2)
    colours: Tensor  # (B, F, 3, 3) [part, rgb]
    residual: Tensor  # (B, F) mean square that glyph, place and colours leave


def read(video: Tensor, chunk: int = 512) -> Reading:
    """The best glyph, position and three colours of each frame of (B, 3, F, 16, 16).

    In closed form: least squares for all 640 glyphs and places; the smallest residual wins.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (SIZE, SIZE):
        raise ValueError(f"expected (B, 3, F, {SIZE}, {SIZE}), got {tuple(video.shape)}")
    b, _, f = video.shape[:3]
    frames = video.detach().transpose(1, 2).reshape(b * f, 3, SIZE * SIZE)
    tables = Tables()
    inverse = torch.linalg.inv(tables.gram.double()).float()
    parts = [_read(part.float(), tables, inverse) for part in frames.split(chunk)]
    glyph, place, colours, residual = (torch.cat(p).unflatten(0, (b, f)) for p in zip(*parts))
    width = ROOM[1] + 1
    return Reading(glyph, torch.stack((place // width, place % width), dim=-1), colours, residual)


def _read(frames: Tensor, tables: Tables, inverse: Tensor) -> tuple[Tensor, ...]:
    n = len(frames)
    # A constant added to a frame is added to its colours; without it fewer digits cancel.
    mean = frames.mean(dim=2, keepdim=True)
    frames = frames - mean
    inside = (frames @ tables.inside).unflatten(2, (2, -1))  # (N, 3, 2, 640)
    outside = (frames @ tables.ends)[..., None] - inside
    back = torch.einsum("nij,bcjn->bcin", inverse, outside)
    front = inside.sum(dim=2) / tables.area
    explained = (back * outside).sum(dim=(1, 2)) + (front.square() * tables.area).sum(dim=1)
    best = explained.argmax(dim=1)
    at = best[:, None, None].expand(n, 3, 1)
    back = back.gather(3, at[..., None].expand(n, 3, 2, 1))[..., 0]
    colours = torch.cat((back, front.gather(2, at)), dim=2).transpose(1, 2) + mean.transpose(1, 2)
    glyph, place = best // PLACES, best % PLACES
    mask = placed_masks()[glyph, place].flatten(1)[:, None]
    fit = (
        colours[:, :2].transpose(1, 2) @ tables.ends.T * (1 - mask) + colours[:, 2, :, None] * mask
    )
    residual = (frames + mean - fit).square().mean(dim=(1, 2))
    return glyph, place, colours, residual

"""Clips whose law is known: a coloured digit bounces over a colour gradient.

Everything that is drawn persists for ever (the digit, three colours, the motion), so the true
continuation of a clip is known, and ``read`` finds it in any frame in closed form, without a judge
network. The law of a window is the same at every place of a long clip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FRAMES, SIZE = 8, 16
HEIGHT, WIDTH = 7, 5  # of a digit
ROOM = (SIZE - HEIGHT, SIZE - WIDTH)  # the largest position, (y, x)
PLACES = (ROOM[0] + 1) * (ROOM[1] + 1)  # a position as one number: y * 12 + x
# Of the colours: upper end of the background, its lower end, the digit.
MEAN, SD = (-0.25, -0.25, 0.4), (0.25, 0.25, 0.2)

_GLYPHS = """
.###. ..#.. .###. ##### ...#. ##### ..##. ##### .###. .###.
#...# .##.. #...# ...#. ..##. #.... .#... ....# #...# #...#
#..## ..#.. ....# ..#.. .#.#. ####. #.... ...#. #...# #...#
#.#.# ..#.. ...#. ...#. #..#. ....# ####. ..#.. .###. .####
##..# ..#.. ..#.. ....# ##### ....# #...# ..#.. #...# ....#
#...# ..#.. .#... #...# ...#. #...# #...# ..#.. #...# ...#.
.###. .###. ##### .###. ...#. .###. .###. ..#.. .###. .##..
"""


def _masks() -> Tensor:
    rows = [line.split() for line in _GLYPHS.split("\n") if line]
    return torch.tensor([[[c == "#" for c in row[d]] for row in rows] for d in range(10)])


DIGITS = _masks()  # (10, 7, 5) bool


def placed_masks() -> Tensor:
    """(10, 120, 16, 16): each digit at each position, 1 inside and 0 outside."""
    out = torch.zeros(10, ROOM[0] + 1, ROOM[1] + 1, SIZE, SIZE)
    for y in range(ROOM[0] + 1):
        for x in range(ROOM[1] + 1):
            out[:, y, x, y : y + HEIGHT, x : x + WIDTH] = DIGITS.float()
    return out.flatten(1, 2)


def gradient() -> Tensor:
    """(16,) from 0 at the top to 1 at the bottom: how much of the lower colour a row has."""
    return torch.arange(SIZE) / (SIZE - 1)


class Batch(NamedTuple):
    """Clips and all that they were drawn from."""

    video: Tensor  # (B, 3, F, 16, 16) in [-1, 1]
    digit: Tensor  # (B,)
    colours: Tensor  # (B, 3, 3) [part, rgb]: upper background, lower background, digit
    moving: Tensor  # (B, 2) bool, whether it moves along (y, x)
    phase: Tensor  # (B, 2) at frame 0: of the unfolded motion, or where it stands


def positions(moving: Tensor, phase: Tensor, frames: int, start: int = 0) -> Tensor:
    """(..., F, 2) of frames ``start`` .. ``start + frames - 1``, from (..., 2) each.

    Along an axis the digit stands still, or walks one pixel a frame and turns round at the walls:
    a phase on a circle of 2 room, folded.
    """
    room = torch.tensor(ROOM)
    time = torch.arange(start, start + frames)[:, None]
    at = phase[..., None, :] + time * moving[..., None, :]
    return room - (at % (2 * room) - room).abs()


def render(digit: Tensor, colours: Tensor, position: Tensor) -> Tensor:
    """(B, 3, F, 16, 16) from (B,), (B, 3, 3), (B, F, 2)."""
    place = position[..., 0] * (ROOM[1] + 1) + position[..., 1]
    mask = placed_masks().to(colours)[digit[:, None], place][:, None]
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

    digit, still = integers(10), integers(3)
    moving = torch.stack((still != 0, still != 1), dim=1)
    phase = torch.stack(
        [torch.where(moving[:, i], integers(2 * r), integers(r + 1)) for i, r in enumerate(ROOM)], 1
    )
    mean, sd = (torch.tensor(p)[:, None] for p in (MEAN, SD))
    colours = torch.full((batch, 3, 3), 2.0)
    while bool((colours.abs() > 1).any()):
        again = mean + sd * torch.randn(batch, 3, 3, generator=generator)
        colours = torch.where(colours.abs() > 1, again, colours)
    video = render(digit, colours, positions(moving, phase, frames))
    return Batch(video, digit, colours, moving, phase)


def continued(batch: Batch, frames: int) -> Tensor:
    """The clips of ``batch`` from their first frame on, (B, 3, frames, 16, 16)."""
    return render(batch.digit, batch.colours, positions(batch.moving, batch.phase, frames))


class Tables:
    """What both ``read`` and the exact denoiser need of digits at places.

    A frame of digit d at place p is a sum of three pictures: the two ends of the background outside
    the mask, and the mask. The mask is orthogonal to the others.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        g = gradient().double()[:, None].expand(SIZE, SIZE).flatten()
        self.ends = torch.stack((1 - g, g), dim=1)  # (256, 2)
        mask = placed_masks().double().flatten(0, 1).flatten(1)  # (1200, 256)
        inside = torch.stack((mask * (1 - g), mask * g), dim=2)  # (1200, 256, 2)
        # (1200, 2, 2): inner products of the two ends outside the mask
        self.gram = self.ends.T @ self.ends - torch.einsum("nki,kj->nij", inside, self.ends)
        self.area = mask.sum(1)  # (1200,)
        self.inside = inside.permute(1, 2, 0).reshape(SIZE * SIZE, -1)  # (256, 2 * 1200)
        for name, value in vars(self).items():
            setattr(self, name, value.to(dtype).contiguous())


class Reading(NamedTuple):
    """What ``read`` finds in every frame."""

    digit: Tensor  # (B, F)
    position: Tensor  # (B, F, 2)
    colours: Tensor  # (B, F, 3, 3) [part, rgb]
    residual: Tensor  # (B, F) mean square that digit, place and colours leave


def read(video: Tensor, chunk: int = 512) -> Reading:
    """The best digit, position and three colours of each frame of (B, 3, F, 16, 16).

    In closed form: least squares for all 1,200 digits and places; what leaves the least wins.
    """
    if video.ndim != 5 or video.shape[1] != 3 or video.shape[3:] != (SIZE, SIZE):
        raise ValueError(f"expected (B, 3, F, {SIZE}, {SIZE}), got {tuple(video.shape)}")
    b, _, f = video.shape[:3]
    frames = video.detach().transpose(1, 2).reshape(b * f, 3, SIZE * SIZE)
    tables = Tables()
    inverse = torch.linalg.inv(tables.gram.double()).float()
    parts = [_read(part.float(), tables, inverse) for part in frames.split(chunk)]
    digit, place, colours, residual = (torch.cat(p).unflatten(0, (b, f)) for p in zip(*parts))
    width = ROOM[1] + 1
    return Reading(digit, torch.stack((place // width, place % width), dim=-1), colours, residual)


def _read(frames: Tensor, tables: Tables, inverse: Tensor) -> tuple[Tensor, ...]:
    n = len(frames)
    # a constant added to a frame is added to its colours: without it fewer digits cancel
    mean = frames.mean(dim=2, keepdim=True)
    frames = frames - mean
    inside = (frames @ tables.inside).unflatten(2, (2, -1))  # (N, 3, 2, 1200)
    outside = (frames @ tables.ends)[..., None] - inside
    back = torch.einsum("nij,bcjn->bcin", inverse, outside)
    front = inside.sum(dim=2) / tables.area
    explained = (back * outside).sum(dim=(1, 2)) + (front.square() * tables.area).sum(dim=1)
    best = explained.argmax(dim=1)
    at = best[:, None, None].expand(n, 3, 1)
    back = back.gather(3, at[..., None].expand(n, 3, 2, 1))[..., 0]
    colours = torch.cat((back, front.gather(2, at)), dim=2).transpose(1, 2) + mean.transpose(1, 2)
    digit, place = best // PLACES, best % PLACES
    mask = placed_masks()[digit, place].flatten(1)[:, None]
    fit = (
        colours[:, :2].transpose(1, 2) @ tables.ends.T * (1 - mask) + colours[:, 2, :, None] * mask
    )
    residual = (frames + mean - fit).square().mean(dim=(1, 2))
    return digit, place, colours, residual

"""Moving digits: one of ten, in one colour, bounces over black. Clips are made on the fly.

What a clip shows persists: the digit, its colour and its speed. The continuation of a clip is
therefore known, and a change of digit or colour in a drawn one is seen at once.
"""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

FRAMES, SIZE = 16, 24
GLYPH = 15  # pixels of the square that a digit is drawn in
SPEED = (0.2, 0.9)  # pixels a frame, along each axis


def _glyphs() -> Tensor:
    """(10, GLYPH, GLYPH) in [0, 1], with Pillow's own font."""
    font = ImageFont.load_default(size=18)
    drawn = []
    for digit in "0123456789":
        left, top, right, bottom = font.getbbox(digit, stroke_width=0.5)
        picture = Image.new("L", (GLYPH, GLYPH))
        corner = ((GLYPH - left - right) / 2, (GLYPH - top - bottom) / 2)
        pen = ImageDraw.Draw(picture)
        pen.text(corner, digit, 255, font, stroke_width=0.5, stroke_fill=255)
        drawn.append(torch.from_numpy(np.array(picture)))
    return torch.stack(drawn).float() / 255


GLYPHS = _glyphs()


def fold(position: Tensor, room: float) -> Tensor:
    """A straight path, reflected at 0 and ``room``."""
    return room - (position % (2 * room) - room).abs()


def clips(batch: int, frames: int = FRAMES, generator: torch.Generator | None = None) -> Tensor:
    """(B, 3, F, 24, 24) in [-1, 1]."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator)

    digit = torch.randint(10, (batch,), generator=generator)
    hue = uniform()
    colour = torch.tensor([colorsys.hsv_to_rgb(h, 0.75, 1.0) for h in hue.tolist()])
    sign = 2.0 * torch.randint(2, (batch, 2), generator=generator) - 1
    speed = sign * (SPEED[0] + (SPEED[1] - SPEED[0]) * uniform(2))
    room = SIZE - GLYPH
    path = room * uniform(2)[:, None] + torch.arange(frames)[:, None] * speed[:, None]
    at = fold(path, room)  # (B, F, 2), the left upper corner as (x, y)
    # The glyph between pixels: bilinear, on a grid in the glyph's own coordinates.
    pixel = torch.arange(SIZE) + 0.5
    place = 2 * (pixel - at[..., None]) / GLYPH - 1  # (B, F, 2, SIZE)
    x = place[:, :, 0, None, :].expand(-1, -1, SIZE, -1)
    y = place[:, :, 1, :, None].expand(-1, -1, -1, SIZE)
    grid = torch.stack((x, y), dim=-1).flatten(0, 1)
    glyph = GLYPHS[digit][:, None, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    mask = F.grid_sample(glyph, grid, align_corners=False).unflatten(0, (batch, frames))
    return 2 * colour[:, :, None, None, None] * mask.transpose(1, 2) - 1

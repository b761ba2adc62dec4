"""From decoded pictures to tensors: alpha, luma, resizing.

A picture is a uint8 array (H, W, 3) or, with alpha, (H, W, 4); a tensor here is (..., H, W).
"""

from __future__ import annotations

import operator
from numbers import Integral
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def to_channels(picture: np.ndarray, channels: int, background: float) -> Tensor:
    """(H, W, 3 or 4) uint8 to (channels, H, W) uint8, with the strides of the array.

    With one or three channels there is no alpha; transparent pixels then show ``background``, a
    grey level in [0, 1]. One channel is the luma of ITU-R 601, as in Pillow's ``convert("L")``.
    """
    pixels = torch.from_numpy(picture)
    if channels == 4:
        if pixels.shape[-1] == 3:
            pixels = torch.cat([pixels, pixels.new_full((*pixels.shape[:2], 1), 255)], dim=-1)
        return pixels.permute(2, 0, 1)
    if pixels.shape[-1] == 4:
        pixels = _composite(pixels, background)
    if channels == 1:
        red, green, blue = pixels.int().unbind(-1)
        luma = (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16
        return luma.to(torch.uint8)[None]
    return pixels.permute(2, 0, 1)


def _composite(pixels: Tensor, background: float) -> Tensor:
    """Composite (H, W, 4) over a grey level; returns (H, W, 3)."""
    colour, alpha = pixels[..., :3].int(), pixels[..., 3:].int()
    behind = round(255 * background)
    mixed = (colour * alpha + behind * (255 - alpha) + 127).div(255, rounding_mode="floor")
    return mixed.to(torch.uint8)


def resize_crop(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize ``(..., H, W)`` (bilinear, antialiased) to cover ``size``, then crop the centre.

    uint8 pixels are within 1 of Pillow's; floats are in [0, 1].
    """
    height, width = sides(size)
    h, w = x.shape[-2:]
    scale = max(height / h, width / w)
    new = (max(height, round(h * scale)), max(width, round(w * scale)))
    if new != (h, w):
        # Keep the strides of a picture: torch is ten times as fast on pixels (H, W, 3).
        flat = x[None] if x.ndim == 3 else x.reshape(-1, 1, h, w)
        flat = F.interpolate(flat, size=new, mode="bilinear", antialias=True, align_corners=False)
        if flat.is_floating_point():
            flat = flat.clamp(0, 1)
        x = flat.reshape(*x.shape[:-2], *new)
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return x[..., top : top + height, left : left + width].contiguous()


def resize_picture(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """``resize_crop`` for pixels (C, H, W) uint8; the last of four channels is alpha.

    Colours are weighted by alpha, as in Pillow; otherwise the invisible colours of transparent
    pixels would bleed into the edges.
    """
    if x.shape[0] != 4 or bool((x[3] == 255).all()):
        return resize_crop(x, size)
    alpha = x[3:].float() / 255
    mixed = resize_crop(torch.cat([x[:3] * alpha / 255, alpha]), size)
    colour = torch.where(mixed[3:] > 0, mixed[:3] / mixed[3:], 0.0)
    return (torch.cat([colour.clamp(max=1), mixed[3:]]) * 255).round().to(torch.uint8)


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W) of a size. Raises TypeError unless both are ints, ValueError unless positive."""
    try:
        pair: Any = (size, size) if isinstance(size, Integral) else size
        height, width = map(operator.index, pair)
    except (TypeError, ValueError):
        raise TypeError(f"size must be an int or (height, width), got {size!r}") from None
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {size}")
    return height, width

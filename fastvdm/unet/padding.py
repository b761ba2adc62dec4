"""Frames whose size no network has, made larger for it and cut again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_edges(x: Tensor, factor: int) -> Tensor:
    """(B, C, F, H, W) with H and W up to the next multiples of ``factor``, the border repeated,
    half of it before and the rest behind. By concatenation: the backward pass of torch's padding
    adds in an order of its own on a GPU."""
    for dim in (3, 4):
        more = -x.shape[dim] % factor
        if more:
            parts = [x]
            if more // 2:
                parts.insert(0, _repeated(x.narrow(dim, 0, 1), dim, more // 2))
            parts.append(_repeated(x.narrow(dim, x.shape[dim] - 1, 1), dim, more - more // 2))
            x = torch.cat(parts, dim)
    return x


def _repeated(edge: Tensor, dim: int, count: int) -> Tensor:
    shape = list(edge.shape)
    shape[dim] = count
    return edge.expand(shape)


def crop(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, F, H', W', C) back to ``size`` (H, W), what ``pad_edges`` added cut off."""
    for dim, extent in zip((2, 3), size):
        more = x.shape[dim] - extent
        x = x.narrow(dim, more // 2, extent) if more else x
    return x

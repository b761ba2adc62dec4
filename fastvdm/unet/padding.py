"""Pad frames to a size that the network takes, and crop its output to the original size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_edges(x: Tensor, factor: int) -> Tensor:
    """Pad x (B, C, F, H, W): H and W become the next multiples of ``factor``. The border pixels are
    repeated, half of the padding before and the rest behind. It concatenates because the backward
    pass of torch's padding sums in another order on a GPU."""
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
    """Crop x (B, F, H', W', C) to ``size`` (H, W): remove what ``pad_edges`` added."""
    for dim, extent in zip((2, 3), size):
        more = x.shape[dim] - extent
        x = x.narrow(dim, more // 2, extent) if more else x
    return x

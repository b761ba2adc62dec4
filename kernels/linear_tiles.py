"""What the kernels of ``norm_linear`` and ``linear_residual`` share: the tile, its pointers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class LinearConfig:
    BM: int  # rows of a tile
    BN: int  # features of a tile
    BK: int  # inner axis of a step
    num_warps: int
    num_stages: int


@triton.jit
def tile_rows(block, rows, BM: tl.constexpr):
    """First row of a tile in int64, since rows * features exceeds 2^31; its rows from there in
    int32, the last one again beyond the end, so that only stores need a mask; and which exist."""
    first = block.to(tl.int64) * BM
    left = tl.minimum(rows - first, BM).to(tl.int32)
    local = tl.arange(0, BM)
    return first, tl.minimum(local, left - 1), local < left


@triton.jit
def row_block(ptr, row, first, K, BK: tl.constexpr):
    """Columns [first, first + BK) of rows of width K, (BM, BK); zero beyond K."""
    offs = first + tl.arange(0, BK)[None, :]
    return tl.load(ptr + row[:, None] * K + offs, mask=offs < K, other=0.0)


@triton.jit
def weight_block(ptr, feature, first, K, BK: tl.constexpr):
    """Columns [first, first + BK) of rows ``feature`` of a weight (N, K), transposed: (BK, BN)."""
    offs = first + tl.arange(0, BK)[:, None]
    return tl.load(ptr + feature[None, :] * K + offs, mask=offs < K, other=0.0)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right by the library in the dtype that they share, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right

"""Shared by the norm's kernels: tiles and chunks, parameters, the elementwise arithmetic.

``__init__.py`` has the mathematics and the names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import LOG2E, cdiv, next_power_of_2, reciprocal, sigmoid, widened
from fastvdm.runtime.device import facts

# Networks have many values of these and no access gains from them, so there is no specialisation
# on 1 and on multiples of 16. ``frames`` is a divisor in 64 bits, so 1 stays a constant.
GENERAL: dict[str, Any] = dict(
    do_not_specialize=["N", "L", "groups", "rows", "chunks", "part_rows", "part_chunks", "total"],
    do_not_specialize_on_alignment=["frames"],
)


# The same for kernels that use channels only to find their group.
BY_GROUP = GENERAL | {"do_not_specialize_on_alignment": ["frames", "group_width"]}


class Config(NamedTuple):
    block_c: int  # channels per tile
    block_l: int  # pixels per tile
    num_warps: int


def programs(device: torch.device, num_warps: int, warps: int = 32) -> int:
    """``warps`` per multiprocessor; few under the interpreter."""
    found = facts(device)
    return warps // num_warps * found.multiprocessors if found.is_gpu else 4


def split_for_sums(
    device: torch.device, outer: int, length: int, cfg: Config, warps: int = 32
) -> tuple[int, int]:
    """(pixels per chunk, chunks) of a reduction with ``outer`` programs per chunk: as few chunks as
    fill the GPU, of at least two tiles."""
    tiles = cdiv(length, cfg.block_l)
    wanted = max(1, min(cdiv(tiles, 2), programs(device, cfg.num_warps, warps) // outer))
    rows = cdiv(tiles, wanted) * cfg.block_l
    return rows, cdiv(length, rows)


def split_for_map(
    device: torch.device, outer: int, length: int, cfg: Config, least: int = 1
) -> tuple[int, int]:
    """The same for an elementwise pass: ``least`` to 16 tiles, which share the loads of the
    parameters."""
    tiles = outer * cdiv(length, cfg.block_l)
    rows = max(least, min(16, tiles // programs(device, cfg.num_warps))) * cfg.block_l
    return rows, cdiv(length, rows)


def extents(x: Tensor, x2: Tensor | None, per_frame: bool) -> tuple[int, int, int, int, int]:
    """(N, L, C1, C2, frames): N statistics, each over L pixels; ``frames`` of them per sample."""
    b, f, h, w, c1 = x.shape
    c2 = 0 if x2 is None else x2.shape[-1]
    return (b * f, h * w, c1, c2, f) if per_frame else (b, f * h * w, c1, c2, 1)


# The stride that marks a missing vector; a multiple of 16, like most strides.
ABSENT = -16


def row_stride(t: Tensor | None) -> int:
    return ABSENT if t is None else t.stride(0)


def vectors(
    x: Tensor, x_bias: Tensor | None, params: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor | None, ...], tuple[int, int, int]]:
    """x_bias, weight, bias, scale, shift as kernels take them, and the strides of scale, shift and
    x_bias. x replaces missing vectors, so that they need no kernel of their own."""
    weight, bias, scale, shift = params
    at = [x if t is None else t for t in (x_bias, scale, shift)]
    strides = row_stride(scale), row_stride(shift), ABSENT if x_bias is None else 0
    return (at[0], weight, bias, *at[1:]), strides


def merge_tile(chunks: int, width: int, most: int = 16) -> dict[str, int]:
    """Chunks and channels that a merge holds at once, 8 values per thread. With many chunks it has
    ``most`` warps, because each step waits for memory."""
    block_c = min(64, next_power_of_2(width))
    num_warps = 4 if chunks * block_c <= 1024 else most
    return dict(BLOCK_K=256 * num_warps // block_c, BLOCK_C=block_c, num_warps=num_warps)


@triton.jit
def quotient(cols, width):
    """cols // width for channels, in fp32: exact below 2^20, at a seventh of a division."""
    return ((cols.to(tl.float32) + 0.5) * (1.0 / width)).to(tl.int32)


@triton.jit
def vector(ptr, stride, row, cols, mask, ACC: tl.constexpr):
    """A row of an optional vector; 0 if it is missing."""
    return tl.load(ptr + row * stride + cols, mask=mask & (stride >= 0), other=0.0).to(ACC)


@triton.jit
def affine(
    w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols, mask,
    ACC: tl.constexpr,
):  # fmt: skip
    """gain and offset of t = x_hat gain + offset, both (BLOCK_C,)."""
    gain = tl.load(w_ptr + cols, mask=mask, other=0.0).to(ACC)
    offset = tl.zeros_like(gain)
    if b_ptr is not None:
        offset = tl.load(b_ptr + cols, mask=mask, other=0.0).to(ACC)
    if scale_ptr is not None:
        film = 1.0 + vector(scale_ptr, stride_scale, batch, cols, mask, ACC)
        gain *= film
        offset *= film
    if shift_ptr is not None:
        offset += vector(shift_ptr, stride_shift, batch, cols, mask, ACC)
    return gain, offset


@triton.jit
def in_powers_of_2(gain, offset, ACT: tl.constexpr):
    """gain and offset of -log2(e) t, which ``store_act`` takes if there is a SiLU: its exponential
    is then exp2(t), without an extra product."""
    if ACT:
        return gain * -LOG2E, offset * -LOG2E
    else:
        return gain, offset


@triton.jit
def store_act(t, y_ptr, res_ptr, drop_ptr, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """y = SiLU(t) dropout_mask + residual at ``offs`` from the pointers, which may be tiles of
    pointers themselves."""
    if ACT:
        t *= reciprocal(-LOG2E * tl.exp2(t) - LOG2E)
    if drop_ptr is not None:
        t *= tl.load(drop_ptr + offs, mask=mask, other=0.0).to(ACC)
    if res_ptr is not None:
        t += widened(tl.load(res_ptr + offs, mask=mask, other=0.0), ACC)
    tl.store(y_ptr + offs, t.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_dt(t, dy_ptr, drop_ptr, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """dt = dy dropout_mask SiLU'(t); 0 outside the mask, where t must be finite."""
    dt = widened(tl.load(dy_ptr + offs, mask=mask, other=0.0), ACC)
    if drop_ptr is not None:
        dt *= tl.load(drop_ptr + offs, mask=mask, other=0.0).to(ACC)
    if ACT:
        sig = sigmoid(t)
        dt *= sig + sig * (t - t * sig)
    return dt

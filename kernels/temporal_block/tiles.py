"""Tiles of the kernels of temporal_block: pixels with all their frames, weights, probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvdm.kernels.axis_attention.shared import skew
from fastvdm.kernels.common import dot_x3, next_power_of_2
from fastvdm.kernels.tuned import tuned

_REGISTER_CHANNELS = 128  # widest row whose output projection accumulates in registers
COLUMNS = tl.constexpr(64)  # columns per block of the products after the loop over the heads


@dataclass(frozen=True)
class Config:
    P: int  # pixels per tile
    BN: int  # frames, padded
    BC: int  # channels, padded
    BD: int  # features of a head, padded
    num_warps: int
    num_stages: int


@tuned(
    "temporal_block",
    frames=lambda n: max(16, next_power_of_2(n)),
    pixels=lambda n: min(64, next_power_of_2(n)),
)
def pick_config(
    frames: int,
    channels: int,
    dim: int,
    pixels: int,
    itemsize: int,
    *,
    tables: bool,
    backward: bool,
    major: int,
) -> Config:
    """Pixels per tile: each tile reads all weights, so it has as many rows as the registers allow.
    The limits are those up to which ptxas does not spill (``bench/aot.py``). ``tables`` are Shaw's,
    ``major`` is the device's compute capability, ``itemsize`` that of x. NOT MEASURED."""
    bn, bd = max(16, next_power_of_2(frames)), max(16, next_power_of_2(dim))
    bc = max(16, next_power_of_2(channels))
    wide, rows, warps = itemsize > 2, 128, 8
    if backward:  # few classes reach it, see ``fuse_backward``
        rows = 128 if major >= 9 else 64
    elif major < 9 and (bc > 64 or (tables and (bd > 32 or bn > 16))):
        rows = 32
    elif major < 9:
        rows = 64 if wide and bd > 32 else 128
    elif (tables and bd > 32) or (bc == _REGISTER_CHANNELS and (bd > 32 or wide or tables)):
        rows = 32 if wide and tables and bd <= 32 else 64
    elif major == 9 and not (wide or tables) and bd <= 32 and bn == 16:
        # Two blocks per multiprocessor for 4% more instructions; at batch 1 twice the programs.
        rows, warps = 64, 4
    p = min(rows // bn, next_power_of_2(pixels))
    return Config(p, bn, bc, bd, num_warps=warps, num_stages=1)


# Specialising on these gains nothing.
_COUNTS = ["pixels", "area", "attended", "tiles", "walkers"]


@triton.jit
def _rows(tile, pixels, area, F, focus_ptr, P: tl.constexpr, BN: tl.constexpr):
    """For each row of the tile (P * BN): its row of x (int64), its frame and whether it exists; and
    the focus flag of each pixel (P)."""
    offs = tl.arange(0, P * BN)
    pixel, frame = tl.cast(tile * P, tl.int32) + offs // BN, offs % BN
    row = ((pixel // area).to(tl.int64) * F + frame) * area + pixel % area
    inside = (pixel < pixels) & (frame < F)
    focused = tl.zeros([P], tl.int1)
    if focus_ptr is not None:
        pixel = tl.cast(tile * P, tl.int32) + tl.arange(0, P)
        focused = tl.load(focus_ptr + pixel // area, mask=pixel < pixels, other=0) != 0
    return row, frame, inside, focused


@triton.jit
def _load_block(ptr, row, inside, stride, first, width, BLOCK: tl.constexpr):
    """Columns [first, first + BLOCK) below ``width`` of the existing rows, (rows, BLOCK)."""
    offs = first + tl.arange(0, BLOCK)
    mask = inside[:, None] & (offs < width)[None, :]
    at = row.to(tl.int64)[:, None] * stride + offs[None, :]
    return tl.load(ptr + at, mask=mask, other=0.0)


@triton.jit
def _load_matrix(
    ptr, first_m, first_n, stride, height, width, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """A (BM, BN) block of a (height, width) matrix."""
    offs_m, offs_n = first_m + tl.arange(0, BM)[:, None], first_n + tl.arange(0, BN)[None, :]
    mask = (offs_m < height) & (offs_n < width)
    return tl.load(ptr + offs_m * stride + offs_n, mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, row, inside, stride, value, width, BLOCK: tl.constexpr):
    """Store the first ``width`` columns of value to the existing rows."""
    offs = tl.arange(0, BLOCK)
    mask = inside[:, None] & (offs < width)[None, :]
    at = ptr + row.to(tl.int64)[:, None] * stride + offs[None, :]
    tl.store(at, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _vector(ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    return tl.load(ptr + offs, mask=offs < SIZE, other=0.0).to(ACC)


@triton.jit
def _statistics(x, eps, C: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """mean and rstd of each row, in two passes over the registers."""
    x = x.to(ACC)
    mean = tl.sum(x, 1) / C
    centred = tl.where((tl.arange(0, BC) < C)[None, :], x - mean[:, None], 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)


@triton.jit
def _normalise(
    x, mean, rstd, w_ptr, b_ptr, C: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The affine LayerNorm of (rows, BC), zero beyond C."""
    y = (x.to(ACC) - mean[:, None]) * rstd[:, None] * _vector(w_ptr, C, BC, ACC)[None, :]
    if b_ptr is not None:
        y += _vector(b_ptr, C, BC, ACC)[None, :]
    return y


@triton.jit
def _projection(
    ptr, first, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Rows [first, first + D) of qkv_weight (.., C), transposed: (BC, BD)."""
    offs_c, offs_d = tl.arange(0, BC)[:, None], tl.arange(0, BD)[None, :]
    at = ptr + first * C + offs_d * C + offs_c
    if C == BC and D == BD:
        return tl.load(at)
    return tl.load(at, mask=(offs_c < C) & (offs_d < D), other=0.0)


@triton.jit
def _out_projection(
    ptr, first, inner, C: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Columns [first, first + D) of out_weight (C, inner): (BC, BD)."""
    offs_c, offs_d = tl.arange(0, BC)[:, None], tl.arange(0, BD)[None, :]
    at = ptr + first + offs_c * inner + offs_d
    if C == BC and D == BD:
        return tl.load(at)
    return tl.load(at, mask=(offs_c < C) & (offs_d < D), other=0.0)


@triton.jit
def _project(
    xn, w, bias_ptr, first,
    ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """xn w + bias in ACC, (ROWS, BD)."""
    y = dot_x3(xn, w, tl.zeros([ROWS, BD], ACC))
    if bias_ptr is not None:
        y += _vector(bias_ptr + first, D, BD, ACC)[None, :]
    return y


@triton.jit
def _probabilities(
    q, k, rel_k, bias_ptr, focused, F, attended, scale,
    MASKED: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """p (P, BN, BN) over the first ``attended`` keys; the identity for focused samples and for
    frames from ``attended`` on; zero in rows that are all -inf."""
    keys = tl.trans(k.reshape(P, BN, BD), 0, 2, 1)
    s = dot_x3(q.reshape(P, BN, BD), keys, tl.zeros([P, BN, BN], ACC))
    if rel_k is not None:
        shift = tl.arange(0, P * BN) % BN - (F - 1)
        product = dot_x3(q, tl.trans(rel_k), tl.zeros([P * BN, 2 * BN], ACC))
        s += skew(product, shift, P * BN, BN).reshape(P, BN, BN)
    s = s * scale
    i, j = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + i * F + j, mask=(i < F) & (j < F), other=0.0)
        s += bias.to(ACC)[None, :, :]
    s = tl.where((j < attended)[None, :, :], s, float("-inf"))
    top = tl.max(s, 2)
    p = tl.exp(s - tl.where(top == float("-inf"), 0.0, top)[:, :, None])
    total = tl.sum(p, 2)
    p = p / tl.where(total == 0.0, 1.0, total)[:, :, None]
    if MASKED:
        alone = focused[:, None, None] | (i >= attended)[None, :, :]
        p = tl.where(alone, tl.where(i == j, 1.0, 0.0)[None, :, :], p)
    return p

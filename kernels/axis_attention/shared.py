"""Shared by the short and the long kernels of ``axis_attention``.

A tile reads the Shaw tables as one row per distance (``by_distance``), so their term is one product
with consecutive distances, which is then skewed: ``skew`` gathers along the row for logits,
``unskew`` for their gradients. Gradients of the tables also have one row per distance until
``roll_up``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.common import INTERPRET, acc_dtype, next_power_of_2
from fastvdm.kernels.limits import TIME


@dataclass(frozen=True)
class Geometry:
    """One call as the kernels see it: (batch, outer, n) sequences per head, with their strides."""

    batch: int
    outer: int
    total: int  # length of the sequence in memory
    n: int  # attended positions; the others are images
    heads: int
    d: int
    qkv: tuple[int, int, int, int, int]  # strides of batch, outer, sequence, q|k|v, head
    out: tuple[int, int, int]  # strides of a contiguous (B, F, H, W, heads, D); head has stride D
    dqkv: tuple[int, int, int]  # strides of a contiguous (B, F, H, W, 3, heads, D)


def _walk(t: Tensor, axis: int) -> tuple[int, int, int]:
    """Strides of (batch, outer, sequence); consecutive pixels of (H, W) have one stride."""
    pixel = t.stride(3) if t.shape[3] > 1 else t.stride(2)
    return (t.stride(0), pixel, t.stride(1)) if axis == TIME else (t.stride(0), t.stride(1), pixel)


def strides(t: Tensor, axis: int) -> tuple[int, ...]:
    """Strides of (B, F, H, W, [3,] heads, D) without the last axis, in the order kernels take."""
    return (*_walk(t, axis), *t.stride()[4:-1])


def geometry(qkv: Tensor, axis: int, num_images: int) -> Geometry:
    b, f, h, w, _, heads, d = qkv.shape
    pixels, row = h * w, heads * d
    total, outer = (f, pixels) if axis == TIME else (pixels, f)
    frame = (f * pixels * row, row, pixels * row)
    out = frame if axis == TIME else (frame[0], frame[2], frame[1])
    return Geometry(
        batch=b,
        outer=outer,
        total=total,
        n=total - num_images,
        heads=heads,
        d=d,
        qkv=strides(qkv, axis),  # type: ignore[arg-type]
        out=out,
        dqkv=(3 * out[0], 3 * out[1], 3 * out[2]),
    )


def roll_up(grad: Tensor, table: Tensor) -> Tensor:
    """grad (parts, heads, 2N-1, D) by distance, in the accumulator's dtype → the gradient of the
    table. Parts, clipped ends, and heads that share the table are summed in order. One launch."""
    parts, heads, rows, d = grad.shape
    result = torch.empty_like(table)
    _roll_up_kernel[(table.shape[0] * table.shape[1],)](
        *(grad, result, parts, heads, table.shape[0], rows, table.shape[1]),
        D=d,
        BLOCK=64,
        BD=next_power_of_2(d),
        ACC=acc_dtype(grad.dtype),
        num_warps=8,
    )
    return result


@triton.jit(do_not_specialize=["parts", "heads", "tables", "rows", "width"])
def _roll_up_kernel(
    grad_ptr, table_ptr, parts, heads, tables, rows, width,
    D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A row of the table: row r of width 2R+1 sums the distances that are clipped to r - R."""
    row, table = tl.program_id(0) % width, tl.program_id(0) // width
    # The first distance, counted from -(N-1), and the number of distances.
    shift = rows // 2 - width // 2
    first = tl.maximum(tl.where(row == 0, 0, row + shift), 0)
    last = tl.minimum(tl.where(row == width - 1, rows - 1, row + shift), rows - 1)
    shared = heads // tables  # heads that share the table
    each = tl.maximum(last - first + 1, 0)
    offs_d = tl.arange(0, BD)
    total = tl.zeros([BLOCK, BD], ACC)
    for start in tl.range(0, parts * shared * each, BLOCK):
        index = start + tl.arange(0, BLOCK)
        part, head = index // each // shared, index // each % shared + table
        at = (part * heads + head).to(tl.int64) * rows + first + index % each
        mask = (index < parts * shared * each)[:, None] & (offs_d < D)[None, :]
        total += tl.load(grad_ptr + at[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    to = table_ptr + tl.program_id(0).to(tl.int64) * D + offs_d
    tl.store(to, tl.sum(total, 0).to(table_ptr.dtype.element_ty), mask=offs_d < D)


def prepared(options: AttentionOptions, n: int) -> AttentionOptions:
    """The options as kernels take them: the bias of ``n`` attended positions, masks as bytes."""
    bias, focus_mask = options.bias, options.focus_mask
    return options._replace(
        bias=None if bias is None else bias[:, :n, :n].contiguous(),
        focus_mask=None if focus_mask is None else focus_mask.view(torch.uint8),
    )


def table_sizes(options: AttentionOptions) -> list[int]:
    """Strides of the first axis of the two tables, 0 if the heads share one; then their R."""
    tables = options.rel_k, options.rel_v
    strides = [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in tables]
    return [*strides, *(0 if t is None else t.shape[1] // 2 for t in tables)]


def split_scale(sm_scale: float) -> tuple[float, float]:
    """A kernel argument is fp32; the second part restores the digits that an fp64 kernel needs."""
    (high,) = struct.unpack("f", struct.pack("f", sm_scale))
    return high, sm_scale - high


@triton.jit
def by_distance(ptr, first, reach, n, ROWS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr):
    """(ROWS, BD): the rows of a Shaw table (2 * reach + 1, D) for the distances from ``first`` on;
    zero for distances that do not occur among n positions."""
    distance, offs_d = first + tl.arange(0, ROWS), tl.arange(0, BD)
    rows = tl.minimum(tl.maximum(distance, -reach), reach) + reach
    mask = ((distance > -n) & (distance < n))[:, None] & (offs_d < D)[None, :]
    return tl.load(ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def rotary_table(
    rot_ptr, offs_n, n, total, HALF: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """cos, sin (BLOCK, BD/2); 1 and 0 beyond the rotated features."""
    offs = tl.arange(0, BD // 2)
    at = offs_n[:, None] * HALF + offs[None, :]
    mask = (offs_n < n)[:, None] & (offs < HALF)[None, :]
    cos = tl.load(rot_ptr + at, mask=mask, other=1.0).to(ACC)
    sin = tl.load(rot_ptr + total * HALF + at, mask=mask, other=0.0).to(ACC)
    return cos, sin


@triton.jit
def rotate(x, cos, sin):
    """Rotate the pairs (2i, 2i+1) of the last axis of x by (cos, sin), one entry per pair."""
    even, odd = tl.split(x.reshape(x.shape[:-1] + [x.shape[-1] // 2, 2]))
    return tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(x.shape)


@triton.jit
def pinned(x):
    """x, computed once. Otherwise the compiler repeats cheap arithmetic for each layout that a
    product needs: 60-100 registers for rotated q and k (Triton 3.6, sm_90)."""
    if INTERPRET or x.dtype.primitive_bitwidth == 64:
        return x
    elif x.dtype.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2
        )
    else:
        return tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=1
        )


@triton.jit
def skew(by_distance, shift, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(ROWS, 2*COLS) per query and distance → (ROWS, COLS) per query and key: for row r, key j
    takes column j - shift[r]."""
    at = tl.arange(0, COLS)[None, :] - shift[:, None]
    at = tl.minimum(tl.maximum(at, 0), 2 * COLS - 1)
    return tl.gather(by_distance, at, 1)


@triton.jit
def unskew(by_key, shift, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The transpose of ``skew``: (ROWS, COLS) → (ROWS, 2*COLS), zero where there is no key."""
    at = tl.arange(0, 2 * COLS)[None, :] + shift[:, None]
    inside = (at >= 0) & (at < COLS)
    moved = tl.gather(by_key, tl.where(inside, at, 0), 1)
    return tl.where(inside, moved, 0.0)

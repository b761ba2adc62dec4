"""What the short and the long kernels of ``axis_attention`` share.

The Shaw tables arrive unrolled to one row per distance -(N-1) .. N-1 (``unroll_table``), so that
row j-i+N-1 belongs to query i and key j. The term of a tile is then one product with consecutive
rows, skewed: a gather along the row, ``skew`` for logits, ``unskew`` for their gradients.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.common import INTERPRET
from fastvdm.kernels.limits import TIME


@dataclass(frozen=True)
class Geometry:
    """One call seen from the kernels: (batch, outer, n) sequences per head, with their strides."""

    batch: int
    outer: int
    total: int  # length of the sequence in memory
    n: int  # of which attended; the rest are images
    heads: int
    d: int
    qkv: tuple[int, int, int, int, int]  # strides of batch, outer, sequence, q|k|v, head
    out: tuple[int, int, int]  # the same of a contiguous (B, F, H, W, heads, D); head has stride D
    dqkv: tuple[int, int, int]  # of a contiguous (B, F, H, W, 3, heads, D)


def _walk(t: Tensor, axis: int) -> tuple[int, int, int]:
    """Strides of (batch, outer, sequence); (H, W) walks with one stride."""
    pixel = t.stride(3) if t.shape[3] > 1 else t.stride(2)
    return (t.stride(0), pixel, t.stride(1)) if axis == TIME else (t.stride(0), t.stride(1), pixel)


def strides(t: Tensor, axis: int) -> tuple[int, ...]:
    """Of (B, F, H, W, [3,] heads, D) without the last axis, in the order the kernels take them."""
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


def _distances(table: Tensor, n: int) -> Tensor:
    reach = table.shape[1] // 2
    return torch.arange(1 - n, n, device=table.device).clamp(-reach, reach) + reach


def unroll_table(table: Tensor | None, n: int) -> Tensor | None:
    """Shaw table (T, 2R+1, D) → (T, 2N-1, D): one row per distance."""
    return None if table is None else table.index_select(1, _distances(table, n))


def roll_up(grad: Tensor, table: Tensor) -> Tensor:
    """Transpose of ``unroll_table``: grad (heads, 2N-1, D) of the unrolled rows → gradient of the
    table, the clipped ends summed in order, the heads summed if they share it."""
    rows, reach, n = grad.shape[1], table.shape[1] // 2, (grad.shape[1] + 1) // 2
    if table.shape[0] == 1:
        grad = grad.sum(0, keepdim=True)
    result = grad.new_zeros(table.shape)
    inner = min(reach, n - 1)  # distances -inner .. inner have their own row
    result[:, reach - inner : reach + inner + 1] = grad[:, n - 1 - inner : n + inner]
    if inner < n - 1:
        result[:, 0] += grad[:, : n - 1 - inner].sum(1)
        result[:, -1] += grad[:, rows - (n - 1 - inner) :].sum(1)
    return result


def prepared(options: AttentionOptions, n: int) -> AttentionOptions:
    """As kernels read them: the bias of the ``n`` attended positions, tables unrolled, bytes."""
    bias, rel_k, rel_v, _, focus_mask, _ = options
    return options._replace(
        bias=None if bias is None else bias[:, :n, :n].contiguous(),
        rel_k=unroll_table(rel_k, n),
        rel_v=unroll_table(rel_v, n),
        focus_mask=None if focus_mask is None else focus_mask.view(torch.uint8),
    )


def table_strides(options: AttentionOptions) -> list[int]:
    """Strides of the first axis of the unrolled tables; 0 where the heads share one."""
    tables = options.rel_k, options.rel_v
    return [0 if t is None or t.shape[0] == 1 else t.stride(0) for t in tables]


def split_scale(sm_scale: float) -> tuple[float, float]:
    """A kernel argument is fp32: the second restores the digits an fp64 kernel needs."""
    (high,) = struct.unpack("f", struct.pack("f", sm_scale))
    return high, sm_scale - high


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
    """The pairs (2i, 2i+1) of the last axis of x turned by (cos, sin), one entry a pair."""
    even, odd = tl.split(x.reshape(x.shape[:-1] + [x.shape[-1] // 2, 2]))
    return tl.join(even * cos - odd * sin, odd * cos + even * sin).reshape(x.shape)


@triton.jit
def pinned(x):
    """x, computed once. The compiler would repeat cheap arithmetic for every layout that a product
    wants of its result: 60-100 registers for rotated q and k (Triton 3.6, sm_90)."""
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
    """(ROWS, 2*COLS) per query and distance → (ROWS, COLS) per query and key: row r, key j takes
    column j - shift[r]."""
    at = tl.arange(0, COLS)[None, :] - shift[:, None]
    at = tl.minimum(tl.maximum(at, 0), 2 * COLS - 1)
    return tl.gather(by_distance, at, 1)


@triton.jit
def unskew(by_key, shift, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Transpose of ``skew``: (ROWS, COLS) → (ROWS, 2*COLS), zero where no key lies."""
    at = tl.arange(0, 2 * COLS)[None, :] + shift[:, None]
    inside = (at >= 0) & (at < COLS)
    moved = tl.gather(by_key, tl.where(inside, at, 0), 1)
    return tl.where(inside, moved, 0.0)

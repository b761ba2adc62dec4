"""x + out(attention(LayerNorm_C(x))) over the frames of each pixel, x read once and written once.

    xn = (x - mean) rstd w + b,  q, k, v = xn Wᵀ + b,  p = softmax(D^-½ (q'k' + q rel_k) + bias)
    y = x + (p (v + rel_v)) W_outᵀ + b_out,   q', k' with the rotary embedding

Shaw tables, rel_k and rel_v, stand neither beside a rotary embedding nor beside a bias.

x (B, F, H, W, C). A program holds P pixels with all their frames, padded to BN = 16 or 32: P * BN
rows of all C channels, and walks over the heads; the weights stream from the L2. 2*M*C*e bytes and
8*M*C*inner + 4*M*F*inner FLOPs (M rows of x, inner = heads * D).

The backward recomputes everything from x in one kernel: dx; the gradients of the norm and of the
bias leave one partial per program, summed in a fixed order (no atomics: two runs give the same
bits). The gradients of the two projections are sums over every row of x of a matrix
as large as the weights. Per-program partials of those would be 4*C*inner*4 bytes each, more than
the rows a program owns. So the kernel stores xn, dq|dk|dv and the attention's output, in the dtype
of the weights, and library GEMMs reduce them: only when the weights are trained, and only for the
length of this call. With frozen weights nothing but dx is written: 3*M*C*e bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels import axis_attention
from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.axis_attention.shared import (
    by_distance,
    prepared,
    rotary_table,
    rotate,
    skew,
    split_scale,
    table_sizes,
    unskew,
)
from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    dot_x3,
    major,
    next_power_of_2,
    program_budget,
)
from fastvdm.kernels.limits import TIME
from fastvdm.kernels.tuned import tuned

_REGISTER_CHANNELS = 128  # widest row whose out-projection accumulates in registers
COLUMNS = tl.constexpr(64)  # of a block of the products that follow the loop over the heads


@dataclass(frozen=True)
class Config:
    P: int  # pixels of a tile
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
    """Pixels a tile: each tile streams all weights, so as many rows as the registers allow. The
    limits are those at which ptxas does not spill (``bench/aot.py``): ``tables`` are Shaw's,
    ``major`` is the device's compute capability, ``itemsize`` that of x. NOT MEASURED."""
    bn, bd = max(16, next_power_of_2(frames)), max(16, next_power_of_2(dim))
    bc = max(16, next_power_of_2(channels))
    wide, rows, warps = itemsize > 2, 128, 8
    if backward:  # of few classes, see ``fuse_backward``
        rows = 128 if major >= 9 else 64
    elif major < 9 and (bc > 64 or (tables and (bd > 32 or bn > 16))):
        rows = 32
    elif major < 9:
        rows = 64 if wide and bd > 32 else 128
    elif (tables and bd > 32) or (bc == _REGISTER_CHANNELS and (bd > 32 or wide or tables)):
        rows = 32 if wide and tables and bd <= 32 else 64
    elif major == 9 and not (wide or tables) and bd <= 32 and bn == 16:
        # Two blocks a multiprocessor for 4% more instructions; at batch 1 twice the programs.
        rows, warps = 64, 4
    p = min(rows // bn, next_power_of_2(pixels))
    return Config(p, bn, bc, bd, num_warps=warps, num_stages=1)


# Nothing is gained by knowing them.
_COUNTS = ["pixels", "area", "attended", "tiles", "walkers"]


@triton.jit
def _rows(tile, pixels, area, F, focus_ptr, P: tl.constexpr, BN: tl.constexpr):
    """Row of x (int64) of each row of the tile, its frame and whether it exists (P * BN); the
    focus flag of each pixel (P)."""
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
    """Columns [first, first + BLOCK) below ``width`` of the rows that exist, (rows, BLOCK)."""
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
    """The first ``width`` columns of value to the rows that exist."""
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
    """p (P, BN, BN): over the first ``attended`` keys; the identity for focused samples and for
    the frames from ``attended`` on; zero in rows of nothing but -inf."""
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


@triton.jit(do_not_specialize=[*_COUNTS, "reach_k", "reach_v"])
def _fwd_kernel(
    x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr,
    out_bias_ptr, bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr,
    scratch_ptr,
    pixels, area, F, attended, heads, tiles, walkers, scale_high, scale_low, eps,
    stride_rk, stride_rv, reach_k, reach_v,
    MASKED: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    walker = tl.program_id(0).to(tl.int64)
    for tile in tl.range(walker, tiles, walkers):
        _fwd_tile(
            x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr,
            out_weight_ptr, out_bias_ptr, bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr,
            scratch_ptr, tile, walker, pixels, area, F, attended, heads,
            scale_high, scale_low, eps, stride_rk, stride_rv, reach_k, reach_v,
            MASKED, C, D, HALF, P, BN, BC, BD, ACC,
        )  # fmt: skip


@triton.jit
def _fwd_tile(
    x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr,
    out_bias_ptr, bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, scratch_ptr,
    tile, walker, pixels, area, F, attended, heads, scale_high, scale_low, eps,
    stride_rk, stride_rv, reach_k, reach_v,
    MASKED: tl.constexpr, C: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Without scratch the out-projection accumulates over the heads in registers. With it, for
    wide rows, the heads' outputs go through the L2 and the projection follows in column blocks."""
    ROWS: tl.constexpr = P * BN
    low = qkv_weight_ptr.dtype.element_ty
    scale = tl.zeros([], ACC) + scale_high + scale_low
    inner = heads * D
    row, frame, inside, focused = _rows(tile, pixels, area, F, focus_ptr, P, BN)
    local = walker * ROWS + tl.arange(0, ROWS)

    x = _load_block(x_ptr, row, inside, C, 0, C, BC)
    mean, rstd = _statistics(x, eps, C, BC, ACC)
    tl.debug_barrier()  # keeps the two loads apart: one would hold the fp32 rows in registers
    x = _load_block(x_ptr, row, inside, C, 0, C, BC)
    xn = _normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, BC, ACC).to(low)
    if rot_ptr is not None:
        cos, sin = rotary_table(rot_ptr, frame, F, F, HALF, BD, ACC)

    if scratch_ptr is None:
        acc = tl.zeros([ROWS, BC], ACC)
    for head in range(heads):
        first = head * D
        w = _projection(qkv_weight_ptr, first, C, D, BC, BD)
        q = _project(xn, w, qkv_bias_ptr, first, ROWS, D, BD, ACC)
        w = _projection(qkv_weight_ptr, inner + first, C, D, BC, BD)
        k = _project(xn, w, qkv_bias_ptr, inner + first, ROWS, D, BD, ACC)
        if rot_ptr is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        rel_k = None
        if rel_k_ptr is not None:
            rel_k = by_distance(rel_k_ptr + head * stride_rk, 1 - F, reach_k, F, 2 * BN, D, BD)
        head_bias = None
        if bias_ptr is not None:
            head_bias = bias_ptr + head * F * F
        p = _probabilities(
            q.to(low), k.to(low), rel_k, head_bias, focused, F, attended, scale,
            MASKED, P, BN, BD, ACC,
        )  # fmt: skip
        w = _projection(qkv_weight_ptr, 2 * inner + first, C, D, BC, BD)
        v = _project(xn, w, qkv_bias_ptr, 2 * inner + first, ROWS, D, BD, ACC).to(low)
        o = dot_x3(p.to(low), v.reshape(P, BN, BD), tl.zeros([P, BN, BD], ACC)).reshape(ROWS, BD)
        if rel_v_ptr is not None:
            rel_v = by_distance(rel_v_ptr + head * stride_rv, 1 - F, reach_v, F, 2 * BN, D, BD)
            shift = tl.arange(0, ROWS) % BN - (F - 1)
            spread = unskew(p.reshape(ROWS, BN), shift, ROWS, BN).to(low)
            o = dot_x3(spread, rel_v, o)
        if scratch_ptr is None:
            w = _out_projection(out_weight_ptr, first, inner, C, D, BC, BD)
            acc = dot_x3(o.to(low), tl.trans(w), acc)
        else:
            _store_rows(scratch_ptr + first, local, inside, inner, o, D, BD)

    # x is read again, from the L1 or L2: kept, it would cost as many registers as acc.
    if scratch_ptr is None:
        if out_bias_ptr is not None:
            acc += _vector(out_bias_ptr, C, BC, ACC)[None, :]
        acc += _load_block(x_ptr, row, inside, C, 0, C, BC).to(ACC)
        _store_rows(y_ptr, row, inside, C, acc, C, BC)
    else:
        tl.debug_barrier()  # other threads wrote what this one reads
        for column in range(0, C, COLUMNS):
            acc = tl.zeros([ROWS, COLUMNS], ACC)
            for k in range(0, inner, COLUMNS):
                o = _load_block(scratch_ptr, local, inside, inner, k, inner, COLUMNS)
                w = _load_matrix(out_weight_ptr, column, k, inner, C, inner, COLUMNS, COLUMNS)
                acc = dot_x3(o, tl.trans(w), acc)
            if out_bias_ptr is not None:
                offs = column + tl.arange(0, COLUMNS)
                acc += tl.load(out_bias_ptr + offs, mask=offs < C, other=0.0).to(ACC)[None, :]
            acc += _load_block(x_ptr, row, inside, C, column, C, COLUMNS).to(ACC)
            _store_rows(y_ptr + column, row, inside, C, acc, C - column, COLUMNS)
        tl.debug_barrier()  # before the next tile overwrites it


@triton.jit
def _add_partial(ptr, at, mask, value, fresh):
    """Add to what this program stored there for its previous tile; ``fresh``: there was none."""
    before = tl.load(ptr + at, mask=mask & (fresh == 0), other=0.0)
    tl.store(ptr + at, before + value, mask=mask)


@triton.jit(do_not_specialize=_COUNTS)
def _bwd_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, qkv_bias_ptr, out_weight_ptr,
    bias_ptr, rot_ptr, focus_ptr,
    dx_ptr, dnorm_weight_ptr, dnorm_bias_ptr, dbias_ptr, xn_ptr, dqkv_ptr, o_ptr,
    pixels, area, F, attended, heads, tiles, walkers, scale_high, scale_low, eps,
    TRAIN: tl.constexpr, MASKED: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx, and what else has a pointer: partials (walkers, ..) of the gradients of norm and bias;
    xn, dq|dk|dv (TRAIN; else of a scratch tile) and the attention's output per row of x."""
    ROWS: tl.constexpr = P * BN
    low = qkv_weight_ptr.dtype.element_ty
    scale = tl.zeros([], ACC) + scale_high + scale_low
    inner = heads * D
    walker = tl.program_id(0)  # int32, as all that is held over the heads
    offs_c = tl.arange(0, BC)
    i, j = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]

    for tile in tl.range(walker, tiles, walkers):
        fresh = (tile == walker).to(tl.int32)
        row, frame, inside, focused = _rows(tile, pixels, area, F, focus_ptr, P, BN)
        row = row.to(tl.int32)  # fewer than 2^31, says ``exceeds_registers``
        keep = row
        if not TRAIN:
            keep = walker * ROWS + tl.arange(0, ROWS)
        x = _load_block(x_ptr, row, inside, C, 0, C, BC)
        mean, rstd = _statistics(x, eps, C, BC, ACC)
        tl.debug_barrier()  # as in the forward
        x = _load_block(x_ptr, row, inside, C, 0, C, BC)
        xn = _normalise(x, mean, rstd, norm_weight_ptr, norm_bias_ptr, C, BC, ACC).to(low)
        dy = _load_block(dy_ptr, row, inside, C, 0, C, BC).to(low)
        if xn_ptr is not None:
            _store_rows(xn_ptr, row, inside, C, xn, C, BC)
        if rot_ptr is not None:
            cos, sin = rotary_table(rot_ptr, frame, F, F, HALF, BD, ACC)

        for head in range(heads):
            first = head * D
            w = _projection(qkv_weight_ptr, first, C, D, BC, BD)
            q = _project(xn, w, qkv_bias_ptr, first, ROWS, D, BD, ACC)
            w = _projection(qkv_weight_ptr, inner + first, C, D, BC, BD)
            k = _project(xn, w, qkv_bias_ptr, inner + first, ROWS, D, BD, ACC)
            if rot_ptr is not None:
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            q, k = q.to(low), k.to(low)
            head_bias = None
            if bias_ptr is not None:
                head_bias = bias_ptr + head * F * F
            p = _probabilities(
                q, k, None, head_bias, focused, F, attended, scale,
                MASKED, P, BN, BD, ACC,
            )  # fmt: skip
            p_low = p.to(low)
            w = _projection(qkv_weight_ptr, 2 * inner + first, C, D, BC, BD)
            v = _project(xn, w, qkv_bias_ptr, 2 * inner + first, ROWS, D, BD, ACC).to(low)
            v3 = v.reshape(P, BN, BD)

            w = _out_projection(out_weight_ptr, first, inner, C, D, BC, BD)
            do = dot_x3(dy, w, tl.zeros([ROWS, BD], ACC)).to(low)
            do3 = do.reshape(P, BN, BD)
            dp = dot_x3(do3, tl.trans(v3, 0, 2, 1), tl.zeros([P, BN, BN], ACC))
            if o_ptr is not None:
                o = dot_x3(p_low, v3, tl.zeros([P, BN, BD], ACC)).reshape(ROWS, BD)
                _store_rows(o_ptr + first, row, inside, inner, o, D, BD)

            ds = p * (dp - tl.sum(p * dp, 2)[:, :, None])
            if dbias_ptr is not None:
                at = (walker.to(tl.int64) * heads + head) * F * F + i * F + j
                _add_partial(dbias_ptr, at, (i < F) & (j < F), tl.sum(ds, 0), fresh)
            ds_low = ds.to(low)
            zero = tl.zeros([P, BN, BD], ACC)
            dv = dot_x3(tl.trans(p_low, 0, 2, 1), do3, zero).reshape(ROWS, BD)
            dk = dot_x3(tl.trans(ds_low, 0, 2, 1), q.reshape(P, BN, BD), zero).reshape(ROWS, BD)
            dq = dot_x3(ds_low, k.reshape(P, BN, BD), zero).reshape(ROWS, BD)
            if rot_ptr is not None:
                dq, dk = rotate(dq, cos, -sin), rotate(dk, cos, -sin)
            _store_rows(dqkv_ptr + first, keep, inside, 3 * inner, dq * scale, D, BD)
            _store_rows(dqkv_ptr + inner + first, keep, inside, 3 * inner, dk * scale, D, BD)
            _store_rows(dqkv_ptr + 2 * inner + first, keep, inside, 3 * inner, dv, D, BD)

        tl.debug_barrier()  # other threads wrote what this one reads
        dxn = tl.zeros([ROWS, BC], ACC)
        for k in range(0, 3 * inner, COLUMNS):
            dz = _load_block(dqkv_ptr, keep, inside, 3 * inner, k, 3 * inner, COLUMNS)
            w = _load_matrix(qkv_weight_ptr, k, 0, C, 3 * inner, C, COLUMNS, BC)
            dxn = dot_x3(dz, w, dxn)

        # Read and normalised anew: what is kept over the heads costs registers there.
        x = _load_block(x_ptr, row, inside, C, 0, C, BC).to(ACC)
        mean, rstd = _statistics(x, eps, C, BC, ACC)
        x_hat = tl.where((offs_c < C)[None, :], (x - mean[:, None]) * rstd[:, None], 0.0)
        if dnorm_weight_ptr is not None:
            at = walker.to(tl.int64) * C + offs_c
            _add_partial(dnorm_weight_ptr, at, offs_c < C, tl.sum(dxn * x_hat, 0), fresh)
            _add_partial(dnorm_bias_ptr, at, offs_c < C, tl.sum(dxn, 0), fresh)
        g = dxn * _vector(norm_weight_ptr, C, BC, ACC)[None, :]
        g = g - (tl.sum(g, 1) / C)[:, None] - x_hat * (tl.sum(g * x_hat, 1) / C)[:, None]
        dx = _load_block(dy_ptr, row, inside, C, 0, C, BC).to(ACC) + g * rstd[:, None]
        _store_rows(dx_ptr, row, inside, C, dx, C, BC)
        tl.debug_barrier()  # the partials of this tile are read back by other threads in the next


def fuse_backward(channels: int, frames: int, dim: int, *, tables: bool) -> bool:
    """Whether the backward is one kernel. Above 64 channels its two operands of all channels, xn
    and dy, leave no registers for the attention (ptxas: kilobytes of spills at 128), and the
    recomputed products are large enough to run near the peak in library GEMMs. At 64 channels the
    gradients of 32 frames, of heads above 32 features or of Shaw tables spill, too: up to 2.5 KB.
    """
    return channels <= 64 and frames <= 16 and dim <= 32 and not tables


def _composed_backward(
    dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
    options, need_norm, need_qkv, need_out, need_bias, need_rel,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same from recomputed buffers: library norm and GEMMs around the attention's kernels."""
    b, f, h, w, c = x.shape
    low, dim = qkv_weight.dtype, qkv_weight.shape[0] // (3 * heads)
    bias, rel_k, rel_v = options[:3]

    def nothing() -> Tensor:  # each its own: outputs of an op may not alias
        return x.new_empty((0,))

    if x.numel() == 0:
        wanted = (
            *((norm_weight, need_norm), (norm_bias, need_norm), (qkv_weight, need_qkv)),
            *((qkv_bias, need_qkv), (out_weight, need_out), (out_bias, need_out)),
            *((bias, need_bias), (rel_k, need_rel), (rel_v, need_rel)),
        )
        zeros = [nothing() if t is None or not n else torch.zeros_like(t) for t, n in wanted]
        return (torch.empty_like(x, memory_format=torch.contiguous_format), *zeros)
    rows, wide = x.reshape(-1, c), acc_torch_dtype(x.dtype)
    gain = norm_weight.to(x.dtype)
    shift = None if norm_bias is None else norm_bias.to(x.dtype)
    xn, mean, rstd = torch.native_layer_norm(rows, [c], gain, shift, eps)
    xn = xn.to(low)
    qkv = torch.nn.functional.linear(xn, qkv_weight, qkv_bias).view(b, f, h, w, 3, heads, dim)
    low_dy = dy.reshape(-1, c).to(low)
    attend = (TIME, options, dim**-0.5)
    dout_weight, dout_bias, dqkv_weight, dqkv_bias = (nothing() for _ in range(4))
    if need_out:
        o, _ = axis_attention.axis_attention_fwd(qkv, *attend)
        dout_weight = low_dy.t() @ o.view(-1, heads * dim)
        if out_bias is not None:
            dout_bias = dy.reshape(-1, c).sum(0, dtype=wide).to(out_bias.dtype)
    do = (low_dy @ out_weight).view(b, f, h, w, heads, dim)
    dqkv, dbias, drel_k, drel_v = axis_attention.axis_attention_bwd(
        *(do, qkv, nothing(), nothing(), *attend),
        *(True, need_bias and bias is not None),
        *(need_rel and rel_k is not None, need_rel and rel_v is not None),
    )
    dqkv = dqkv.view(-1, 3 * heads * dim)
    if need_qkv:
        dqkv_weight = dqkv.t() @ xn
        if qkv_bias is not None:
            dqkv_bias = dqkv.sum(0, dtype=wide).to(qkv_bias.dtype)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        (dqkv @ qkv_weight).to(x.dtype), rows, [c], mean, rstd, gain, shift,
        [True, need_norm, need_norm and norm_bias is not None],
    )  # fmt: skip
    return (
        (dx + dy.reshape(-1, c)).view(x.shape),
        dnorm_weight.to(norm_weight.dtype) if need_norm else nothing(),
        dnorm_bias.to(norm_bias.dtype) if need_norm and norm_bias is not None else nothing(),
        *(dqkv_weight, dqkv_bias, dout_weight, dout_bias),
        # What is not wanted has the dtype of x, as the fake says, not that of the projections.
        dbias if need_bias and bias is not None else nothing(),
        drel_k if need_rel and rel_k is not None else nothing(),
        drel_v if need_rel and rel_v is not None else nothing(),
    )


def temporal_block_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
    options: AttentionOptions,
) -> Tensor:
    """y as x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    b, f, h, w, c = x.shape
    if y.numel() == 0:
        return y
    dim, pixels = qkv_weight.shape[0] // (3 * heads), b * h * w
    config = pick_config(
        f,
        c,
        dim,
        pixels,
        x.element_size(),
        tables=options.shaw,
        backward=False,
        major=major(x.device),
    )
    tiles, scratch = cdiv(pixels, config.P), None
    walkers = tiles
    if config.BC > _REGISTER_CHANNELS:
        walkers = min(tiles, program_budget(x.device))
        size = (walkers * config.P * config.BN, heads * dim)
        scratch = torch.empty(size, dtype=qkv_weight.dtype, device=x.device)
    options = prepared(options, f)
    _fwd_kernel[(walkers,)](
        *(x, y, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias),
        *(*options[:5], scratch, pixels, h * w, f, f - options.num_images, heads, tiles, walkers),
        *(*split_scale(dim**-0.5), eps, *table_sizes(options)),
        MASKED=options.masked,
        C=c,
        D=dim,
        HALF=options.pairs,
        P=config.P,
        BN=config.BN,
        BC=config.BC,
        BD=config.BD,
        ACC=acc_dtype(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def temporal_block_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
    options: AttentionOptions,
    need_norm: bool,
    need_qkv: bool,
    need_out: bool,
    need_bias: bool,
    need_rel: bool,
) -> tuple[Tensor, ...]:
    """As ``fastvdm::temporal_block_bwd``."""
    b, f, h, w, c = x.shape
    dim = qkv_weight.shape[0] // (3 * heads)
    if not fuse_backward(c, f, dim, tables=options.shaw):
        return _composed_backward(
            *(dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias),
            *(heads, eps, options, need_norm, need_qkv, need_out, need_bias, need_rel),
        )
    options = prepared(options, f)
    pixels, rows = b * h * w, b * f * h * w
    inner, acc, device = heads * dim, acc_torch_dtype(x.dtype), x.device
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    need_bias = need_bias and options.bias is not None
    config = pick_config(
        f, c, dim, pixels, x.element_size(), tables=False, backward=True, major=major(x.device)
    )
    tiles = cdiv(pixels, config.P)
    walkers = min(tiles, program_budget(device))

    def partial(need: bool, *shape: int) -> Tensor | None:
        return torch.empty((walkers, *shape), dtype=acc, device=device) if need else None

    def per_row(need: bool, width: int) -> Tensor | None:
        return torch.empty((rows, width), dtype=qkv_weight.dtype, device=device) if need else None

    dnorm_weight, dnorm_bias = partial(need_norm, c), partial(need_norm, c)
    dbias = partial(need_bias, heads, f, f)
    xn, o = per_row(need_qkv, c), per_row(need_out, inner)
    # Frozen, dq|dk|dv of a tile pass through the L2; trained, those of every row are kept.
    size = (rows if need_qkv else walkers * config.P * config.BN, 3 * inner)
    dqkv = torch.empty(size, dtype=qkv_weight.dtype, device=device)
    if tiles:
        _bwd_kernel[(walkers,)](
            *(dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight),
            *(options.bias, options.rotary, options.focus_mask),
            *(dx, dnorm_weight, dnorm_bias, dbias, xn, dqkv, o),
            *(pixels, h * w, f, f - options.num_images, heads, tiles, walkers),
            *(*split_scale(dim**-0.5), eps),
            TRAIN=need_qkv,
            MASKED=options.masked,
            C=c,
            D=dim,
            HALF=options.pairs,
            P=config.P,
            BN=config.BN,
            BC=config.BC,
            BD=config.BD,
            ACC=acc_dtype(x.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def reduced(part: Tensor | None, like: Tensor | None) -> Tensor:
        if part is None or like is None:
            return x.new_empty((0,))
        return part.sum(0).to(like.dtype)

    def summed(per_row: Tensor, like: Tensor | None) -> Tensor:
        return x.new_empty((0,)) if like is None else per_row.sum(0, dtype=acc).to(like.dtype)

    def product(left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None or right is None:
            return x.new_empty((0,))
        return left.t() @ right

    low_dy = dy.reshape(rows, c).to(qkv_weight.dtype) if need_out else None
    return (
        dx,
        reduced(dnorm_weight, norm_weight),
        reduced(dnorm_bias, norm_bias),
        product(dqkv, xn),
        summed(dqkv, qkv_bias if need_qkv else None),
        product(low_dy, o),
        # Not in the kernel, where its sums would spill: a rare parameter, one more read of dy.
        summed(dy.reshape(rows, c), out_bias if need_out else None),
        reduced(dbias, options.bias),
        *(x.new_empty((0,)) for _ in range(2)),  # none of tables: with those it is composed
    )

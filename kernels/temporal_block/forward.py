"""Forward kernel of temporal_block: y for tiles of pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.axis_attention.shared import by_distance, rotary_table, rotate, unskew
from fastvdm.kernels.common import dot_x3
from fastvdm.kernels.temporal_block.tiles import (
    _COUNTS,
    COLUMNS,
    _load_block,
    _load_matrix,
    _normalise,
    _out_projection,
    _probabilities,
    _project,
    _projection,
    _rows,
    _statistics,
    _store_rows,
    _vector,
)


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
    """Without scratch the output projection accumulates over the heads in registers. With it, for
    wide rows, the heads' outputs go through the L2 cache and the projection follows in blocks of
    columns."""
    ROWS: tl.constexpr = P * BN
    low = qkv_weight_ptr.dtype.element_ty
    scale = tl.zeros([], ACC) + scale_high + scale_low
    inner = heads * D
    row, frame, inside, focused = _rows(tile, pixels, area, F, focus_ptr, P, BN)
    local = walker * ROWS + tl.arange(0, ROWS)

    x = _load_block(x_ptr, row, inside, C, 0, C, BC)
    mean, rstd = _statistics(x, eps, C, BC, ACC)
    tl.debug_barrier()  # do not merge the two loads: one would hold the fp32 rows in registers
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

    # x is read again, from the L1 or L2 cache: kept, it would cost as many registers as acc.
    if scratch_ptr is None:
        if out_bias_ptr is not None:
            acc += _vector(out_bias_ptr, C, BC, ACC)[None, :]
        acc += _load_block(x_ptr, row, inside, C, 0, C, BC).to(ACC)
        _store_rows(y_ptr, row, inside, C, acc, C, BC)
    else:
        tl.debug_barrier()  # this thread reads what others wrote
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

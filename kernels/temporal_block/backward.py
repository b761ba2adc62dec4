"""Backward kernel of temporal_block: dx, and the terms of the gradients of parameters."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.axis_attention.shared import rotary_table, rotate
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


@triton.jit
def _add_partial(ptr, at, mask, value, fresh):
    """Add to the value that this program stored for its previous tile; ``fresh``: there is none."""
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
    """dx, and all outputs that have a pointer: partials (walkers, ..) of the gradients of norm and
    bias; xn, dq|dk|dv (TRAIN; otherwise of a scratch tile) and the attention's output per row of
    x."""
    ROWS: tl.constexpr = P * BN
    low = qkv_weight_ptr.dtype.element_ty
    scale = tl.zeros([], ACC) + scale_high + scale_low
    inner = heads * D
    walker = tl.program_id(0)  # int32, like all values held over the heads
    offs_c = tl.arange(0, BC)
    i, j = tl.arange(0, BN)[:, None], tl.arange(0, BN)[None, :]

    for tile in tl.range(walker, tiles, walkers):
        fresh = (tile == walker).to(tl.int32)
        row, frame, inside, focused = _rows(tile, pixels, area, F, focus_ptr, P, BN)
        row = row.to(tl.int32)  # fewer than 2^31, as ``exceeds_registers`` ensures
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

        tl.debug_barrier()  # this thread reads what others wrote
        dxn = tl.zeros([ROWS, BC], ACC)
        for k in range(0, 3 * inner, COLUMNS):
            dz = _load_block(dqkv_ptr, keep, inside, 3 * inner, k, 3 * inner, COLUMNS)
            w = _load_matrix(qkv_weight_ptr, k, 0, C, 3 * inner, C, COLUMNS, BC)
            dxn = dot_x3(dz, w, dxn)

        # Load and normalise again: a value kept over the heads costs registers there.
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
        tl.debug_barrier()  # in the next tile other threads read the partials of this one

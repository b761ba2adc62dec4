"""Backward kernels of linear_attention_block. With y = q' M, M = ctx W_outᵀ, ctx = s G W_vᵀ:

    dM = q'ᵀ dy,  dctx = dM W_out,  dG = s dctx W_v,  dW_out = dMᵀ ctx,  dW_v = s dctxᵀ G
    dq' = dy Mᵀ,  dk' = x̂ dGᵀ,  dx̂ = dq W_q + dk W_k + k' dG,  dW_q = dqᵀ x̂,  dW_k = dkᵀ x̂

and because k' sums to one over the pixels, its softmax subtracts Σ_n k' dk' = Σ_c G dG. q and k are
recomputed in each kernel that needs them. Sums over pixels are written as partials, which are added
in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.common import LOG2E, dot_x3
from fastvdm.kernels.linear_attention_block.forward import COUNTS
from fastvdm.kernels.linear_attention_block.shared import (
    gather_rows,
    load_rows,
    normalised,
    rows_of_heads,
    softmax_of_heads,
    standardise,
    vector,
)


@triton.jit
def _grad_q(
    dy, m, p, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """dq (BN, BF) from the softmax p (BN, BF / BD, BD), through dq' = dy Mᵀ."""
    dp = dot_x3(dy, tl.trans(m), tl.zeros([BN, BF], ACC)).reshape(BN, BF // BD, BD)
    return (p * (dp - tl.sum(p * dp, 2)[:, :, None])).reshape(BN, BF)


@triton.jit
def _store_turned(
    ptr, rows, inside, value, C: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Store value (BC, BF), transposed, to the given rows of (.., C)."""
    offs_c = tl.arange(0, BC)
    at = ptr + rows[None, :] * C + offs_c[:, None]
    if WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=inside[None, :] & (offs_c < C)[:, None])


@triton.jit(do_not_specialize=COUNTS)
def _dm_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, m_ptr, dm_ptr, dqkv_ptr,
    N, heads, splits, chunk, parts, walkers, eps,
    C: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For BF / BD heads, the results that have a pointer: dM over a split of a frame's pixels,
    (parts, inner, C); W_q's gradient over all splits that the program walks over,
    (walkers, 3 inner, C). Both are summed transposed, so that no result of a product has to be
    transposed to become an operand."""
    low = qkv_weight_ptr.dtype.element_ty
    blocks = tl.cdiv(heads, BF // BD)
    pid = tl.program_id(0)
    walker = pid // blocks
    rows, inside = rows_of_heads(pid % blocks * (BF // BD), heads, D, BF, BD)
    w = gather_rows(qkv_weight_ptr, rows, inside, 0, C, BC, WHOLE)
    if dqkv_ptr is not None:
        dw = tl.zeros([BC, BF], ACC)
    for part in tl.range(walker, parts, walkers):
        frame = tl.cast(part // splits, tl.int64)
        lo = (part % splits) * chunk
        hi = tl.minimum(lo + chunk, N)
        if dqkv_ptr is not None:
            m = gather_rows(m_ptr + frame * heads * D * C, rows, inside, 0, C, BC, WHOLE)
        if dm_ptr is not None:
            dm = tl.zeros([BC, BF], ACC)
        for n in tl.range(lo, hi, BN):
            at = (frame * N + n) * C
            xn = normalised(
                x_ptr + at, hi - n, norm_weight_ptr, norm_bias_ptr, eps, C, BN, BC, ACC, EVEN
            ).to(low)
            dy = load_rows(dy_ptr + at, hi - n, C, BN, BC, EVEN).to(low)
            q = dot_x3(xn, tl.trans(w), tl.zeros([BN, BF], ACC))
            p = softmax_of_heads(q, D, BN, BF, BD)
            if dm_ptr is not None:
                dm = dot_x3(tl.trans(dy), p.reshape(BN, BF).to(low), dm)
            if dqkv_ptr is not None:
                dw = dot_x3(tl.trans(xn), _grad_q(dy, m, p, BN, BF, BD, ACC).to(low), dw)
        if dm_ptr is not None:
            first = tl.cast(part, tl.int64) * heads * D
            _store_turned(dm_ptr, first + rows, inside, dm, C, BC, WHOLE)
    if dqkv_ptr is not None:
        first = tl.cast(walker, tl.int64) * 3 * heads * D
        _store_turned(dqkv_ptr, first + rows, inside, dw, C, BC, WHOLE)


@triton.jit
def _summed(
    dm_ptr, at, here, column, step, splits,
    C: tl.constexpr, BD: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Columns [column, column + CB) of dM: the sum of the partials, in order."""
    dm = tl.zeros([BD, CB], ACC)
    for split in range(0, splits):
        dm += gather_rows(dm_ptr, at + split * step, here, column, C, CB, WHOLE)
    return dm


@triton.jit
def _out_columns(
    ptr, inner, row, here, column,
    C: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The columns ``row`` of rows [column, column + CB) of out_weight (C, inner): (BD, CB)."""
    offs_c = column + tl.arange(0, CB)
    at = ptr + offs_c[None, :] * inner + row[:, None]
    if WHOLE:
        return tl.load(at).to(ACC)
    return tl.load(at, mask=here[:, None] & (offs_c < C)[None, :], other=0.0).to(ACC)


@triton.jit(do_not_specialize=COUNTS)
def _unfold_kernel(
    dm_ptr, g_ptr, qkv_weight_ptr, out_weight_ptr, dg_ptr, r_ptr, dctx_ptr, heads, splits, scale,
    C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CB: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """For one frame and head: dG (frames, inner, C), r = Σ_c G dG and, if needed, s dctx."""
    problem = tl.program_id(0).to(tl.int64)
    frame, head = problem // heads, (problem % heads).to(tl.int32)
    inner = heads * D
    offs_d = tl.arange(0, BD)
    here, row = offs_d < D, head * D + offs_d
    own, at = frame * inner + row, frame * splits * inner + row
    dctx = tl.zeros([BD, BD], ACC)
    for column in range(0, C, CB):
        dm = _summed(dm_ptr, at, here, column, inner, splits, C, BD, CB, ACC, WHOLE)
        out = _out_columns(out_weight_ptr, inner, row, here, column, C, CB, ACC, WHOLE)
        dctx = dot_x3(dm, tl.trans(out), dctx)
    dctx *= scale
    if dctx_ptr is not None:
        square = dctx_ptr + own[:, None] * D + offs_d[None, :]
        tl.store(square, dctx, mask=here[:, None] & here[None, :])
    r = tl.zeros([BD], ACC)
    for column in range(0, C, CB):
        v = gather_rows(qkv_weight_ptr + 2 * inner * C, row, here, column, C, CB, WHOLE)
        dg = dot_x3(dctx, v.to(ACC), tl.zeros([BD, CB], ACC)).to(dg_ptr.dtype.element_ty)
        offs_c = column + tl.arange(0, CB)
        to = dg_ptr + own[:, None] * C + offs_c[None, :]
        tl.store(to, dg, mask=here[:, None] & (offs_c < C)[None, :])
        # Use the rounded dG, because dk' is computed from it and must sum to r.
        g = gather_rows(g_ptr, own, here, column, C, CB, WHOLE).to(ACC)
        r += tl.sum(g * dg.to(ACC), 1)
    tl.store(r_ptr + own, r, mask=here)


@triton.jit(do_not_specialize=COUNTS)
def _frames_kernel(
    dm_ptr, g_ptr, ctx_ptr, dctx_ptr, dqkv_ptr, dout_ptr, heads, splits, frames, walkers,
    C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CB: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """For one head and CB channels, over the frames that the program walks over: the gradients of
    W_v, (walkers, 3 inner, C), and of W_out, (walkers, inner, C), if needed."""
    columns = tl.cdiv(C, CB)
    pid = tl.program_id(0)
    column, head = pid % columns * CB, pid // columns % heads
    walker = pid // (columns * heads)
    inner = heads * D
    offs_d, offs_c = tl.arange(0, BD), column + tl.arange(0, CB)
    here, row = offs_d < D, head * D + offs_d
    square = here[:, None] & here[None, :]
    dv = tl.zeros([BD, CB], ACC)
    dout = tl.zeros([BD, CB], ACC)
    for frame in tl.range(walker, frames, walkers):
        own = tl.cast(frame, tl.int64) * inner + row
        turned = own[None, :] * D + offs_d[:, None]
        if dqkv_ptr is not None:
            dctx_t = tl.load(dctx_ptr + turned, mask=square, other=0.0)
            g = gather_rows(g_ptr, own, here, column, C, CB, WHOLE).to(ACC)
            dv = dot_x3(dctx_t, g, dv)
        if dout_ptr is not None:
            ctx_t = tl.load(ctx_ptr + turned, mask=square, other=0.0)
            at = tl.cast(frame, tl.int64) * splits * inner + row
            dm = _summed(dm_ptr, at, here, column, inner, splits, C, BD, CB, ACC, WHOLE)
            dout = dot_x3(ctx_t, dm, dout)
    mask = here[:, None] & (offs_c < C)[None, :]
    first = tl.cast(walker, tl.int64) * inner
    if dqkv_ptr is not None:
        to = dqkv_ptr + (3 * first + 2 * inner + row)[:, None] * C + offs_c[None, :]
        tl.store(to, dv, mask=mask)
    if dout_ptr is not None:
        to = dout_ptr + (first + row)[:, None] * C + offs_c[None, :]
        tl.store(to, dout, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _dk_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, lse_ptr, dg_ptr, r_ptr, dqkv_ptr,
    N, heads, splits, chunk, parts, walkers, eps,
    C: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of BF rows of W_k, over all splits that the program walks over."""
    low = qkv_weight_ptr.dtype.element_ty
    inner = heads * D
    blocks = tl.cdiv(inner, BF)
    pid = tl.program_id(0)
    walker, first = pid // blocks, pid % blocks * BF
    offs_f, offs_c = first + tl.arange(0, BF), tl.arange(0, BC)
    inside = offs_f < inner
    w = gather_rows(qkv_weight_ptr + inner * C, offs_f, inside, 0, C, BC, WHOLE)
    dw = tl.zeros([BF, BC], ACC)
    for part in tl.range(walker, parts, walkers):
        frame = tl.cast(part // splits, tl.int64)
        lo = (part % splits) * chunk
        hi = tl.minimum(lo + chunk, N)
        dg = gather_rows(dg_ptr + frame * inner * C, offs_f, inside, 0, C, BC, WHOLE)
        at = frame * inner + offs_f
        lse = tl.load(lse_ptr + at, mask=inside, other=0.0).to(ACC) * LOG2E
        r = tl.load(r_ptr + at, mask=inside, other=0.0)
        for n in tl.range(lo, hi, BN):
            pixels = x_ptr + (frame * N + n) * C
            xn = normalised(
                pixels, hi - n, norm_weight_ptr, norm_bias_ptr, eps, C, BN, BC, ACC, EVEN
            ).to(low)
            k = dot_x3(w, tl.trans(xn), tl.zeros([BF, BN], ACC))
            dp = dot_x3(dg, tl.trans(xn), tl.zeros([BF, BN], ACC))
            dk = tl.exp2(k * LOG2E - lse[:, None]) * (dp - r[:, None])
            if not EVEN:
                dk = tl.where((n + tl.arange(0, BN) < hi)[None, :], dk, 0.0)
            dw = dot_x3(dk.to(low), xn, dw)
    at = (tl.cast(walker, tl.int64) * 3 * inner + inner + offs_f)[:, None] * C + offs_c[None, :]
    tl.store(dqkv_ptr + at, dw, mask=inside[:, None] & (offs_c < C)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def _dx_kernel(
    dy_ptr, x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, m_ptr, lse_ptr, dg_ptr, r_ptr,
    dx_ptr, sums_ptr,
    N, heads, tiles, eps,
    C: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dx of one tile of pixels and, if needed, its sums (.., 3, C): those for the gradients of
    norm_weight and norm_bias, and the sum of dy."""
    low = qkv_weight_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    frame, first = pid // tiles, (pid % tiles * BN).to(tl.int32)
    at = (frame * N + first) * C
    count = N - first
    inner = heads * D
    xn = normalised(
        x_ptr + at, count, norm_weight_ptr, norm_bias_ptr, eps, C, BN, BC, ACC, EVEN
    ).to(low)
    dy = load_rows(dy_ptr + at, count, C, BN, BC, EVEN).to(low)
    m_ptr += frame * inner * C
    dg_ptr += frame * inner * C
    dxn = tl.zeros([BN, BC], ACC)
    # Two loops, because the registers cannot hold all operands of a single one.
    for head in tl.range(0, heads, BF // BD, num_stages=STAGES):
        rows, inside = rows_of_heads(head, heads, D, BF, BD)
        w = gather_rows(qkv_weight_ptr, rows, inside, 0, C, BC, WHOLE)
        q = dot_x3(xn, tl.trans(w), tl.zeros([BN, BF], ACC))
        p = softmax_of_heads(q, D, BN, BF, BD)
        m = gather_rows(m_ptr, rows, inside, 0, C, BC, WHOLE)
        dxn = dot_x3(_grad_q(dy, m, p, BN, BF, BD, ACC).to(low), w, dxn)
    for head in tl.range(0, heads, BF // BD, num_stages=STAGES):
        rows, inside = rows_of_heads(head, heads, D, BF, BD)
        w = gather_rows(qkv_weight_ptr + inner * C, rows, inside, 0, C, BC, WHOLE)
        dg = gather_rows(dg_ptr, rows, inside, 0, C, BC, WHOLE)
        lse = tl.load(lse_ptr + frame * inner + rows, mask=inside, other=0.0).to(ACC) * LOG2E
        r = tl.load(r_ptr + frame * inner + rows, mask=inside, other=0.0)
        k = dot_x3(xn, tl.trans(w), tl.zeros([BN, BF], ACC))
        k = tl.exp2(k * LOG2E - lse[None, :])
        dk = k * (dot_x3(xn, tl.trans(dg), tl.zeros([BN, BF], ACC)) - r[None, :])
        dxn = dot_x3(k.to(low), dg, dxn)
        dxn = dot_x3(dk.to(low), w, dxn)

    # Load and normalise again: a value kept over the heads costs registers there. The barriers keep
    # the compiler from merging the loads.
    tl.debug_barrier()
    offs_n, offs_c = tl.arange(0, BN)[:, None], tl.arange(0, BC)[None, :]
    x_hat, rstd = standardise(load_rows(x_ptr + at, count, C, BN, BC, EVEN), eps, C, BC, ACC)
    if sums_ptr is not None:
        if not EVEN:
            dxn = tl.where(offs_n < count, dxn, 0.0)
        to = sums_ptr + pid * 3 * C + tl.arange(0, BC)
        here = tl.arange(0, BC) < C
        tl.store(to, tl.sum(dxn * x_hat, 0), mask=here)
        tl.store(to + C, tl.sum(dxn, 0), mask=here)
    g = dxn * vector(norm_weight_ptr, C, BC, ACC)
    g = (g - (tl.sum(g, 1) / C)[:, None] - x_hat * (tl.sum(g * x_hat, 1) / C)[:, None]) * rstd
    tl.debug_barrier()
    dy = load_rows(dy_ptr + at, count, C, BN, BC, EVEN).to(ACC)
    if sums_ptr is not None:
        tl.store(to + 2 * C, tl.sum(dy, 0), mask=here)
    dx = (dy + g).to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + at + offs_n * C + offs_c, dx, mask=(offs_n < count) & (offs_c < C))

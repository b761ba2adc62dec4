"""Forward kernels: G over splits of the pixels; M per frame and head; y."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.common import LOG2E, dot_x3
from fastvdm.kernels.linear_attention_block.shared import (
    gather_rows,
    load_rows,
    normalised,
    rows_of_heads,
    softmax_of_heads,
    vector,
)

COUNTS = ["N", "heads", "splits", "chunk", "tiles"]  # kernels are not specialised on these


@triton.jit(do_not_specialize=COUNTS)
def _sum_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, top_ptr, sum_ptr, g_ptr,
    N, heads, splits, chunk, eps,
    C: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    EVEN: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """For one split of a frame's pixels and BF features of k: max, Σ exp(k - max) and, as in flash
    attention with features as queries, Σ exp(k - max) x̂. Partials (frames, splits, inner), C wide.
    """
    low = qkv_weight_ptr.dtype.element_ty
    inner = heads * D
    blocks = tl.cdiv(inner, BF)
    pid = tl.program_id(0)
    first = pid % blocks * BF  # neighbouring programs share the pixels
    part = (pid // blocks).to(tl.int64)
    frame, split = part // splits, part % splits
    lo = (split * chunk).to(tl.int32)
    hi = tl.minimum(lo + chunk, N)
    x_ptr += frame * N * C
    offs_f, offs_c = first + tl.arange(0, BF), tl.arange(0, BC)
    inside = offs_f < inner
    w = gather_rows(qkv_weight_ptr + inner * C, offs_f, inside, 0, C, BC, WHOLE)
    top = tl.full([BF], float("-inf"), ACC)
    total = tl.zeros([BF], ACC)
    g = tl.zeros([BF, BC], ACC)
    for n in tl.range(lo, hi, BN):
        at = x_ptr + tl.cast(n, tl.int64) * C
        xn = normalised(at, hi - n, norm_weight_ptr, norm_bias_ptr, eps, C, BN, BC, ACC, EVEN)
        xn = xn.to(low)
        k = dot_x3(w, tl.trans(xn), tl.zeros([BF, BN], ACC))
        if not EVEN:
            k = tl.where((n + tl.arange(0, BN) < hi)[None, :], k, float("-inf"))
        new = tl.maximum(top, tl.max(k, 1))
        alpha = tl.exp2((top - new) * LOG2E)
        p = tl.exp2(k * LOG2E - (new * LOG2E)[:, None])
        total = total * alpha + tl.sum(p, 1)
        g = dot_x3(p.to(low), xn, g * alpha[:, None])
        top = new
    tl.store(top_ptr + part * inner + offs_f, top, mask=inside)
    tl.store(sum_ptr + part * inner + offs_f, total, mask=inside)
    at = (part * inner + offs_f)[:, None] * C + offs_c[None, :]
    tl.store(g_ptr + at, g, mask=inside[:, None] & (offs_c < C)[None, :])


@triton.jit
def _merged(
    part_ptr, top_ptr, at, here, top, total, column, step, splits,
    C: tl.constexpr, BD: tl.constexpr, CB: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Columns [column, column + CB) of G: the sum of the partials, in order, each scaled to the
    overall maximum. ``at`` are the rows of the first partial; the next is ``step`` further."""
    g = tl.zeros([BD, CB], ACC)
    for split in range(0, splits):
        rows = at + split * step
        by = tl.exp2((tl.load(top_ptr + rows, mask=here, other=0.0) - top) * LOG2E)
        g += gather_rows(part_ptr, rows, here, column, C, CB, WHOLE) * by[:, None]
    return g / total[:, None]


@triton.jit(do_not_specialize=COUNTS)
def _fold_kernel(
    top_ptr, sum_ptr, part_ptr, g_ptr, lse_ptr, qkv_weight_ptr, out_weight_ptr, ctx_ptr, m_ptr,
    heads, splits, scale,
    C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, CB: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """For one frame and head M = D^-½ G W_vᵀ W_outᵀ (D, C), CB columns at a time. With partials, G
    is merged from them in order and log Σ exp k is written. Otherwise G is read, and ctx (D, D) is
    written if needed."""
    problem = tl.program_id(0).to(tl.int64)
    frame, head = problem // heads, (problem % heads).to(tl.int32)
    inner = heads * D
    offs_d = tl.arange(0, BD)
    here, row = offs_d < D, head * D + offs_d
    own = frame * inner + row
    if part_ptr is not None:
        at = frame * splits * inner + row
        top = tl.full([BD], float("-inf"), ACC)
        total = tl.zeros([BD], ACC)
        for split in range(0, splits):
            one = tl.load(top_ptr + at + split * inner, mask=here, other=0.0)
            l = tl.load(sum_ptr + at + split * inner, mask=here, other=1.0)
            new = tl.maximum(top, one)
            total = total * tl.exp2((top - new) * LOG2E) + l * tl.exp2((one - new) * LOG2E)
            top = new
        tl.store(lse_ptr + own, top + tl.log(total), mask=here)
    ctx = tl.zeros([BD, BD], ACC)
    for column in range(0, C, CB):
        offs_c = column + tl.arange(0, CB)
        to = own[:, None] * C + offs_c[None, :]
        if part_ptr is not None:
            g = _merged(
                part_ptr, top_ptr, at, here, top, total, column, inner, splits,
                C, BD, CB, ACC, WHOLE,
            )  # fmt: skip
            tl.store(g_ptr + to, g, mask=here[:, None] & (offs_c < C)[None, :])
        else:
            g = gather_rows(g_ptr, own, here, column, C, CB, WHOLE).to(ACC)
        v = gather_rows(qkv_weight_ptr + 2 * inner * C, row, here, column, C, CB, WHOLE)
        ctx = dot_x3(g, tl.trans(v.to(ACC)), ctx)
    ctx *= scale
    if ctx_ptr is not None:
        square = own[:, None] * D + offs_d[None, :]
        tl.store(ctx_ptr + square, ctx, mask=here[:, None] & here[None, :])
    for column in range(0, C, CB):
        offs_c = column + tl.arange(0, CB)
        mask = here[:, None] & (offs_c < C)[None, :]
        at_out = offs_c[None, :] * inner + row[:, None]
        out = tl.load(out_weight_ptr + at_out, mask=mask, other=0.0).to(ACC)
        m = dot_x3(ctx, out, tl.zeros([BD, CB], ACC))
        to_m = m_ptr + own[:, None] * C + offs_c[None, :]
        tl.store(to_m, m.to(m_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def _apply_kernel(
    x_ptr, y_ptr, norm_weight_ptr, norm_bias_ptr, qkv_weight_ptr, out_bias_ptr, m_ptr,
    N, heads, tiles, eps,
    C: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr,
    BD: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = x + q' M + b for one tile of pixels, BF / BD heads at a time."""
    low = qkv_weight_ptr.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    frame, first = pid // tiles, (pid % tiles * BN).to(tl.int32)
    at = (frame * N + first) * C
    count = N - first
    xn = normalised(
        x_ptr + at, count, norm_weight_ptr, norm_bias_ptr, eps, C, BN, BC, ACC, EVEN
    ).to(low)
    m_ptr += frame * heads * D * C
    acc = tl.zeros([BN, BC], ACC)
    for head in tl.range(0, heads, BF // BD, num_stages=STAGES):
        rows, inside = rows_of_heads(head, heads, D, BF, BD)
        w = gather_rows(qkv_weight_ptr, rows, inside, 0, C, BC, WHOLE)
        q = dot_x3(xn, tl.trans(w), tl.zeros([BN, BF], ACC))
        p = softmax_of_heads(q, D, BN, BF, BD).reshape(BN, BF)
        m = gather_rows(m_ptr, rows, inside, 0, C, BC, WHOLE)
        acc = dot_x3(p.to(low), m, acc)
    if out_bias_ptr is not None:
        acc += vector(out_bias_ptr, C, BC, ACC)
    # x is read again, from the L1 or L2 cache, because keeping it would cost registers.
    acc += load_rows(x_ptr + at, count, C, BN, BC, EVEN).to(ACC)
    offs_n, offs_c = tl.arange(0, BN)[:, None], tl.arange(0, BC)[None, :]
    to = y_ptr + at + offs_n * C + offs_c
    tl.store(to, acc.to(y_ptr.dtype.element_ty), mask=(offs_n < count) & (offs_c < C))

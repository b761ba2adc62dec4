"""Forward kernel of long attention: out and lse of a block of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.axis_attention.long_tiles import (
    _COUNTS,
    _block,
    _exp,
    _logits,
    _put_rows,
    _relative_rows,
    _rows,
    _turned,
    _unit,
)
from fastvdm.kernels.axis_attention.shared import unskew
from fastvdm.kernels.common import dot


@triton.jit(do_not_specialize=_COUNTS)
def _long_fwd_kernel(
    qkv_ptr, bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, out_ptr, lse_ptr,
    outer, total, n, heads, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h, out_b, out_o, out_n,
    stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    sequence, b, o, head, start_m = _block(n, outer, heads, BM)
    scale = tl.zeros([], ACC) + scale_high + scale_low
    base = qkv_ptr + b * stride_b + o * stride_o + head * stride_h
    out_base = out_ptr + b * out_b + o * out_o + head * D
    offs_m = start_m + tl.arange(0, BM)

    if focus_ptr is not None:  # noqa: SIM102  (known at compile time)
        if tl.load(focus_ptr + b) != 0:  # each frame attends to itself only
            v = _rows(base + stride_c + stride_c, offs_m, n, stride_n, D, BD)
            if rel_v_ptr is not None:
                offs_d = tl.arange(0, BD)
                itself = rel_v_ptr + head * stride_rv + reach_v * D + offs_d
                center = tl.load(itself, mask=offs_d < D, other=0.0).to(ACC)
                v = (v.to(ACC) + center[None, :]).to(v.dtype)
            _put_rows(out_base, v, offs_m, n, out_n, D, BD)
            return

    q_plain = _rows(base, offs_m, n, stride_n, D, BD)
    q = _turned(q_plain, rot_ptr, offs_m, n, total, HALF, BD, ACC)
    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + head * n * n
    rel_k_at = None
    if rel_k_ptr is not None:
        rel_k_at = rel_k_ptr + head * stride_rk
    unit = _unit(scale, FOLD)
    m_i = tl.full([BM], float("-inf"), ACC)
    l_i = tl.zeros([BM], ACC)
    acc = tl.zeros([BM, BD], ACC)
    for start_n in tl.range(0, n, BN):
        offs_n = start_n + tl.arange(0, BN)
        k = _rows(base + stride_c, offs_n, n, stride_n, D, BD, EVEN)
        k = _turned(k, rot_ptr, offs_n, n, total, HALF, BD, ACC)
        v = _rows(base + stride_c + stride_c, offs_n, n, stride_n, D, BD, EVEN)
        s = _logits(
            q, q_plain, k, bias_at, rel_k_at, reach_k, start_m, start_n, n, scale,
            False, FOLD, not EVEN, D, BM, BN, BD, ACC,
        )  # fmt: skip
        m_new = tl.maximum(m_i, tl.max(s, 1) * unit)
        top = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = _exp(s * unit - top[:, None], bias_ptr is not None)
        shrink = _exp(m_i - top, bias_ptr is not None)
        l_i = l_i * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = dot(p.to(v.dtype), v, acc)
        if rel_v_ptr is not None:
            rows = _relative_rows(
                rel_v_ptr + head * stride_rv, reach_v, start_m, start_n, n, D, BM, BN, BD
            )
            acc = dot(unskew(p, tl.arange(0, BM) - (BM - 1), BM, BN).to(v.dtype), rows, acc)
        m_i = m_new
    out = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    _put_rows(out_base, out.to(q.dtype), offs_m, n, out_n, D, BD)
    if bias_ptr is None:
        tl.store(lse_ptr + sequence * total + offs_m, m_i + tl.log2(l_i), mask=offs_m < n)
    else:  # an empty row gets 0 and +inf, so that p is zero in the backward
        at = lse_ptr + 2 * sequence * total + offs_m
        tl.store(at, tl.where(l_i == 0.0, 0.0, m_i), mask=offs_m < n)
        tl.store(at + total, tl.where(l_i == 0.0, float("inf"), tl.log2(l_i)), mask=offs_m < n)

"""Backward kernels of long attention: over queries, over keys, for the bias and for the tables."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.axis_attention.long_tiles import (
    _COUNTS,
    _along,
    _block,
    _logits,
    _numbers,
    _put_rows,
    _relative_rows,
    _rows,
    _tile_product,
    _turned,
    _turned_back,
    _unit,
)
from fastvdm.kernels.axis_attention.shared import pinned, unskew
from fastvdm.kernels.common import LOG2E, dot


@triton.jit
def _softmax_sums(
    ptr, sequence, total, offs_m, n, BIAS: tl.constexpr, FULL: tl.constexpr = False
):  # fmt: skip
    """Of rows of one sequence and head: the maximum and the rest of lse; without a bias lse, 0."""
    if BIAS:
        at = ptr + 2 * sequence * total
        return _numbers(at, offs_m, n, FULL), _numbers(at + total, offs_m, n, FULL)
    else:
        return _numbers(ptr + sequence * total, offs_m, n, FULL), 0.0


@triton.jit
def _tile_gradient(
    q, q_plain, k, v, do, top, log, delta, bias_ptr, rel_k_ptr, rel_v_ptr, reach_k, reach_v,
    start_m, start_n, n, scale,
    T: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """p and ds of a tile, (BM, BN), or with T (BN, BM). With T the products are transposed, so that
    p and ds can be operands as they are; transposing them would go through shared memory.

    Queries beyond n need no mask: their rows and numbers were loaded as zero, so p is 1 and ds is
    0, and both are multiplied by zeros. Keys beyond n need one if they are summed over (MASK),
    because p may be inf."""
    s = _logits(
        q, q_plain, k, bias_ptr, rel_k_ptr, reach_k, start_m, start_n, n, scale, T, FOLD, MASK,
        D, BM, BN, BD, ACC,
    )  # fmt: skip
    if bias_ptr is None:
        p = tl.exp2(s * _unit(scale, FOLD) - _along(top, not T))
    else:
        p = tl.exp2((s - _along(top, not T)) * LOG2E - _along(log, not T))
    dp = _tile_product(do, v, do, rel_v_ptr, reach_v, start_m, start_n, n, T, D, BM, BN, BD, ACC)
    return p, p * (dp - _along(delta, not T))


@triton.jit(do_not_specialize=_COUNTS)
def _long_bwd_dq_kernel(
    dout_ptr, qkv_ptr, out_ptr, lse_ptr, delta_ptr,
    bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, dqkv_ptr,
    outer, total, n, heads, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h, dout_b, dout_o, dout_n, dout_h,
    out_b, out_o, out_n, dqkv_b, dqkv_o, dqkv_n, stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    sequence, b, o, head, start_m = _block(n, outer, heads, BM)
    scale = tl.zeros([], ACC) + scale_high + scale_low
    base = qkv_ptr + b * stride_b + o * stride_o + head * stride_h
    offs_m = start_m + tl.arange(0, BM)

    do = _rows(dout_ptr + b * dout_b + o * dout_o + head * dout_h, offs_m, n, dout_n, D, BD)
    out = _rows(out_ptr + b * out_b + o * out_o + head * D, offs_m, n, out_n, D, BD)
    delta = tl.sum(do.to(ACC) * out.to(ACC), 1)
    at = sequence * total + offs_m
    tl.store(delta_ptr + at, delta, mask=offs_m < n)
    if dqkv_ptr is not None:  # an early return would not help: code after it is compiled anyway
        dq_base = dqkv_ptr + b * dqkv_b + o * dqkv_o + head * D
        if focus_ptr is not None:  # noqa: SIM102  (known at compile time)
            if tl.load(focus_ptr + b) != 0:
                _put_rows(dq_base, tl.zeros([BM, BD], do.dtype), offs_m, n, dqkv_n, D, BD)
                return

        top, log = _softmax_sums(lse_ptr, sequence, total, offs_m, n, bias_ptr is not None)
        q_plain = _rows(base, offs_m, n, stride_n, D, BD)
        q = _turned(q_plain, rot_ptr, offs_m, n, total, HALF, BD, ACC)
        bias_at = None
        if bias_ptr is not None:
            bias_at = bias_ptr + head * n * n
        rel_k_at = None
        if rel_k_ptr is not None:
            rel_k_at = rel_k_ptr + head * stride_rk
            dq_plain = tl.zeros([BM, BD], ACC)
        rel_v_at = None
        if rel_v_ptr is not None:
            rel_v_at = rel_v_ptr + head * stride_rv
        dq = tl.zeros([BM, BD], ACC)
        for start_n in tl.range(0, n, BN):
            offs_n = start_n + tl.arange(0, BN)
            k = _rows(base + stride_c, offs_n, n, stride_n, D, BD, EVEN)
            k = _turned(k, rot_ptr, offs_n, n, total, HALF, BD, ACC)
            v = _rows(base + stride_c + stride_c, offs_n, n, stride_n, D, BD, EVEN)
            _, ds = _tile_gradient(
                q, q_plain, k, v, do, top, log, delta, bias_at, rel_k_at, rel_v_at, reach_k,
                reach_v, start_m, start_n, n, scale, False, FOLD, not EVEN, D, BM, BN, BD, ACC,
            )  # fmt: skip
            dq = dot(ds.to(k.dtype), k, dq)
            if rel_k_ptr is not None:
                rows = _relative_rows(rel_k_at, reach_k, start_m, start_n, n, D, BM, BN, BD)
                spread = unskew(ds, tl.arange(0, BM) - (BM - 1), BM, BN)
                dq_plain = dot(spread.to(k.dtype), rows, dq_plain)
        dq = _turned_back(dq, rot_ptr, offs_m, n, total, HALF, BD, ACC)
        if rel_k_ptr is not None:
            dq += dq_plain
        _put_rows(dq_base, (dq * scale).to(do.dtype), offs_m, n, dqkv_n, D, BD)


@triton.jit(do_not_specialize=_COUNTS)
def _long_bwd_dkv_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr,
    bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, dqkv_ptr,
    outer, total, n, heads, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h, dout_b, dout_o, dout_n, dout_h,
    dqkv_b, dqkv_o, dqkv_n, stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    # Not for fp32: without a matrix instruction, a transposed rotated q takes twice the registers.
    T: tl.constexpr = qkv_ptr.dtype.element_ty.primitive_bitwidth == 16
    sequence, b, o, head, start_n = _block(n, outer, heads, BN)
    scale = tl.zeros([], ACC) + scale_high + scale_low
    base = qkv_ptr + b * stride_b + o * stride_o + head * stride_h
    do_base = dout_ptr + b * dout_b + o * dout_o + head * dout_h
    dk_base = dqkv_ptr + b * dqkv_b + o * dqkv_o + (heads + head) * D
    dv_base = dk_base + heads * D
    offs_n = start_n + tl.arange(0, BN)
    if focus_ptr is not None:  # noqa: SIM102  (known at compile time)
        if tl.load(focus_ptr + b) != 0:
            do = _rows(do_base, offs_n, n, dout_n, D, BD)
            _put_rows(dv_base, do, offs_n, n, dqkv_n, D, BD)
            _put_rows(dk_base, tl.zeros([BN, BD], do.dtype), offs_n, n, dqkv_n, D, BD)
            return

    k = _rows(base + stride_c, offs_n, n, stride_n, D, BD)
    k = _turned(k, rot_ptr, offs_n, n, total, HALF, BD, ACC)
    v = _rows(base + stride_c + stride_c, offs_n, n, stride_n, D, BD)
    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + head * n * n
    rel_k_at = None
    if rel_k_ptr is not None:
        rel_k_at = rel_k_ptr + head * stride_rk
    rel_v_at = None
    if rel_v_ptr is not None:
        rel_v_at = rel_v_ptr + head * stride_rv
    dk = tl.zeros([BN, BD], ACC)
    dv = tl.zeros([BN, BD], ACC)
    for start_m in tl.range(0, n, BM):
        offs_m = start_m + tl.arange(0, BM)
        q_plain = _rows(base, offs_m, n, stride_n, D, BD, EVEN)
        q = _turned(q_plain, rot_ptr, offs_m, n, total, HALF, BD, ACC)
        if rot_ptr is not None:
            q = pinned(q)  # the pipeliner cannot predicate it, so this loop has one stage
        do = _rows(do_base, offs_m, n, dout_n, D, BD, EVEN)
        top, log = _softmax_sums(lse_ptr, sequence, total, offs_m, n, bias_ptr is not None, EVEN)
        delta = _numbers(delta_ptr + sequence * total, offs_m, n, EVEN)
        p, ds = _tile_gradient(
            q, q_plain, k, v, do, top, log, delta, bias_at, rel_k_at, rel_v_at, reach_k,
            reach_v, start_m, start_n, n, scale, T, FOLD, False, D, BM, BN, BD, ACC,
        )  # fmt: skip
        if not T:
            p, ds = tl.trans(p), tl.trans(ds)
        dv = dot(p.to(do.dtype), do, dv)
        dk = dot(ds.to(q.dtype), q, dk)
    dk = _turned_back(dk, rot_ptr, offs_n, n, total, HALF, BD, ACC)
    _put_rows(dk_base, (dk * scale).to(k.dtype), offs_n, n, dqkv_n, D, BD)
    _put_rows(dv_base, dv.to(k.dtype), offs_n, n, dqkv_n, D, BD)


@triton.jit(do_not_specialize=[*_COUNTS, "sequences", "splits"])
def _long_bwd_dbias_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr,
    bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, dbias_ptr,
    outer, total, n, heads, sequences, splits, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h, dout_b, dout_o, dout_n, dout_h,
    stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(n, BN)
    pid = tl.program_id(0)
    start_n = (pid % columns) * BN
    start_m = (pid // columns % tl.cdiv(n, BM)) * BM
    part = (pid // columns // tl.cdiv(n, BM)).to(tl.int64)  # (split, head)
    head = part % heads
    scale = tl.zeros([], ACC) + scale_high + scale_low
    offs_m, offs_n = start_m + tl.arange(0, BM), start_n + tl.arange(0, BN)
    bias_at = bias_ptr + head * n * n
    rel_k_at = None
    if rel_k_ptr is not None:
        rel_k_at = rel_k_ptr + head * stride_rk
    rel_v_at = None
    if rel_v_ptr is not None:
        rel_v_at = rel_v_ptr + head * stride_rv
    acc = tl.zeros([BM, BN], ACC)
    for index in tl.range((part // heads).to(tl.int32), sequences, splits):  # (batch, outer)
        o, b = tl.cast(index % outer, tl.int64), tl.cast(index // outer, tl.int64)
        focused = False
        if focus_ptr is not None:
            focused = tl.load(focus_ptr + b) != 0
        if not focused:
            base = qkv_ptr + b * stride_b + o * stride_o + head * stride_h
            do_base = dout_ptr + b * dout_b + o * dout_o + head * dout_h
            q_plain = _rows(base, offs_m, n, stride_n, D, BD)
            q = _turned(q_plain, rot_ptr, offs_m, n, total, HALF, BD, ACC)
            k = _rows(base + stride_c, offs_n, n, stride_n, D, BD)
            k = _turned(k, rot_ptr, offs_n, n, total, HALF, BD, ACC)
            if rot_ptr is not None:
                q, k = pinned(q), pinned(k)  # one stage, as in the dkv kernel
            v = _rows(base + stride_c + stride_c, offs_n, n, stride_n, D, BD)
            do = _rows(do_base, offs_m, n, dout_n, D, BD)
            sequence = tl.cast(index, tl.int64) * heads + head
            top, log = _softmax_sums(lse_ptr, sequence, total, offs_m, n, True)
            delta = _numbers(delta_ptr + sequence * total, offs_m, n)
            _, ds = _tile_gradient(
                q, q_plain, k, v, do, top, log, delta, bias_at, rel_k_at, rel_v_at, reach_k,
                reach_v, start_m, start_n, n, scale, False, False, False, D, BM, BN, BD, ACC,
            )  # fmt: skip
            acc += ds
    to = part * n * n + offs_m.to(tl.int64)[:, None] * n + offs_n[None, :]
    tl.store(dbias_ptr + to, acc, mask=(offs_m < n)[:, None] & (offs_n < n)[None, :])


@triton.jit(do_not_specialize=[*_COUNTS, "sequences", "splits"])
def _long_bwd_drel_kernel(
    dout_ptr, qkv_ptr, lse_ptr, delta_ptr,
    bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, drel_k_ptr, drel_v_ptr,
    outer, total, n, heads, sequences, splits, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h, dout_b, dout_o, dout_n, dout_h,
    stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One diagonal of tiles, which all use the same 2*BN rows of the tables."""
    blocks = tl.cdiv(n, BN)
    diagonals = 2 * blocks - 1
    pid = tl.program_id(0)
    diagonal = pid % diagonals
    part = (pid // diagonals).to(tl.int64)  # (split, head)
    head = part % heads
    ahead = diagonal - (blocks - 1)  # key block minus query block
    scale = tl.zeros([], ACC) + scale_high + scale_low
    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + head * n * n
    rel_k_at = None
    if rel_k_ptr is not None:
        rel_k_at = rel_k_ptr + head * stride_rk
    rel_v_at = None
    if rel_v_ptr is not None:
        rel_v_at = rel_v_ptr + head * stride_rv
    shift = tl.arange(0, BM) - (BM - 1)
    if drel_k_ptr is not None:
        drel_k = tl.zeros([2 * BN, BD], ACC)
    if drel_v_ptr is not None:
        drel_v = tl.zeros([2 * BN, BD], ACC)
    first, last = tl.maximum(0, -ahead), tl.minimum(blocks, blocks - ahead)
    for index in tl.range((part // heads).to(tl.int32), sequences, splits):
        o, b = tl.cast(index % outer, tl.int64), tl.cast(index // outer, tl.int64)
        base = qkv_ptr + b * stride_b + o * stride_o + head * stride_h
        do_base = dout_ptr + b * dout_b + o * dout_o + head * dout_h
        focused = False
        if focus_ptr is not None:
            focused = tl.load(focus_ptr + b) != 0
        for block in tl.range(first, last):
            start_m, start_n = block * BM, (block + ahead) * BN
            offs_m, offs_n = start_m + tl.arange(0, BM), start_n + tl.arange(0, BN)
            do = _rows(do_base, offs_m, n, dout_n, D, BD)
            if focused:
                if drel_v_ptr is not None:
                    itself = (tl.arange(0, 2 * BN) == BM - 1) & (ahead == 0)
                    drel_v += tl.where(itself[:, None], tl.sum(do.to(ACC), 0)[None, :], 0.0)
            else:
                q_plain = _rows(base, offs_m, n, stride_n, D, BD)
                q = _turned(q_plain, rot_ptr, offs_m, n, total, HALF, BD, ACC)
                k = _rows(base + stride_c, offs_n, n, stride_n, D, BD)
                k = _turned(k, rot_ptr, offs_n, n, total, HALF, BD, ACC)
                v = _rows(base + stride_c + stride_c, offs_n, n, stride_n, D, BD)
                sequence = tl.cast(index, tl.int64) * heads + head
                top, log = _softmax_sums(lse_ptr, sequence, total, offs_m, n, bias_ptr is not None)
                delta = _numbers(delta_ptr + sequence * total, offs_m, n)
                p, ds = _tile_gradient(
                    q, q_plain, k, v, do, top, log, delta, bias_at, rel_k_at, rel_v_at, reach_k,
                    reach_v, start_m, start_n, n, scale, False, FOLD, True, D, BM, BN, BD, ACC,
                )  # fmt: skip
                if drel_k_ptr is not None:
                    spread = unskew(ds, shift, BM, BN).to(do.dtype)
                    drel_k = dot(tl.trans(spread), q_plain, drel_k)
                if drel_v_ptr is not None:
                    spread_p = unskew(p, shift, BM, BN).to(do.dtype)
                    drel_v = dot(tl.trans(spread_p), do, drel_v)
    rows, offs_d = tl.arange(0, 2 * BN), tl.arange(0, BD)
    to = (part * diagonals + diagonal) * 2 * BN * D + rows[:, None] * D + offs_d[None, :]
    if drel_k_ptr is not None:
        tl.store(drel_k_ptr + to, drel_k * scale, mask=(offs_d < D)[None, :])
    if drel_v_ptr is not None:
        tl.store(drel_v_ptr + to, drel_v, mask=(offs_d < D)[None, :])

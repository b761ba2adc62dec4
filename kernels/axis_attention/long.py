"""``axis_attention`` beyond one tile: online softmax over blocks of keys, any N.

Forward after Dao 2023 (FlashAttention-2, arXiv 2307.08691): saves lse. Backward in two kernels,
one by queries (dq and δ = rowsum(dout*out)) and one by keys (dk, dv); the gradients of bias and
tables come from kernels of their own that recompute ds for one tile of (query, key), sum it over
the sequences in registers and write one partial per split: deterministic, never expanded over the
batch. Recomputing costs two of five products; atomics would cost the order of the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.axis_attention.shared import (
    Geometry,
    by_distance,
    pinned,
    rotary_table,
    rotate,
    skew,
    split_scale,
    strides,
    table_sizes,
    unskew,
)
from fastvdm.kernels.common import (
    LOG2E,
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    dot,
    major,
    next_power_of_2,
    program_budget,
)
from fastvdm.kernels.tuned import tuned


@dataclass(frozen=True)
class LongConfig:
    BM: int  # queries of a tile
    BN: int  # keys of a tile
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # 255 where ptxas would rather spill than give up a block


@tuned("axis_attention_long", n=lambda n: min(4096, next_power_of_2(n)))
def pick_config(
    kind: str, bd: int, itemsize: int, n: int, *, shaw: bool, bias: bool, rotary: bool, major: int
) -> LongConfig:
    """Tiles that spill nowhere (``bench/aot.py``). Analytic, NOT MEASURED: of 128x64 logits the
    exponentials alone take 512 cycles of a multiprocessor, so that tiles of more keys, with fewer
    instructions but one block, gain nothing over 128x64 with two (590 at D=64, 518 at D=32).

    kind: "fwd", "dq", "dkv", "dbias" or "drel". The Shaw terms need BM == BN and hold 2*BN rows.
    ``major`` is the device's compute capability; the length ``n`` tells measured tiles apart.
    """
    wide = bd > 64
    if kind == "drel":
        return LongConfig(16, 16, 8 if wide else 4, 1, 255)
    if shaw:
        return LongConfig(32, 32, 8, 1, 255 if kind == "dkv" else None)
    if itemsize > 2:  # products on the FMA units: smaller tiles keep operands in registers
        if kind == "dbias":
            return LongConfig(32, 16, 8, 1) if wide else LongConfig(16, 32, 4, 1, 255)
        if wide and (kind == "dq" or (kind == "fwd" and (bias or rotary))):
            return LongConfig(16, 16, 8, 1)
        if wide and kind == "dkv":
            return LongConfig(32, 32, 8, 1, 255)
        more = wide or kind == "dq" or (kind == "fwd" and rotary)
        most = 255 if rotary and kind in ("dq", "dkv") else None
        return LongConfig(32, 32, 8 if more else 4, 1, most)
    if kind == "fwd" and n <= 64 and not wide:  # one tile of keys: nothing to load ahead
        return LongConfig(64, 32, 4, 2) if rotary else LongConfig(64, 64, 4, 1)
    if kind == "fwd":  # a third stage of bias tiles would leave room for one block only
        return LongConfig(128, 32 if wide and major < 9 else 64, 8, 2 if wide or bias else 3)
    if rotary and kind == "dq":  # it turns keys in the loop, dkv queries
        return LongConfig(64, 32, 8 if wide else 4, 2, 255)
    if rotary and kind == "dkv":
        small = wide if major >= 9 else bias and bd == 64
        return LongConfig(16 if small else 32, 64, 8, 1, 255)
    if kind == "dkv" and bd == 64 and (bias or major < 9):
        return LongConfig(32, 64, 4, 2)
    if kind == "dbias":
        if rotary:
            return LongConfig(32 if wide or major < 9 else 64, 64, 8, 1, 255)
        return LongConfig(64, 64, 8, 2)
    return LongConfig(64, 64, 8 if wide else 4, 2)


_COUNTS = ["outer", "heads", "reach_k", "reach_v"]  # nothing is gained by knowing them


@triton.jit
def _block(n, outer, heads, BLOCK: tl.constexpr):
    """What a program works on: its sequence (batch, outer, head), also taken apart, in int64, and
    the first of its BLOCK rows there."""
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)  # divided in int32: in int64 each division is a call of 100 instructions
    sequence, start = pid // blocks, pid % blocks * BLOCK
    b, o, head = sequence // heads // outer, sequence // heads % outer, sequence % heads
    return sequence.to(tl.int64), b.to(tl.int64), o.to(tl.int64), head.to(tl.int64), start


@triton.jit
def _rows(
    base, offs_n, n, stride_n, D: tl.constexpr, BD: tl.constexpr, FULL: tl.constexpr = False
):  # fmt: skip
    """(BLOCK, BD) rows offs_n of one sequence and head, zero outside; FULL: all are inside."""
    offs_d = tl.arange(0, BD)
    at = base + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    if FULL and D == BD:
        return tl.load(at)
    elif FULL:
        return tl.load(at, mask=(offs_d < D)[None, :], other=0.0)
    else:
        return tl.load(at, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _numbers(ptr, offs_n, n, FULL: tl.constexpr = False):
    """One number a row, as ``_rows``."""
    if FULL:
        return tl.load(ptr + offs_n)
    else:
        return tl.load(ptr + offs_n, mask=offs_n < n, other=0.0)


@triton.jit
def _put_rows(base, x, offs_n, n, stride_n, D: tl.constexpr, BD: tl.constexpr):
    offs_d = tl.arange(0, BD)
    at = offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    tl.store(base + at, x, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :])


@triton.jit
def _turned(
    x, rot_ptr, offs_n, n, total, HALF: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if rot_ptr is not None:
        cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
        return rotate(x.to(ACC), cos, sin).to(x.dtype)
    else:
        return x


@triton.jit
def _turned_back(
    x, rot_ptr, offs_n, n, total, HALF: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if rot_ptr is not None:
        cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
        return rotate(x, cos, -sin)
    else:
        return x


@triton.jit
def _relative_rows(
    ptr, reach, start_m, start_n, n,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(2*BN, BD): the rows of a table that a tile (BM == BN) needs; its key j and query i take the
    local row j - i + BM - 1."""
    return by_distance(ptr, start_n - start_m - (BM - 1), reach, n, 2 * BN, D, BD)


@triton.jit
def _relative_product(
    x, ptr, reach, start_m, start_n, n,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x_i·table[j-i] of a tile, (BM, BN)."""
    rows = _relative_rows(ptr, reach, start_m, start_n, n, D, BM, BN, BD)
    product = dot(x, tl.trans(rows), tl.zeros([BM, 2 * BN], ACC))
    return skew(product, tl.arange(0, BM) - (BM - 1), BM, BN)


@triton.jit
def _along(x, FIRST: tl.constexpr):
    """A vector along the first axis of a tile, or along its second."""
    if FIRST:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _tile_product(
    of_query, of_key, plain, table_ptr, reach, start_m, start_n, n, T: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """of_query_i·of_key_j + plain_i·table[j-i], (BM, BN) or, T, (BN, BM)."""
    if T:
        s = dot(of_key, tl.trans(of_query), tl.zeros([BN, BM], ACC))
    else:
        s = dot(of_query, tl.trans(of_key), tl.zeros([BM, BN], ACC))
    if table_ptr is not None:
        more = _relative_product(plain, table_ptr, reach, start_m, start_n, n, D, BM, BN, BD, ACC)
        if T:
            more = tl.trans(more)
        s += more
    return s


@triton.jit
def _logits(
    q, q_plain, k, bias_ptr, rel_k_ptr, reach_k, start_m, start_n, n, scale, T: tl.constexpr,
    FOLD: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits of a tile, (BM, BN) or, T, (BN, BM), in ``_unit``; MASK: -inf for keys beyond n,
    which the loads left zero."""
    s = _tile_product(q, k, q_plain, rel_k_ptr, reach_k, start_m, start_n, n, T, D, BM, BN, BD, ACC)
    if not FOLD:
        s = s * (scale * LOG2E)
    offs_m, offs_n = start_m + tl.arange(0, BM), start_n + tl.arange(0, BN)
    if bias_ptr is not None:
        at = _along(offs_m.to(tl.int64), not T) * n + _along(offs_n, T)
        mask = _along(offs_m < n, not T) & _along(offs_n < n, T)
        s += tl.load(bias_ptr + at, mask=mask, other=0.0).to(ACC) * LOG2E
    if MASK:
        s = tl.where(_along(offs_n < n, T), s, float("-inf"))
    return s


@triton.jit
def _unit(scale, FOLD: tl.constexpr):
    """What takes ``_logits`` to powers of 2. FOLD: the scale, by the one instruction that subtracts
    the maximum; where it is not positive or a bias follows it, they have it already."""
    if FOLD:
        return scale * LOG2E
    else:
        return 1.0


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
        if tl.load(focus_ptr + b) != 0:  # each frame sees itself only
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
        p = tl.exp2(s * unit - top[:, None])
        shrink = tl.exp2(m_i - top)
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
    # An empty row keeps +inf, so that p = exp(s - lse) is zero in the backward.
    lse = tl.where(l_i == 0.0, float("inf"), (m_i + tl.log2(l_i)) / LOG2E)
    tl.store(lse_ptr + sequence * total + offs_m, lse, mask=offs_m < n)


@triton.jit
def _tile_gradient(
    q, q_plain, k, v, do, lse, delta, bias_ptr, rel_k_ptr, rel_v_ptr, reach_k, reach_v,
    start_m, start_n, n, scale,
    T: tl.constexpr, FOLD: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """p and ds of a tile, (BM, BN) or, T, (BN, BM): by transposed products, after which they are
    operands as they stand. Transposed themselves they would pass through shared memory.

    Queries beyond n need no mask: their rows, lse and delta among them, were loaded as zero, so p
    is 1, ds is 0, and both meet zeros. Keys do where they are summed over (MASK): p may be inf."""
    s = _logits(
        q, q_plain, k, bias_ptr, rel_k_ptr, reach_k, start_m, start_n, n, scale, T, FOLD, MASK,
        D, BM, BN, BD, ACC,
    )  # fmt: skip
    p = tl.exp2(s * _unit(scale, FOLD) - _along(lse * LOG2E, not T))
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
    if dqkv_ptr is not None:  # not an early return: what follows one is compiled all the same
        dq_base = dqkv_ptr + b * dqkv_b + o * dqkv_o + head * D
        if focus_ptr is not None:  # noqa: SIM102  (known at compile time)
            if tl.load(focus_ptr + b) != 0:
                _put_rows(dq_base, tl.zeros([BM, BD], do.dtype), offs_m, n, dqkv_n, D, BD)
                return

        lse = tl.load(lse_ptr + at, mask=offs_m < n, other=0.0)
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
                q, q_plain, k, v, do, lse, delta, bias_at, rel_k_at, rel_v_at, reach_k, reach_v,
                start_m, start_n, n, scale, False, FOLD, not EVEN, D, BM, BN, BD, ACC,
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
    # fp32 has no matrix instruction, and a rotated q transposed there takes its registers twice.
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
            q = pinned(q)  # why this loop has one stage: the pipeliner cannot predicate it
        do = _rows(do_base, offs_m, n, dout_n, D, BD, EVEN)
        lse = _numbers(lse_ptr + sequence * total, offs_m, n, EVEN)
        delta = _numbers(delta_ptr + sequence * total, offs_m, n, EVEN)
        p, ds = _tile_gradient(
            q, q_plain, k, v, do, lse, delta, bias_at, rel_k_at, rel_v_at, reach_k, reach_v,
            start_m, start_n, n, scale, T, FOLD, False, D, BM, BN, BD, ACC,
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
                q, k = pinned(q), pinned(k)  # one stage, as in dkv
            v = _rows(base + stride_c + stride_c, offs_n, n, stride_n, D, BD)
            do = _rows(do_base, offs_m, n, dout_n, D, BD)
            at = (tl.cast(index, tl.int64) * heads + head) * total + offs_m
            lse = tl.load(lse_ptr + at, mask=offs_m < n, other=0.0)
            delta = tl.load(delta_ptr + at, mask=offs_m < n, other=0.0)
            _, ds = _tile_gradient(
                q, q_plain, k, v, do, lse, delta, bias_at, rel_k_at, rel_v_at, reach_k, reach_v,
                start_m, start_n, n, scale, False, False, False, D, BM, BN, BD, ACC,
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
    """One diagonal of tiles: all of them touch the same 2*BN rows of the tables."""
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
                at = (tl.cast(index, tl.int64) * heads + head) * total + offs_m
                lse = tl.load(lse_ptr + at, mask=offs_m < n, other=0.0)
                delta = tl.load(delta_ptr + at, mask=offs_m < n, other=0.0)
                p, ds = _tile_gradient(
                    q, q_plain, k, v, do, lse, delta, bias_at, rel_k_at, rel_v_at, reach_k, reach_v,
                    start_m, start_n, n, scale, False, FOLD, True, D, BM, BN, BD, ACC,
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


def _common(
    geo: Geometry, qkv: Tensor, options: AttentionOptions, config: LongConfig, **more: bool
) -> dict:
    return dict(
        D=geo.d,
        HALF=options.pairs,
        BM=config.BM,
        BN=config.BN,
        BD=max(16, next_power_of_2(geo.d)),
        ACC=acc_dtype(qkv.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        **more,
    )


def _config(kind: str, geo: Geometry, qkv: Tensor, options: AttentionOptions) -> LongConfig:
    has = {"bias": options.bias is not None, "rotary": options.rotary is not None}
    bd = max(16, next_power_of_2(geo.d))
    has["shaw"] = options.shaw
    return pick_config(kind, bd, qkv.element_size(), geo.n, major=major(qkv.device), **has)


def long_fwd(
    geo: Geometry,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    sm_scale: float,
) -> None:
    """``options`` are ``prepared``; writes n rows of out and lse."""
    config = _config("fwd", geo, qkv, options)
    fold = options.bias is None and sm_scale > 0
    grid = (geo.batch * geo.outer * geo.heads * cdiv(geo.n, config.BM),)
    _long_fwd_kernel[grid](
        *(qkv, *options[:5], out, lse),
        *(geo.outer, geo.total, geo.n, geo.heads, *split_scale(sm_scale)),
        *(*geo.qkv, *geo.out, *table_sizes(options)),
        **_common(geo, qkv, options, config, FOLD=fold, EVEN=geo.n % config.BN == 0),
    )


def _add_diagonals(partial: Tensor, n: int, block: int) -> Tensor:
    """(splits, heads, diagonals, 2*block, D) → (1, heads, 2n-1, D): neighbouring diagonals
    overlap by one block; summed in order."""
    partial = partial.sum(0)
    heads, diagonals, _, d = partial.shape
    rows = partial.new_zeros(heads, diagonals + 1, block, d)
    rows[:, :-1] += partial[:, :, :block]
    rows[:, 1:] += partial[:, :, block:]
    # Row 0 is the distance -(blocks*block - 1).
    first = (diagonals + 1) // 2 * block - n
    return rows.flatten(1, 2)[None, :, first : first + 2 * n - 1].contiguous()


def long_bwd(
    geo: Geometry,
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    axis: int,
    options: AttentionOptions,
    sm_scale: float,
    dqkv: Tensor | None,
    need_dbias: bool,
    need_drel_k: bool,
    need_drel_v: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes the first n rows of dqkv; returns dbias (heads, n, n) and the gradients of the tables
    by distance (1, heads, 2n-1, D) in the accumulator's dtype."""
    acc = acc_torch_dtype(qkv.dtype)
    sequences = geo.batch * geo.outer
    scale = split_scale(sm_scale)
    fold = options.bias is None and sm_scale > 0
    given, tables = options[:5], table_sizes(options)
    reads = (*geo.qkv, *strides(dout, axis))
    delta = torch.empty_like(lse)

    def splits_of(tiles: int) -> int:
        return max(1, min(sequences, program_budget(qkv.device) // tiles))

    by_query = _config("dq", geo, qkv, options)
    _long_bwd_dq_kernel[(sequences * geo.heads * cdiv(geo.n, by_query.BM),)](
        *(dout, qkv, out, lse, delta, *given, dqkv),
        *(geo.outer, geo.total, geo.n, geo.heads, *scale),
        *(*reads, *geo.out, *geo.dqkv, *tables),
        **_common(geo, qkv, options, by_query, FOLD=fold, EVEN=geo.n % by_query.BN == 0),
    )
    if dqkv is not None:
        by_key = _config("dkv", geo, qkv, options)
        _long_bwd_dkv_kernel[(sequences * geo.heads * cdiv(geo.n, by_key.BN),)](
            *(dout, qkv, lse, delta, *given, dqkv),
            *(geo.outer, geo.total, geo.n, geo.heads, *scale),
            *(*reads, *geo.dqkv, *tables),
            **_common(geo, qkv, options, by_key, FOLD=fold, EVEN=geo.n % by_key.BM == 0),
        )
    dbias = drel_k = drel_v = None
    if need_dbias:
        tile = _config("dbias", geo, qkv, options)
        tiles = geo.heads * cdiv(geo.n, tile.BM) * cdiv(geo.n, tile.BN)
        splits = splits_of(tiles)
        dbias = torch.empty((splits, geo.heads, geo.n, geo.n), dtype=acc, device=qkv.device)
        _long_bwd_dbias_kernel[(tiles * splits,)](
            *(dout, qkv, lse, delta, *given, dbias),
            *(geo.outer, geo.total, geo.n, geo.heads, sequences, splits, *scale),
            *(*reads, *tables),
            **_common(geo, qkv, options, tile),
        )
        dbias = dbias.sum(0)
    if need_drel_k or need_drel_v:
        tile = _config("drel", geo, qkv, options)
        diagonals = 2 * cdiv(geo.n, tile.BN) - 1
        splits = splits_of(geo.heads * diagonals)
        size = (splits, geo.heads, diagonals, 2 * tile.BN, geo.d)
        drel_k = torch.empty(size, dtype=acc, device=qkv.device) if need_drel_k else None
        drel_v = torch.empty(size, dtype=acc, device=qkv.device) if need_drel_v else None
        _long_bwd_drel_kernel[(geo.heads * diagonals * splits,)](
            *(dout, qkv, lse, delta, *given, drel_k, drel_v),
            *(geo.outer, geo.total, geo.n, geo.heads, sequences, splits, *scale),
            *(*reads, *tables),
            **_common(geo, qkv, options, tile, FOLD=fold),
        )
        drel_k = None if drel_k is None else _add_diagonals(drel_k, geo.n, tile.BN)
        drel_v = None if drel_v is None else _add_diagonals(drel_v, geo.n, tile.BN)
    return dbias, drel_k, drel_v

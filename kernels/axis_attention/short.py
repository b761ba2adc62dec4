"""``axis_attention`` for N <= 32: one tile holds all keys of several sequences.

A program owns one head of P neighbouring sequences (pixels, for attention over time) and runs their
products as batched 3-D dots, so that memory is the limit: forward 4 and backward 7 times the bytes
of q. Nothing is saved for the backward; it recomputes p and takes δ = Σ_j p dp from the tile. The
gradients of bias and tables are summed in registers by programs that walk over the tiles of their
head, and each writes one partial: no atomics, nothing that grows with the batch.
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
class ShortConfig:
    P: int  # sequences per tile
    num_warps: int
    maxnreg: int | None = None


@tuned("axis_attention_short", outer=lambda n: min(64, next_power_of_2(n)))
def pick_config(
    bn: int, bd: int, itemsize: int, outer: int, *, backward: bool, shaw: bool, biased: bool,
    even: bool, frozen: bool, major: int,
) -> ShortConfig:  # fmt: skip
    """Derived from the registers that ptxas reports for sm_90
    (``python bench/aot.py axis_attention``). Analytic, NOT MEASURED.

    A batched product keeps a whole sequence in one warp, so P sequences need P warps. This fits
    while bn*bd is small: the backward takes 128 registers without spills at 16x32, so four blocks
    share a multiprocessor; the forward takes 123 at 16x64. Otherwise one sequence is spread over
    the warps. With Shaw tables two sequences take half the instructions of one (16x64, backward),
    and spill only together with a bias or a rotary embedding (``biased``), which no network has.
    Four sequences take five eighths of the instructions of two. They fit without masks (``even``:
    all of 16 x 64, and P divides ``outer``) if the tables are ``frozen``, and on sm_90 also with
    their gradients.
    """
    packed = 512 if backward or itemsize > 2 else 1024
    if bn * bd <= packed and not (backward and (shaw or itemsize > 2)):
        p = min(4, next_power_of_2(outer))
        return ShortConfig(p, 4, 128 if backward and itemsize == 2 else None)
    if backward and shaw and not biased and (bn, bd, itemsize) == (16, 64, 2):
        p = 4 if even and outer % 4 == 0 and (frozen or major == 9) else 2
        return ShortConfig(min(p, next_power_of_2(outer)), 4, 255)
    with_tables = shaw and (backward or itemsize > 2)
    heavy = bn * bd > 2048 or (with_tables and bn * bd > (1024 if itemsize > 2 else 512))
    heavy = heavy or (backward and itemsize > 2 and bn * bd == 2048 and (bd == 64 or major < 9))
    # 255, because ptxas would otherwise limit registers for occupancy, and spill.
    most = 255 if backward and (shaw or itemsize > 2) else None
    return ShortConfig(1, 8 if heavy else 4, most)


@triton.jit
def _products(a, b, acc):
    """acc + a @ b for each of P sequences. A batched product gives each sequence to one warp; a
    plain product spreads a single sequence over all warps."""
    if acc.shape[0] == 1:
        flat = acc.reshape(acc.shape[1], acc.shape[2])
        a, b = a.reshape(a.shape[1], a.shape[2]), b.reshape(b.shape[1], b.shape[2])
        return dot(a, b, flat).reshape(acc.shape)
    else:
        return dot(a, b, acc)


@triton.jit
def _probabilities(
    q, q_plain, k, rel_k, bias_ptr, shift, offs_n, n, scale,
    P: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """p (P, BN, BN) in ACC; zero for keys beyond n and in rows that are all -inf."""
    s = _products(q, tl.trans(k, 0, 2, 1), tl.zeros([P, BN, BN], ACC))
    if rel_k is not None:
        flat = q_plain.reshape(P * BN, BD)
        product = dot(flat, tl.trans(rel_k), tl.zeros([P * BN, 2 * BN], ACC))
        s += skew(product, shift, P * BN, BN).reshape(P, BN, BN)
    # With a bias in plain units: finfo.min times LOG2E would be -inf, which masks, and it does not.
    s = s * (scale if bias_ptr is not None else scale * LOG2E)
    if bias_ptr is not None:
        in_tile = (offs_n < n)[:, None] & (offs_n < n)[None, :]
        bias = tl.load(bias_ptr + offs_n[:, None] * n + offs_n[None, :], mask=in_tile, other=0.0)
        s += bias.to(ACC)[None, :, :]
    s = tl.where((offs_n < n)[None, None, :], s, float("-inf"))
    top = tl.max(s, 2)
    top = tl.where(top == float("-inf"), 0.0, top)
    s -= top[:, :, None]
    p = tl.exp2(s * LOG2E if bias_ptr is not None else s)
    total = tl.sum(p, 2)
    return p * (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]


@triton.jit
def _inside(offs_o, offs_n, offs_d, outer, n, D: tl.constexpr, EVEN: tl.constexpr):
    """The mask of a tile (P, BN, BD). EVEN: all of it is inside, which the compiler can see."""
    if EVEN:
        return tl.full([offs_o.shape[0], offs_n.shape[0], offs_d.shape[0]], 1, tl.int1)
    else:
        inside = (offs_o < outer)[:, None, None] & (offs_n < n)[None, :, None]
        return inside & (offs_d < D)[None, None, :]


# Specialising on these gains nothing.
_COUNTS = ["outer", "total", "tiles", "heads", "reach_k", "reach_v"]


@triton.jit(do_not_specialize=_COUNTS)
def _short_fwd_kernel(
    qkv_ptr, bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr, out_ptr,
    outer, total, n, tiles, heads, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h, out_b, out_o, out_n,
    stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)  # divide in int32: an int64 division is a call of 100 instructions
    head, b = (pid % heads).to(tl.int64), (pid // heads // tiles).to(tl.int64)
    scale = tl.zeros([], ACC) + scale_high + scale_low

    offs_o = (pid // heads % tiles).to(tl.int64) * P + tl.arange(0, P)
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, BD)
    walk = offs_n.to(tl.int64)
    mask = _inside(offs_o, offs_n, offs_d, outer, n, D, EVEN)
    # (P, BN, BD)
    at = offs_o[:, None, None] * stride_o + walk[None, :, None] * stride_n + offs_d[None, None, :]
    base = qkv_ptr + b * stride_b + head * stride_h
    out_at = offs_o[:, None, None] * out_o + walk[None, :, None] * out_n + offs_d[None, None, :]
    out_base = out_ptr + b * out_b + head * D
    v = tl.load(base + stride_c + stride_c + at, mask=mask, other=0.0)

    if focus_ptr is not None:  # noqa: SIM102  (known at compile time)
        if tl.load(focus_ptr + b) != 0:  # each frame attends to itself only
            out = v
            if rel_v_ptr is not None:
                itself = rel_v_ptr + head * stride_rv + reach_v * D + offs_d
                center = tl.load(itself, mask=offs_d < D, other=0.0).to(ACC)
                out = (v.to(ACC) + center[None, None, :]).to(v.dtype)
            tl.store(out_base + out_at, out, mask=mask)
            return

    q = tl.load(base + at, mask=mask, other=0.0)
    k = tl.load(base + stride_c + at, mask=mask, other=0.0)
    q_plain = q
    if rot_ptr is not None:
        cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
        q = pinned(rotate(q.to(ACC), cos[None], sin[None]).to(v.dtype))
        k = pinned(rotate(k.to(ACC), cos[None], sin[None]).to(v.dtype))
    shift = tl.arange(0, P * BN) % BN - (n - 1)
    rel_k = None
    if rel_k_ptr is not None:
        rel_k = by_distance(rel_k_ptr + head * stride_rk, 1 - n, reach_k, n, 2 * BN, D, BD)
    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + head * n * n
    p = _probabilities(q, q_plain, k, rel_k, bias_at, shift, offs_n, n, scale, P, BN, BD, ACC)
    out = _products(p.to(v.dtype), v, tl.zeros([P, BN, BD], ACC))
    if rel_v_ptr is not None:
        rel_v = by_distance(rel_v_ptr + head * stride_rv, 1 - n, reach_v, n, 2 * BN, D, BD)
        spread = unskew(p.reshape(P * BN, BN), shift, P * BN, BN).to(v.dtype)
        out += dot(spread, rel_v, tl.zeros([P * BN, BD], ACC)).reshape(P, BN, BD)
    tl.store(out_base + out_at, out.to(v.dtype), mask=mask)


@triton.jit(do_not_specialize=[*_COUNTS, "all_tiles", "walkers"])
def _short_bwd_kernel(
    dout_ptr, qkv_ptr, bias_ptr, rel_k_ptr, rel_v_ptr, rot_ptr, focus_ptr,
    dqkv_ptr, dbias_ptr, drel_k_ptr, drel_v_ptr,
    outer, total, n, tiles, all_tiles, heads, walkers, scale_high, scale_low,
    stride_b, stride_o, stride_n, stride_c, stride_h,
    dout_b, dout_o, dout_n, dout_h, dqkv_b, dqkv_o, dqkv_n, stride_rk, stride_rv, reach_k, reach_v,
    D: tl.constexpr, HALF: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    head, walker = (pid % heads).to(tl.int64), pid // heads
    scale = tl.zeros([], ACC) + scale_high + scale_low
    offs_n, offs_d = tl.arange(0, BN), tl.arange(0, BD)
    walk = offs_n.to(tl.int64)
    row = tl.arange(0, P * BN) % BN
    shift = row - (n - 1)
    rel_k = None
    if rel_k_ptr is not None:
        rel_k = by_distance(rel_k_ptr + head * stride_rk, 1 - n, reach_k, n, 2 * BN, D, BD)
    rel_v = None
    if rel_v_ptr is not None:
        rel_v = by_distance(rel_v_ptr + head * stride_rv, 1 - n, reach_v, n, 2 * BN, D, BD)
    bias_at = None
    if bias_ptr is not None:
        bias_at = bias_ptr + head * n * n
    if dbias_ptr is not None:
        dbias = tl.zeros([P, BN, BN], ACC)
    if drel_k_ptr is not None:
        drel_k = tl.zeros([2 * BN, BD], ACC)
    if drel_v_ptr is not None:
        drel_v = tl.zeros([2 * BN, BD], ACC)

    for index in tl.range(walker, all_tiles, walkers):
        b = tl.cast(index // tiles, tl.int64)
        offs_o = tl.cast(index % tiles, tl.int64) * P + tl.arange(0, P)
        mask = _inside(offs_o, offs_n, offs_d, outer, n, D, EVEN)
        # (P, BN, BD)
        at = offs_o[:, None, None] * stride_o + walk[None, :, None] * stride_n
        at += offs_d[None, None, :]
        base = qkv_ptr + b * stride_b + head * stride_h
        do_at = offs_o[:, None, None] * dout_o + walk[None, :, None] * dout_n
        do_at += offs_d[None, None, :]
        do = tl.load(dout_ptr + b * dout_b + head * dout_h + do_at, mask=mask, other=0.0)
        focused = False
        if focus_ptr is not None:
            focused = tl.load(focus_ptr + b) != 0
        d_at = offs_o[:, None, None] * dqkv_o + walk[None, :, None] * dqkv_n
        d_at += offs_d[None, None, :]
        d_row = heads * D  # stride from q to k to v
        if focused:
            if dqkv_ptr is not None:
                d_base = dqkv_ptr + b * dqkv_b + head * D
                nothing = tl.zeros([P, BN, BD], do.dtype)
                tl.store(d_base + d_at, nothing, mask=mask)
                tl.store(d_base + d_row + d_at, nothing, mask=mask)
                tl.store(d_base + 2 * d_row + d_at, do, mask=mask)
            if drel_v_ptr is not None:
                itself = (tl.arange(0, 2 * BN) == n - 1)[:, None]
                summed = tl.sum(do.to(ACC).reshape(P * BN, BD), 0)
                drel_v += tl.where(itself, summed[None, :], 0.0)
        else:
            q = tl.load(base + at, mask=mask, other=0.0)
            k = tl.load(base + stride_c + at, mask=mask, other=0.0)
            v = tl.load(base + stride_c + stride_c + at, mask=mask, other=0.0)
            q_plain = q
            if rot_ptr is not None:
                cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
                q = pinned(rotate(q.to(ACC), cos[None], sin[None]).to(do.dtype))
                k = pinned(rotate(k.to(ACC), cos[None], sin[None]).to(do.dtype))
            p = _probabilities(
                q, q_plain, k, rel_k, bias_at, shift, offs_n, n, scale, P, BN, BD, ACC
            )
            dp = _products(do, tl.trans(v, 0, 2, 1), tl.zeros([P, BN, BN], ACC))
            if rel_v_ptr is not None:
                flat_do = do.reshape(P * BN, BD)
                product = dot(flat_do, tl.trans(rel_v), tl.zeros([P * BN, 2 * BN], ACC))
                dp += skew(product, shift, P * BN, BN).reshape(P, BN, BN)
                if drel_v_ptr is not None:
                    spread = unskew(p.reshape(P * BN, BN), shift, P * BN, BN).to(do.dtype)
                    drel_v = dot(tl.trans(spread), flat_do, drel_v)
            delta = tl.sum(p * dp, 2)
            ds = p * (dp - delta[:, :, None])
            if dbias_ptr is not None:
                dbias += ds
            if rel_k_ptr is not None:
                spread = unskew(ds.reshape(P * BN, BN), shift, P * BN, BN).to(do.dtype)
                if drel_k_ptr is not None:
                    drel_k = dot(tl.trans(spread), q_plain.reshape(P * BN, BD), drel_k)
            if dqkv_ptr is not None:
                d_base = dqkv_ptr + b * dqkv_b + head * D
                dv = _products(tl.trans(p, 0, 2, 1).to(do.dtype), do, tl.zeros([P, BN, BD], ACC))
                tl.store(d_base + 2 * d_row + d_at, dv.to(do.dtype), mask=mask)
                low = ds.to(do.dtype)
                dk = _products(tl.trans(low, 0, 2, 1), q, tl.zeros([P, BN, BD], ACC))
                dq = _products(low, k, tl.zeros([P, BN, BD], ACC))
                if rot_ptr is not None:
                    # Loaded again instead of being held across the tile.
                    cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
                    dq = rotate(dq, cos[None], -sin[None])
                    dk = rotate(dk, cos[None], -sin[None])
                if rel_k_ptr is not None:
                    dq += dot(spread, rel_k, tl.zeros([P * BN, BD], ACC)).reshape(P, BN, BD)
                tl.store(d_base + d_at, (dq * scale).to(do.dtype), mask=mask)
                tl.store(d_base + d_row + d_at, (dk * scale).to(do.dtype), mask=mask)

    part = walker.to(tl.int64) * heads + head
    if dbias_ptr is not None:
        in_tile = (offs_n < n)[:, None] & (offs_n < n)[None, :]
        to = dbias_ptr + part * n * n + offs_n[:, None] * n + offs_n[None, :]
        tl.store(to, tl.sum(dbias, 0), mask=in_tile)
    rows = tl.arange(0, 2 * BN)
    to = part * (2 * n - 1) * D + rows[:, None] * D + offs_d[None, :]
    in_table = (rows < 2 * n - 1)[:, None] & (offs_d < D)[None, :]
    if drel_k_ptr is not None:
        tl.store(drel_k_ptr + to, drel_k * scale, mask=in_table)
    if drel_v_ptr is not None:
        tl.store(drel_v_ptr + to, drel_v, mask=in_table)


def _config(geo: Geometry, qkv: Tensor, options: AttentionOptions, **how: bool) -> ShortConfig:
    bn, bd = max(16, next_power_of_2(geo.n)), max(16, next_power_of_2(geo.d))
    return pick_config(
        *(bn, bd, qkv.element_size(), geo.outer),
        shaw=options.shaw,
        biased=options.bias is not None or options.pairs > 0,
        even=(geo.n, geo.d) == (bn, bd),
        major=major(qkv.device),
        **how,
    )


def _constants(geo: Geometry, qkv: Tensor, options: AttentionOptions, config: ShortConfig) -> dict:
    bn, bd = max(16, next_power_of_2(geo.n)), max(16, next_power_of_2(geo.d))
    return dict(
        D=geo.d,
        HALF=options.pairs,
        P=config.P,
        BN=bn,
        BD=bd,
        ACC=acc_dtype(qkv.dtype),
        EVEN=(geo.n, geo.d, geo.outer % config.P) == (bn, bd, 0),
        num_warps=config.num_warps,
        num_stages=1,
        maxnreg=config.maxnreg,
    )


def short_fwd(
    geo: Geometry, qkv: Tensor, out: Tensor, options: AttentionOptions, sm_scale: float
) -> None:
    """``options`` are ``prepared``; it writes the first n rows of out."""
    config = _config(geo, qkv, options, backward=False, frozen=False)
    tiles = cdiv(geo.outer, config.P)
    _short_fwd_kernel[(geo.batch * tiles * geo.heads,)](
        *(qkv, *options[:5], out),
        *(geo.outer, geo.total, geo.n, tiles, geo.heads, *split_scale(sm_scale)),
        *(*geo.qkv, *geo.out, *table_sizes(options)),
        **_constants(geo, qkv, options, config),
    )


def short_bwd(
    geo: Geometry,
    dout: Tensor,
    qkv: Tensor,
    axis: int,
    options: AttentionOptions,
    sm_scale: float,
    dqkv: Tensor | None,
    need_dbias: bool,
    need_drel_k: bool,
    need_drel_v: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes the first n rows of dqkv. Returns dbias (heads, n, n) and the unsummed gradients of
    the tables by distance (walkers, heads, 2n-1, D), in the accumulator's dtype."""
    config = _config(geo, qkv, options, backward=True, frozen=not (need_drel_k or need_drel_v))
    tiles = cdiv(geo.outer, config.P)
    all_tiles = geo.batch * tiles
    walkers = all_tiles
    if need_dbias or need_drel_k or need_drel_v:
        walkers = min(all_tiles, cdiv(program_budget(qkv.device), geo.heads))
    acc = acc_torch_dtype(qkv.dtype)

    def partial(need: bool, *shape: int) -> Tensor | None:
        size = (walkers, geo.heads, *shape)
        return torch.empty(size, dtype=acc, device=qkv.device) if need else None

    dbias = partial(need_dbias, geo.n, geo.n)
    drel_k = partial(need_drel_k, 2 * geo.n - 1, geo.d)
    drel_v = partial(need_drel_v, 2 * geo.n - 1, geo.d)
    _short_bwd_kernel[(walkers * geo.heads,)](
        *(dout, qkv, *options[:5], dqkv, dbias, drel_k, drel_v),
        *(geo.outer, geo.total, geo.n, tiles, all_tiles, geo.heads, walkers),
        *(*split_scale(sm_scale), *geo.qkv, *strides(dout, axis), *geo.dqkv),
        *table_sizes(options),
        **_constants(geo, qkv, options, config),
    )
    return None if dbias is None else dbias.sum(0), drel_k, drel_v

"""Linear attention over the N = H*W pixels of each frame (Shen et al. 2021, arXiv 1812.01243).

    q' = softmax_D(q),  k' = softmax_N(k),  ctx = k'ᵀ v  (D, D),  out = sm_scale * q' ctx

qkv (B, F, H, W, 3, heads, D) is packed and read by strides; out is (B, F, H, W, heads, D). One
frame and head is one problem. Saved for the backward: log-sum-exp of k over the pixels, and ctx.

Forward: pass 1 reads k, v (online max over the pixels), pass 2 reads q and writes out. Backward:
pass 1 reads q, dout, writes dq and sums dctx; pass 2 reads k, v and writes dk, dv. The softmax
gradient of k needs Σ_n k' dk', which equals Σ_e ctx dctx, so there is no third pass. Bytes 4*M*c*e
forward and 7*M*c*e backward, FLOPs 4*M*c*D and 8*M*c*D (M pixels of all frames, c = heads*D, e
bytes).

With enough frames and heads one program does both passes of its problem. Otherwise the pixels are
split: one partial per chunk, one merge in a fixed order, one program per chunk for the second pass.
No atomics: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    at_least,
    cdiv,
    dot_x3,
    major,
    next_power_of_2,
)
from fastvdm.kernels.tuned import tuned
from fastvdm.runtime.device import H200, facts


class Config(NamedTuple):
    block_n: int
    block_d: int
    num_warps: int
    maxnreg: int | None = None


@tuned("linear_attention", pixels=next_power_of_2)
def pick_config(dim: int, dtype: torch.dtype, pixels: int, *, backward: bool, major: int) -> Config:
    """Pixels per tile, and warps. A tile holds (block_n, D) operands and a (D, D) accumulator and
    never spills (``bench/aot.py``). ``major`` is the device's compute capability. ``pixels`` per
    frame only distinguishes measured tiles."""
    block_d = max(16, next_power_of_2(dim))
    warps = 8 if block_d == 128 or (block_d == 64 and dtype.itemsize > 2) else 4
    if dtype.itemsize > 2:
        return Config(16 if block_d >= 64 else 32, block_d, warps)
    if major < 9 and block_d == 128:
        return Config(32, block_d, warps)
    # 128, because ptxas would otherwise limit registers for a fifth block, and spill.
    most = 128 if major < 9 and block_d <= 32 and not backward else None
    return Config(64, block_d, warps, most)


def split_pixels(problems: int, pixels: int, block_n: int, sm_count: int) -> tuple[int, int]:
    """(splits, pixels per split): two waves of programs, but at least two tiles per split."""
    tiles = cdiv(pixels, block_n)
    wanted = min(cdiv(2 * sm_count, problems), max(1, tiles // 2))
    chunk = cdiv(tiles, wanted) * block_n
    return cdiv(pixels, chunk), chunk


@triton.jit
def _load(ptr, row, count, fill, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_N, BLOCK_D) from ``ptr``; rows have the stride ``row``, and ``count`` are valid."""
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(ptr + offs_n * row + offs_d, mask=(offs_n < count) & (offs_d < D), other=fill)


@triton.jit
def _store(ptr, row, count, value, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (offs_n < count) & (offs_d < D)
    tl.store(ptr + offs_n * row + offs_d, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _softmax_d(q, ACC: tl.constexpr):
    """Softmax over the features of ``q``, which is padded with -inf. (BLOCK_N, BLOCK_D)"""
    q = q.to(ACC)
    m = tl.max(q, 1)
    p = tl.exp(q - tl.where(m == float("-inf"), 0.0, m)[:, None])
    return p / at_least(tl.sum(p, 1), 1e-30)[:, None]


@triton.jit
def _context(
    qkv, row, width, lo, hi,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online over the pixels [lo, hi): max m and sum l of exp(k - m) per feature, and vᵀ p, the
    transposed context. v is transposed in shared memory; pᵀ would have to go through registers."""
    m_i = tl.full([BLOCK_D], float("-inf"), ACC)
    l_i = tl.zeros([BLOCK_D], ACC)
    acc = tl.zeros([BLOCK_D, BLOCK_D], ACC)
    for n in range(lo, hi, BLOCK_N):
        at = qkv + tl.cast(n, tl.int64) * row
        k = _load(at + width, row, hi - n, float("-inf"), D, BLOCK_N, BLOCK_D).to(ACC)
        v = _load(at + 2 * width, row, hi - n, 0.0, D, BLOCK_N, BLOCK_D)
        m_new = tl.maximum(m_i, tl.max(k, 0))
        # A feature that is -inf so far (padding, or in the data) must not give inf - inf.
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp(m_i - shift)
        p = tl.exp(k - shift[None, :])
        l_i = l_i * alpha + tl.sum(p, 0)
        acc = dot_x3(tl.trans(v), p.to(v.dtype), acc * alpha[None, :])
        m_i = m_new
    return m_i, l_i, tl.trans(acc)


@triton.jit
def _apply(
    qkv, row, out, width, ctx, lo, hi,
    SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out = sm_scale * softmax_D(q) ctx for the pixels [lo, hi)."""
    for n in range(lo, hi, BLOCK_N):
        at = tl.cast(n, tl.int64)
        q = _load(qkv + at * row, row, hi - n, float("-inf"), D, BLOCK_N, BLOCK_D)
        p = _softmax_d(q, ACC)
        o = dot_x3(p.to(q.dtype), ctx, tl.zeros([BLOCK_N, BLOCK_D], ACC)) * SCALE
        _store(out + at * width, width, hi - n, o, D, BLOCK_N, BLOCK_D)


@triton.jit
def _store_stats(
    lse_ptr, ctx_ptr, problem, m, l, acc, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store log-sum-exp and the normalised context of one problem; return the context."""
    offs_d = tl.arange(0, BLOCK_D)
    l = tl.where(offs_d < D, l, 1.0)  # it is 0 in the padding
    tl.store(lse_ptr + problem * D + offs_d, m + tl.log(l), mask=offs_d < D)
    ctx = acc / l[:, None]
    _store(ctx_ptr + problem * D * D, D, D, ctx, D, BLOCK_D, BLOCK_D)
    return ctx


@triton.jit
def _fwd_kernel(
    qkv_ptr, out_ptr, lse_ptr, ctx_ptr, N, heads,
    SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both passes of one problem."""
    problem = tl.program_id(0).to(tl.int64)
    frame, head = problem // heads, problem % heads
    width = heads * D
    qkv = qkv_ptr + frame * N * (3 * width) + head * D
    m, l, acc = _context(qkv, 3 * width, width, 0, N, D, BLOCK_N, BLOCK_D, ACC)
    ctx = _store_stats(lse_ptr, ctx_ptr, problem, m, l, acc, D, BLOCK_D)
    out = out_ptr + frame * N * width + head * D
    ctx = ctx.to(qkv_ptr.dtype.element_ty)
    _apply(qkv, 3 * width, out, width, ctx, 0, N, SCALE, D, BLOCK_N, BLOCK_D, ACC)


@triton.jit
def _fwd_context_kernel(
    qkv_ptr, m_ptr, l_ptr, acc_ptr, N, heads, splits, chunk,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pass 1 of one chunk of pixels: partials (problems, splits, D) twice and (.., D, D)."""
    part = tl.program_id(0).to(tl.int64)
    problem, split = part // splits, part % splits
    frame, head = problem // heads, problem % heads
    width = heads * D
    qkv = qkv_ptr + frame * N * (3 * width) + head * D
    lo = (split * chunk).to(tl.int32)
    hi = tl.minimum(lo + chunk, N)
    m, l, acc = _context(qkv, 3 * width, width, lo, hi, D, BLOCK_N, BLOCK_D, ACC)
    offs_d = tl.arange(0, BLOCK_D)
    tl.store(m_ptr + part * D + offs_d, m, mask=offs_d < D)
    tl.store(l_ptr + part * D + offs_d, l, mask=offs_d < D)
    _store(acc_ptr + part * D * D, D, D, acc, D, BLOCK_D, BLOCK_D)


@triton.jit
def _fwd_merge_kernel(
    m_ptr, l_ptr, acc_ptr, lse_ptr, ctx_ptr, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merge the partials of one problem, in order, into its statistics."""
    problem = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    m_i = tl.full([BLOCK_D], float("-inf"), ACC)
    l_i = tl.zeros([BLOCK_D], ACC)
    acc = tl.zeros([BLOCK_D, BLOCK_D], ACC)
    for split in range(0, splits):
        part = problem * splits + split
        m = tl.load(m_ptr + part * D + offs_d, mask=offs_d < D, other=float("-inf"))
        l = tl.load(l_ptr + part * D + offs_d, mask=offs_d < D, other=0.0)
        ctx = _load(acc_ptr + part * D * D, D, D, 0.0, D, BLOCK_D, BLOCK_D)
        m_new = tl.maximum(m_i, m)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha, beta = tl.exp(m_i - shift), tl.exp(m - shift)
        l_i = l_i * alpha + l * beta
        acc = acc * alpha[:, None] + ctx * beta[:, None]
        m_i = m_new
    _store_stats(lse_ptr, ctx_ptr, problem, m_i, l_i, acc, D, BLOCK_D)


@triton.jit
def _fwd_apply_kernel(
    qkv_ptr, out_ptr, ctx_ptr, N, heads, splits, chunk,
    SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pass 2 of one chunk of pixels."""
    part = tl.program_id(0).to(tl.int64)
    problem, split = part // splits, part % splits
    frame, head = problem // heads, problem % heads
    width = heads * D
    ctx = _load(ctx_ptr + problem * D * D, D, D, 0.0, D, BLOCK_D, BLOCK_D)
    ctx = ctx.to(qkv_ptr.dtype.element_ty)
    qkv = qkv_ptr + frame * N * (3 * width) + head * D
    out = out_ptr + frame * N * width + head * D
    lo = (split * chunk).to(tl.int32)
    hi = tl.minimum(lo + chunk, N)
    _apply(qkv, 3 * width, out, width, ctx, lo, hi, SCALE, D, BLOCK_N, BLOCK_D, ACC)


@triton.jit
def _grad_q(
    qkv, dqkv, row, dout, width, ctx, lo, hi,
    SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dq for the pixels [lo, hi), and their part of dctx = sm_scale * q'ᵀ dout."""
    dctx_t = tl.zeros([BLOCK_D, BLOCK_D], ACC)  # transposed, as in _context
    ctx_t = tl.trans(ctx)
    for n in range(lo, hi, BLOCK_N):
        at = tl.cast(n, tl.int64)
        q = _load(qkv + at * row, row, hi - n, float("-inf"), D, BLOCK_N, BLOCK_D)
        do = _load(dout + at * width, width, hi - n, 0.0, D, BLOCK_N, BLOCK_D)
        p = _softmax_d(q, ACC)
        dctx_t = dot_x3(tl.trans(do), p.to(q.dtype), dctx_t)
        dp = dot_x3(do, ctx_t, tl.zeros([BLOCK_N, BLOCK_D], ACC)) * SCALE
        dq = p * (dp - tl.sum(p * dp, 1)[:, None])
        _store(dqkv + at * row, row, hi - n, dq, D, BLOCK_N, BLOCK_D)
    return tl.trans(dctx_t) * SCALE


@triton.jit
def _grad_kv(
    qkv, dqkv, row, width, lse, delta, dctx, lo, hi,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dk = k' (v dctxᵀ - delta) and dv = k' dctx for the pixels [lo, hi)."""
    dctx_t = tl.trans(dctx)
    for n in range(lo, hi, BLOCK_N):
        at = tl.cast(n, tl.int64)
        k = _load(qkv + at * row + width, row, hi - n, float("-inf"), D, BLOCK_N, BLOCK_D)
        v = _load(qkv + at * row + 2 * width, row, hi - n, 0.0, D, BLOCK_N, BLOCK_D)
        p = tl.exp(k.to(ACC) - lse[None, :])
        dv = dot_x3(p.to(v.dtype), dctx, tl.zeros([BLOCK_N, BLOCK_D], ACC))
        _store(dqkv + at * row + 2 * width, row, hi - n, dv, D, BLOCK_N, BLOCK_D)
        dp = dot_x3(v, dctx_t, tl.zeros([BLOCK_N, BLOCK_D], ACC))
        dk = p * (dp - delta[None, :])
        _store(dqkv + at * row + width, row, hi - n, dk, D, BLOCK_N, BLOCK_D)


@triton.jit
def _bwd_kernel(
    dout_ptr, qkv_ptr, lse_ptr, ctx_ptr, dqkv_ptr, dctx_ptr, N, heads, splits, chunk,
    FIRST: tl.constexpr, SECOND: tl.constexpr, SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """FIRST and SECOND: both passes of a problem (splits = 1). One of them: that pass for a chunk;
    the first writes dctx (problems, splits, D, D), the second reads dctx (problems, D, D)."""
    part = tl.program_id(0).to(tl.int64)
    problem, split = part // splits, part % splits
    frame, head = problem // heads, problem % heads
    width = heads * D
    qkv = qkv_ptr + frame * N * (3 * width) + head * D
    dqkv = dqkv_ptr + frame * N * (3 * width) + head * D
    dout = dout_ptr + frame * N * width + head * D
    lo = (split * chunk).to(tl.int32)
    hi = tl.minimum(lo + chunk, N)
    if FIRST:
        ctx = _load(ctx_ptr + problem * D * D, D, D, 0.0, D, BLOCK_D, BLOCK_D)
        low = ctx.to(qkv_ptr.dtype.element_ty)
        dctx = _grad_q(
            qkv, dqkv, 3 * width, dout, width, low, lo, hi, SCALE, D, BLOCK_N, BLOCK_D, ACC
        )
        if not SECOND:
            _store(dctx_ptr + part * D * D, D, D, dctx, D, BLOCK_D, BLOCK_D)
    if SECOND:
        if not FIRST:
            dctx = _load(dctx_ptr + problem * D * D, D, D, 0.0, D, BLOCK_D, BLOCK_D)
        offs_d = tl.arange(0, BLOCK_D)
        lse = tl.load(lse_ptr + problem * D + offs_d, mask=offs_d < D, other=0.0)
        # ctx is loaded again: kept across the first pass, it would cost D*D fp32 registers.
        ctx = _load(ctx_ptr + problem * D * D, D, D, 0.0, D, BLOCK_D, BLOCK_D)
        delta = tl.sum(ctx * dctx, 1)
        low = dctx.to(qkv_ptr.dtype.element_ty)
        _grad_kv(qkv, dqkv, 3 * width, width, lse, delta, low, lo, hi, D, BLOCK_N, BLOCK_D, ACC)


def _sm_count(x: Tensor) -> int:
    """Decides only how far to split; under the interpreter that of an H200."""
    return facts(x.device).multiprocessors or H200.multiprocessors


def _tile(qkv: Tensor, config: Config) -> dict[str, Any]:
    """Constants and options of a kernel over tiles of pixels."""
    return dict(
        D=qkv.shape[-1],
        BLOCK_N=config.block_n,
        BLOCK_D=config.block_d,
        ACC=acc_dtype(qkv.dtype),
        num_warps=config.num_warps,
        num_stages=2,
        maxnreg=config.maxnreg,
    )


def linear_attention_fwd(qkv: Tensor, sm_scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """out, k_lse (B, F, heads, D), ctx (B, F, heads, D, D)."""
    b, f, h, w, _, heads, dim = qkv.shape
    acc = acc_torch_dtype(qkv.dtype)
    out = torch.empty((b, f, h, w, heads, dim), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((b, f, heads, dim), dtype=acc, device=qkv.device)
    ctx = torch.empty((b, f, heads, dim, dim), dtype=acc, device=qkv.device)
    problems, pixels = b * f * heads, h * w
    if out.numel() == 0:
        return out, lse, ctx
    config = pick_config(dim, qkv.dtype, pixels, backward=False, major=major(qkv.device))
    splits, chunk = split_pixels(problems, pixels, config.block_n, _sm_count(qkv))
    tile = _tile(qkv, config)
    if splits == 1:
        _fwd_kernel[(problems,)](qkv, out, lse, ctx, pixels, heads, SCALE=sm_scale, **tile)
        return out, lse, ctx
    m = torch.empty((problems, splits, dim), dtype=acc, device=qkv.device)
    l = torch.empty_like(m)
    partial = torch.empty((problems, splits, dim, dim), dtype=acc, device=qkv.device)
    grid = (problems * splits,)
    _fwd_context_kernel[grid](qkv, m, l, partial, pixels, heads, splits, chunk, **tile)
    _fwd_merge_kernel[(problems,)](
        m, l, partial, lse, ctx, splits,
        D=dim, BLOCK_D=config.block_d, ACC=tile["ACC"], num_warps=config.num_warps,
    )  # fmt: skip
    _fwd_apply_kernel[grid](
        qkv, out, ctx, pixels, heads, splits, chunk, SCALE=sm_scale, **tile
    )  # fmt: skip
    return out, lse, ctx


def linear_attention_bwd(
    dout: Tensor, qkv: Tensor, k_lse: Tensor, ctx: Tensor, sm_scale: float
) -> Tensor:
    """dqkv like ``qkv``."""
    b, f, h, w, _, heads, dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    problems, pixels = b * f * heads, h * w
    if dqkv.numel() == 0:
        return dqkv
    config = pick_config(dim, qkv.dtype, pixels, backward=True, major=major(qkv.device))
    splits, chunk = split_pixels(problems, pixels, config.block_n, _sm_count(qkv))
    tile = _tile(qkv, config)
    args = (dout, qkv, k_lse, ctx, dqkv)
    rest = (pixels, heads, splits, chunk)
    tile["SCALE"] = sm_scale
    if splits == 1:
        _bwd_kernel[(problems,)](*args, ctx, *rest, FIRST=True, SECOND=True, **tile)
        return dqkv
    partial = ctx.new_empty((problems, splits, dim, dim))
    grid = (problems * splits,)
    _bwd_kernel[grid](*args, partial, *rest, FIRST=True, SECOND=False, **tile)
    dctx = partial.sum(1)
    _bwd_kernel[grid](*args, dctx, *rest, FIRST=False, SECOND=True, **tile)
    return dqkv

"""The two elementwise kernels of a guided sampling step (Ho et al. 2022, §3.1, Eqs. 7 and 8).

    seed:    x_hat = p_z z + p_m m;
             seed = known_scale 2 (x_hat - x^a) on known frames + low_scale 2 D^T (D x_hat - y)
    update:  x = e_z z + e_m x_hat - grad - direct seed, clipped;  z_next = u_z z + u_x x + u_n n,
             or k_z z + k_x x^a + k_n n on known frames

z, x_hat, z_next, known, low_res are contiguous (B, C, F, H, W). The network's output m, its
gradient and seed are read and written by strides, because a channels-last network returns permuted
views. One program of ``seed`` owns BLOCK pixels of the low-resolution grid and the FACTOR x FACTOR
block under each: it sums them, then reads them again (from cache) to write. Without a low
resolution FACTOR is 1. Saved for backward: nothing. Bytes: seed 4 N values, update 4 N,
N = B C F H W. FLOPs are negligible. Philox takes about 100 integer operations per element; each
element draws its own 4-word block and uses two words, which is simpler than sharing blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import acc_dtype, at_least, at_most, cdiv
from fastvdm.kernels.tuned import tuned


class Config(NamedTuple):
    block: int
    num_warps: int


@tuned("guidance")
def pick_config(what: str, dtype: torch.dtype, factor: int = 1) -> Config:
    """Elements per program (``what`` = "seed": low-resolution pixels; "update"). It is small,
    because one video has only some 10^5 elements and all multiprocessors should get a part."""
    return Config(256 if factor > 1 or dtype == torch.float64 else 512, 4)


@triton.jit
def _split(i, F, H, W):
    """Row-major index in (C, F, H, W) → (c, f, h, w)."""
    w = i % W
    i = i // W
    h = i % H
    i = i // H
    return i // F, i % F, h, w


@triton.jit
def _normal(rng_ptr, i, step, ACC: tl.constexpr):
    """Standard normals of elements ``i`` of the sample whose key is at ``rng_ptr``, as in the
    reference's ``philox_normal``."""
    c0 = (i & 0xFFFFFFFF).to(tl.uint32)
    c1 = (i >> 32).to(tl.uint32)
    c2 = c0 * 0 + step.to(tl.uint32)
    n0, n1, _, _ = tl.philox(tl.load(rng_ptr), c0, c1, c2, c0 * 0)
    u0 = ((n0 >> 9).to(ACC) + 0.5) * 1.1920928955078125e-07  # 2^-23
    u1 = ((n1 >> 9).to(ACC) + 0.5) * 1.1920928955078125e-07
    return tl.sqrt(-2.0 * tl.log(u0)) * tl.cos(6.283185307179586 * u1)


@triton.jit
def _guidance_seed_kernel(
    z_ptr,
    m_ptr,
    coef_ptr,
    known_ptr,
    slot_ptr,
    low_ptr,
    low_slot_ptr,
    extra_ptr,
    x_hat_ptr,
    seed_ptr,
    blocks,
    C,
    F,
    H,
    W,
    num_known,
    num_low,
    stride_mb,
    stride_mc,
    stride_mf,
    stride_mh,
    stride_mw,
    stride_sb,
    stride_sc,
    stride_sf,
    stride_sh,
    stride_sw,
    HAS_KNOWN: tl.constexpr,
    HAS_LOW: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    CLIP: tl.constexpr,
    FACTOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    low_h = H // FACTOR
    low_w = W // FACTOR
    cell = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    mask = cell < (pid * 0 + C) * F * low_h * low_w
    c, f, h, w = _split(cell, F, low_h, low_w)
    p_z = tl.load(coef_ptr + b * 4)
    p_m = tl.load(coef_ptr + b * 4 + 1)
    known_scale = tl.load(coef_ptr + b * 4 + 2)
    low_scale = tl.load(coef_ptr + b * 4 + 3)

    # Offsets of the top left pixel of each cell.
    z_offs = (((b * C + c) * F + f) * H + h * FACTOR) * W + w * FACTOR
    m_offs = b * stride_mb + c * stride_mc + f * stride_mf
    m_offs += h * FACTOR * stride_mh + w * FACTOR * stride_mw
    s_offs = b * stride_sb + c * stride_sc + f * stride_sf
    s_offs += h * FACTOR * stride_sh + w * FACTOR * stride_sw

    r_low = tl.zeros((BLOCK,), dtype=ACC)
    if HAS_LOW:
        total = tl.zeros((BLOCK,), dtype=ACC)
        for k in range(FACTOR * FACTOR):
            dh = k // FACTOR
            dw = k % FACTOR
            z = tl.load(z_ptr + z_offs + dh * W + dw, mask=mask, other=0.0).to(ACC)
            m_at = m_ptr + m_offs + dh * stride_mh + dw * stride_mw
            x_hat = p_z * z + p_m * tl.load(m_at, mask=mask, other=0.0).to(ACC)
            if CLIP:
                x_hat = at_most(at_least(x_hat, -1.0), 1.0)
            total += x_hat
        place = tl.load(low_slot_ptr + f, mask=mask, other=-1).to(tl.int64)
        given = mask & (place >= 0)
        low_offs = (((b * C + c) * num_low + place) * low_h + h) * low_w + w
        y = tl.load(low_ptr + low_offs, mask=given, other=0.0).to(ACC)
        r_low = tl.where(given, (total / (FACTOR * FACTOR) - y) * (2.0 / (FACTOR * FACTOR)), 0.0)

    place = cell * 0 - 1
    if HAS_KNOWN:
        place = tl.load(slot_ptr + f, mask=mask, other=-1).to(tl.int64)
    given = mask & (place >= 0)
    known_offs = (((b * C + c) * num_known + place) * H + h * FACTOR) * W + w * FACTOR
    for k in range(FACTOR * FACTOR):
        dh = k // FACTOR
        dw = k % FACTOR
        at = dh * W + dw
        z = tl.load(z_ptr + z_offs + at, mask=mask, other=0.0).to(ACC)
        m_at = m_ptr + m_offs + dh * stride_mh + dw * stride_mw
        raw = p_z * z + p_m * tl.load(m_at, mask=mask, other=0.0).to(ACC)
        x_hat = raw
        if CLIP:
            x_hat = at_most(at_least(raw, -1.0), 1.0)
        seed = r_low
        if HAS_EXTRA:
            seed += tl.load(extra_ptr + z_offs + at, mask=mask, other=0.0).to(ACC)
        seed *= low_scale
        if HAS_KNOWN:
            x_a = tl.load(known_ptr + known_offs + at, mask=given, other=0.0).to(ACC)
            seed += tl.where(given, 2.0 * known_scale * (x_hat - x_a), 0.0)
        if CLIP:
            seed = tl.where(tl.abs(raw) <= 1.0, seed, 0.0)
        tl.store(x_hat_ptr + z_offs + at, x_hat.to(x_hat_ptr.dtype.element_ty), mask=mask)
        seed_at = seed_ptr + s_offs + dh * stride_sh + dw * stride_sw
        tl.store(seed_at, seed.to(seed_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["step"])  # it counts up; do not recompile at 1 and multiples of 16
def _guidance_update_kernel(
    z_ptr,
    x_hat_ptr,
    coef_ptr,
    grad_ptr,
    seed_ptr,
    known_ptr,
    slot_ptr,
    noise_ptr,
    rng_ptr,
    threshold_ptr,
    x_tilde_ptr,
    z_next_ptr,
    blocks,
    C,
    F,
    H,
    W,
    num_known,
    step,
    stride_xb,
    stride_xc,
    stride_xf,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gc,
    stride_gf,
    stride_gh,
    stride_gw,
    stride_sb,
    stride_sc,
    stride_sf,
    stride_sh,
    stride_sw,
    HAS_GRAD: tl.constexpr,
    HAS_SEED: tl.constexpr,
    HAS_KNOWN: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    RNG: tl.constexpr,  # columns of rng: 0, 1, or 2 (the second is added to step)
    HAS_THRESHOLD: tl.constexpr,
    CLIP: tl.constexpr,
    WANT_X: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    i = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    size = (pid * 0 + C) * F * H * W
    mask = i < size
    c, f, h, w = _split(i, F, H, W)
    z_offs = b * size + i
    coef_ptr += b * 9
    e_z = tl.load(coef_ptr)
    e_m = tl.load(coef_ptr + 1)
    u_z = tl.load(coef_ptr + 3)
    u_x = tl.load(coef_ptr + 4)
    u_n = tl.load(coef_ptr + 5)

    z = tl.load(z_ptr + z_offs, mask=mask, other=0.0).to(ACC)
    x_offs = b * stride_xb + c * stride_xc + f * stride_xf + h * stride_xh + w * stride_xw
    x = e_z * z + e_m * tl.load(x_hat_ptr + x_offs, mask=mask, other=0.0).to(ACC)
    if HAS_GRAD:
        g_offs = b * stride_gb + c * stride_gc + f * stride_gf + h * stride_gh + w * stride_gw
        x -= tl.load(grad_ptr + g_offs, mask=mask, other=0.0).to(ACC)
        if HAS_SEED:
            s_offs = b * stride_sb + c * stride_sc + f * stride_sf + h * stride_sh + w * stride_sw
            seed = tl.load(seed_ptr + s_offs, mask=mask, other=0.0).to(ACC)
            x -= tl.load(coef_ptr + 2) * seed
    if CLIP:
        if HAS_THRESHOLD:
            s = tl.load(threshold_ptr + b)
            x = at_most(at_least(x, -s), s) / s
        else:
            x = at_most(at_least(x, -1.0), 1.0)

    n = tl.zeros((BLOCK,), dtype=ACC)
    if HAS_NOISE:
        n = tl.load(noise_ptr + z_offs, mask=mask, other=0.0).to(ACC)
    if RNG > 0:
        rng_ptr += b * RNG
        place = step + (pid * 0)
        if RNG == 2:
            place += tl.load(rng_ptr + 1)
        n = _normal(rng_ptr, i, place, ACC)
    z_next = u_z * z + u_x * x + u_n * n
    if HAS_KNOWN:
        k_z = tl.load(coef_ptr + 6)
        k_x = tl.load(coef_ptr + 7)
        k_n = tl.load(coef_ptr + 8)
        place = tl.load(slot_ptr + f, mask=mask, other=-1).to(tl.int64)
        given = mask & (place >= 0)
        known_offs = (((b * C + c) * num_known + place) * H + h) * W + w
        x_a = tl.load(known_ptr + known_offs, mask=given, other=0.0).to(ACC)
        x = tl.where(given, x_a, x)
        z_next = tl.where(given, k_z * z + k_x * x_a + k_n * n, z_next)
    if WANT_X:
        tl.store(x_tilde_ptr + z_offs, x.to(x_tilde_ptr.dtype.element_ty), mask=mask)
    tl.store(z_next_ptr + z_offs, z_next.to(z_next_ptr.dtype.element_ty), mask=mask)


def guidance_seed_fwd(
    z: Tensor,
    model_out: Tensor,
    coef: Tensor,
    known: Tensor | None,
    slot: Tensor | None,
    low_res: Tensor | None,
    low_slot: Tensor | None,
    extra: Tensor | None,
    clip: bool,
) -> tuple[Tensor, Tensor]:
    b, c, f, h, w = z.shape
    x_hat, seed = torch.empty_like(z), torch.empty_like(model_out)
    if z.numel() == 0:
        return x_hat, seed
    factor = h // low_res.shape[3] if low_res is not None else 1
    config = pick_config("seed", z.dtype, factor)
    blocks = cdiv(c * f * (h // factor) * (w // factor), config.block)
    _guidance_seed_kernel[(b * blocks,)](
        z,
        model_out,
        coef,
        known,
        slot,
        low_res,
        low_slot,
        extra,
        x_hat,
        seed,
        blocks,
        c,
        f,
        h,
        w,
        known.shape[2] if known is not None else 0,
        low_res.shape[2] if low_res is not None else 0,
        *model_out.stride(),
        *seed.stride(),
        HAS_KNOWN=known is not None,
        HAS_LOW=low_res is not None,
        HAS_EXTRA=extra is not None,
        CLIP=clip,
        FACTOR=factor,
        ACC=acc_dtype(z.dtype),
        BLOCK=config.block,
        num_warps=config.num_warps,
        maxnreg=128,  # otherwise ptxas limits registers for occupancy, and spills
    )
    return x_hat, seed


def guidance_update_fwd(
    z: Tensor,
    estimate: Tensor,
    coef: Tensor,
    grad: Tensor | None,
    seed: Tensor | None,
    known: Tensor | None,
    slot: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    threshold: Tensor | None,
    step: int,
    clip: bool,
    want_x: bool,
) -> tuple[Tensor, Tensor]:
    b, c, f, h, w = z.shape
    z_next = torch.empty_like(z)
    x_tilde = torch.empty_like(z) if want_x else z.new_empty(0)
    if z.numel() == 0:
        return x_tilde, z_next
    config = pick_config("update", z.dtype)
    blocks = cdiv(c * f * h * w, config.block)
    none = (0, 0, 0, 0, 0)
    _guidance_update_kernel[(b * blocks,)](
        z,
        estimate,
        coef,
        grad,
        seed,
        known,
        slot,
        noise,
        rng,
        threshold,
        x_tilde,
        z_next,
        blocks,
        c,
        f,
        h,
        w,
        known.shape[2] if known is not None else 0,
        step,
        *estimate.stride(),
        *(grad.stride() if grad is not None else none),
        *(seed.stride() if seed is not None else none),
        HAS_GRAD=grad is not None,
        HAS_SEED=seed is not None,
        HAS_KNOWN=known is not None,
        HAS_NOISE=noise is not None,
        RNG=rng.dim() if rng is not None else 0,
        HAS_THRESHOLD=threshold is not None,
        CLIP=clip,
        WANT_X=want_x,
        ACC=acc_dtype(z.dtype),
        BLOCK=config.block,
        num_warps=config.num_warps,
    )
    return x_tilde, z_next

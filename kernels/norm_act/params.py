"""Gradients of the norm's vectors, from the sums of its rows, all in one launch.

``__init__.py`` has the mathematics and the names.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import cdiv, next_power_of_2
from fastvdm.kernels.norm_act.shared import BY_GROUP, quotient, row_stride


@triton.jit(**BY_GROUP)
def _params_kernel(
    sums_ptr, m_ptr, rstd_ptr, w_ptr, b_ptr, scale_ptr, dscale_ptr, dshift_ptr, dw_ptr, db_ptr,
    dxb_ptr, N, L, C, group_width, groups, frames, stride_scale,
    SUMS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """From the sums A and B, (N, SUMS, C): dscale = weight B + bias A and dshift = A, (N / frames,
    C); dweight = Σ (1 + scale) B and dbias = Σ (1 + scale) A, (C,). dx_bias (C,) is Σ dx. With m
    (N, 2, groups), for GroupNorm, it follows from the third sum Σ_l x_hat; without m the third sum
    is Σ_l dx itself."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    weight = tl.load(w_ptr + cols, mask=mask_c, other=0.0).to(ACC)[None, :]
    bias = tl.zeros((1, BLOCK_C), ACC)
    if b_ptr is not None:
        bias = tl.load(b_ptr + cols, mask=mask_c, other=0.0).to(ACC)[None, :]
    film = tl.full((BLOCK_B, BLOCK_C), 1.0, ACC)
    total_a = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    total_b = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    total_x = tl.zeros((BLOCK_B, BLOCK_F, BLOCK_C), ACC)
    batches = N // frames
    for b0 in range(0, batches, BLOCK_B):
        batch = (b0 + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]
        mask_b = (batch < batches) & mask_c[None, :]
        if scale_ptr is not None:
            scale = scale_ptr + batch * stride_scale + cols[None, :]
            film = 1.0 + tl.load(scale, mask=mask_b, other=0.0).to(ACC)
        sum_a = tl.zeros((BLOCK_B, BLOCK_C), ACC)
        sum_b = tl.zeros((BLOCK_B, BLOCK_C), ACC)
        for f0 in range(0, frames, BLOCK_F):
            frame = f0 + tl.arange(0, BLOCK_F)[None, :]
            n = (batch * frames + frame)[:, :, None]
            mask = mask_b[:, None, :] & (frame < frames)[:, :, None]
            row = sums_ptr + n * SUMS * C + cols[None, None, :]
            a = tl.load(row, mask=mask, other=0.0)
            sum_a += tl.sum(a, axis=1)
            sum_b += tl.sum(tl.load(row + C, mask=mask, other=0.0), axis=1)
            if dxb_ptr is not None:
                dx = tl.load(row + 2 * C, mask=mask, other=0.0)
                if m_ptr is not None:
                    group = quotient(cols, group_width)[None, None, :]
                    m1 = tl.load(m_ptr + n * 2 * groups + group, mask=mask, other=0.0)
                    m2 = tl.load(m_ptr + (n * 2 + 1) * groups + group, mask=mask, other=0.0)
                    rstd = tl.load(rstd_ptr + n * groups + group, mask=mask, other=0.0)
                    dx = rstd * ((weight * film)[:, None, :] * a - L * m1 - dx * m2)
                total_x += dx
        total_a += film * sum_a
        total_b += film * sum_b
        out = batch * C + cols[None, :]
        if dscale_ptr is not None:
            dscale = weight * sum_b + bias * sum_a
            tl.store(dscale_ptr + out, dscale.to(dscale_ptr.dtype.element_ty), mask=mask_b)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + out, sum_a.to(dshift_ptr.dtype.element_ty), mask=mask_b)
    if dw_ptr is not None:
        dweight = tl.sum(total_b, axis=0)
        tl.store(dw_ptr + cols, dweight.to(dw_ptr.dtype.element_ty), mask=mask_c)
    if db_ptr is not None:
        dbias = tl.sum(total_a, axis=0)
        tl.store(db_ptr + cols, dbias.to(db_ptr.dtype.element_ty), mask=mask_c)
    if dxb_ptr is not None:
        dx_bias = tl.sum(tl.sum(total_x, axis=1), axis=0)
        tl.store(dxb_ptr + cols, dx_bias.to(dxb_ptr.dtype.element_ty), mask=mask_c)


def params_bwd(
    sums: Tensor,
    m: Tensor | None,
    rstd: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    outs: tuple[Tensor | None, ...],
    length: int,
    frames: int,
    acc: tl.dtype,
) -> None:
    """``outs`` is (dscale, dshift, dweight, dbias, dx_bias), None if not needed. ``frames`` rows of
    the sums (N, SUMS, C), each over ``length`` pixels, belong to one sample."""
    n, count, c = sums.shape
    groups = c if m is None else m.shape[2]
    block_c, block_f = min(32, next_power_of_2(c)), min(16, next_power_of_2(frames))
    _params_kernel[(cdiv(c, block_c),)](
        sums, m, rstd, weight, bias, scale, *outs, n, length, c, c // groups, groups, frames,
        row_stride(scale), SUMS=count, BLOCK_B=min(16 // block_f, next_power_of_2(n // frames)),
        BLOCK_F=block_f, BLOCK_C=block_c, ACC=acc, num_warps=4,
    )  # fmt: skip

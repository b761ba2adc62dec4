"""GroupNorm's backward: the sums over pixels, and dx.

``__init__.py`` has the mathematics and the names, ``group.py`` has the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import acc_torch_dtype, widened
from fastvdm.kernels.norm_act.group import _launch, mean_of_x, source
from fastvdm.kernels.norm_act.shared import (
    BY_GROUP,
    affine,
    extents,
    load_dt,
    quotient,
    split_for_map,
    split_for_sums,
)


@triton.jit(**BY_GROUP)
def _group_bwd_sums_kernel(
    dy_ptr, x_ptr, x2_ptr, part_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr,
    drop_ptr, L, C1, C2, group_width, groups, frames, stride_scale, stride_shift, stride_bias, rows,
    chunks, SUMS: tl.constexpr, ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """part (N, chunks, SUMS, C): sums over a chunk of dt, of dt x_hat and, third, of x_hat."""
    blocks = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid // blocks % chunks
    n = (pid // blocks // chunks).to(tl.int64)
    src, width, c0, before = source(x_ptr, x2_ptr, pid % blocks, C1, C2, BLOCK_C)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = c0 + offs_c < width
    cols = before + c0 + offs_c
    group = n * groups + quotient(cols, group_width)
    mean = mean_of_x(mean_ptr, xb_ptr, stride_bias, group, cols, mask_c, ACC)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    gain, offset = affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    slope = (rstd * gain)[None, :]
    offset = offset[None, :]
    C = C1 if x2_ptr is None else C1 + C2
    src += (n * L + first) * width + c0 + offs_l[:, None] * width + offs_c[None, :]
    at = (n * L + first) * C + before + c0 + offs_l[:, None] * C + offs_c[None, :]
    dy_ptr += at
    if drop_ptr is not None:
        drop_ptr += at
    limit = tl.where(mask_c, size, 0)[None, :]

    # Sums of dt, of dt (x - mean) and of x - mean; rstd is a factor of the last two.
    sum_dt = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    sum_dtx = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    sum_x = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    for start in tl.range(0, size, BLOCK_L, num_stages=1):
        mask = (start + offs_l)[:, None] < limit
        x = widened(tl.load(src, mask=mask, other=0.0), ACC) - mean
        dt = load_dt(x * slope + offset, dy_ptr, drop_ptr, 0, mask, ACT, ACC)
        sum_dt += dt
        sum_dtx += dt * x
        if SUMS == 3:
            sum_x += tl.where(mask, x, 0.0)
        src += BLOCK_L * width
        dy_ptr += BLOCK_L * C
        if drop_ptr is not None:
            drop_ptr += BLOCK_L * C
    rstd = tl.load(
        rstd_ptr + group, mask=mask_c, other=0.0, volatile=True
    )  # volatile: not kept in registers through the loop
    out = part_ptr + (n * chunks + chunk) * SUMS * (C1 + C2) + cols
    tl.store(out, tl.sum(sum_dt, axis=0), mask=mask_c)
    tl.store(out + C1 + C2, rstd * tl.sum(sum_dtx, axis=0), mask=mask_c)
    if SUMS == 3:
        tl.store(out + 2 * (C1 + C2), rstd * tl.sum(sum_x, axis=0), mask=mask_c)


@triton.jit(**BY_GROUP)
def _group_bwd_dx_kernel(
    dy_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, m_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr,
    scale_ptr, shift_ptr, drop_ptr, L, C1, C2, group_width, groups, frames, stride_scale,
    stride_shift, stride_bias, rows, chunks,
    ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dt gain - m1 - x_hat m2) over a chunk of pixels; m is (N, 2, groups)."""
    blocks = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid // blocks % chunks
    n = (pid // blocks // chunks).to(tl.int64)
    src, width, c0, before = source(x_ptr, x2_ptr, pid % blocks, C1, C2, BLOCK_C)
    dst, _, _, _ = source(dx_ptr, dx2_ptr, pid % blocks, C1, C2, BLOCK_C)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = c0 + offs_c < width
    cols = before + c0 + offs_c
    group = quotient(cols, group_width)
    mean = mean_of_x(mean_ptr, xb_ptr, stride_bias, n * groups + group, cols, mask_c, ACC)
    rstd = tl.load(rstd_ptr + n * groups + group, mask=mask_c, other=0.0)
    m1 = tl.load(m_ptr + n * 2 * groups + group, mask=mask_c, other=0.0)
    m2 = tl.load(m_ptr + (n * 2 + 1) * groups + group, mask=mask_c, other=0.0)
    gain, offset = affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    # dx = dt slope + x k2 + k1
    slope = (rstd * gain)[None, :]
    offset = offset[None, :]
    k1 = (-rstd * m1)[None, :]
    k2 = (-rstd * rstd * m2)[None, :]
    FOLDED: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    if FOLDED:
        offset -= mean * slope
        k1 -= mean * k2
    C = C1 if x2_ptr is None else C1 + C2
    at = (n * L + first) * width + c0 + offs_l[:, None] * width + offs_c[None, :]
    src += at
    dst += at
    at = (n * L + first) * C + before + c0 + offs_l[:, None] * C + offs_c[None, :]
    dy_ptr += at
    if drop_ptr is not None:
        drop_ptr += at
    limit = tl.where(mask_c, size, 0)[None, :]
    for start in tl.range(0, size, BLOCK_L, num_stages=1):
        mask = (start + offs_l)[:, None] < limit
        x = widened(tl.load(src, mask=mask, other=0.0), ACC)
        if not FOLDED:
            x -= mean
        dt = load_dt(x * slope + offset, dy_ptr, drop_ptr, 0, mask, ACT, ACC)
        dx = dt * slope + (x * k2 + k1)
        tl.store(dst, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        src += BLOCK_L * width
        dst += BLOCK_L * width
        dy_ptr += BLOCK_L * C
        if drop_ptr is not None:
            drop_ptr += BLOCK_L * C


def group_bwd_sums(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    drop: Tensor | None,
    per_frame: bool,
    act: bool,
    count: int,
) -> Tensor:
    """(N, chunks, count, C): A, B and, if ``count`` is 3, X of each chunk."""
    grid, given, counts, tile = _launch(
        x, x2, x_bias, params, mean.shape[1], per_frame, "sums", split_for_sums
    )
    n, _, c1, c2, _ = extents(x, x2, per_frame)
    part = x.new_empty((n, counts[-1], count, c1 + c2), dtype=acc_torch_dtype(x.dtype))
    _group_bwd_sums_kernel[(grid,)](
        dy, x, x2, part, mean, rstd, *given, drop, *counts, SUMS=count, ACT=act, **tile,
        maxnreg=64 if x.element_size() == 2 and count == 2 and drop is None else None,
    )  # fmt: skip
    return part


def group_bwd_dx(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    dx: Tensor | None,
    dx2: Tensor | None,
    m: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    drop: Tensor | None,
    per_frame: bool,
    act: bool,
) -> None:
    """dx and dx2 from m1 and m2, which are in ``m`` (N, 2, groups)."""
    grid, given, counts, tile = _launch(
        x, x2, x_bias, params, mean.shape[1], per_frame, "dx", split_for_map
    )
    _group_bwd_dx_kernel[(grid,)](
        dy, x, x2, dx, dx2, m, mean, rstd, *given, drop, *counts, ACT=act, **tile
    )

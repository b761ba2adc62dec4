"""GroupNorm: tiles, forward from given statistics, backward sums and dx.

``__init__.py`` has the mathematics and the names; here N videos (B, or B*F frames) of L
pixels are normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    next_power_of_2,
    widened,
)
from fastvdm.kernels.norm_act.shared import (
    BY_GROUP,
    Config,
    affine,
    extents,
    in_powers_of_2,
    load_dt,
    row_stride,
    split_for_map,
    split_for_sums,
    store_act,
)
from fastvdm.kernels.tuned import tuned


@tuned("norm_act_group")
def pick_config(c1: int, c2: int, itemsize: int, kind: str) -> Config:
    """Tile of the GroupNorm kernels: 8 values a thread.
    ``itemsize`` and ``kind``, "stats", "fwd", "sums" or "dx", tell measured tiles apart.

    The kernels that end in a sum over pixels give each warp 32 channels of its own: Triton stores
    what warps have to add as [channel][warp], 4-way bank conflicts with two warps, 16-way with
    four. The width pads the two sources least, among widths that read at least 64 bytes in a row;
    of equals the widest. Analytic, NOT MEASURED: no GPU was at hand (November 2026).
    """
    top = min(32 if kind in ("stats", "sums") else 64, next_power_of_2(max(c1, c2)))
    widths = [w for w in (64, 32, 16, 8, 4, 2, 1) if min(top, 32) <= w <= top]
    block_c = min(widths, key=lambda w: (cdiv(c1, w) + cdiv(c2, w)) * w)
    # Triton has each thread fetch for itself a parameter vector that is shorter than the block
    num_warps = max(1, block_c // 32)
    return Config(block_c, 256 * num_warps // block_c, num_warps)


@triton.jit
def mean_of_x(mean_ptr, xb_ptr, group, cols, mask, ACC: tl.constexpr):
    """What to take off x, (1, BLOCK_C): the mean of x + x_bias is off x by x_bias."""
    mean = tl.load(mean_ptr + group, mask=mask, other=0.0)
    if xb_ptr is not None:
        mean -= tl.load(xb_ptr + cols, mask=mask, other=0.0).to(ACC)
    return mean[None, :]


@triton.jit
def source(x_ptr, x2_ptr, pid_c, C1, C2, BLOCK_C: tl.constexpr):
    """Which tensor the block ``pid_c`` of the channels [x, x2] lies in: its pointer, its width, the
    block's first channel in it, and the channels that stand before it."""
    first = pid_c * BLOCK_C
    if x2_ptr is None:
        return x_ptr, C1, first, 0
    else:
        blocks = tl.cdiv(C1, BLOCK_C)
        second = pid_c >= blocks
        src = tl.where(second, x2_ptr, x_ptr)
        width = tl.where(second, C2, C1)
        return (
            src,
            width,
            tl.where(second, first - blocks * BLOCK_C, first),
            tl.where(second, C1, 0),
        )


@triton.jit(**BY_GROUP)
def _group_fwd_kernel(
    x_ptr, x2_ptr, y_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr, res_ptr,
    drop_ptr, L, C1, C2, group_width, groups, frames, stride_scale, stride_shift, rows, chunks,
    ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y from x and its statistics, over a chunk of ``rows`` pixels of BLOCK_C channels."""
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
    group = n * groups + cols // group_width
    mean = mean_of_x(mean_ptr, xb_ptr, group, cols, mask_c, ACC)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    gain, offset = affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    gain, offset = in_powers_of_2(gain, offset, ACT)
    slope = (rstd * gain)[None, :]
    offset = offset[None, :]
    FOLDED: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    if FOLDED:
        offset -= mean * slope
    C = C1 if x2_ptr is None else C1 + C2
    src += (n * L + first) * width + c0 + offs_l[:, None] * width + offs_c[None, :]
    at = (n * L + first) * C + before + c0 + offs_l[:, None] * C + offs_c[None, :]
    y_ptr += at
    if res_ptr is not None:
        res_ptr += at
    if drop_ptr is not None:
        drop_ptr += at
    limit = tl.where(mask_c, size, 0)[None, :]
    for start in tl.range(0, size, BLOCK_L, num_stages=1):
        mask = (start + offs_l)[:, None] < limit
        x = widened(tl.load(src, mask=mask, other=0.0), ACC)
        if not FOLDED:
            x -= mean
        store_act(x * slope + offset, y_ptr, res_ptr, drop_ptr, 0, mask, ACT, ACC)
        src += BLOCK_L * width
        y_ptr += BLOCK_L * C
        if res_ptr is not None:
            res_ptr += BLOCK_L * C
        if drop_ptr is not None:
            drop_ptr += BLOCK_L * C


@triton.jit(**BY_GROUP)
def _group_bwd_sums_kernel(
    dy_ptr, x_ptr, x2_ptr, part_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr,
    drop_ptr, L, C1, C2, group_width, groups, frames, stride_scale, stride_shift, rows, chunks,
    SUMS: tl.constexpr, ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """part (N, chunks, SUMS, C): the sums over a chunk of dt, of dt x_hat and, third, of x_hat."""
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
    group = n * groups + cols // group_width
    mean = mean_of_x(mean_ptr, xb_ptr, group, cols, mask_c, ACC)
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

    # of dt, of dt (x - mean) and of x - mean: rstd is a factor of the last two
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
    )  # not kept through the loop
    out = part_ptr + (n * chunks + chunk) * SUMS * (C1 + C2) + cols
    tl.store(out, tl.sum(sum_dt, axis=0), mask=mask_c)
    tl.store(out + C1 + C2, rstd * tl.sum(sum_dtx, axis=0), mask=mask_c)
    if SUMS == 3:
        tl.store(out + 2 * (C1 + C2), rstd * tl.sum(sum_x, axis=0), mask=mask_c)


@triton.jit(**BY_GROUP)
def _group_bwd_dx_kernel(
    dy_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, m_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr,
    scale_ptr, shift_ptr, drop_ptr, L, C1, C2, group_width, groups, frames, stride_scale,
    stride_shift, rows, chunks,
    ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = rstd (dt gain - m1 - x_hat m2) over a chunk of pixels, with m (N, 2, groups)."""
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
    group = cols // group_width
    mean = mean_of_x(mean_ptr, xb_ptr, n * groups + group, cols, mask_c, ACC)
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


def _launch(
    x: Tensor,
    x2: Tensor | None,
    params: tuple[Tensor | None, ...],
    groups: int,
    per_frame: bool,
    kind: str,
    split: Callable[[torch.device, int, int, Config], tuple[int, int]],
) -> tuple[int, tuple[int, ...], dict[str, Any]]:
    """(programs, the integers from L to chunks, tile) of a kernel whose pixels ``split`` cuts."""
    n, length, c1, c2, frames = extents(x, x2, per_frame)
    cfg = pick_config(c1, c2, x.element_size(), kind)
    blocks = cdiv(c1, cfg.block_c) + cdiv(c2, cfg.block_c)
    rows, chunks = split(x.device, n * blocks, length, cfg)
    strides = (row_stride(params[2]), row_stride(params[3]))
    counts = (length, c1, c2, (c1 + c2) // groups, groups, frames, *strides, rows, chunks)
    tile: dict[str, Any] = dict(
        BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c, ACC=acc_dtype(x.dtype), num_warps=cfg.num_warps
    )
    return n * chunks * blocks, counts, tile


def group_fwd(
    x: Tensor,
    x2: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    residual: Tensor | None,
    drop: Tensor | None,
    per_frame: bool,
    act: bool,
) -> None:
    """y in one read and one write; ``params`` is (weight, bias, scale, shift)."""
    grid, counts, tile = _launch(x, x2, params, mean.shape[1], per_frame, "fwd", split_for_map)
    _group_fwd_kernel[(grid,)](
        x, x2, y, mean, rstd, x_bias, *params, residual, drop, *counts, ACT=act, **tile
    )


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
    """(N, chunks, count, C): A, B and, where ``count`` is 3, X of each chunk."""
    grid, counts, tile = _launch(x, x2, params, mean.shape[1], per_frame, "sums", split_for_sums)
    n, _, c1, c2, _ = extents(x, x2, per_frame)
    part = x.new_empty((n, counts[-1], count, c1 + c2), dtype=acc_torch_dtype(x.dtype))
    _group_bwd_sums_kernel[(grid,)](
        dy, x, x2, part, mean, rstd, x_bias, *params, drop, *counts, SUMS=count, ACT=act, **tile,
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
    """dx and dx2 from m1 and m2, which ``m`` (N, 2, groups) holds."""
    grid, counts, tile = _launch(x, x2, params, mean.shape[1], per_frame, "dx", split_for_map)
    _group_bwd_dx_kernel[(grid,)](
        dy, x, x2, dx, dx2, m, mean, rstd, x_bias, *params, drop, *counts, ACT=act, **tile
    )

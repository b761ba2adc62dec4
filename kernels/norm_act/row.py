"""RMSNorm and LayerNorm over the channels of one pixel, forward and backward.

``__init__.py`` has the mathematics and the names; a program holds whole pixels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    at_least,
    cdiv,
    next_power_of_2,
    widened,
)
from fastvdm.kernels.norm_act.shared import (
    GENERAL,
    Config,
    affine,
    extents,
    in_powers_of_2,
    load_dt,
    row_stride,
    split_for_sums,
    store_act,
)
from fastvdm.kernels.tuned import tuned


@tuned("norm_act_row")
def pick_row_config(c1: int, c2: int, itemsize: int, kind: str) -> Config:
    """Tile of the row-wise kernels: whole pixels. ``itemsize`` and ``kind`` as in ``group.py``.

    The backward gives a warp whole pixels while they fit, 8 to 16 values per thread; then no sum
    over channels or pixels crosses warps. Analytic, NOT MEASURED.
    """
    width = next_power_of_2(next_power_of_2(c1) + (next_power_of_2(c2) if c2 else 0))
    if kind == "bwd":
        return Config(width, max(1, 256 // width), max(1, width // 512))
    return Config(width, max(1, 2048 // width), 4 if width <= 2048 else 8)


@triton.jit
def _row_norm(x, x2, mask, mask2, C, EPS: tl.constexpr, LAYER: tl.constexpr, TWO: tl.constexpr):
    """x_hat of the tiles x (BLOCK_L, BLOCK_C1) and x2; rstd and whether it varies, (BLOCK_L, 1).

    LayerNorm subtracts the mean twice, the second time to remove the rounding error of the first.
    """
    if LAYER:
        for _ in tl.static_range(2):
            total = tl.sum(x, axis=1)
            if TWO:
                total += tl.sum(x2, axis=1)
            mean = (total / C)[:, None]
            x = tl.where(mask, x - mean, 0.0)
            if TWO:
                x2 = tl.where(mask2, x2 - mean, 0.0)
    square = tl.sum(x * x, axis=1)
    if TWO:
        square += tl.sum(x2 * x2, axis=1)
    if LAYER:
        rstd = 1.0 / tl.sqrt(square / C + EPS)
        varies = square >= 0
    else:
        norm = tl.sqrt(square)
        rstd = tl.sqrt(tl.cast(C, x.dtype)) / at_least(norm, EPS)
        varies = norm >= EPS
    return x * rstd[:, None], x2 * rstd[:, None], rstd[:, None], varies[:, None]


@triton.jit(**GENERAL)
def _row_fwd_kernel(
    x_ptr, x2_ptr, y_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr, res_ptr, drop_ptr,
    L, C1, C2, stride_scale, stride_shift,
    LAYER: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C1: tl.constexpr, BLOCK_C2: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_L pixels of one video per program."""
    TWO: tl.constexpr = x2_ptr is not None
    C = C1 + C2
    tiles = tl.cdiv(L, BLOCK_L)
    pid = tl.program_id(0)
    row0 = pid % tiles * BLOCK_L
    batch = (pid // tiles).to(tl.int64)
    at = batch * L + row0
    offs_l = tl.arange(0, BLOCK_L)[:, None]
    cols = tl.arange(0, BLOCK_C1)
    cols2 = tl.arange(0, BLOCK_C2)
    mask = (row0 + offs_l < L) & (cols < C1)[None, :]
    mask2 = (row0 + offs_l < L) & (cols2 < C2)[None, :]
    x = widened(tl.load(x_ptr + at * C1 + offs_l * C1 + cols[None, :], mask=mask, other=0.0), ACC)
    if xb_ptr is not None:
        x += tl.load(xb_ptr + cols, mask=cols < C1, other=0.0).to(ACC)[None, :]
    x2 = x
    if TWO:
        x2 = widened(
            tl.load(x2_ptr + at * C2 + offs_l * C2 + cols2[None, :], mask=mask2, other=0.0), ACC
        )
    x_hat, x_hat2, _, _ = _row_norm(x, x2, mask, mask2, C, EPS, LAYER, TWO)

    gain, offset = affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols, cols < C1, ACC
    )
    gain, offset = in_powers_of_2(gain, offset, ACT)
    t = x_hat * gain[None, :] + offset[None, :]
    offs = at * C + offs_l * C + cols[None, :]
    store_act(t, y_ptr, res_ptr, drop_ptr, offs, mask, ACT, ACC)
    if TWO:
        cols2 += C1
        gain, offset = affine(
            w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols2, cols2 < C,
            ACC,
        )  # fmt: skip
        gain, offset = in_powers_of_2(gain, offset, ACT)
        t = x_hat2 * gain[None, :] + offset[None, :]
        offs = at * C + offs_l * C + cols2[None, :]
        store_act(t, y_ptr, res_ptr, drop_ptr, offs, mask2, ACT, ACC)


@triton.jit(**GENERAL)
def _row_bwd_kernel(
    dy_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, part_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr,
    drop_ptr, L, C1, C2, stride_scale, stride_shift, rows, chunks,
    SUMS: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C1: tl.constexpr, BLOCK_C2: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of pixels, and part (B, chunks, SUMS, C): its sums of dt, of dt x_hat and, if
    SUMS is 3, of dx."""
    TWO: tl.constexpr = x2_ptr is not None
    C = C1 + C2
    pid = tl.program_id(0)
    chunk = pid % chunks
    batch = (pid // chunks).to(tl.int64)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)[:, None]
    cols = tl.arange(0, BLOCK_C1)
    cols2 = tl.arange(0, BLOCK_C2)
    gain, offset = affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols, cols < C1, ACC
    )
    gain2, offset2 = gain, offset
    if TWO:
        gain2, offset2 = affine(
            w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, C1 + cols2,
            cols2 < C2, ACC,
        )  # fmt: skip
    sum_dt = tl.zeros((BLOCK_L, BLOCK_C1), ACC)
    sum_dtx = tl.zeros((BLOCK_L, BLOCK_C1), ACC)
    sum_dx = tl.zeros((BLOCK_L, BLOCK_C1), ACC)
    x_bias = tl.zeros((BLOCK_C1,), ACC)
    if xb_ptr is not None:
        x_bias = tl.load(xb_ptr + cols, mask=cols < C1, other=0.0).to(ACC)
    sum_dt2 = tl.zeros((BLOCK_L, BLOCK_C2), ACC)
    sum_dtx2 = tl.zeros((BLOCK_L, BLOCK_C2), ACC)
    for start in tl.range(0, size, BLOCK_L, num_stages=1):
        at = batch * L + first + start
        mask = (start + offs_l < size) & (cols < C1)[None, :]
        mask2 = (start + offs_l < size) & (cols2 < C2)[None, :]
        offs = at * C1 + offs_l * C1 + cols[None, :]
        offs2 = at * C2 + offs_l * C2 + cols2[None, :]
        x = widened(tl.load(x_ptr + offs, mask=mask, other=0.0), ACC)
        if xb_ptr is not None:
            x += x_bias[None, :]
        x2 = x
        if TWO:
            x2 = widened(tl.load(x2_ptr + offs2, mask=mask2, other=0.0), ACC)
        x_hat, x_hat2, rstd, varies = _row_norm(x, x2, mask, mask2, C, EPS, LAYER, TWO)

        offs_y = at * C + offs_l * C + cols[None, :]
        t = x_hat * gain[None, :] + offset[None, :]
        dt = load_dt(t, dy_ptr, drop_ptr, offs_y, mask, ACT, ACC)
        du = dt * gain[None, :]
        dt2 = dt
        du2 = du
        dot = tl.sum(du * x_hat, axis=1)
        total = tl.sum(du, axis=1)
        if TWO:
            offs_y = at * C + C1 + offs_l * C + cols2[None, :]
            t = x_hat2 * gain2[None, :] + offset2[None, :]
            dt2 = load_dt(t, dy_ptr, drop_ptr, offs_y, mask2, ACT, ACC)
            du2 = dt2 * gain2[None, :]
            dot += tl.sum(du2 * x_hat2, axis=1)
            total += tl.sum(du2, axis=1)
        if (dx_ptr is not None) or (SUMS == 3):
            m1 = tl.zeros_like(rstd)
            m2 = tl.where(varies, (dot / C)[:, None], 0.0)
            if LAYER:
                m1 = (total / C)[:, None]
            dx = rstd * (du - m1 - x_hat * m2)
            if SUMS == 3:
                sum_dx += tl.where(mask, dx, 0.0)
            if dx_ptr is not None:
                tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                if TWO:
                    dx = rstd * (du2 - m1 - x_hat2 * m2)
                    tl.store(dx2_ptr + offs2, dx.to(dx2_ptr.dtype.element_ty), mask=mask2)
        if part_ptr is not None:
            sum_dt += tl.where(mask, dt, 0.0)
            sum_dtx += tl.where(mask, dt * x_hat, 0.0)
            if TWO:
                sum_dt2 += tl.where(mask2, dt2, 0.0)
                sum_dtx2 += tl.where(mask2, dt2 * x_hat2, 0.0)
    if part_ptr is not None:
        out = part_ptr + (batch * chunks + chunk) * SUMS * C
        tl.store(out + cols, tl.sum(sum_dt, axis=0), mask=cols < C1)
        tl.store(out + C + cols, tl.sum(sum_dtx, axis=0), mask=cols < C1)
        if SUMS == 3:
            tl.store(out + 2 * C + cols, tl.sum(sum_dx, axis=0), mask=cols < C1)
        if TWO:
            tl.store(out + C1 + cols2, tl.sum(sum_dt2, axis=0), mask=cols2 < C2)
            tl.store(out + C + C1 + cols2, tl.sum(sum_dtx2, axis=0), mask=cols2 < C2)


def row_fwd(
    x: Tensor,
    x2: Tensor | None,
    y: Tensor,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    residual: Tensor | None,
    drop: Tensor | None,
    per_frame: bool,
    layer: bool,
    eps: float,
    act: bool,
) -> None:
    """y in one read and one write; ``params`` is (weight, bias, scale, shift)."""
    n, length, c1, c2, _ = extents(x, x2, per_frame)
    cfg = pick_row_config(c1, c2, x.element_size(), "fwd")
    strides = (row_stride(params[2]), row_stride(params[3]))
    _row_fwd_kernel[(n * cdiv(length, cfg.block_l),)](
        x, x2, y, x_bias, *params, residual, drop, length, c1, c2, *strides,
        LAYER=layer, EPS=eps, ACT=act, BLOCK_L=cfg.block_l, BLOCK_C1=next_power_of_2(c1),
        BLOCK_C2=next_power_of_2(max(c2, 1)), ACC=acc_dtype(x.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip


def row_bwd(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    dx: Tensor | None,
    dx2: Tensor | None,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    drop: Tensor | None,
    per_frame: bool,
    layer: bool,
    eps: float,
    act: bool,
    count: int,
) -> Tensor | None:
    """Writes dx and dx2 if given. Returns (N, chunks, count, C): A, B and, if ``count`` is 3, Σ dx
    of each chunk; None if ``count`` is 0."""
    n, length, c1, c2, _ = extents(x, x2, per_frame)
    cfg = pick_row_config(c1, c2, x.element_size(), "bwd")
    rows, chunks = split_for_sums(x.device, n, length, cfg, warps=16)  # its registers allow 12-20
    strides = (row_stride(params[2]), row_stride(params[3]))
    part = None
    if count:
        part = x.new_empty((n, chunks, count, c1 + c2), dtype=acc_torch_dtype(x.dtype))
    _row_bwd_kernel[(n * chunks,)](
        dy, x, x2, dx, dx2, part, x_bias, *params, drop, length, c1, c2, *strides, rows, chunks,
        SUMS=max(count, 2), LAYER=layer, EPS=eps, ACT=act, BLOCK_L=cfg.block_l,
        BLOCK_C1=next_power_of_2(c1), BLOCK_C2=next_power_of_2(max(c2, 1)),
        ACC=acc_dtype(x.dtype), num_warps=cfg.num_warps,
        maxnreg=255,  # otherwise ptxas limits registers for occupancy, and spills
    )  # fmt: skip
    return part

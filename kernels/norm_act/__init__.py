"""Norm → affine → FiLM → SiLU → dropout → + residual on (B, F, H, W, C), forward and backward.

    x_hat = (x - mean) rstd;  t = x_hat gain + offset;  y = SiLU(t) dropout_mask + residual
    gain = weight (1 + scale),  offset = bias (1 + scale) + shift          per sample and channel

GroupNorm (kind 0) has N = B videos (B*F frames with per_frame) of L pixels:
  forward   Statistics: a program takes a chunk of pixels of one block of channels. Each lane runs
            Welford over its own pixels; lanes and channels of a group are merged by Chan's formula
            into one (mean, M2) per group and chunk. There are about as many chunks as
            multiprocessors, even for one video. Then apply: each program merges the chunks of its
            groups, and reads and writes once. In all 2R + 1W in two launches, or 1R + 1W with given
            statistics. A group that crosses two sources, or is too wide for a program, is merged
            from channels by a small kernel in between. A small group takes one program, which reads
            it twice: one launch.
  backward  With dt = dy dropout_mask SiLU'(t), everything follows from A = Σ_l dt and
            B = Σ_l dt x_hat per channel: dshift = A, dscale = weight B + bias A,
            dweight = Σ_n (1 + scale) B, dbias = Σ_n (1 + scale) A. m1, m2 = Σ_group gain A, gain B
            over the group's size, and dx = rstd (dt gain - m1 - x_hat m2). Two passes,
            2 (R x + R dy) + 1W, and two small launches: from chunks to the sums of each row, and
            from these to the gradients of all vectors.
x_bias, the bias of the preceding convolution, is part of what is normalised: x stands for
x + x_bias. It costs GroupNorm nothing: it moves a channel's mean and no variance, so the merges add
it to the means, and x_hat = (x - (mean - x_bias)) rstd. With X = Σ_l x_hat, a third sum if needed,
dx_bias = Σ_n rstd (gain A - L m1 - m2 X): the sum of dx before dx is rounded.
RMSNorm (1) and LayerNorm (2) reduce over the channels of one pixel: 1R + 1W, backward 2R + 1W.
t is recomputed in the backward; x, mean and rstd are saved. About 14 FLOPs per element forward, 30
backward. Partial sums are added in a fixed order: no atomics, two runs give the same bits.
Wu & He 2018 (GroupNorm); Chan, Golub, LeVeque 1979 (merging of variances).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import acc_dtype, acc_torch_dtype, cdiv
from fastvdm.kernels.limits import GROUP, LAYER
from fastvdm.kernels.norm_act.group import group_fwd
from fastvdm.kernels.norm_act.group_backward import group_bwd_dx, group_bwd_sums
from fastvdm.kernels.norm_act.params import params_bwd
from fastvdm.kernels.norm_act.row import row_bwd, row_fwd
from fastvdm.kernels.norm_act.shared import (
    GENERAL,
    affine,
    extents,
    merge_tile,
    row_stride,
)
from fastvdm.kernels.norm_act.stats import group_stats, group_whole, is_small


@triton.jit(**GENERAL)
def _reduce_kernel(
    part_ptr, sums_ptr, m_ptr, w_ptr, scale_ptr, C, width, frames, stride_scale, chunks, total,
    SUMS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums (N, SUMS, C) from part (N, chunks, SUMS, C); a program takes ``width`` channels.

    For GroupNorm they form one group, and m (N, 2, groups) = Σ gain sums / total.
    """
    pieces = tl.cdiv(C, width)
    pid = tl.program_id(0)
    n = (pid // pieces).to(tl.int64)
    piece = pid % pieces
    stop = tl.minimum((piece + 1) * width, C)
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    part_ptr += n * chunks * SUMS * C
    sums_ptr += n * SUMS * C
    m1 = tl.zeros((BLOCK_C,), ACC)
    m2 = tl.zeros((BLOCK_C,), ACC)
    for c0 in range(piece * width, stop, BLOCK_C):
        cols = c0 + offs_c
        mask_c = cols < stop
        a = tl.zeros((BLOCK_K, BLOCK_C), ACC)
        b = tl.zeros((BLOCK_K, BLOCK_C), ACC)
        third = tl.zeros((BLOCK_K, BLOCK_C), ACC)
        for k0 in range(0, chunks, BLOCK_K):
            k = k0 + offs_k
            mask = (k < chunks)[:, None] & mask_c[None, :]
            at = part_ptr + k[:, None] * SUMS * C + cols[None, :]
            a += tl.load(at, mask=mask, other=0.0)
            b += tl.load(at + C, mask=mask, other=0.0)
            if SUMS == 3:
                third += tl.load(at + 2 * C, mask=mask, other=0.0)
        sum_a = tl.sum(a, axis=0)
        sum_b = tl.sum(b, axis=0)
        tl.store(sums_ptr + cols, sum_a, mask=mask_c)
        tl.store(sums_ptr + C + cols, sum_b, mask=mask_c)
        if SUMS == 3:
            tl.store(sums_ptr + 2 * C + cols, tl.sum(third, axis=0), mask=mask_c)
        if m_ptr is not None:
            gain, _ = affine(
                w_ptr, None, scale_ptr, None, n // frames, stride_scale, 0, cols, mask_c, ACC
            )
            m1 += gain * sum_a
            m2 += gain * sum_b
    if m_ptr is not None:
        tl.store(m_ptr + n * 2 * pieces + piece, tl.sum(m1) / total)
        tl.store(m_ptr + (n * 2 + 1) * pieces + piece, tl.sum(m2) / total)


def _numeric(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def norm_act_fwd(
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    dropout_mask: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    kind: int,
    groups: int,
    per_frame: bool,
    eps: float,
    act: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd). mean and rstd are empty if they were given or do not exist."""
    y = x.new_empty((*x.shape[:-1], x.shape[-1] + (0 if x2 is None else x2.shape[-1])))
    params, drop = (weight, bias, scale, shift), _numeric(dropout_mask)
    given = mean is not None and rstd is not None
    if kind == GROUP:
        if not given and is_small(x, x2, groups, per_frame):
            options = groups, per_frame, eps, x_bias, params, residual, drop, act
            return y, *group_whole(x, y, *options)
        parts = None
        if mean is None or rstd is None:
            mean, rstd, parts = group_stats(x, x2, groups, per_frame, eps, x_bias)
        group_fwd(x, x2, y, mean, rstd, x_bias, params, residual, drop, per_frame, act, parts)
        if not given:
            return y, mean, rstd
    else:
        row_fwd(
            x, x2, y, x_bias, params, residual, drop, per_frame, kind == LAYER, eps, act
        )  # fmt: skip
    acc = acc_torch_dtype(x.dtype)
    return y, x.new_empty(0, dtype=acc), x.new_empty(0, dtype=acc)


def norm_act_bwd(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    dropout_mask: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    kind: int,
    groups: int,
    per_frame: bool,
    eps: float,
    act: bool,
    need_dx: bool,
    need_dx_bias: bool,
    need_dweight: bool,
    need_dfilm: bool,
) -> tuple[Tensor, ...]:
    """(dx, dx2, dx_bias, dweight, dbias, dscale, dshift); empty if the tensor is None or its
    gradient is not needed."""
    needs = (need_dx, need_dx, need_dx_bias, need_dweight, need_dweight, need_dfilm, need_dfilm)
    dx, dx2, dxb, dw, db, dscale, dshift = (
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip((x, x2, x_bias, weight, bias, scale, shift), needs)
    )
    n, length, c1, c2, frames = extents(x, x2, per_frame)
    c, acc = c1 + c2, acc_dtype(x.dtype)
    params, drop = (weight, bias, scale, shift), _numeric(dropout_mask)
    count = 2 if dxb is None else 3  # number of sums per row, see the kernels
    m = sums = None
    if kind == GROUP:
        assert mean is not None and rstd is not None  # computed by the forward
        given = (mean, rstd, x_bias, params, drop, per_frame, act)
        part = group_bwd_sums(dy, x, x2, *given, count)
        if need_dx or dxb is not None:
            m = part.new_empty((n, 2, groups))
        sums = _reduce(part, m, weight, scale, c // groups, frames, length * (c // groups), acc)
        if need_dx:
            group_bwd_dx(dy, x, x2, dx, dx2, m, *given)
    else:
        wanted = any(t is not None for t in (dw, dscale, dshift, dxb))
        row_part = row_bwd(
            dy, x, x2, dx, dx2, x_bias, params, drop, per_frame, kind == LAYER, eps, act,
            count if wanted else 0,
        )  # fmt: skip
        if row_part is not None:
            sums = _reduce(row_part, None, weight, scale, 8, frames, 1, acc)

    outs = dscale, dshift, dw, db, dxb
    if any(t is not None for t in outs):
        assert sums is not None
        params_bwd(sums, m, rstd, weight, bias, scale, outs, length, frames, acc)
    found = (dx, dx2, dxb, dw, db, dscale, dshift)
    return tuple(x.new_empty(0) if t is None else t for t in found)


def _reduce(
    part: Tensor,
    m: Tensor | None,
    weight: Tensor,
    scale: Tensor | None,
    width: int,
    frames: int,
    total: int,
    acc: tl.dtype,
) -> Tensor:
    n, chunks, count, c = part.shape
    sums = part.new_empty((n, count, c))
    _reduce_kernel[(n * cdiv(c, width),)](
        part, sums, m, weight, weight if scale is None else scale, c, width, frames,
        row_stride(scale), chunks, total,
        SUMS=count, ACC=acc,
        **merge_tile(chunks, width, 16 if width <= 16 else 4),  # wide: bank conflicts, 6-way
        maxnreg=128,  # otherwise ptxas limits registers for occupancy, and spills
    )  # fmt: skip
    return sums

"""GroupNorm's statistics in two levels; and where a group is small, the whole norm in one launch.

``__init__.py`` has the mathematics and the names.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    next_power_of_2,
    reciprocal,
    widened,
)
from fastvdm.kernels.norm_act.group import pick_config, source
from fastvdm.kernels.norm_act.shared import (
    GENERAL,
    affine,
    extents,
    in_powers_of_2,
    merge_tile,
    row_stride,
    split_for_sums,
    store_act,
)

# Values of a group that one program may normalise alone. It is bound by the instructions it issues,
# 27 a value: 4.7 us for 32768 (sm_90). Three launches, each after the one before, take 6 to 8 where
# they are recorded in a graph, and 30 on the host where not. Analytic, NOT MEASURED.
WHOLE_VALUES = 32768
# Of which it may take the statistics alone, 9 instructions a value: 5.5 us for 131072, as long as
# the two launches for chunks and their merge. NOT MEASURED.
STATS_VALUES = 131072


@triton.jit(**GENERAL)
def _stats_kernel(
    x_ptr, x2_ptr, part_ptr, L, C1, C2, rows, chunks,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part (N, chunks, 2, C): mean and M2 of each channel over each chunk of ``rows`` pixels."""
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
    src += (n * L + first) * width + c0 + offs_l[:, None] * width + offs_c[None, :]
    limit = tl.where(mask_c, size, 0)[None, :]

    # (BLOCK_L, BLOCK_C): a lane is its own Welford over the pixels offs_l, offs_l + BLOCK_L, ...
    mean = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    for start in tl.range(0, size, BLOCK_L, num_stages=1):
        mask = (start + offs_l)[:, None] < limit
        x = widened(tl.load(src, mask=mask, other=0.0), ACC)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * reciprocal(tl.cast(start // BLOCK_L + 1, ACC))
        m2 += delta * (x - mean)
        src += BLOCK_L * width

    # Chan's merge of the lanes. Means are summed as differences to the first: mean >> std needs it
    count = tl.maximum((size - offs_l + BLOCK_L - 1) // BLOCK_L, 0).to(ACC)[:, None]
    shift = tl.sum(tl.where(offs_l[:, None] == 0, mean, 0.0), axis=0)
    centre = shift + tl.sum(count * (mean - shift[None, :]), axis=0) / size.to(ACC)
    apart = mean - centre[None, :]
    out = part_ptr + (n * chunks + chunk) * 2 * (C1 + C2) + before + c0 + offs_c
    tl.store(out, centre, mask=mask_c)
    tl.store(out + C1 + C2, tl.sum(m2 + count * apart * apart, axis=0), mask=mask_c)


@triton.jit(**GENERAL)
def _merge_kernel(
    part_ptr, xb_ptr, mean_ptr, rstd_ptr, L, C, group_width, groups, rows, chunks,
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and rstd (N, groups) from part (N, chunks, 2, C): Chan's merge over chunks, channels.

    x_bias is added here, as a difference to that of the group's first channel, too.
    """
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    part_ptr += n * chunks * 2 * C + pid % groups * group_width
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = tl.arange(0, BLOCK_C)
    shift = tl.load(part_ptr)
    total = tl.cast(L, ACC) * group_width
    bias = tl.zeros((), ACC)
    if xb_ptr is not None:
        xb_ptr += pid % groups * group_width
        bias = tl.load(xb_ptr).to(ACC)

    moment = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + offs_k
        size = tl.minimum(L - k * rows, rows).to(ACC)[:, None]
        for c0 in range(0, group_width, BLOCK_C):
            c = c0 + offs_c
            mask = (k < chunks)[:, None] & (c < group_width)[None, :]
            mean = tl.load(part_ptr + k[:, None] * 2 * C + c[None, :], mask=mask, other=0.0) - shift
            if xb_ptr is not None:
                mean += tl.load(xb_ptr + c, mask=c < group_width, other=0.0).to(ACC)[None, :] - bias
            moment += tl.where(mask, size * mean, 0.0)
    centre = tl.sum(moment) / total

    moment = tl.zeros((BLOCK_K, BLOCK_C), ACC)
    for k0 in range(0, chunks, BLOCK_K):
        k = k0 + offs_k
        size = tl.minimum(L - k * rows, rows).to(ACC)[:, None]
        for c0 in range(0, group_width, BLOCK_C):
            c = c0 + offs_c
            mask = (k < chunks)[:, None] & (c < group_width)[None, :]
            at = part_ptr + k[:, None] * 2 * C + c[None, :]
            apart = tl.load(at, mask=mask, other=0.0) - shift
            if xb_ptr is not None:
                more = tl.load(xb_ptr + c, mask=c < group_width, other=0.0).to(ACC)
                apart += more[None, :] - bias
            apart -= centre
            m2 = tl.load(at + C, mask=mask, other=0.0)
            moment += tl.where(mask, m2 + size * apart * apart, 0.0)
    tl.store(mean_ptr + pid, shift + bias + centre)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(tl.sum(moment) / total + EPS))


@triton.jit(**GENERAL)
def _whole_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr, res_ptr, drop_ptr,
    L, C, group_width, groups, frames, stride_scale, stride_shift,
    EPS: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group and, in another pass of what is in L2, its y."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)[:, None]
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < group_width
    cols = pid % groups * group_width + offs_c
    limit = tl.where(mask_c, L, 0)[None, :]
    bias = tl.zeros((BLOCK_C,), ACC)
    if xb_ptr is not None:
        bias = tl.load(xb_ptr + cols, mask=mask_c, other=0.0).to(ACC)
    at = n * L * C + offs_l * C + cols[None, :]

    # (BLOCK_L, BLOCK_C): lanes as in _stats_kernel
    mean = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    x_at = x_ptr + at
    for start in tl.range(0, L, BLOCK_L, num_stages=4):
        if EVEN:  # all tiles are full
            x = widened(tl.load(x_at), ACC)
            delta = x - mean
        else:
            mask = start + offs_l < limit
            x = widened(tl.load(x_at, mask=mask, other=0.0), ACC)
            delta = tl.where(mask, x - mean, 0.0)
        mean += delta * reciprocal(tl.cast(start // BLOCK_L + 1, ACC))
        m2 += delta * (x - mean)
        x_at += BLOCK_L * C

    # Chan's merge, of lanes and channels at once
    count = tl.maximum((limit - offs_l + BLOCK_L - 1) // BLOCK_L, 0).to(ACC)
    total = tl.cast(L, ACC) * group_width
    first = tl.sum(tl.where(offs_c == 0, bias, 0.0))
    shift = tl.sum(tl.where((offs_l == 0) & (offs_c == 0)[None, :], mean, 0.0))
    apart = mean - shift + (bias - first)[None, :]
    centre = tl.sum(count * apart) / total
    apart -= centre
    rstd = 1.0 / tl.sqrt(tl.sum(m2 + count * apart * apart) / total + EPS)
    centre += shift + first
    tl.store(mean_ptr + pid, centre)
    tl.store(rstd_ptr + pid, rstd)

    if y_ptr is not None:
        gain, offset = affine(
            w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols,
            mask_c, ACC,
        )  # fmt: skip
        gain, offset = in_powers_of_2(gain, offset, ACT)
        slope = rstd * gain
        x_at = x_ptr + at
        for start in tl.range(0, L, BLOCK_L, num_stages=3):
            mask = start + offs_l < limit
            x = widened(tl.load(x_at, mask=mask, other=0.0), ACC) - (centre - bias)[None, :]
            t = x * slope[None, :] + offset[None, :]
            store_act(t, y_ptr, res_ptr, drop_ptr, at, mask, ACT, ACC)
            x_at += BLOCK_L * C
            at += BLOCK_L * C


def group_stats(
    x: Tensor,
    x2: Tensor | None,
    groups: int,
    per_frame: bool,
    eps: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """mean and rstd of x + x_bias, each (N, groups)."""
    if is_small(x, x2, groups, per_frame, STATS_VALUES):
        none = (None,) * 4
        return group_whole(x, None, groups, per_frame, eps, x_bias, none, None, None, False)
    n, length, c1, c2, _ = extents(x, x2, per_frame)
    acc = acc_dtype(x.dtype)
    cfg = pick_config(c1, c2, x.element_size(), "stats")
    blocks = cdiv(c1, cfg.block_c) + cdiv(c2, cfg.block_c)
    rows, chunks = split_for_sums(x.device, n * blocks, length, cfg)
    part = x.new_empty((n, chunks, 2, c1 + c2), dtype=acc_torch_dtype(x.dtype))
    mean = part.new_empty((n, groups))
    rstd = torch.empty_like(mean)
    _stats_kernel[(n * chunks * blocks,)](
        x, x2, part, length, c1, c2, rows, chunks,
        BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c, ACC=acc, num_warps=cfg.num_warps,
    )  # fmt: skip
    width = (c1 + c2) // groups
    _merge_kernel[(n * groups,)](
        part, x_bias, mean, rstd, length, c1 + c2, width, groups, rows, chunks,
        EPS=eps, ACC=acc, **merge_tile(chunks, width),
        maxnreg=128,  # ptxas would rather spill than give up a block
    )  # fmt: skip
    return mean, rstd


def is_small(
    x: Tensor, x2: Tensor | None, groups: int, per_frame: bool, most: int | None = None
) -> bool:
    """Whether a program takes a group alone: at most so many values, in rows of whole sectors."""
    most = WHOLE_VALUES if most is None else most
    _, length, c1, _, _ = extents(x, x2, per_frame)
    width = c1 // groups
    return x2 is None and width * x.element_size() >= 32 and length * width <= most


def group_whole(
    x: Tensor,
    y: Tensor | None,
    groups: int,
    per_frame: bool,
    eps: float,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    residual: Tensor | None,
    drop: Tensor | None,
    act: bool,
) -> tuple[Tensor, Tensor]:
    """y where it is wanted; mean and rstd of x + x_bias, each (N, groups)."""
    n, length, c, _, frames = extents(x, None, per_frame)
    mean = x.new_empty((n, groups), dtype=acc_torch_dtype(x.dtype))
    rstd = torch.empty_like(mean)
    block_c = next_power_of_2(c // groups)
    num_warps = 4 if length * block_c <= 1024 else 16
    block_l = max(1, 256 * num_warps // block_c)
    _whole_kernel[(n * groups,)](
        x, y, mean, rstd, x_bias, *params, residual, drop, length, c, c // groups, groups, frames,
        row_stride(params[2]), row_stride(params[3]), EPS=eps, ACT=act,
        EVEN=length % block_l == 0 and c == groups * block_c, BLOCK_L=block_l, BLOCK_C=block_c,
        ACC=acc_dtype(x.dtype), num_warps=num_warps,
    )  # fmt: skip
    return mean, rstd

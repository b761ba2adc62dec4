"""GroupNorm's statistics, chunk by chunk; for small groups, the whole norm in one launch.

``__init__.py`` has the mathematics and the names.
"""

from __future__ import annotations

from math import gcd

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
from fastvdm.kernels.norm_act.group import Partials, source
from fastvdm.kernels.norm_act.shared import (
    ABSENT,
    BY_GROUP,
    GENERAL,
    Config,
    affine,
    extents,
    in_powers_of_2,
    merge_tile,
    split_for_sums,
    store_act,
    vector,
    vectors,
)
from fastvdm.kernels.tuned import tuned

# Values of a group that one program may normalise alone. It is bound by the instructions it issues,
# 27 per value: 4.7 us for 32768 (sm_90). Two consecutive launches take 4 to 5 us if recorded in a
# graph, and otherwise 20 us on the host. Analytic, NOT MEASURED.
WHOLE_VALUES = 32768
# Channels of a group whose statistics one program may compute.
WIDEST_GROUP = 128


@tuned("norm_act_stats")
def pick_stats_config(step: int, itemsize: int) -> Config:
    """Tile of the statistics of ``step`` channels: 32 bytes per thread, and enough warps to hide
    the memory latency, because there are few programs (the next kernel reads one result of each).
    Analytic, NOT MEASURED: no GPU was at hand (November 2026)."""
    block_c = next_power_of_2(step)
    return Config(block_c, 8192 // itemsize // block_c, 8)


@triton.jit(**BY_GROUP)
def _stats_kernel(
    x_ptr, x2_ptr, xb_ptr, part_ptr, L, C1, C2, group_width, groups, stride_bias, rows,
    chunks, EVEN: tl.constexpr, STEP: tl.constexpr, SUB: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part (N, chunks, 2, groups): mean and M2 of each group over each chunk of ``rows`` pixels,
    with x_bias relative to that of the group's first channel. A program takes STEP channels, which
    are whole groups; SUB divides a group."""
    blocks = tl.cdiv(C1, STEP) + tl.cdiv(C2, STEP)
    pid = tl.program_id(0)
    chunk = pid // blocks % chunks
    n = (pid // blocks // chunks).to(tl.int64)
    src, width, c0, before = source(x_ptr, x2_ptr, pid % blocks, C1, C2, STEP)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = (offs_c < STEP) & (c0 + offs_c < width)
    src += (n * L + first) * width + c0 + offs_l[:, None] * width + offs_c[None, :]
    limit = tl.where(mask_c, size, 0)[None, :]

    # (BLOCK_L, BLOCK_C): each lane runs Welford over the pixels offs_l, offs_l + BLOCK_L, ...
    mean = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    for start in tl.range(0, size, BLOCK_L, num_stages=4):
        if EVEN:  # all tiles are full
            x = widened(tl.load(src), ACC)
            delta = x - mean
        else:
            mask = (start + offs_l)[:, None] < limit
            x = widened(tl.load(src, mask=mask, other=0.0), ACC)
            delta = tl.where(mask, x - mean, 0.0)
        mean += delta * reciprocal(tl.cast(start // BLOCK_L + 1, ACC))
        m2 += delta * (x - mean)
        src += BLOCK_L * width

    # Chan's merges. Means are summed as differences to the first, for the case mean >> std. First
    # over SUB channels, in a thread's registers; (BLOCK_L, BLOCK_S) from here on.
    BLOCK_S: tl.constexpr = BLOCK_C // SUB
    count = tl.maximum((size - offs_l + BLOCK_L - 1) // BLOCK_L, 0).to(ACC)[:, None]
    sub = tl.arange(0, BLOCK_S)
    mean = tl.reshape(mean, (BLOCK_L, BLOCK_S, SUB))
    shift = tl.sum(tl.where(tl.arange(0, SUB)[None, None, :] == 0, mean, 0.0), axis=2)
    apart = mean - shift[:, :, None]
    xb_ptr += before + c0
    more = vector(xb_ptr, stride_bias, 0, offs_c, mask_c, ACC)
    lead = vector(xb_ptr, stride_bias, 0, sub * SUB, c0 + sub * SUB < width, ACC)
    apart += (tl.reshape(more, (BLOCK_S, SUB)) - lead[:, None])[None, :, :]
    group_lead = sub * SUB // group_width * group_width
    # The x_bias of a first channel, relative to that of its group.
    beyond = lead - vector(xb_ptr, stride_bias, 0, group_lead, c0 + group_lead < width, ACC)
    off = tl.sum(apart, axis=2) / SUB
    apart -= off[:, :, None]
    m2 = tl.sum(tl.reshape(m2, (BLOCK_L, BLOCK_S, SUB)) + count[:, :, None] * apart * apart, axis=2)
    mean = shift + off

    # Then over the lanes, (BLOCK_S,).
    shift = tl.sum(tl.where(offs_l[:, None] == 0, mean, 0.0), axis=0)
    centre = shift + tl.sum(count * (mean - shift[None, :]), axis=0) / size.to(ACC)
    apart = mean - centre[None, :]
    m2 = tl.sum(m2 + SUB * count * apart * apart, axis=0)

    # Finally over the channels of a group, (BLOCK_S, BLOCK_G).
    offs_g = tl.arange(0, BLOCK_G)
    member = (sub * SUB // group_width)[:, None] == offs_g[None, :]
    first = (sub * SUB % group_width == 0)[:, None] & member
    shift = tl.sum(tl.where(first, centre[:, None], 0.0), axis=0)
    apart = tl.where(member, centre[:, None] - shift[None, :] + beyond[:, None], 0.0)
    off = tl.sum(apart, axis=0) * SUB / tl.cast(group_width, ACC)
    apart = tl.where(member, apart - off[None, :], 0.0)
    moment = m2[:, None] + SUB * size.to(ACC) * apart * apart
    m2 = tl.sum(tl.where(member, moment, 0.0), axis=0)
    group = (before + c0) // group_width + offs_g
    mask = (offs_g < STEP // group_width) & (group < (before + width) // group_width)
    out = part_ptr + (n * chunks + chunk) * 2 * groups + group
    tl.store(out, shift + off, mask=mask)
    tl.store(out + groups, m2, mask=mask)


@triton.jit(**GENERAL)
def _merge_kernel(
    part_ptr, xb_ptr, mean_ptr, rstd_ptr, L, C, group_width, groups, rows, chunks,
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and rstd (N, groups) from part (N, chunks, 2, C): Chan's merge over chunks, channels.

    x_bias is added here too, relative to that of the group's first channel.
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

    centre = tl.zeros((), ACC)
    for second in tl.static_range(2):
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
                if second:
                    apart -= centre
                    apart *= apart
                    m2 = tl.load(at + C, mask=mask, other=0.0)
                    moment += tl.where(mask, m2 + size * apart, 0.0)
                else:
                    moment += tl.where(mask, size * apart, 0.0)
        if not second:
            centre = tl.sum(moment) / total
    tl.store(mean_ptr + pid, shift + bias + centre)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(tl.sum(moment) / total + EPS))


@triton.jit(**GENERAL)
def _whole_kernel(
    x_ptr, y_ptr, mean_ptr, rstd_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr, res_ptr, drop_ptr,
    L, C, group_width, groups, frames, stride_scale, stride_shift, stride_bias,
    EPS: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr, BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean and rstd of one group and, in a second pass over data in the L2 cache, its y."""
    pid = tl.program_id(0)
    n = (pid // groups).to(tl.int64)
    offs_l = tl.arange(0, BLOCK_L)[:, None]
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < group_width
    cols = pid % groups * group_width + offs_c
    limit = tl.where(mask_c, L, 0)[None, :]
    bias = vector(xb_ptr, stride_bias, 0, cols, mask_c, ACC)
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

    # Chan's merge, over lanes and channels at once.
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
) -> tuple[Tensor, Tensor, Partials | None]:
    """mean and rstd of x + x_bias, each (N, groups). If partials are returned, these two are not
    computed yet: the launch that normalises merges the partials."""
    n, length, c1, c2, _ = extents(x, x2, per_frame)
    c = c1 + c2
    width = c // groups
    # A program must hold whole groups of one source; otherwise it takes single channels.
    whole = width <= WIDEST_GROUP and c1 % width == 0
    part_width = width if whole else 1
    step = max(32 // part_width, 1) * part_width
    cfg = pick_stats_config(step, x.element_size())
    blocks = cdiv(c1, step) + cdiv(c2, step)
    rows, chunks = split_for_sums(x.device, n * blocks, length, cfg, cfg.num_warps)
    acc = acc_torch_dtype(x.dtype)
    part = x.new_empty((n, chunks, 2, c // part_width), dtype=acc)
    mean = x.new_empty((n, groups), dtype=acc)
    rstd = torch.empty_like(mean)
    even = whole and length % rows == 0 and rows % cfg.block_l == 0
    even = even and step == cfg.block_c and c1 % step == 0 and c2 % step == 0
    _stats_kernel[(n * chunks * blocks,)](
        x, x2, x if x_bias is None else x_bias, part, length, c1, c2, part_width, c // part_width,
        0 if whole and x_bias is not None else ABSENT, rows, chunks,
        EVEN=even, STEP=step, SUB=gcd(part_width, 8), BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c,
        BLOCK_G=max(8, next_power_of_2(step // part_width)), ACC=acc_dtype(x.dtype),
        num_warps=cfg.num_warps,
    )  # fmt: skip
    if whole:
        return mean, rstd, Partials(part, rows, chunks, eps)
    _merge_kernel[(n * groups,)](
        part, x_bias, mean, rstd, length, c, width, groups, rows, chunks,
        EPS=eps, ACC=acc_dtype(x.dtype), **merge_tile(chunks, width),
        maxnreg=128,  # otherwise ptxas limits registers for occupancy, and spills
    )  # fmt: skip
    return mean, rstd, None


def is_small(x: Tensor, x2: Tensor | None, groups: int, per_frame: bool) -> bool:
    """Whether one program normalises a group: it has few values, in rows of whole sectors."""
    _, length, c1, _, _ = extents(x, x2, per_frame)
    width = c1 // groups
    return x2 is None and width * x.element_size() >= 32 and length * width <= WHOLE_VALUES


def group_whole(
    x: Tensor,
    y: Tensor,
    groups: int,
    per_frame: bool,
    eps: float,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    residual: Tensor | None,
    drop: Tensor | None,
    act: bool,
) -> tuple[Tensor, Tensor]:
    """Writes y. Returns mean and rstd of x + x_bias, each (N, groups)."""
    n, length, c, _, frames = extents(x, None, per_frame)
    mean = x.new_empty((n, groups), dtype=acc_torch_dtype(x.dtype))
    rstd = torch.empty_like(mean)
    block_c = next_power_of_2(c // groups)
    num_warps = 4 if length * block_c <= 1024 else 16
    # 16 bytes per thread; more would spill in fp32.
    block_l = max(1, 512 // x.element_size() * num_warps // block_c)
    given, strides = vectors(x, x_bias, params)
    _whole_kernel[(n * groups,)](
        x, y, mean, rstd, *given, residual, drop, length, c, c // groups, groups, frames, *strides,
        EPS=eps, ACT=act,
        EVEN=length % block_l == 0 and c == groups * block_c, BLOCK_L=block_l, BLOCK_C=block_c,
        ACC=acc_dtype(x.dtype), num_warps=num_warps,
    )  # fmt: skip
    return mean, rstd

"""Norm → affine → FiLM → SiLU → dropout → + residual on (B, F, H, W, C), forward and backward.

    x_hat = (x - mean) rstd;  t = x_hat gain + offset;  y = SiLU(t) dropout_mask + residual
    gain = weight (1 + scale),  offset = bias (1 + scale) + shift          per sample and channel

GroupNorm (kind 0) sees N = B videos (B*F frames when per frame) of L pixels:
  forward   statistics: every program takes a chunk of pixels of one block of channels, each lane
            runs Welford over its own pixels, and the lanes merge by Chan's formula into one (mean,
            M2) per channel and chunk; a small kernel merges chunks and channels into groups. The
            chunks are as many as fill the GPU, also for one video. Then apply: one read, one write.
            2R + 1W in all, 1R + 1W with given statistics.
  backward  with dt = dy dropout_mask SiLU'(t), A = Σ_l dt and B = Σ_l dt x_hat per channel yield
            everything: dshift = A, dscale = weight B + bias A, dweight = Σ_n (1 + scale) B,
            dbias = Σ_n (1 + scale) A, and m1, m2 = Σ_group gain A, gain B over the group's size:
            dx = rstd (dt gain - m1 - x_hat m2).  Two passes, 2 (R x + R dy) + 1W.
x_bias, the bias of the convolution before, is part of what is normalised: x stands for x + x_bias.
To GroupNorm it costs nothing: it moves a channel's mean and no variance, so the merge adds it to
the means, and x_hat = (x - (mean - x_bias)) rstd. With X = Σ_l x_hat, a third sum where wanted,
dx_bias = Σ_n rstd (gain A - L m1 - m2 X): the sum of dx before dx is rounded.
RMSNorm (1) and LayerNorm (2) reduce over the channels of one pixel: 1R + 1W, backward 2R + 1W.
t is recomputed in the backward; saved are x, mean and rstd. About 14 FLOPs an element forward, 30
backward. Sums go through partials in a fixed order: no atomics, two runs give the same bits.
Wu & He 2018 (GroupNorm); Chan, Golub, LeVeque 1979 (merging of variances).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.aot import AotCase
from fastvdm.kernels.common import acc_dtype, acc_torch_dtype, cdiv, next_power_of_2
from fastvdm.kernels.tuned import tuned

GROUP, RMS, LAYER = 0, 1, 2
# Copies of the next tiles on their way while one is computed; registers fall by 40 % with it, too
# (sm_90, Triton 3.6: 167 to 96 in _group_bwd_dx_kernel).
STAGES = tl.constexpr(3)
MAX_ROW = 4096  # channels of one pixel that a row-wise program holds in registers


class Config(NamedTuple):
    block_c: int  # channels a tile
    block_l: int  # pixels a tile
    num_warps: int


@tuned("norm_act_group")
def pick_config(c1: int, c2: int, itemsize: int, kind: str) -> Config:
    """Tile of the GroupNorm kernels: 16 values a thread. ``itemsize`` and ``kind``, "stats", "fwd"
    or "bwd", tell measured tiles apart.

    The width pads the two sources least, among widths that read at least 64 bytes in a row (bf16);
    of equals the widest. Analytic, NOT MEASURED: no GPU was at hand (November 2026).
    """
    top = min(128, next_power_of_2(max(c1, c2)))
    widths = [w for w in (128, 64, 32, 16, 8, 4, 2, 1) if min(top, 32) <= w <= top]
    block_c = min(widths, key=lambda w: (cdiv(c1, w) + cdiv(c2, w)) * w)
    # Triton has each thread fetch for itself a parameter vector that is shorter than the block
    num_warps = max(1, min(4, block_c // 32))
    return Config(block_c, 512 * num_warps // block_c, num_warps)


@tuned("norm_act_row")
def pick_row_config(c1: int, c2: int, itemsize: int, kind: str) -> Config:
    """Tile of the row-wise kernels: whole pixels, about 16 values a thread. NOT MEASURED.
    ``itemsize`` and ``kind``, "fwd" or "bwd", as in ``pick_config``."""
    width = next_power_of_2(next_power_of_2(c1) + (next_power_of_2(c2) if c2 else 0))
    return Config(width, max(1, 2048 // width), 4 if width <= 2048 else 8)


def _programs(device: torch.device, num_warps: int) -> int:
    """32 warps a multiprocessor; the interpreter counts as a tenth of one."""
    if device.type != "cuda":
        return 4
    return 32 // num_warps * torch.cuda.get_device_properties(device).multi_processor_count


def split_for_sums(device: torch.device, outer: int, length: int, cfg: Config) -> tuple[int, int]:
    """(pixels a chunk, chunks) of a reduction: as few chunks as fill the GPU, where ``outer``
    programs stand for each chunk."""
    tiles = cdiv(length, cfg.block_l)
    wanted = max(1, min(tiles, _programs(device, cfg.num_warps) // outer))
    rows = cdiv(tiles, wanted) * cfg.block_l
    return rows, cdiv(length, rows)


def split_for_map(device: torch.device, outer: int, length: int, cfg: Config) -> tuple[int, int]:
    """The same for an elementwise pass: up to 8 tiles, which share the loads of the parameters."""
    tiles = outer * cdiv(length, cfg.block_l)
    rows = max(1, min(8, tiles // _programs(device, cfg.num_warps))) * cfg.block_l
    return rows, cdiv(length, rows)


# --- shared by the kernels below ------------------------------------------------------------------


@triton.jit
def _affine(
    w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols, mask,
    ACC: tl.constexpr,
):  # fmt: skip
    """gain and offset of t = x_hat gain + offset, both (BLOCK_C,)."""
    gain = tl.load(w_ptr + cols, mask=mask, other=0.0).to(ACC)
    offset = tl.zeros_like(gain)
    if b_ptr is not None:
        offset = tl.load(b_ptr + cols, mask=mask, other=0.0).to(ACC)
    if scale_ptr is not None:
        film = 1.0 + tl.load(scale_ptr + batch * stride_scale + cols, mask=mask, other=0.0).to(ACC)
        gain *= film
        offset *= film
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + batch * stride_shift + cols, mask=mask, other=0.0).to(ACC)
    return gain, offset


@triton.jit
def _mean(mean_ptr, xb_ptr, group, cols, mask, ACC: tl.constexpr):
    """What to take off x, (1, BLOCK_C): the mean of x + x_bias is off x by x_bias."""
    mean = tl.load(mean_ptr + group, mask=mask, other=0.0)
    if xb_ptr is not None:
        mean -= tl.load(xb_ptr + cols, mask=mask, other=0.0).to(ACC)
    return mean[None, :]


@triton.jit
def _store_act(t, y_ptr, res_ptr, drop_ptr, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """y = SiLU(t) dropout_mask + residual at ``offs``."""
    if ACT:
        t *= tl.sigmoid(t)
    if drop_ptr is not None:
        t *= tl.load(drop_ptr + offs, mask=mask, other=0.0).to(ACC)
    if res_ptr is not None:
        t += tl.load(res_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + offs, t.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_dt(t, dy_ptr, drop_ptr, offs, mask, ACT: tl.constexpr, ACC: tl.constexpr):
    """dt = dy dropout_mask SiLU'(t); 0 outside the mask."""
    dt = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(ACC)
    if drop_ptr is not None:
        dt *= tl.load(drop_ptr + offs, mask=mask, other=0.0).to(ACC)
    if ACT:
        sig = tl.sigmoid(t)
        dt *= sig * (1.0 + t * (1.0 - sig))
    return tl.where(mask, dt, 0.0)


@triton.jit
def _source(x_ptr, x2_ptr, pid_c, C1, C2, BLOCK_C: tl.constexpr):
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


# --- GroupNorm ------------------------------------------------------------------------------------


@triton.jit
def _stats_kernel(
    x_ptr, x2_ptr, part_ptr, L, C1, C2, rows, chunks,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """part (N, chunks, 2, C): mean and M2 of each channel over each chunk of ``rows`` pixels."""
    blocks = tl.cdiv(C1, BLOCK_C) + tl.cdiv(C2, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid // blocks % chunks
    n = (pid // blocks // chunks).to(tl.int64)
    src, width, c0, before = _source(x_ptr, x2_ptr, pid % blocks, C1, C2, BLOCK_C)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = c0 + offs_c < width
    src += (n * L + first) * width + c0
    offs = offs_l[:, None] * width + offs_c[None, :]

    # (BLOCK_L, BLOCK_C): a lane is its own Welford over the pixels offs_l, offs_l + BLOCK_L, ...
    mean = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    m2 = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    for start in tl.range(0, size, BLOCK_L, num_stages=STAGES):
        mask = (start + offs_l < size)[:, None] & mask_c[None, :]
        x = tl.load(src + offs, mask=mask, other=0.0).to(ACC)
        delta = tl.where(mask, x - mean, 0.0)
        mean += delta * (1.0 / tl.cast(start // BLOCK_L + 1, ACC))
        m2 += delta * (x - mean)
        src += BLOCK_L * width

    # Chan's merge of the lanes. Means are summed as differences to the first: mean >> std needs it
    count = ((size - offs_l + BLOCK_L - 1) // BLOCK_L).to(ACC)[:, None]
    count = tl.maximum(count, 0.0)
    shift = tl.sum(tl.where(offs_l[:, None] == 0, mean, 0.0), axis=0)
    centre = shift + tl.sum(count * (mean - shift[None, :]), axis=0) / size.to(ACC)
    apart = mean - centre[None, :]
    out = part_ptr + (n * chunks + chunk) * 2 * (C1 + C2) + before + c0 + offs_c
    tl.store(out, centre, mask=mask_c)
    tl.store(out + C1 + C2, tl.sum(m2 + count * apart * apart, axis=0), mask=mask_c)


@triton.jit
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


@triton.jit
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
    src, width, c0, before = _source(x_ptr, x2_ptr, pid % blocks, C1, C2, BLOCK_C)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = c0 + offs_c < width
    cols = before + c0 + offs_c
    group = n * groups + cols // group_width
    mean = _mean(mean_ptr, xb_ptr, group, cols, mask_c, ACC)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
    gain, offset = _affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    slope = (rstd * gain)[None, :]
    src += (n * L + first) * width + c0
    at = (n * L + first) * (C1 + C2)
    offs_x = offs_l[:, None] * width + offs_c[None, :]
    offs_y = offs_l[:, None] * (C1 + C2) + cols[None, :]
    for start in tl.range(0, size, BLOCK_L, num_stages=STAGES):
        mask = (start + offs_l < size)[:, None] & mask_c[None, :]
        x = tl.load(src + offs_x, mask=mask, other=0.0).to(ACC)
        t = (x - mean) * slope + offset[None, :]
        _store_act(t, y_ptr, res_ptr, drop_ptr, at + offs_y, mask, ACT, ACC)
        src += BLOCK_L * width
        at += BLOCK_L * (C1 + C2)


@triton.jit
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
    src, width, c0, before = _source(x_ptr, x2_ptr, pid % blocks, C1, C2, BLOCK_C)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = c0 + offs_c < width
    cols = before + c0 + offs_c
    group = n * groups + cols // group_width
    mean = _mean(mean_ptr, xb_ptr, group, cols, mask_c, ACC)
    rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)[None, :]
    gain, offset = _affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    src += (n * L + first) * width + c0
    at = (n * L + first) * (C1 + C2)
    offs_x = offs_l[:, None] * width + offs_c[None, :]
    offs_y = offs_l[:, None] * (C1 + C2) + cols[None, :]

    sum_dt = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    sum_dtx = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    sum_x = tl.zeros((BLOCK_L, BLOCK_C), ACC)
    for start in tl.range(0, size, BLOCK_L, num_stages=STAGES):
        mask = (start + offs_l < size)[:, None] & mask_c[None, :]
        x_hat = (tl.load(src + offs_x, mask=mask, other=0.0).to(ACC) - mean) * rstd
        t = x_hat * gain[None, :] + offset[None, :]
        dt = _load_dt(t, dy_ptr, drop_ptr, at + offs_y, mask, ACT, ACC)
        sum_dt += dt
        sum_dtx += dt * x_hat
        if SUMS == 3:
            sum_x += tl.where(mask, x_hat, 0.0)
        src += BLOCK_L * width
        at += BLOCK_L * (C1 + C2)
    out = part_ptr + (n * chunks + chunk) * SUMS * (C1 + C2) + cols
    tl.store(out, tl.sum(sum_dt, axis=0), mask=mask_c)
    tl.store(out + C1 + C2, tl.sum(sum_dtx, axis=0), mask=mask_c)
    if SUMS == 3:
        tl.store(out + 2 * (C1 + C2), tl.sum(sum_x, axis=0), mask=mask_c)


@triton.jit
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
    src, width, c0, before = _source(x_ptr, x2_ptr, pid % blocks, C1, C2, BLOCK_C)
    dst, _, _, _ = _source(dx_ptr, dx2_ptr, pid % blocks, C1, C2, BLOCK_C)
    first = chunk * rows
    size = tl.minimum(L - first, rows)
    offs_l = tl.arange(0, BLOCK_L)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = c0 + offs_c < width
    cols = before + c0 + offs_c
    group = cols // group_width
    mean = _mean(mean_ptr, xb_ptr, n * groups + group, cols, mask_c, ACC)
    rstd = tl.load(rstd_ptr + n * groups + group, mask=mask_c, other=0.0)[None, :]
    m1 = tl.load(m_ptr + n * 2 * groups + group, mask=mask_c, other=0.0)[None, :]
    m2 = tl.load(m_ptr + (n * 2 + 1) * groups + group, mask=mask_c, other=0.0)[None, :]
    gain, offset = _affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    src += (n * L + first) * width + c0
    dst += (n * L + first) * width + c0
    at = (n * L + first) * (C1 + C2)
    offs_x = offs_l[:, None] * width + offs_c[None, :]
    offs_y = offs_l[:, None] * (C1 + C2) + cols[None, :]
    for start in tl.range(0, size, BLOCK_L, num_stages=STAGES):
        mask = (start + offs_l < size)[:, None] & mask_c[None, :]
        x_hat = (tl.load(src + offs_x, mask=mask, other=0.0).to(ACC) - mean) * rstd
        t = x_hat * gain[None, :] + offset[None, :]
        dt = _load_dt(t, dy_ptr, drop_ptr, at + offs_y, mask, ACT, ACC)
        dx = rstd * (dt * gain[None, :] - m1 - x_hat * m2)
        tl.store(dst + offs_x, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        src += BLOCK_L * width
        dst += BLOCK_L * width
        at += BLOCK_L * (C1 + C2)


@triton.jit
def _reduce_kernel(
    part_ptr, sums_ptr, m_ptr, w_ptr, scale_ptr, C, width, frames, stride_scale, chunks, total,
    SUMS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums (N, SUMS, C) of part (N, chunks, SUMS, C); a program takes ``width`` channels.

    For GroupNorm these are one group, and m (N, 2, groups) = Σ gain sums / total.
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
            gain, _ = _affine(
                w_ptr, None, scale_ptr, None, n // frames, stride_scale, 0, cols, mask_c, ACC
            )
            m1 += gain * sum_a
            m2 += gain * sum_b
    if m_ptr is not None:
        tl.store(m_ptr + n * 2 * pieces + piece, tl.sum(m1) / total)
        tl.store(m_ptr + (n * 2 + 1) * pieces + piece, tl.sum(m2) / total)


@triton.jit
def _dfilm_kernel(
    sums_ptr, w_ptr, b_ptr, dscale_ptr, dshift_ptr, C, frames,
    SUMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dscale = weight B + bias A and dshift = A (B, C), from the sums A, B (B*frames, SUMS, C)."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    batch = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    a = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    b = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for n0 in range(0, frames, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = (n < frames)[:, None] & mask_c[None, :]
        at = sums_ptr + (batch * frames + n)[:, None] * SUMS * C + cols[None, :]
        a += tl.load(at, mask=mask, other=0.0)
        b += tl.load(at + C, mask=mask, other=0.0)
    sum_a = tl.sum(a, axis=0)
    if dscale_ptr is not None:
        dscale = tl.sum(b, axis=0) * tl.load(w_ptr + cols, mask=mask_c, other=0.0).to(ACC)
        if b_ptr is not None:
            dscale += sum_a * tl.load(b_ptr + cols, mask=mask_c, other=0.0).to(ACC)
        out = dscale_ptr + batch * C + cols
        tl.store(out, dscale.to(dscale_ptr.dtype.element_ty), mask=mask_c)
    if dshift_ptr is not None:
        out = dshift_ptr + batch * C + cols
        tl.store(out, sum_a.to(dshift_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _dweight_kernel(
    sums_ptr, scale_ptr, dw_ptr, db_ptr, N, C, frames, stride_scale,
    SUMS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dweight = Σ_n (1 + scale) B and dbias = Σ_n (1 + scale) A, (C,), of the sums (N, SUMS, C)."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    a = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    b = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for n0 in range(0, N, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (n < N) & mask_c[None, :]
        at = sums_ptr + n * SUMS * C + cols[None, :]
        more_a = tl.load(at, mask=mask, other=0.0)
        more_b = tl.load(at + C, mask=mask, other=0.0)
        if scale_ptr is not None:
            at = scale_ptr + n // frames * stride_scale + cols[None, :]
            film = 1.0 + tl.load(at, mask=mask, other=0.0).to(ACC)
            more_a *= film
            more_b *= film
        a += more_a
        b += more_b
    tl.store(dw_ptr + cols, tl.sum(b, axis=0).to(dw_ptr.dtype.element_ty), mask=mask_c)
    if db_ptr is not None:
        tl.store(db_ptr + cols, tl.sum(a, axis=0).to(db_ptr.dtype.element_ty), mask=mask_c)


@triton.jit
def _dx_bias_kernel(
    sums_ptr, m_ptr, rstd_ptr, w_ptr, scale_ptr, dxb_ptr, N, L, C, group_width, groups, frames,
    stride_scale, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx_bias (C,) = Σ dx over all rows, from the sums (N, 3, C). The third is Σ_l x_hat for
    GroupNorm, with m (N, 2, groups); without m it is Σ_l dx itself."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = cols < C
    group = (cols // group_width)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for n0 in range(0, N, BLOCK_N):
        n = (n0 + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
        mask = (n < N) & mask_c[None, :]
        at = sums_ptr + n * 3 * C + cols[None, :]
        found = tl.load(at + 2 * C, mask=mask, other=0.0)
        if m_ptr is not None:
            gain = tl.load(w_ptr + cols, mask=mask_c, other=0.0).to(ACC)[None, :]
            if scale_ptr is not None:
                film = scale_ptr + n // frames * stride_scale + cols[None, :]
                gain = gain * (1.0 + tl.load(film, mask=mask, other=0.0).to(ACC))
            m1 = tl.load(m_ptr + n * 2 * groups + group, mask=mask, other=0.0)
            m2 = tl.load(m_ptr + (n * 2 + 1) * groups + group, mask=mask, other=0.0)
            rstd = tl.load(rstd_ptr + n * groups + group, mask=mask, other=0.0)
            found = rstd * (gain * tl.load(at, mask=mask, other=0.0) - L * m1 - found * m2)
        total += found
    tl.store(dxb_ptr + cols, tl.sum(total, axis=0).to(dxb_ptr.dtype.element_ty), mask=mask_c)


# --- RMSNorm and LayerNorm over the channels of one pixel -----------------------------------------


@triton.jit
def _row_norm(x, x2, mask, mask2, C, EPS: tl.constexpr, LAYER: tl.constexpr, TWO: tl.constexpr):
    """x_hat of the tiles x (BLOCK_L, BLOCK_C1) and x2; rstd and whether it varies, (BLOCK_L, 1).

    LayerNorm subtracts the mean twice: what the first rounding left of it is taken off, too.
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
        rstd = tl.sqrt(tl.cast(C, x.dtype)) / tl.maximum(norm, EPS)
        varies = norm >= EPS
    return x * rstd[:, None], x2 * rstd[:, None], rstd[:, None], varies[:, None]


@triton.jit
def _row_fwd_kernel(
    x_ptr, x2_ptr, y_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr, res_ptr, drop_ptr,
    L, C1, C2, stride_scale, stride_shift,
    LAYER: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C1: tl.constexpr, BLOCK_C2: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """BLOCK_L pixels of one video a program."""
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
    x = tl.load(x_ptr + at * C1 + offs_l * C1 + cols[None, :], mask=mask, other=0.0).to(ACC)
    if xb_ptr is not None:
        x += tl.load(xb_ptr + cols, mask=cols < C1, other=0.0).to(ACC)[None, :]
    x2 = x
    if TWO:
        x2 = tl.load(x2_ptr + at * C2 + offs_l * C2 + cols2[None, :], mask=mask2, other=0.0).to(ACC)
    x_hat, x_hat2, _, _ = _row_norm(x, x2, mask, mask2, C, EPS, LAYER, TWO)

    gain, offset = _affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols, cols < C1, ACC
    )
    t = x_hat * gain[None, :] + offset[None, :]
    offs = at * C + offs_l * C + cols[None, :]
    _store_act(t, y_ptr, res_ptr, drop_ptr, offs, mask, ACT, ACC)
    if TWO:
        cols2 += C1
        gain, offset = _affine(
            w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols2, cols2 < C,
            ACC,
        )  # fmt: skip
        t = x_hat2 * gain[None, :] + offset[None, :]
        offs = at * C + offs_l * C + cols2[None, :]
        _store_act(t, y_ptr, res_ptr, drop_ptr, offs, mask2, ACT, ACC)


@triton.jit
def _row_bwd_kernel(
    dy_ptr, x_ptr, x2_ptr, dx_ptr, dx2_ptr, part_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr,
    drop_ptr, L, C1, C2, stride_scale, stride_shift, rows, chunks,
    SUMS: tl.constexpr, LAYER: tl.constexpr, EPS: tl.constexpr, ACT: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C1: tl.constexpr, BLOCK_C2: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx of a chunk of pixels, and part (B, chunks, SUMS, C): its sums of dt, of dt x_hat and,
    third, of dx."""
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
    gain, offset = _affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, batch, stride_scale, stride_shift, cols, cols < C1, ACC
    )
    gain2, offset2 = gain, offset
    if TWO:
        gain2, offset2 = _affine(
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
    for start in tl.range(0, size, BLOCK_L, num_stages=STAGES):
        at = batch * L + first + start
        mask = (start + offs_l < size) & (cols < C1)[None, :]
        mask2 = (start + offs_l < size) & (cols2 < C2)[None, :]
        offs = at * C1 + offs_l * C1 + cols[None, :]
        offs2 = at * C2 + offs_l * C2 + cols2[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(ACC)
        if xb_ptr is not None:
            x += x_bias[None, :]
        x2 = x
        if TWO:
            x2 = tl.load(x2_ptr + offs2, mask=mask2, other=0.0).to(ACC)
        x_hat, x_hat2, rstd, varies = _row_norm(x, x2, mask, mask2, C, EPS, LAYER, TWO)

        offs_y = at * C + offs_l * C + cols[None, :]
        t = x_hat * gain[None, :] + offset[None, :]
        dt = _load_dt(t, dy_ptr, drop_ptr, offs_y, mask, ACT, ACC)
        du = dt * gain[None, :]
        dt2 = dt
        du2 = du
        dot = tl.sum(du * x_hat, axis=1)
        total = tl.sum(du, axis=1)
        if TWO:
            offs_y = at * C + C1 + offs_l * C + cols2[None, :]
            t = x_hat2 * gain2[None, :] + offset2[None, :]
            dt2 = _load_dt(t, dy_ptr, drop_ptr, offs_y, mask2, ACT, ACC)
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
            sum_dt += dt
            sum_dtx += tl.where(mask, dt * x_hat, 0.0)
            if TWO:
                sum_dt2 += dt2
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


# --- launchers ------------------------------------------------------------------------------------


def _numeric(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _extents(x: Tensor, x2: Tensor | None, per_frame: bool) -> tuple[int, int, int, int, int]:
    """(N, L, C1, C2, frames): N statistics, each over L pixels; ``frames`` of them a sample."""
    b, f, h, w, c1 = x.shape
    c2 = 0 if x2 is None else x2.shape[-1]
    return (b * f, h * w, c1, c2, f) if per_frame else (b, f * h * w, c1, c2, 1)


def _row_stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def _group_stats(
    x: Tensor,
    x2: Tensor | None,
    groups: int,
    per_frame: bool,
    eps: float,
    x_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    n, length, c1, c2, _ = _extents(x, x2, per_frame)
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
    block_k, block_c = _merge_tile(chunks, width)
    _merge_kernel[(n * groups,)](
        part, x_bias, mean, rstd, length, c1 + c2, width, groups, rows, chunks,
        EPS=eps, BLOCK_K=block_k, BLOCK_C=block_c, ACC=acc, num_warps=4,
    )  # fmt: skip
    return mean, rstd


def _merge_tile(rows: int, width: int) -> tuple[int, int]:
    block_c = min(64, next_power_of_2(width))
    return min(next_power_of_2(rows), 1024 // block_c), block_c


def norm_act_fwd(
    x: Tensor,
    x2: Tensor | None,
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
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd), the last two empty where they were given or there are none."""
    n, length, c1, c2, frames = _extents(x, x2, per_frame)
    acc = acc_dtype(x.dtype)
    y = x.new_empty((*x.shape[:-1], c1 + c2))
    none = x.new_empty(0, dtype=acc_torch_dtype(x.dtype))
    drop = _numeric(dropout_mask)
    strides = (_row_stride(scale), _row_stride(shift))
    if kind != GROUP:
        cfg = pick_row_config(c1, c2, x.element_size(), "fwd")
        _row_fwd_kernel[(n * cdiv(length, cfg.block_l),)](
            x, x2, y, x_bias, weight, bias, scale, shift, residual, drop, length, c1, c2, *strides,
            LAYER=kind == LAYER, EPS=eps, ACT=act, BLOCK_L=cfg.block_l,
            BLOCK_C1=next_power_of_2(c1), BLOCK_C2=next_power_of_2(max(c2, 1)), ACC=acc,
            num_warps=cfg.num_warps,
        )  # fmt: skip
        return y, none, torch.empty_like(none)
    found = (none, torch.empty_like(none))
    if mean is None:
        mean, rstd = found = _group_stats(x, x2, groups, per_frame, eps, x_bias)
    cfg = pick_config(c1, c2, x.element_size(), "fwd")
    blocks = cdiv(c1, cfg.block_c) + cdiv(c2, cfg.block_c)
    rows, chunks = split_for_map(x.device, n * blocks, length, cfg)
    _group_fwd_kernel[(n * chunks * blocks,)](
        x, x2, y, mean, rstd, x_bias, weight, bias, scale, shift, residual, drop, length, c1, c2,
        (c1 + c2) // groups, groups, frames, *strides, rows, chunks,
        ACT=act, BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c, ACC=acc, num_warps=cfg.num_warps,
    )  # fmt: skip
    return y, *found


def norm_act_bwd(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
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
    need_dweight: bool,
    need_dfilm: bool,
    x_bias: Tensor | None = None,
    need_dx_bias: bool = False,
) -> tuple[Tensor, ...]:
    """(dx, dx2, dweight, dbias, dscale, dshift, dx_bias), empty where the tensor is None or not
    wanted."""
    needs = (need_dx, need_dx, need_dweight, need_dweight, need_dfilm, need_dfilm, need_dx_bias)
    dx, dx2, dw, db, dscale, dshift, dxb = (
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip((x, x2, weight, bias, scale, shift, x_bias), needs)
    )
    n, length, c1, c2, frames = _extents(x, x2, per_frame)
    c, acc = c1 + c2, acc_dtype(x.dtype)
    drop = _numeric(dropout_mask)
    strides = (_row_stride(scale), _row_stride(shift))
    params = any(t is not None for t in (dw, dscale, dshift, dxb))
    count = 2 if dxb is None else 3  # sums of the rows, see the kernels
    m = None
    partials: dict[str, Any] = {"dtype": acc_torch_dtype(x.dtype), "device": x.device}

    if kind == GROUP:
        cfg = pick_config(c1, c2, x.element_size(), "bwd")
        blocks = cdiv(c1, cfg.block_c) + cdiv(c2, cfg.block_c)
        rows, chunks = split_for_sums(x.device, n * blocks, length, cfg)
        part = torch.empty((n, chunks, count, c), **partials)
        shared = (mean, rstd, x_bias, weight, bias, scale, shift, drop)
        counts = (length, c1, c2, c // groups, groups, frames, *strides)
        tile: dict[str, Any] = dict(
            ACT=act, BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c, ACC=acc, num_warps=cfg.num_warps
        )
        _group_bwd_sums_kernel[(n * chunks * blocks,)](
            dy, x, x2, part, *shared, *counts, rows, chunks, SUMS=count, **tile
        )
        if need_dx or dxb is not None:
            m = torch.empty((n, 2, groups), **partials)
        sums = _reduce(part, m, weight, scale, c // groups, frames, length * (c // groups), acc)
        if need_dx:
            rows, chunks = split_for_map(x.device, n * blocks, length, cfg)
            _group_bwd_dx_kernel[(n * chunks * blocks,)](
                dy, x, x2, dx, dx2, m, *shared, *counts, rows, chunks, **tile
            )
    else:
        cfg = pick_row_config(c1, c2, x.element_size(), "bwd")
        rows, chunks = split_for_sums(x.device, n, length, cfg)
        row_part = torch.empty((n, chunks, count, c), **partials) if params else None
        _row_bwd_kernel[(n * chunks,)](
            dy, x, x2, dx, dx2, row_part, x_bias, weight, bias, scale, shift, drop, length, c1, c2,
            *strides, rows, chunks,
            SUMS=count, LAYER=kind == LAYER, EPS=eps, ACT=act, BLOCK_L=cfg.block_l,
            BLOCK_C1=next_power_of_2(c1), BLOCK_C2=next_power_of_2(max(c2, 1)), ACC=acc,
            num_warps=cfg.num_warps,
        )  # fmt: skip
        sums = None
        if row_part is not None:
            sums = _reduce(row_part, None, weight, scale, 32, frames, 1, acc)

    block_c = min(32, next_power_of_2(c))
    if dscale is not None or dshift is not None:
        _dfilm_kernel[(x.shape[0] * cdiv(c, block_c),)](
            sums, weight, bias, dscale, dshift, c, frames, SUMS=count,
            BLOCK_N=min(32, next_power_of_2(frames)), BLOCK_C=block_c, ACC=acc, num_warps=4,
        )  # fmt: skip
    if dw is not None:
        _dweight_kernel[(cdiv(c, block_c),)](
            sums, scale, dw, db, n, c, frames, strides[0], SUMS=count,
            BLOCK_N=min(32, next_power_of_2(n)), BLOCK_C=block_c, ACC=acc, num_warps=4,
        )  # fmt: skip
    if dxb is not None:
        _dx_bias_kernel[(cdiv(c, block_c),)](
            sums, m, rstd, weight, scale, dxb, n, length, c, c // groups, groups, frames,
            strides[0], BLOCK_N=min(32, next_power_of_2(n)), BLOCK_C=block_c, ACC=acc, num_warps=4,
        )  # fmt: skip
    found = (dx, dx2, dw, db, dscale, dshift, dxb)
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
    block_k, block_c = _merge_tile(chunks, width)
    _reduce_kernel[(n * cdiv(c, width),)](
        part, sums, m, weight, scale, c, width, frames, _row_stride(scale), chunks, total,
        SUMS=count, BLOCK_K=block_k, BLOCK_C=block_c, ACC=acc, num_warps=4,
    )  # fmt: skip
    return sums


def aot_cases() -> list[AotCase]:
    """The kernels as the launchers start them: bf16 in both widths of tile, two unequal sources,
    fp32, and the widest row; with x_bias and its gradient where there is one source of bf16. The
    small kernels that reduce partials have one form."""
    found = _aot_small()
    for dtype, c1, c2 in (("bf16", 64, 0), ("bf16", 256, 0), ("bf16", 96, 48), ("fp32", 128, 0)):
        found += _aot_group(dtype, c1, c2)
    for dtype, c1, c2 in (
        ("bf16", 64, 0),
        ("bf16", 96, 48),
        ("fp32", 128, 0),
        ("bf16", MAX_ROW, 0),
    ):
        found += _aot_row(dtype, c1, c2)
    return found


_AOT_PARTIALS = ("part_ptr", "mean_ptr", "rstd_ptr", "m_ptr", "sums_ptr", "dw_ptr", "db_ptr")


def _aot(
    what: str, kernel: Any, dtype: str, channels: tuple[int, int], num_warps: int, **constexprs: Any
) -> AotCase:
    signature: dict[str, str] = {}
    divisible = []
    absent = [] if channels[1] else ["x2_ptr", "dx2_ptr"]
    absent += ["xb_ptr"] if _aot_sums(dtype, channels[1]) == 2 else []
    for arg in kernel.arg_names:
        if arg in constexprs:
            continue
        if arg in absent:
            constexprs[arg] = None
        elif arg.endswith("_ptr"):
            kind = "fp32" if arg in _AOT_PARTIALS else "u8" if arg == "drop_ptr" else dtype
            signature[arg] = f"*{kind}"
        else:
            signature[arg] = "i32"
            if arg in ("C", "C1", "C2", "stride_scale", "stride_shift"):
                divisible.append(arg)
    name = f"norm_act_{what}/{dtype}-{'+'.join(str(c) for c in channels if c)}"
    return AotCase(name, kernel, signature, constexprs, divisible, num_warps)


def _aot_small() -> list[AotCase]:
    block_k, block_c = _merge_tile(128, 64)
    merge = dict(BLOCK_K=block_k, BLOCK_C=block_c, ACC=tl.float32)
    last = dict(BLOCK_N=32, BLOCK_C=32, ACC=tl.float32)
    return [
        _aot("merge", _merge_kernel, "bf16", (64, 0), 4, EPS=1e-5, **merge),
        _aot("reduce", _reduce_kernel, "bf16", (64, 0), 4, SUMS=3, **merge),
        _aot("dfilm", _dfilm_kernel, "bf16", (64, 0), 4, SUMS=3, **last),
        _aot("dweight", _dweight_kernel, "bf16", (64, 0), 4, SUMS=3, **last),
        _aot("dx_bias", _dx_bias_kernel, "bf16", (64, 0), 4, **last),
    ]


def _aot_group(dtype: str, c1: int, c2: int) -> list[AotCase]:
    cfg = pick_config.analytic(c1, c2, 2, "bwd")
    tile = dict(BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c, ACC=tl.float32)
    kernels = {
        "group_fwd": _group_fwd_kernel,
        "group_bwd_sums": _group_bwd_sums_kernel,
        "group_bwd_dx": _group_bwd_dx_kernel,
    }
    channels, warps = (c1, c2), cfg.num_warps
    sums = {"group_bwd_sums": {"SUMS": _aot_sums(dtype, c2)}}
    return [_aot("stats", _stats_kernel, dtype, channels, warps, **tile)] + [
        _aot(what, kernel, dtype, channels, warps, ACT=True, **tile, **sums.get(what, {}))
        for what, kernel in kernels.items()
    ]


def _aot_sums(dtype: str, c2: int) -> int:
    """3 with x_bias."""
    return 2 if c2 or dtype != "bf16" else 3


def _aot_row(dtype: str, c1: int, c2: int) -> list[AotCase]:
    cfg = pick_row_config.analytic(c1, c2, 2, "bwd")
    tile = dict(
        ACT=True, BLOCK_L=cfg.block_l, BLOCK_C1=next_power_of_2(c1),
        BLOCK_C2=next_power_of_2(max(c2, 1)), ACC=tl.float32, EPS=1e-5,
    )  # fmt: skip
    sums = {"fwd": {}, "bwd": {"SUMS": _aot_sums(dtype, c2)}}
    return [
        _aot(
            f"{kind}_{what}", kernel, dtype, (c1, c2), cfg.num_warps, LAYER=layer, **tile,
            **sums[what],
        )
        for kind, layer in (("rms", False), ("layer", True))
        for what, kernel in (("fwd", _row_fwd_kernel), ("bwd", _row_bwd_kernel))
    ]  # fmt: skip

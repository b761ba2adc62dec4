"""GroupNorm: tiles, and the forward from complete or partial statistics.

``__init__.py`` has the mathematics and the names. Here N videos (B, or B*F frames) of L pixels are
normalised.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import (
    acc_dtype,
    at_least,
    cdiv,
    major,
    next_power_of_2,
    widened,
)
from fastvdm.kernels.norm_act.shared import (
    BY_GROUP,
    Config,
    affine,
    extents,
    in_powers_of_2,
    quotient,
    split_for_map,
    store_act,
    vector,
    vectors,
)
from fastvdm.kernels.tuned import tuned


@tuned("norm_act_group")
def pick_config(c1: int, c2: int, itemsize: int, kind: str) -> Config:
    """Tile of the GroupNorm kernels: 8 values per thread.
    ``itemsize`` and ``kind`` ("fwd", "sums" or "dx") distinguish measured tiles.

    The kernel that ends in a sum over pixels gives each warp its own 32 channels: Triton stores
    values that warps must add as [channel][warp], which has 4-way bank conflicts with two warps and
    16-way with four. The width is the one with the least padding of the two sources among widths
    that read at least 64 bytes in a row; the widest if equal. Analytic, NOT MEASURED: no GPU was at
    hand (November 2026).
    """
    top = min(32 if kind == "sums" else 64, next_power_of_2(max(c1, c2)))
    widths = [w for w in (64, 32, 16, 8, 4, 2, 1) if min(top, 32) <= w <= top]
    block_c = min(widths, key=lambda w: (cdiv(c1, w) + cdiv(c2, w)) * w)
    # Each thread loads a parameter vector shorter than the block by itself (Triton).
    num_warps = max(1, block_c // 32)
    return Config(block_c, 256 * num_warps // block_c, num_warps)


class Partials(NamedTuple):
    """Partial statistics: part (N, chunks, 2, groups) has the mean and M2 of ``rows`` pixels each;
    the last chunk has the remaining pixels."""

    part: Tensor
    rows: int
    chunks: int
    eps: float


@triton.jit
def merged(
    part_ptr, n, L, group_width, groups, group0, rows, chunks,
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """mean, without the x_bias of its first channel, and rstd (BLOCK_G,) of groups from ``group0``.

    Sums are of differences to the mean of the first BLOCK_K chunks. Only their square cancels, and
    it is small relative to the variance, whichever chunk has an outlier.
    """
    offs_k = tl.arange(0, BLOCK_K)[:, None]
    group = group0 + tl.arange(0, BLOCK_G)
    mask_g = group < groups
    part_ptr += n * chunks * 2 * groups + group
    shift = tl.load(part_ptr, mask=mask_g, other=0.0)
    part_ptr = part_ptr[None, :] + offs_k * 2 * groups
    mask = (offs_k < chunks) & mask_g[None, :]
    apart = tl.load(part_ptr, mask=mask, other=0.0) - shift[None, :]
    few = tl.minimum(chunks, BLOCK_K).to(ACC)
    shift += tl.sum(tl.where(mask, apart, 0.0), axis=0) / few
    first = tl.zeros((BLOCK_K, BLOCK_G), ACC)
    second = tl.zeros((BLOCK_K, BLOCK_G), ACC)
    for k0 in tl.range(0, chunks, BLOCK_K, num_stages=1):
        k = k0 + offs_k
        mask = (k < chunks) & mask_g[None, :]
        size = tl.minimum(L - k * rows, rows).to(ACC)
        apart = tl.load(part_ptr, mask=mask, other=0.0) - shift[None, :]
        sums = tl.where(mask, size * apart, 0.0)
        first += sums
        second += sums * apart * group_width + tl.load(part_ptr + groups, mask=mask, other=0.0)
        part_ptr += BLOCK_K * 2 * groups
    total = tl.cast(L, ACC)
    off = tl.sum(first, axis=0) / total
    var = tl.sum(second, axis=0) / (total * group_width) - off * off
    return shift + off, 1.0 / tl.sqrt(at_least(var, 0.0) + EPS)


@triton.jit
def mean_of_x(mean_ptr, xb_ptr, stride_bias, group, cols, mask, ACC: tl.constexpr):
    """The value to subtract from x, (1, BLOCK_C): the mean of x + x_bias, minus x_bias."""
    mean = tl.load(mean_ptr + group, mask=mask, other=0.0)
    mean -= vector(xb_ptr, stride_bias, 0, cols, mask, ACC)
    return mean[None, :]


@triton.jit
def source(x_ptr, x2_ptr, pid_c, C1, C2, BLOCK_C: tl.constexpr):
    """The tensor that contains block ``pid_c`` of the channels [x, x2]: its pointer, its width, the
    first channel of the block in it, and the number of channels before it."""
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
    x_ptr, x2_ptr, y_ptr, mean_ptr, rstd_ptr, part_ptr, xb_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr,
    res_ptr, drop_ptr, L, C1, C2, group_width, groups, frames, stride_scale, stride_shift,
    stride_bias, rows, chunks, part_rows, part_chunks,
    EPS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_G: tl.constexpr,
    ACT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y from x and its statistics, over a chunk of ``rows`` pixels of BLOCK_C channels. The
    programs of the first chunk store the statistics if they came in parts."""
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
    group0 = (before + c0) // group_width
    if part_ptr is not None:
        means, rstds = merged(
            part_ptr, n, L, group_width, groups, group0, part_rows, part_chunks,
            EPS, BLOCK_K, BLOCK_G, ACC,
        )  # fmt: skip
        here = group0 + tl.arange(0, BLOCK_G)
        starts = here * group_width
        writes = (chunk == 0) & (starts >= before + c0) & (starts < before + c0 + BLOCK_C)
        writes = writes & (starts < before + width)
        lead = vector(xb_ptr, stride_bias, 0, starts, here < groups, ACC)
        tl.store(mean_ptr + n * groups + here, means + lead, mask=writes)
        tl.store(rstd_ptr + n * groups + here, rstds, mask=writes)
    gain, offset = affine(
        w_ptr, b_ptr, scale_ptr, shift_ptr, n // frames, stride_scale, stride_shift, cols, mask_c,
        ACC,
    )  # fmt: skip
    gain, offset = in_powers_of_2(gain, offset, ACT)
    if part_ptr is not None:
        place = tl.minimum(quotient(cols, group_width) - group0, BLOCK_G - 1)
        rstd = tl.gather(rstds, place, 0)
        mean = tl.gather(means, place, 0)
        bias = vector(xb_ptr, stride_bias, 0, cols, mask_c, ACC)
        mean += tl.gather(lead, place, 0) - bias
        mean = mean[None, :]
    else:
        mean = mean_of_x(mean_ptr, xb_ptr, stride_bias, group, cols, mask_c, ACC)
        rstd = tl.load(rstd_ptr + group, mask=mask_c, other=0.0)
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


def _launch(
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
    params: tuple[Tensor | None, ...],
    groups: int,
    per_frame: bool,
    kind: str,
    split: Callable[[torch.device, int, int, Config], tuple[int, int]],
) -> tuple[int, tuple[Tensor | None, ...], tuple[int, ...], dict[str, Any]]:
    """(programs, the vectors from x_bias to shift, the integers from L to chunks, tile) of a kernel
    whose pixels are divided by ``split``."""
    n, length, c1, c2, frames = extents(x, x2, per_frame)
    cfg = pick_config(c1, c2, x.element_size(), kind)
    blocks = cdiv(c1, cfg.block_c) + cdiv(c2, cfg.block_c)
    rows, chunks = split(x.device, n * blocks, length, cfg)
    given, strides = vectors(x, x_bias, params)
    counts = (length, c1, c2, (c1 + c2) // groups, groups, frames, *strides, rows, chunks)
    tile: dict[str, Any] = dict(
        BLOCK_L=cfg.block_l, BLOCK_C=cfg.block_c, ACC=acc_dtype(x.dtype), num_warps=cfg.num_warps
    )
    return n * chunks * blocks, given, counts, tile


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
    parts: Partials | None = None,
) -> None:
    """y in one read and one write; ``params`` is (weight, bias, scale, shift). With ``parts`` mean
    and rstd are written, not read."""
    # The tiles of a program also share the merge of the parts.
    split = split_for_map if parts is None else partial(split_for_map, least=4)
    grid, given, counts, tile = _launch(
        x, x2, x_bias, params, mean.shape[1], per_frame, "fwd", split
    )
    part, part_rows, part_chunks, eps = (None, 0, 0, 0.0) if parts is None else parts
    block, width = tile["BLOCK_C"], counts[3]
    aligned = block % width == 0 or width % block == 0
    held = max(1, block // width) if aligned else cdiv(block, width) + 1  # groups in a block
    block_g = 1 if part is None else max(8, next_power_of_2(held))
    num_warps = tile["num_warps"]
    # More registers would cost every seventh warp. They are not bounded where that would spill.
    fits = part is not None and x.element_size() == 2 and num_warps == 2
    fits = fits and drop is None and major(x.device) >= 9
    _group_fwd_kernel[(grid,)](
        x, x2, y, mean, rstd, part, *given, residual, drop, *counts, part_rows,
        part_chunks, EPS=eps, BLOCK_K=max(1, 64 * num_warps // block_g), BLOCK_G=block_g, ACT=act,
        **tile, maxnreg=40 if fits else None,
    )  # fmt: skip

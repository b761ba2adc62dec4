"""y = LayerNorm_C(x) Wᵀ + b: the first half of a block too wide for ``temporal_block``.

    y = ((x - mean) rstd w + b_norm) Wᵀ + b

x (rows, C), W (N, C). A program takes BM rows and a share of the columns: it finds the statistics
of its rows once, one pass over them, and normalises each block of x between its load and the
product. The normalised x is never written: (rows*(C + N) + C*N)*e bytes, 2*rows*C*N FLOPs. There
are as many shares as fill the GPU; every share reads x again, from the L2 but for the first.

Backward: dxn = dy W and dW = dyᵀ xn by the library, dx by the kernel of ``norm_act``, which needs
x alone; xn is computed again only where W is trained.
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
    dot_x3,
    next_power_of_2,
    program_budget,
)
from fastvdm.kernels.limits import LAYER
from fastvdm.kernels.linear_tiles import (
    LinearConfig,
    product,
    row_block,
    tile_rows,
    weight_block,
)
from fastvdm.kernels.norm_act import norm_act_bwd, norm_act_fwd
from fastvdm.kernels.tuned import tuned


@tuned("norm_linear", rows=lambda n: min(1 << 17, next_power_of_2(n)))
def pick_config(
    rows: int, channels: int, features: int, x_itemsize: int, itemsize: int
) -> LinearConfig:
    """Tiles that spill in none but the calls that ``bench/aot.py`` names. NOT MEASURED.

    Normalising costs about ten instructions an element of x and tile of columns, so that tiles are
    wide; an fp32 x takes twice the shared memory, thus half the step.
    """
    if itemsize > 2:
        return LinearConfig(64, 64, 32, 8, 2)  # with 4 warps sm_80 spills
    if rows <= 64 * 64:
        return LinearConfig(64, 128, 64 if x_itemsize == 2 else 32, 4, 3)
    return LinearConfig(128, 128, 64 if x_itemsize == 2 else 32, 8, 3)


@triton.jit
def _statistics(
    x_ptr, row, C, EPS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """(shift, mean of x - shift, rstd) of each row; Chan's formula merges its blocks.

    The shift is the first value of the row. It lies within sqrt(C - 1) standard deviations of the
    mean (Samuelson 1968), so that no digit of x - mean is lost where mean >> std.
    """
    shift = tl.load(x_ptr + row * C).to(ACC)
    mean = tl.zeros([BM], ACC)
    m2 = tl.zeros([BM], ACC)
    for k in tl.range(0, C, BK):
        inside = (k + tl.arange(0, BK) < C)[None, :]
        x = row_block(x_ptr, row, k, C, BK).to(ACC)
        x = tl.where(inside, x - shift[:, None], 0.0)
        before = tl.cast(k, ACC)
        size = tl.cast(tl.minimum(C - k, BK), ACC)
        centre = tl.sum(x, 1) / size
        apart = tl.where(inside, x - centre[:, None], 0.0)
        step = centre - mean
        mean += step * (size / (before + size))
        m2 += tl.sum(apart * apart, 1) + step * step * (before * size / (before + size))
    return shift, mean, 1.0 / tl.sqrt(m2 / tl.cast(C, ACC) + EPS)


@triton.jit
def _norm_linear_kernel(
    x_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, y_ptr,
    rows, C, N, share, shares,
    EPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``share`` tiles of columns of BM rows."""
    pid = tl.program_id(0)
    first_row, row, exists = tile_rows(pid // shares, rows, BM)
    x_ptr += first_row * C
    y_ptr += first_row * N
    shift, mean, rstd = _statistics(x_ptr, row, C, EPS, BM, BK, ACC)
    first = pid % shares * share
    for tile in tl.range(first, tl.minimum(first + share, tl.cdiv(N, BN))):
        offs_n = tile * BN + tl.arange(0, BN)
        feature = tl.minimum(offs_n, N - 1)
        acc = tl.zeros([BM, BN], ACC)
        for k in tl.range(0, C, BK):
            offs_k = k + tl.arange(0, BK)
            x = row_block(x_ptr, row, k, C, BK).to(ACC)
            w = weight_block(weight_ptr, feature, k, C, BK)
            gain = tl.load(norm_weight_ptr + offs_k, mask=offs_k < C, other=0.0).to(ACC)
            x = ((x - shift[:, None]) - mean[:, None]) * rstd[:, None] * gain[None, :]
            if norm_bias_ptr is not None:
                offset = tl.load(norm_bias_ptr + offs_k, mask=offs_k < C, other=0.0).to(ACC)
                x += offset[None, :]
            acc = dot_x3(x.to(w.dtype), w, acc)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + feature).to(ACC)[None, :]
        at = y_ptr + row[:, None] * N + offs_n[None, :]
        mask = exists[:, None] & (offs_n < N)[None, :]
        tl.store(at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def _shares(config: LinearConfig, rows: int, features: int, budget: int) -> tuple[int, int]:
    """(tiles of columns a program, programs for each tile of rows)."""
    tiles = cdiv(features, config.BN)
    share = cdiv(tiles, min(tiles, cdiv(budget, cdiv(rows, config.BM))))
    return share, cdiv(tiles, share)


def norm_linear_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """As ``fastvdm::norm_linear_fwd``."""
    (features, channels), rows = weight.shape, x.numel() // x.shape[-1]
    y = torch.empty((*x.shape[:-1], features), dtype=weight.dtype, device=x.device)
    if y.numel() == 0:
        return y
    config = pick_config(rows, channels, features, x.element_size(), weight.element_size())
    share, shares = _shares(config, rows, features, program_budget(x.device))
    _norm_linear_kernel[(cdiv(rows, config.BM) * shares,)](
        *(x, norm_weight, norm_bias, weight, bias, y, rows, channels, features, share, shares),
        EPS=eps,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        ACC=acc_dtype(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def norm_linear_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    need_dx: bool,
    need_norm: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    """As ``fastvdm::norm_linear_bwd``."""
    flat, seeds = x.view(1, 1, 1, -1, x.shape[-1]), dy.view(-1, dy.shape[-1])

    def nothing() -> Tensor:  # each its own: outputs of an op may not alias
        return x.new_empty((0,))

    if dy.numel() == 0:
        wanted = (
            *((norm_weight, need_norm), (norm_bias, need_norm)),
            *((weight, need_weight), (bias, need_bias)),
        )
        zeros = [torch.zeros_like(t) if t is not None and n else nothing() for t, n in wanted]
        return (torch.empty_like(x) if need_dx else nothing(), *zeros)
    dx, dnorm_weight, dnorm_bias, dweight, dbias = (nothing() for _ in range(5))
    if need_dx or need_norm:
        dxn = product(seeds, weight).view(flat.shape)
        dx, _, _, dnorm_weight, dnorm_bias, *_ = norm_act_bwd(
            dxn, flat, None, None, norm_weight, norm_bias, None, None, None, None, None,
            LAYER, 1, False, eps, False, need_dx, False, need_norm, False,
        )  # fmt: skip
    if need_weight:
        xn, _, _ = norm_act_fwd(
            flat, None, None, norm_weight, norm_bias, None, None, None, None, None, None,
            LAYER, 1, False, eps, False,
        )  # fmt: skip
        dweight = product(seeds.t(), xn.view(-1, x.shape[-1]).to(weight.dtype))
    if need_bias and bias is not None:
        dbias = seeds.sum(0, dtype=acc_torch_dtype(x.dtype)).to(bias.dtype)
    return dx.view(x.shape) if need_dx else dx, dnorm_weight, dnorm_bias, dweight, dbias

"""y = x + o Wᵀ + b: the second half of an attention block that ``temporal_block`` cannot hold.

o (rows, K), W (N, K), x and y (rows, N); x may be wider than o, as under autocast. Bias and
residual are added to the fp32 accumulator, and y is rounded once. x is read once and y written
once; a library product followed by a sum would write, read twice and write again.
rows*(K + 2*N)*e + N*K*e bytes, 2*rows*K*N FLOPs. Backward: two products by the library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    dot_x3,
    major,
    next_power_of_2,
)
from fastvdm.kernels.tuned import tuned


@dataclass(frozen=True)
class LinearConfig:
    BM: int  # rows per tile
    BN: int  # features per tile
    BK: int  # depth of a step
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


@tuned("linear_residual", rows=lambda n: min(1 << 17, next_power_of_2(n)))
def pick_config(
    rows: int, depth: int, features: int, x_itemsize: int, itemsize: int, *, major: int
) -> LinearConfig:
    """Tiles that do not spill (``bench/aot.py``). NOT MEASURED.

    Tiles are smaller if large ones would leave multiprocessors without work. With 128 registers two
    large tiles share a multiprocessor of Hopper: one multiplies while the other adds and stores. On
    Blackwell they would spill. ``major`` is that of the compute capability; ``depth`` only
    distinguishes measured tiles.
    """
    if itemsize > 2:
        return LinearConfig(64, 64, 32, 4, 3)
    if cdiv(rows, 128) * cdiv(features, 128) < 128:
        return LinearConfig(64, 64, 64, 4, 4)
    return LinearConfig(128, 128, 64, 8, 3, 128 if major == 9 and x_itemsize == 2 else 255)


@triton.jit
def _linear_residual_kernel(
    x_ptr, o_ptr, weight_ptr, bias_ptr, y_ptr, rows, K, N, biases,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One tile. Tiles of the same rows are neighbours, so that o comes from the L2 cache."""
    columns = tl.cdiv(N, BN)
    pid = tl.program_id(0)
    first_row = (pid // columns).to(tl.int64) * BM  # rows * features exceeds 2^31
    left = tl.minimum(rows - first_row, BM).to(tl.int32)
    # Repeat the last row and feature beyond the end, so that only stores need a mask.
    offs_m, offs_n = tl.arange(0, BM), pid % columns * BN + tl.arange(0, BN)
    row, feature = tl.minimum(offs_m, left - 1), tl.minimum(offs_n, N - 1)
    o_ptr += first_row * K
    x_ptr += first_row * N
    y_ptr += first_row * N
    acc = tl.zeros([BM, BN], ACC)
    for k in tl.range(0, K, BK):
        offs_k = k + tl.arange(0, BK)
        o_at, w_at = row[:, None] * K + offs_k[None, :], feature[None, :] * K + offs_k[:, None]
        o = tl.load(o_ptr + o_at, mask=(offs_k < K)[None, :], other=0.0)
        w = tl.load(weight_ptr + w_at, mask=(offs_k < K)[:, None], other=0.0)
        acc = dot_x3(o, w, acc)
    acc += tl.load(bias_ptr + feature, mask=feature < biases, other=0.0).to(ACC)[None, :]
    at = row[:, None] * N + offs_n[None, :]
    mask = (offs_m < left)[:, None] & (offs_n < N)[None, :]
    acc += tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + at, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_residual_fwd(x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The launcher of ``fastvdm::linear_residual_fwd``."""
    features, depth = weight.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    rows = y.numel() // features
    sizes = (x.element_size(), weight.element_size())
    config = pick_config(rows, depth, features, *sizes, major=major(x.device))
    _linear_residual_kernel[(cdiv(rows, config.BM) * cdiv(features, config.BN),)](
        *(x, o, weight, weight if bias is None else bias, y, rows, depth, features),
        0 if bias is None else features,
        BM=config.BM,
        BN=config.BN,
        BK=config.BK,
        ACC=acc_dtype(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
    )
    return y


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right by the library, in their common dtype and without autocast."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


def linear_residual_bwd(
    dy: Tensor,
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_do: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher of ``fastvdm::linear_residual_bwd``."""
    do, dweight, dbias = (o.new_empty((0,)) for _ in range(3))
    seeds = dy.view(-1, dy.shape[-1])
    low = seeds.to(weight.dtype) if need_do or need_weight else seeds
    if need_do:
        do = _product(low, weight).view(o.shape)
    if need_weight:
        dweight = _product(low.t(), o.view(-1, o.shape[-1]))
    if need_bias and bias is not None:
        dbias = seeds.sum(0, dtype=acc_torch_dtype(dy.dtype)).to(bias.dtype)
    return do, dweight, dbias

"""The operations around a convolution of the library: weights folded for an upsampling before it,
bias and residual after it.

    bias_residual   y + bias + residual: 2 reads and a write. torch's two sums read 4 times and
                    write twice; the sum with the bias is not vectorised.
    fold_upsample_weight
                    the 3x3 weight after nearest x2 as a 4x4 one of stride 2: 25 Cin Cout e bytes in
                    one launch; torch's nine launches move twelve times as much. It is folded in
                    every forward, because no version counter shows that a weight is unchanged
                    (``.data`` has none), and comparing it means reading it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels.common import acc_dtype, cdiv, next_power_of_2

_VALUES = 4096  # values per program, 32 per thread, so that four 16-byte loads are in flight
_FOLDED = 32  # input and output channels per tile


@triton.jit(do_not_specialize=["rows", "residuals"])
def _bias_residual_kernel(
    y_ptr, bias_ptr, residual_ptr, out_ptr, rows, residuals, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    first = (pid // blocks).to(tl.int64) * BLOCK_R
    left = tl.minimum(rows - first, BLOCK_R).to(tl.int32)
    cols = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.arange(0, BLOCK_R)
    mask = (offs_r < left)[:, None] & (cols < C)[None, :]
    at = offs_r[:, None] * C + cols[None, :]
    y = tl.load(y_ptr + first * C + at, mask=mask, other=0.0).to(ACC)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(ACC)[None, :]
    mask_r = mask & (residuals > 0)
    y += tl.load(residual_ptr + first * C + at, mask=mask_r, other=0.0).to(ACC)
    tl.store(out_ptr + first * C + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def bias_residual_fwd(y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The launcher of ``fastvdm::bias_residual_fwd``."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return out
    c = y.shape[-1]
    block_c = min(64, next_power_of_2(c))  # whole cache lines in 16 bits; one tile for all widths
    block_r = _VALUES // block_c
    rows = y.numel() // c
    _bias_residual_kernel[(cdiv(rows, block_r) * cdiv(c, block_c),)](
        y, bias, y if residual is None else residual, out, rows, 0 if residual is None else rows, c,
        BLOCK_R=block_r, BLOCK_C=block_c, ACC=acc_dtype(y.dtype),
        num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["stride_o"])
def _fold_upsample_kernel(
    weight_ptr, out_ptr, cin, cout, stride_o, stride_i, stride_h, stride_w,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out (Cin, 4, 4, Cout) from weight (Cout, Cin, 3, 3) with any strides, one tile of channels.
    The taps along an axis are [w2, w1 + w2, w0 + w1, w0]."""
    blocks = tl.cdiv(cin, BLOCK)
    pid = tl.program_id(0)
    offs_o = pid // blocks * BLOCK + tl.arange(0, BLOCK)
    offs_i = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_o < cout)[:, None] & (offs_i < cin)[None, :]
    at = offs_o[:, None].to(tl.int64) * stride_o + offs_i[None, :] * stride_i
    out = out_ptr + offs_i[None, :].to(tl.int64) * 16 * cout + offs_o[:, None]
    for a in tl.static_range(4):
        row0 = _row(weight_ptr + at, 0, mask, stride_h, stride_w, a, ACC)
        row1 = _row(weight_ptr + at, 1, mask, stride_h, stride_w, a, ACC)
        row2 = _row(weight_ptr + at, 2, mask, stride_h, stride_w, a, ACC)
        for b in tl.static_range(4):
            folded = _tap(row0, row1, row2, b)
            tl.store(out + (4 * a + b) * cout, folded.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _row(
    at, column, mask, stride_h, stride_w, A: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """Tap A along the height, for one column of the weight."""
    at += column * stride_w
    if A == 0 or A == 1:
        found = tl.load(at + 2 * stride_h, mask=mask, other=0.0).to(ACC)
        if A == 1:
            found = tl.load(at + stride_h, mask=mask, other=0.0).to(ACC) + found
    else:
        found = tl.load(at, mask=mask, other=0.0).to(ACC)
        if A == 2:
            found += tl.load(at + stride_h, mask=mask, other=0.0).to(ACC)
    return found


@triton.jit
def _tap(w0, w1, w2, B: tl.constexpr):
    if B == 0:
        found = w2
    elif B == 1:
        found = w1 + w2
    elif B == 2:
        found = w0 + w1
    else:
        found = w0
    return found


def fold_upsample_weight_fwd(weight: Tensor) -> Tensor:
    """The launcher of ``fastvdm::fold_upsample_weight_fwd``."""
    cout, cin, _, _ = weight.shape
    out = torch.empty(
        (cin, cout, 4, 4), dtype=weight.dtype, device=weight.device,
        memory_format=torch.channels_last,
    )  # fmt: skip
    if out.numel() == 0:
        return out
    _fold_upsample_kernel[(cdiv(cin, _FOLDED) * cdiv(cout, _FOLDED),)](
        weight, out, cin, cout, *weight.stride(), BLOCK=_FOLDED, ACC=acc_dtype(weight.dtype),
        num_warps=4,
    )  # fmt: skip
    return out

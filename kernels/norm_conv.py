"""norm → FiLM → SiLU → conv in one launch: the norm in the prologue of the convolution.

    y = conv(SiLU(x gain + offset)) + bias + residual
    gain = rstd weight (1 + scale),  offset = (norm_bias - mean rstd weight) (1 + scale) + shift

The statistics are given, so x is read by the convolution alone and the normalised activation is
never written: 1R + 1W fewer than in two launches, for an arithmetic that every tap and tile of
outputs repeats. A small kernel folds statistics, affine and FiLM into gain and offset, (N, C) for N
videos, or frames when per frame; the convolution is that of ``space_conv``.

The activation is rounded to the dtype of x as ``norm_act`` would store it, so that both ways agree.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvdm.kernels import space_conv_library as library
from fastvdm.kernels.common import LOG2E, acc_dtype, cdiv, next_power_of_2
from fastvdm.kernels.space_conv import Prologue, conv


@triton.jit(do_not_specialize=["groups"], do_not_specialize_on_alignment=["group_width", "frames"])
def _fold_kernel(
    mean_ptr, rstd_ptr, w_ptr, b_ptr, scale_ptr, shift_ptr, gain_ptr, offset_ptr,
    C, group_width, groups, frames, stride_scale, stride_shift,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """gain and offset (N, C) of ``Prologue``; a program is BLOCK_C channels of one row."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    n = (pid // blocks).to(tl.int64)
    cols = pid % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = cols < C
    group = n * groups + cols // group_width
    gain = tl.load(rstd_ptr + group, mask=mask, other=0.0)
    gain *= tl.load(w_ptr + cols, mask=mask, other=0.0).to(ACC)
    offset = -gain * tl.load(mean_ptr + group, mask=mask, other=0.0)
    if b_ptr is not None:
        offset += tl.load(b_ptr + cols, mask=mask, other=0.0).to(ACC)
    batch = n // frames
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + batch * stride_scale + cols, mask=mask, other=0.0)
        gain *= 1.0 + scale.to(ACC)
        offset *= 1.0 + scale.to(ACC)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + batch * stride_shift + cols, mask=mask, other=0.0)
        offset += shift.to(ACC)
    if ACT:
        gain *= -LOG2E
        offset *= -LOG2E
    tl.store(gain_ptr + n * C + cols, gain, mask=mask)
    tl.store(offset_ptr + n * C + cols, offset, mask=mask)


def norm_conv_fwd(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    act: bool,
) -> Tensor:
    n, groups = mean.shape
    c = x.shape[-1]
    gain = torch.empty((n, c), dtype=mean.dtype, device=x.device)
    offset = torch.empty_like(gain)
    block_c = min(128, next_power_of_2(c))
    if n:
        _fold_kernel[(n * cdiv(c, block_c),)](
            mean, rstd, norm_weight, norm_bias, scale, shift, gain, offset, c, c // groups, groups,
            n // x.shape[0], *(0 if t is None else t.stride(0) for t in (scale, shift)),
            ACT=act, BLOCK_C=block_c, ACC=acc_dtype(x.dtype), num_warps=1,
        )  # fmt: skip
    return conv(
        x, None, weight, bias, residual, stride=1, pad=library.padding_of(weight.shape[-1]),
        transposed=False, out_axis=0, size=(x.shape[2], x.shape[3]),
        prologue=Prologue(gain, offset, act),
    )[0]  # fmt: skip

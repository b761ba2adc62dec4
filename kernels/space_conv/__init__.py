"""Implicit-GEMM convolution of every frame, with bias, residual and GroupNorm partials.

    y[n, oh, ow, :] = sum_taps W[tap] x[n, ih(oh, tap), iw(ow, tap), :] + bias + residual

One kernel does four jobs, selected by two flags; no im2col, no concatenation, no flipped weight:

- gather (TRANSPOSED=False): ih = S*i + tap - PAD. The forward convolution, and the dgrad of the
  transposed one.
- scatter, seen from the output (TRANSPOSED=True): output rows with equal oh mod S form a phase;
  phase a reads ih = i + (a + PAD - tap) / S for tap = (a + PAD) mod S, + S, ... The dgrad of a
  convolution (S = 1: one phase), the forward of the transposed one and of the folded upsampling.

x, x2 are (N, H, W, C) with N = B*F; weights have any strides, preferably channels-last, and are
read as (out, k) tiles. GEMM: acc[BLOCK_CO, BLOCK_P] = W_tile X_tile^T in fp32 (fp64 for fp64). In
this order both operands come from shared memory on sm_90, wgmma's SS form. FLOPs
2*N*Ho*Wo*Cin*Cout*taps; least bytes x + y + W.

Descriptors (sm_90 and later): a box has unit stride and reads 0 outside the image, which is the
padding. For stride 2, rows and columns are split by parity, which for even extents is a view,
(N, H/2, 2, W/2, 2 C): tap t reads a unit-stride box of parity (t + PAD) mod 2. A step of channels
must not run from one parity into the next, so C is a multiple of the step. Odd extents use
pointers.

Statistics: each tile of pixels writes mean and M2 per channel of the values it stored; a second
kernel merges them by Chan, Golub & LeVeque 1979. No atomics: two runs give the same bits.

Saved for backward: the inputs. dgrad is this kernel; wgrad is the library's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fastvdm.kernels import space_conv_library as library
from fastvdm.kernels.common import acc_dtype, acc_torch_dtype, cdiv
from fastvdm.kernels.space_conv.descriptors import (
    _conv_tma_kernel,
    _input_descriptor,
    _is_rows_of_taps,
    _weight_descriptor,
    weight_step,
)
from fastvdm.kernels.space_conv.pointers import _conv_kernel
from fastvdm.kernels.space_conv.shared import ConvConfig, pick_config, why_not_tma
from fastvdm.kernels.space_conv.stats import _merge_stats_kernel, merge_tile
from fastvdm.runtime.device import facts


def conv(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: int,
    pad: int,
    transposed: bool,
    out_axis: int,
    size: tuple[int, int],
    unit_images: int = 0,
) -> tuple[Tensor, Tensor | None, ConvConfig]:
    """One launch. x is (B, F, H, W, C), weight 4-D with its output channels on ``out_axis``, size
    the output's H and W. ``unit_images`` > 0: it also returns partials (units * tiles, 2, Cout).
    """
    batch, frames, height, width, c1 = x.shape
    c2 = 0 if x2 is None else x2.shape[-1]
    cout, kernel = weight.shape[out_axis], weight.shape[-1]
    x = x.contiguous()
    x2 = None if x2 is None else x2.contiguous()
    residual = None if residual is None else residual.contiguous()
    phases = stride if transposed else 1
    grid = (cdiv(size[0], phases), cdiv(size[1], phases))
    widths = (c1, cout) if x2 is None else (c1, c2, cout)
    by_parity = stride == 2 and not transposed
    tma = facts(x.device).capability >= 90 and not (
        why_not_tma(widths, grid, (height, width), by_parity, x.element_size())
        or any(t is not None and t.data_ptr() % 16 for t in (x, x2))
    )
    config = pick_config(widths, grid, x.element_size(), tma)
    if config.tma and by_parity:
        config = replace(config, block_k=math.gcd(config.block_k, *widths[:-1]))
    if config.tma and not _is_rows_of_taps(weight):  # a copy is also aligned
        weight = weight.clone(memory_format=torch.channels_last)
    first, second = (weight, None)
    if x2 is not None:
        first, second = weight.narrow(1 - out_axis, 0, c1), weight.narrow(1 - out_axis, c1, c2)
    images = batch * frames
    y = torch.empty((batch, frames, *size, cout), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, None, config
    units = images // unit_images if unit_images else 1
    if config.tma:
        tiles = (images // units) * cdiv(grid[0], config.box_h) * cdiv(grid[1], config.box_w)
    else:
        tiles = cdiv(images // units * grid[0] * grid[1], config.block_p)
    partial = None
    if unit_images:
        acc = acc_torch_dtype(x.dtype)
        partial = torch.empty((units * tiles, 2, cout), dtype=acc, device=x.device)
    programs = units * tiles * phases * phases * cdiv(cout, config.block_co)
    flags = dict(
        K=kernel, S=stride, PAD=pad, TRANSPOSED=transposed, HAS_X2=x2 is not None,
        HAS_BIAS=bias is not None, HAS_RES=residual is not None, STATS=partial is not None,
        BLOCK_CO=config.block_co, BLOCK_K=config.block_k, ACC=acc_dtype(x.dtype),
        num_warps=config.num_warps,
    )  # fmt: skip
    if config.tma:
        box = (config.box_h, config.box_w, config.block_k)
        sources = [None if t is None else _input_descriptor(t, *box, by_parity) for t in (x, x2)]
        weights = [
            None if w is None else _weight_descriptor(w, out_axis, config.block_co, config.block_k)
            for w in (first, second)
        ]
        _conv_tma_kernel[(programs,)](
            *sources, *weights, bias, residual, y, partial, c1, c2, weight_step(weight), *size,
            cout, *grid,
            WEIGHT_K_FIRST=out_axis == 1, BOX_H=config.box_h, BOX_W=config.box_w,
            NUM_STAGES=config.num_stages, **flags,
        )  # fmt: skip
    else:
        strides = weight.stride()
        _conv_kernel[(programs,)](
            x, x2, first, second, bias, residual, y, partial, height, width, c1, c2, *size, cout,
            *grid, images // units * grid[0] * grid[1], tiles, strides[out_axis],
            strides[1 - out_axis], strides[2], strides[3], BLOCK_P=config.block_p,
            num_stages=config.num_stages, **flags,
        )  # fmt: skip
    return y, partial, config


def _out_size(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int]:
    kernel = weight.shape[-1]
    slack = 2 * library.padding_of(kernel) - kernel
    return (x.shape[2] + slack) // stride + 1, (x.shape[3] + slack) // stride + 1


def space_conv_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
) -> Tensor:
    return conv(
        x, x2, weight, bias, residual, stride=stride, pad=library.padding_of(weight.shape[-1]),
        transposed=False, out_axis=0, size=_out_size(x, weight, stride),
    )[0]  # fmt: skip


def space_conv_stats_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    groups: int,
    per_frame: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames = x.shape[:2]
    y, partial, config = conv(
        x, x2, weight, bias, residual, stride=stride, pad=library.padding_of(weight.shape[-1]),
        transposed=False, out_axis=0, size=_out_size(x, weight, stride),
        unit_images=1 if per_frame else frames,
    )  # fmt: skip
    units = batch * frames if per_frame else batch
    acc = acc_torch_dtype(x.dtype)
    mean = torch.empty((units, groups), dtype=acc, device=x.device)
    rstd = torch.empty_like(mean)
    if partial is None:  # no pixels, no statistics
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    cout = weight.shape[0]
    # A tile of the pointer variant is a run of pixels: a box one row high.
    grid, box = tuple(y.shape[2:4]), (config.box_h, config.box_w)
    if not config.tma:
        grid, box = (1, y[0, 0, ..., 0].numel() * (1 if per_frame else frames)), (1, config.block_p)
    _merge_stats_kernel[(units * groups,)](
        partial, mean, rstd, partial.shape[0] // units, cout, groups, *grid, eps,
        BOX_H=box[0], BOX_W=box[1], GROUP_WIDTH=cout // groups,
        **merge_tile(cout // groups), ACC=acc_dtype(x.dtype),
    )  # fmt: skip
    return y, mean, rstd


def space_conv_bwd(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    stride: int,
    need_dx: bool,
    need_dx2: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dx2 by the same kernel, each with its slice of the weight; dw by the library."""
    _, _, dw, db = library.space_conv_bwd(dy, x, x2, weight, stride, False, False, need_dw, need_db)
    grads = []
    start = 0
    for source, needed in ((x, need_dx), (x2, need_dx2)):
        if source is None or not needed:
            grads.append(dy.new_empty(0))
        else:
            grads.append(
                conv(
                    dy, None, weight.narrow(1, start, source.shape[-1]), None, None, stride=stride,
                    pad=library.padding_of(weight.shape[-1]), transposed=True, out_axis=1,
                    size=(source.shape[2], source.shape[3]),
                )[0]
            )  # fmt: skip
        start += 0 if source is None else source.shape[-1]
    return grads[0], grads[1], dw, db


def space_conv_transpose_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    size = (2 * x.shape[2], 2 * x.shape[3])
    return conv(
        x, None, weight, bias, residual, stride=2, pad=1, transposed=True, out_axis=1, size=size
    )[0]


def space_conv_transpose_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, dw, db = library.space_conv_transpose_bwd(dy, x, weight, False, need_dw, need_db)
    if not need_dx:
        return dy.new_empty(0), dw, db
    dx, _, _ = conv(
        dy, None, weight, None, None, stride=2, pad=1, transposed=False, out_axis=0,
        size=(x.shape[2], x.shape[3]),
    )  # fmt: skip
    return dx, dw, db

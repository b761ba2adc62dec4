"""``norm_conv``: the other order, norm → FiLM → SiLU → conv, with the producer's statistics.

    y = conv(SiLU((norm(x) norm_weight + norm_bias) (1 + scale) + shift), weight) + bias + residual

In one launch the normalised activation is never in memory, neither written for the convolution nor
kept for the backward, which makes it again with ``norm_act`` where weight gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvdm.kernels.limits import GROUP
from fastvdm.ops import space_conv as conv_ops
from fastvdm.ops._call import autocast_dtype, check_tensors, run, select
from fastvdm.ops._cost import flops
from fastvdm.ops._op import autograd, op
from fastvdm.ops.norm_act import check_stats, norm_act, norm_act_bwd, norm_act_fwd
from fastvdm.ops.space_conv import check_conv, space_conv, space_conv_bwd
from fastvdm.runtime.dispatch import ByDesign, Implementations, implementations


@op("norm_conv", strided="scale shift weight")
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
    backend: str,
) -> Tensor:
    """y (B, F, H, W, Cout) of contiguous inputs, in the dtype of x, weight, bias and residual. The
    rows of scale and shift may lie further apart than C."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _save(ctx, inputs, output):
    *tensors, weight, _bias, _residual, ctx.act, ctx.backend = inputs
    ctx.save_for_backward(*tensors, weight)


def _backward(ctx, dy):
    x, mean, rstd, norm_weight, norm_bias, scale, shift, weight = ctx.saved_tensors
    need = ctx.needs_input_grad
    need_dx, need_dw, need_db, need_dres = need[0], need[7], need[8], need[9]
    need_dnorm, need_dfilm = need[3] or need[4], need[5] or need[6]
    need_dh = need_dx or need_dnorm or need_dfilm
    per_frame = mean.shape[0] != x.shape[0]
    settings = (GROUP, mean.shape[1], per_frame, 0.0, ctx.act)  # eps is in rstd
    affine = (norm_weight, norm_bias, scale, shift)
    dy = dy.contiguous()
    h = x  # stands for its shape where the weight is frozen
    if need_dw:
        stats = (None, None, mean, rstd)
        h = run(norm_act_fwd, x, None, None, *affine, *stats, *settings, ctx.backend)[0]
    flags = (need_dh, False, need_dw, need_db)
    dh, _, dw, db = run(space_conv_bwd, dy, h, None, weight, 1, *flags, ctx.backend)
    dx = dnw = dnb = dscale = dshift = None
    if need_dh:
        dx, _, _, dnw, dnb, dscale, dshift = run(
            norm_act_bwd, dh, x, None, None, *affine, None, mean, rstd, *settings, need_dx, False,
            need_dnorm, need_dfilm, ctx.backend,
        )  # fmt: skip
    found = (dx, None, None, dnw, dnb, dscale, dshift, dw, db, dy if need_dres else None)
    return (*(g if n else None for g, n in zip(found, need)), None, None)


autograd(norm_conv_fwd, _backward, setup_context=_save)


@implementations(
    "norm_conv", "norm_conv_fwd", backends=("triton",),
    examples=lambda device: {"fp32": (torch.empty(1, 1, 1, 1, 8, device=device), 3)},
)  # fmt: skip
def _(x: Tensor, kernel: int) -> Implementations:
    if autocast_dtype(x) != x.dtype:
        yield "triton", ByDesign("autocast gives the convolution another type than the norm")
    else:
        yield "triton", conv_ops.by_triton(x, kernel, x.dtype)
    yield "parts", None


def norm_conv(
    x: Tensor,
    stats: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    per_frame: bool = False,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    residual: Tensor | None = None,
) -> Tensor:
    """y = conv(SiLU((norm(x) norm_weight + norm_bias) (1 + scale) + shift)) + bias + residual.

    Args:
        x: (B, F, H, W, C).
        stats: (mean, rstd) of x, each (B, groups), or (B*F, groups) ``per_frame``, as
            ``space_conv_stats`` gives them. Differentiated as functions of x.
        eps: what is in that rstd.
        norm_weight, norm_bias: (C,), of any floating dtype. scale, shift: FiLM, (B, C).
        weight: (Cout, C, k, k), k odd; stride 1. bias: (Cout,).
        act: SiLU or nothing.
        residual: (B, F, H, W, Cout).

    Returns:
        (B, F, H, W, Cout), contiguous, in x's dtype (autocast's where it is on).

    Raises:
        ValueError, TypeError: as ``norm_act`` and ``space_conv``.
    """
    check_conv(x, None, weight, bias, 1, residual)
    if len(stats) != 2 or getattr(stats[0], "ndim", 0) != 2:
        raise ValueError("stats must be (mean, rstd), each (B, groups)")
    groups, c = stats[0].shape[1], x.shape[-1]
    if groups < 1 or c % groups:
        raise ValueError(f"groups must divide the {c} channels, got {groups}")
    check_stats(x, stats, groups, per_frame)
    film = (x.shape[0], c)
    check_tensors(
        x, ("norm_weight", norm_weight, (c,)), ("norm_bias", norm_bias, (c,)),
        ("scale", scale, film), ("shift", shift, film),
    )  # fmt: skip
    which = select("norm_conv", x.device, x, weight.shape[-1]) if x.shape[0] else "parts"
    if which != "triton":
        h = norm_act(
            x, norm_weight, norm_bias, kind="group", groups=groups, per_frame=per_frame,
            eps=eps, scale=scale, shift=shift, act=act, stats=stats,
        )  # fmt: skip
        return space_conv(h, weight, bias, residual=residual)
    x, weight, bias, residual = conv_ops.cast(x, weight, bias, residual)
    if scale is not None and scale.stride(1) != 1:
        scale = scale.contiguous()
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    return run(
        norm_conv_fwd, x, stats[0], stats[1], norm_weight,
        norm_bias, scale, shift, weight, bias, residual, act, which,
    )  # fmt: skip


@flops(norm_conv_fwd)
def _(*, x, weight, **_):
    return conv_ops.space_conv_cost(x, weight)

"""``norm_conv``: the other order, norm → FiLM → SiLU → conv, with the producer's statistics.

    y = conv(SiLU((norm(x) norm_weight + norm_bias) (1 + scale) + shift), weight) + bias + residual

In one launch the normalised activation is never in memory, neither written for the convolution nor
kept for the backward, which makes it again with ``norm_act`` where weight gradients are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvdm.ops import norm_act as norm_ops
from fastvdm.ops import space_conv as conv_ops
from fastvdm.ops._cost import flops
from fastvdm.ops._op import autograd, define, fake
from fastvdm.ops.norm_act import norm_act, norm_act_bwd, norm_act_fwd
from fastvdm.ops.space_conv import space_conv, space_conv_bwd
from fastvdm.runtime import dispatch

_STEM = "norm_conv"
_GROUP = norm_ops.KINDS["group"]


@define
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
    return dispatch.launchers(_STEM, backend).norm_conv_fwd(
        x, mean, rstd, norm_weight, norm_bias, scale, shift, weight, bias, residual, act
    )


@fake(norm_conv_fwd)
def _(x, mean, rstd, norm_weight, norm_bias, scale, shift, weight, bias, residual, act, backend):
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
    settings = (_GROUP, mean.shape[1], per_frame, 0.0, ctx.act)  # eps is in rstd
    affine = (norm_weight, norm_bias, scale, shift)
    dy = dy.contiguous()
    h = x  # stands for its shape where the weight is frozen
    if need_dw:
        h = norm_act_fwd(x, None, *affine, None, None, mean, rstd, *settings, ctx.backend)[0]
    dh, _, dw, db = space_conv_bwd(
        dy, h, None, weight, 1, need_dh, False, need_dw, need_db, ctx.backend
    )
    dx = dnw = dnb = dscale = dshift = None
    if need_dh:
        dx, _, dnw, dnb, dscale, dshift, _ = norm_act_bwd(
            dh, x, None, *affine, None, mean, rstd, *settings, need_dx, need_dnorm, need_dfilm,
            ctx.backend,
        )  # fmt: skip
    found = (dx, None, None, dnw, dnb, dscale, dshift, dw, db, dy if need_dres else None)
    return (*(g if n else None for g, n in zip(found, need)), None, None)


autograd(norm_conv_fwd, _backward, setup_context=_save)


dispatch.register(
    "norm_conv", _STEM, ("norm_conv_fwd",), conv_ops.unsupported, backends=("triton",)
)


def takes_prologue(x: Tensor) -> bool:
    """Whether norm and convolution are one launch for an input like ``x``. Two where autocast gives
    the convolution another type than the norm.

    | device | choice    | why                                                                     |
    |--------|-----------|-------------------------------------------------------------------------|
    | cuda   | two ops   | NOT MEASURED: has not run on a GPU, so it is taken only by name         |
    |        |           | (FASTVDM_BACKEND=triton)                                                |
    | cpu    | two ops   | oneDNN has no such prologue                                             |
    """
    if dispatch.autocast_dtype(x) != x.dtype:
        return False
    return conv_ops.choose_conv("conv", x.shape[-1], x.device.type, x.dtype) == "triton"


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
    groups, c = stats[0].shape[-1], x.shape[-1]
    backend = "reference"
    if takes_prologue(x) and x.ndim == 5 and x.shape[0] > 0:
        conv_ops.check_conv(x, None, weight, bias, 1, residual, None)
        if groups < 1 or c % groups:
            raise ValueError(f"groups must divide the {c} channels, got {groups}")
        norm_ops.check_stats(x, stats, groups, per_frame)
        vectors = dict(norm_weight=norm_weight, norm_bias=norm_bias, scale=scale, shift=shift)
        for name, t in vectors.items():
            norm_ops.expect(name, t, (c,) if "norm" in name else (x.shape[0], c), x.device)
            if t is not None and not t.is_floating_point():
                raise TypeError(f"{name} must be floating, got {t.dtype}")
        backend = dispatch.select("norm_conv", x.device, x, weight)
    if backend == "reference":
        h = norm_act(
            x, norm_weight, norm_bias, kind="group", groups=groups, per_frame=per_frame,
            eps=eps, scale=scale, shift=shift, act=act, stats=stats,
        )  # fmt: skip
        return space_conv(h, weight, bias, residual=residual)
    x, weight, bias, residual = conv_ops.cast(x, weight, bias, residual)
    mean, rstd, norm_bias, bias, residual = (
        None if t is None else t.contiguous() for t in (*stats, norm_bias, bias, residual)
    )
    scale, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    return norm_conv_fwd(
        x.contiguous(), mean, rstd, norm_weight.contiguous(), norm_bias, scale, shift, weight, bias,
        residual, act, backend,
    )  # fmt: skip


@flops(norm_conv_fwd)
def _(*, x, weight, **_):
    return conv_ops.space_conv_cost(x, weight)

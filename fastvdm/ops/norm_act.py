"""``norm_act``: a norm and the elementwise operations after it, as they follow a convolution.

    z = norm([x + x_bias, x2]) * weight + bias  the statistics are over channels, or a group
    y = SiLU(z * (1 + scale) + shift) * dropout_mask + residual

It reads once and writes once if the statistics are given; otherwise it reads twice. The backward
recomputes the normalised activation; saved are x and, for groups, the mean and 1/std. x_bias is the
bias of the convolution that computed x, if that would need an extra pass to add it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvdm.kernels.limits import MAX_ROW_CHANNELS, NORM_KINDS
from fastvdm.ops._call import FLOATS, check_tensors, run, select
from fastvdm.ops._check import check_video
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.runtime.dispatch import FP64, Implementations, implementations

_MASKS = (*FLOATS, torch.bool, torch.uint8)


def _channels(x: Tensor, x2: Tensor | None) -> int:
    return x.shape[-1] + (0 if x2 is None else x2.shape[-1])


def _stats_shape(x: Tensor, kind: int, groups: int, per_frame: bool) -> tuple[int, ...]:
    if kind != NORM_KINDS["group"]:
        return (0,)
    return (x.shape[0] * (x.shape[1] if per_frame else 1), groups)


@op(
    "norm_act",
    outputs="y mean rstd",
    backward="dy x x2 x_bias weight bias scale shift dropout_mask mean rstd kind groups per_frame "
    "eps act",
    grads="x:dx x2:dx x_bias:dx_bias weight:dweight bias:dweight scale:dfilm shift:dfilm",
    residual="residual",
    strided="scale shift",
)
def norm_act_fwd(
    x: Tensor,
    x2: Tensor | None,
    x_bias: Tensor | None,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd). The inputs are contiguous; only the rows of scale and shift may have a
    stride above C, as halves of one (B, 2C) projection have. y is (B, F, H, W, C1 + C2) in the
    dtype of x. mean and rstd are (N, groups) in fp32 (fp64 for fp64), N = B*F per frame, else B;
    they are (0,) if the kind is not "group" or statistics were given. "cpu" takes no x_bias (C,).
    """
    stats = (0,) if mean is not None else _stats_shape(x, kind, groups, per_frame)
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty((*x.shape[:-1], _channels(x, x2)))
    return y, x.new_empty(stats, dtype=acc), x.new_empty(stats, dtype=acc)


norm_act_bwd = backward_of(norm_act_fwd)


def _examples(device: torch.device) -> dict[str, tuple]:
    return {kind: (torch.empty(1, device=device), kind, 64) for kind in NORM_KINDS}


@implementations("norm_act", "norm_act_fwd", "norm_act_bwd", examples=_examples)
def _(x: Tensor, kind: str, channels: int) -> Implementations:
    fp64 = x.dtype == torch.float64
    yield "cpu", FP64 if fp64 else None
    if kind != "group" and channels > MAX_ROW_CHANNELS:
        held = f"a row-wise kernel holds at most {MAX_ROW_CHANNELS} of one pixel"
        yield "triton", f"{channels} channels: {held}"
    else:
        yield "triton", None


def check_stats(x: Tensor, stats: Sequence[Tensor], groups: int, per_frame: bool) -> None:
    if len(stats) != 2 or any(t is None for t in stats):
        raise ValueError("stats must be (mean, rstd)")
    shape = _stats_shape(x, NORM_KINDS["group"], groups, per_frame)
    acc = (torch.promote_types(x.dtype, torch.float32),)
    check_tensors(x, ("mean", stats[0], shape), ("rstd", stats[1], shape), dtypes=acc)


def norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    groups: int = 1,
    per_frame: bool = False,
    eps: float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    residual: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    x2: Tensor | None = None,
    stats: Sequence[Tensor] | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """y = SiLU((norm(x + x_bias) weight + bias) (1 + scale) + shift) dropout_mask + residual.

    Args:
        x: (B, F, H, W, C), any strides (kernels copy a non-contiguous x); B may be 0.
        weight: (C,), or (C + C2,) with ``x2``; any floating dtype.
        bias: shaped like ``weight``, or None; any floating dtype.
        kind: "group": GroupNorm, biased variance over (C/groups, F, H, W) of each video, or over
            (C/groups, H, W) with ``per_frame``. "rms": x / max(||x||₂, eps) √C over channels.
            "layer": LayerNorm over channels.
        groups: number of groups, for "group" only.
        per_frame: see ``kind``; for "group" only.
        eps: default 1e-5; 1e-12 for "rms".
        scale: (B, C) scale of FiLM, or None.
        shift: (B, C) shift of FiLM, or None.
        act: whether to apply SiLU.
        residual: (B, F, H, W, C), in the dtype of x.
        dropout_mask: (B, F, H, W, C), bool or floating. It is a plain factor, so the caller divides
            by the keep probability. It gets no gradient.
        x2: (B, F, H, W, C2): the norm acts on the channels of x followed by those of x2.
        stats: (mean, rstd), each (B, groups), or (B*F, groups) per frame, in fp32 (fp64 for fp64):
            the statistics of x + x_bias, if their producer has them, or those of a larger video of
            which x is a part. They are differentiated as functions of x.
        x_bias: (C,), any floating dtype, added to x before the norm, in the accumulator's dtype and
            in the same passes; not with ``x2``. The C++ backend adds it in an extra pass in fp32,
            because on a CPU convolutions add their biases themselves.

    Returns:
        (B, F, H, W, C + C2) in the dtype of x.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """
    if getattr(x, "ndim", 0) != 5:
        check_video(x)
    if kind not in NORM_KINDS:
        raise ValueError(f'kind must be "group", "rms" or "layer", got {kind!r}')
    b, *extents, c = x.shape
    video = (b, *extents)
    if x2 is not None:
        if x_bias is not None:
            raise ValueError("x_bias is for one source: give x2 or x_bias")
        check_video(x2, "x2")
        check_tensors(x, ("x2", x2, (*video, x2.shape[-1])), same=("x2",))
        c, x2 = c + x2.shape[-1], x2.to(x.dtype)
    if min(*extents, c) < 1:
        raise ValueError(f"x must not be empty but for the batch, got {tuple(x.shape)}")
    check_tensors(
        x, ("x", x, x.shape), ("weight", weight, (c,)), ("bias", bias, (c,)),
        ("x_bias", x_bias, (c,)), ("scale", scale, (b, c)), ("shift", shift, (b, c)),
        ("residual", residual, (*video, c)), same=("residual",),
    )  # fmt: skip
    if dropout_mask is not None:
        check_tensors(x, ("dropout_mask", dropout_mask, (*video, c)), dtypes=_MASKS)
        if dropout_mask.requires_grad:
            raise ValueError("dropout_mask gets no gradient: detach it")
    if residual is not None and residual.dtype != x.dtype:  # possible under autocast
        residual = residual.to(x.dtype)
    # Literals, because dynamo treats a float from a dictionary as an input that may change.
    eps = (1e-12 if kind == "rms" else 1e-5) if eps is None else float(eps)
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    if kind != "group":
        if stats is not None:
            raise ValueError(f'stats are for kind "group", not {kind!r}')
        groups, per_frame = 1, False
    elif groups < 1 or c % groups:
        raise ValueError(f"groups must divide the {c} channels, got {groups}")
    mean, rstd = None, None
    if stats is not None:
        check_stats(x, stats, groups, per_frame)
        mean, rstd = stats

    # An empty batch of any kind gives nothing, and gradients of 0.
    which = select("norm_act", x.device, x, kind, c) if b else "reference"
    if which == "reference":
        return norm_act_ref(
            x, weight, bias, kind=kind if b else "layer", groups=groups, per_frame=per_frame,
            eps=eps, scale=scale, shift=shift, act=act, residual=residual,
            dropout_mask=dropout_mask, x2=x2,
            stats=None if mean is None or rstd is None else (mean, rstd), x_bias=x_bias,
        )  # fmt: skip
    if x_bias is not None and which == "cpu":  # in fp32, so that a 16-bit sum is not rounded first
        x, dtype = x.float() + x_bias.float(), x.dtype
        residual = None if residual is None else residual.float()
        return norm_act(
            x, weight, bias, kind=kind, groups=groups, per_frame=per_frame, eps=eps, scale=scale,
            shift=shift, act=act, residual=residual, dropout_mask=dropout_mask, stats=stats,
        ).to(dtype)  # fmt: skip
    if scale is not None and scale.stride(1) != 1:
        scale = scale.contiguous()
    if shift is not None and shift.stride(1) != 1:
        shift = shift.contiguous()
    return run(
        norm_act_fwd, x, x2, x_bias, weight, bias,
        scale, shift, residual, dropout_mask, mean, rstd, NORM_KINDS[kind],
        groups, per_frame, eps, act, which,
    )[0]  # fmt: skip


def norm_act_cost(
    x: Tensor,
    *,
    kind: str,
    c2: int = 0,
    stats: bool = False,
    residual: bool = False,
    dropout: bool = False,
    backward: bool = False,
) -> Cost:
    """The least traffic and arithmetic of one call, without parameters and statistics.

    Forward: reads x twice (once for a row-wise kind, or with ``stats``) and writes y. Backward:
    reads x and dy twice (once for a row-wise kind) and writes dx.
    """
    c = x.shape[-1] + c2
    n = x.numel() // x.shape[-1] * c
    once = stats and not backward or kind != "group"
    tensors = (3 if once else 5) if backward else (2 if once else 3)
    tensors += int(residual and not backward) + int(dropout) * (2 if backward and not once else 1)
    return Cost(flops=(30 if backward else 14) * n, bytes=tensors * n * x.element_size())


@flops(norm_act_fwd, norm_act_bwd)
def _(**_):
    return 0  # elementwise: no products, see ``fastvdm.ops._cost``

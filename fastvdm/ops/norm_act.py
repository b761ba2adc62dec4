"""``norm_act``: the norm side of ``conv_group_norm``, with all that stands around a convolution.

    z = norm([x + x_bias, x2]) * weight + bias  the statistics are over channels, or a group
    y = SiLU(z * (1 + scale) + shift) * dropout_mask + residual

One read and one write when the statistics are given, else two reads and one write. The backward
recomputes the normalised activation: what is saved is x and, for groups, the mean and 1/std.
x_bias is the bias of the convolution that made x, where that would add it in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.runtime.dispatch import ByDesign, autocast_on, launchers, register, select

KINDS = {"group": 0, "rms": 1, "layer": 2}  # what the launchers take as ``kind``
_STEM = "norm_act"
_Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def default_eps(kind: str) -> float:
    # Literals: dynamo takes a float out of a dictionary for an input that may change
    return 1e-12 if kind == "rms" else 1e-5


def _channels(x: Tensor, x2: Tensor | None) -> int:
    return x.shape[-1] + (0 if x2 is None else x2.shape[-1])


def _stats_shape(x: Tensor, kind: int, groups: int, per_frame: bool) -> tuple[int, ...]:
    if kind != KINDS["group"]:
        return (0,)
    return (x.shape[0] * (x.shape[1] if per_frame else 1), groups)


def _film_rows(scale: Tensor | None, shift: Tensor | None, backend: str):
    """Only the Triton kernels take rows that lie apart; two small copies for the C++ ones."""
    if backend == "triton":
        return scale, shift
    return (t if t is None else t.contiguous() for t in (scale, shift))


@define
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
    backend: str,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) of contiguous inputs; only the rows of scale and shift may lie further apart
    than C, as halves of one (B, 2C) projection do. y (B, F, H, W, C1 + C2) in the dtype of x. mean,
    rstd (N, groups) in fp32 (fp64 for fp64), N = B*F per frame, else B; of shape (0,) where there
    are none to save: the kind is not "group", or they were given. x_bias (C,), without x2, is for
    backends other than "cpu", whose launchers do not know it."""
    scale, shift = _film_rows(scale, shift, backend)
    return launchers(_STEM, backend).norm_act_fwd(
        x, x2, weight, bias, scale, shift, residual, dropout_mask, mean, rstd,
        kind, groups, per_frame, eps, act, *(() if x_bias is None else (x_bias,)),
    )  # fmt: skip


@fake(norm_act_fwd)
def _(
    x, x2, weight, bias, scale, shift, residual, dropout_mask, mean, rstd,
    kind, groups, per_frame, eps, act, backend, x_bias=None,
):  # fmt: skip
    stats = (0,) if mean is not None else _stats_shape(x, kind, groups, per_frame)
    acc = torch.promote_types(x.dtype, torch.float32)
    y = x.new_empty((*x.shape[:-1], _channels(x, x2)))
    return y, x.new_empty(stats, dtype=acc), x.new_empty(stats, dtype=acc)


@define
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
    backend: str,
    x_bias: Tensor | None = None,
    need_dx_bias: bool = False,
) -> _Grads:
    """(dx, dx2, dweight, dbias, dscale, dshift, dx_bias), each in the shape and dtype of its
    tensor, or of shape (0,) where the tensor is None or not wanted: ``need_dx`` asks for dx and
    dx2, ``need_dweight`` for dweight and dbias, ``need_dfilm`` for dscale and dshift. The gradient
    of the residual is dy itself. mean, rstd are those of the forward; None for kinds "rms",
    "layer"."""
    scale, shift = _film_rows(scale, shift, backend)
    more = () if x_bias is None else (x_bias, need_dx_bias)
    found = launchers(_STEM, backend).norm_act_bwd(
        dy, x, x2, weight, bias, scale, shift, dropout_mask, mean, rstd,
        kind, groups, per_frame, eps, act, need_dx, need_dweight, need_dfilm, *more,
    )  # fmt: skip
    return (*found, x.new_empty(0)) if len(found) == 6 else found  # C++ has no x_bias


@fake(norm_act_bwd)
def _(
    dy, x, x2, weight, bias, scale, shift, dropout_mask, mean, rstd,
    kind, groups, per_frame, eps, act, need_dx, need_dweight, need_dfilm, backend, x_bias=None,
    need_dx_bias=False,
):  # fmt: skip
    needs = (need_dx, need_dx, need_dweight, need_dweight, need_dfilm, need_dfilm, need_dx_bias)
    return tuple(
        x.new_empty(0) if t is None or not need else t.new_empty(t.shape)
        for t, need in zip((x, x2, weight, bias, scale, shift, x_bias), needs)
    )


def _save(ctx, inputs, output):
    x, x2, weight, bias, scale, shift, _, dropout_mask, mean, rstd, *ctx.options, x_bias = inputs
    if mean is None and output[1].numel():
        mean, rstd = output[1:]
    ctx.save_for_backward(x, x2, weight, bias, scale, shift, dropout_mask, mean, rstd, x_bias)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dmean, drstd):
    if dy is None:
        return (None,) * 17
    x, x2, weight, bias, scale, shift, dropout_mask, mean, rstd, x_bias = ctx.saved_tensors
    *options, backend = ctx.options
    need = ctx.needs_input_grad
    dres = dy if need[6] else None
    flags = (need[0] or need[1], need[2] or need[3], need[4] or need[5])
    if not any((*flags, need[16])):  # the residual alone
        return (*(None,) * 6, dres, *(None,) * 10)
    # Without x_bias as the C++ backend has it: torch.export then calls that directly.
    more = () if x_bias is None else (x_bias, need[16])
    *found, dx_bias = norm_act_bwd(
        dy.contiguous(), x, x2, weight, bias, scale, shift, dropout_mask, mean, rstd,
        *options, *flags, backend, *more,
    )  # fmt: skip
    grads = [g if n else None for g, n in zip(found, need)]
    return (*grads, dres, *(None,) * 9, dx_bias if need[16] else None)


autograd(norm_act_fwd, _backward, setup_context=_save)
no_double_backward(norm_act_bwd)


def unsupported(backend: str, x: Tensor, kind: str, channels: int) -> str | None:
    """Why ``backend`` cannot take this call, or None."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return f"{x.dtype} is not a type of its kernels"
    if backend == "cpu" and x.dtype == torch.float64:
        return ByDesign("fp64 runs on the torch reference")
    if backend == "triton" and kind != "group" and channels > 4096:
        return f"{channels} channels: a row-wise kernel holds at most 4096 of one pixel"
    return None


register("norm_act", _STEM, ("norm_act_fwd", "norm_act_bwd"), unsupported)


def expect(name: str, t: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if t is None:
        return
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device} as x is, got {t.device}")


def check_stats(x: Tensor, stats: Sequence[Tensor], groups: int, per_frame: bool) -> None:
    shape = _stats_shape(x, KINDS["group"], groups, per_frame)
    acc = torch.promote_types(x.dtype, torch.float32)
    for name, t in zip(("mean", "rstd"), stats):
        expect(f"stats: {name}", t, shape, x.device)
        if t.dtype != acc:
            raise TypeError(f"stats: {name} must be {acc}, got {t.dtype}")


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
        x: (B, F, H, W, C), any strides (kernels copy a non-contiguous one); B may be 0.
        weight, bias: (C,), of any floating dtype; with ``x2``, (C + C2,).
        kind: "group": GroupNorm, biased variance over (C/groups, F, H, W) of each video, or over
            (C/groups, H, W) ``per_frame``. "rms": x / max(||x||₂, eps) √C over channels.
            "layer": LayerNorm over channels.
        groups, per_frame: for kind "group"; the other kinds look at one pixel at a time.
        eps: default 1e-5; 1e-12 for "rms".
        scale, shift: FiLM, (B, C) each; either may be None.
        act: SiLU or nothing.
        residual: (B, F, H, W, C), in the dtype of x.
        dropout_mask: (B, F, H, W, C), bool or floating; multiplied in as it is, so the caller
            divides by the keep probability. Gets no gradient.
        x2: (B, F, H, W, C2): the norm acts on the channels of x and x2 side by side.
        stats: (mean, rstd), each (B, groups), or (B*F, groups) per frame, in fp32 (fp64 for fp64):
            the statistics of this x + x_bias where its producer has them, or of a larger video of
            which x is a part. Differentiated as functions of x.
        x_bias: (C,), of any floating dtype, added to x before the norm, in the accumulator's type
            and in the same passes; not with ``x2``. The C++ backend adds it in a pass before, in
            fp32: on a CPU the convolutions add their biases themselves.

    Returns:
        (B, F, H, W, C + C2) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option does not fit.
    """
    if x.ndim != 5:
        raise ValueError(f"x must be (B, F, H, W, C), got {x.ndim} dimensions")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}")
    if kind not in KINDS:
        raise ValueError(f'kind must be "group", "rms" or "layer", got {kind!r}')
    video = tuple(x.shape[:-1])
    if x2 is not None:
        if x2.ndim != 5 or tuple(x2.shape[:-1]) != video:
            raise ValueError(f"x2 must be {(*video, 'C2')}, got {tuple(x2.shape)}")
        if x2.device != x.device:
            raise ValueError(f"x2 must be on {x.device} as x is, got {x2.device}")
    b, c = x.shape[0], _channels(x, x2)
    if min(*video[1:], c) < 1:
        raise ValueError(f"x must not be empty but for the batch, got {tuple(x.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        expect(name, t, (c,), x.device)
    if x_bias is not None and x2 is not None:
        raise ValueError("x_bias is for one source: give x2 or x_bias")
    expect("x_bias", x_bias, (c,), x.device)
    for name, t in (("scale", scale), ("shift", shift)):
        expect(name, t, (b, c), x.device)
    for name, t in (("residual", residual), ("dropout_mask", dropout_mask)):
        expect(name, t, (*video, c), x.device)
    if autocast_on(x.device.type):  # one stream may still be wider than the other
        x2 = None if x2 is None else x2.to(x.dtype)
        residual = None if residual is None else residual.to(x.dtype)
    for name, t in (("x2", x2), ("residual", residual)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} as x is, got {t.dtype}")
    vectors = dict(weight=weight, bias=bias, scale=scale, shift=shift, x_bias=x_bias)
    for name, t in vectors.items():
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{name} must be floating, got {t.dtype}")
    if dropout_mask is not None and dropout_mask.requires_grad:
        raise ValueError("dropout_mask gets no gradient: detach it")
    eps = default_eps(kind) if eps is None else float(eps)
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

    if b == 0:  # whatever the kind: nothing, and gradients of 0
        kind, backend = "layer", "reference"
    else:
        backend = select("norm_act", x.device, x, kind, c)
    if backend == "reference":
        return norm_act_ref(
            x, weight, bias, kind=kind, groups=groups, per_frame=per_frame, eps=eps, scale=scale,
            shift=shift, act=act, residual=residual, dropout_mask=dropout_mask, x2=x2,
            stats=None if mean is None or rstd is None else (mean, rstd), x_bias=x_bias,
        )  # fmt: skip
    if x_bias is not None and backend == "cpu":  # in fp32, or a 16-bit sum would be rounded first
        x, dtype = x.float() + x_bias.float(), x.dtype
        residual = None if residual is None else residual.float()
        return norm_act(
            x, weight, bias, kind=kind, groups=groups, per_frame=per_frame, eps=eps, scale=scale,
            shift=shift, act=act, residual=residual, dropout_mask=dropout_mask, stats=stats,
        ).to(dtype)  # fmt: skip
    x2, bias, residual, dropout_mask, mean, rstd, x_bias = (
        None if t is None else t.contiguous()
        for t in (x2, bias, residual, dropout_mask, mean, rstd, x_bias)
    )
    scale, shift = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (scale, shift))
    return norm_act_fwd(
        x.contiguous(), x2, weight.contiguous(), bias, scale, shift, residual, dropout_mask,
        mean, rstd, KINDS[kind], groups, per_frame, eps, act, backend,
        *(() if x_bias is None else (x_bias,)),
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
    """Least traffic and arithmetic of one call; parameters and statistics are too small to count.

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

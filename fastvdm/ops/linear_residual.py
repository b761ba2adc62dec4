"""``linear_residual``: x + o weightᵀ + bias, the second half of an attention block.

Ho et al. 2022, "Video Diffusion Models", section 3, where C is too wide for the one kernel of
``temporal_block``. The Triton kernel adds bias and residual to its accumulator, and rounds once.
Where there is no such kernel it is ``linear``, then a sum.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastvdm.ops._check import check_dtypes
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.ops.linear import linear
from fastvdm.ops.norm_linear import on_triton
from fastvdm.reference.linear_residual import linear_residual_ref
from fastvdm.runtime.dispatch import (
    ByDesign,
    autocast_dtype,
    autocast_on,
    launchers,
    register,
    select,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@define
def linear_residual_fwd(
    x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    """y as x, of contiguous inputs; o, weight and bias share a dtype."""
    return launchers("linear_residual", backend).linear_residual_fwd(x, o, weight, bias)


@fake(linear_residual_fwd)
def _(x, o, weight, bias, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define
def linear_residual_bwd(
    dy: Tensor,
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    need_do: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(do, dweight, dbias), of shape (0,) where not wanted; that of x is dy itself."""
    return launchers("linear_residual", backend).linear_residual_bwd(
        dy, o, weight, bias, need_do, need_weight, need_bias
    )


@fake(linear_residual_bwd)
def _(dy, o, weight, bias, need_do, need_weight, need_bias, backend):
    return tuple(
        t.new_empty(t.shape) if t is not None and need else o.new_empty((0,))
        for t, need in ((o, need_do), (weight, need_weight), (bias, need_bias))
    )


def _save(ctx, inputs, output):
    _, o, weight, bias, ctx.backend = inputs
    ctx.save_for_backward(o, weight, bias)


def _backward(ctx, dy):
    need_x, *need = ctx.needs_input_grad[:4]
    if not any(need):  # the residual alone
        return dy, None, None, None, None
    found = linear_residual_bwd(dy.contiguous(), *ctx.saved_tensors, *need, ctx.backend)
    return dy if need_x else None, *(g if n else None for g, n in zip(found, need)), None


autograd(linear_residual_fwd, _backward, setup_context=_save)
no_double_backward(linear_residual_bwd)


def unsupported(backend: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    if x.dtype == torch.float64 and x.is_cuda:
        return ByDesign("fp64 runs on the torch reference")  # as norm_linear
    return None


register(
    "linear_residual",
    stem="linear_residual",
    names=("linear_residual_fwd", "linear_residual_bwd"),
    unsupported=unsupported,
    backends=("triton",),
)


def _validate(x, o, weight, bias) -> None:
    if weight.ndim != 2 or x.ndim < 1 or o.ndim < 1:
        raise ValueError(f"weight must be (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if min(n, k) < 1 or x.shape[-1] != n or tuple(o.shape) != (*x.shape[:-1], k):
        raise ValueError(
            f"expected x (..., {n}) and o (..., {k}), got {tuple(x.shape)} and {tuple(o.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be {(n,)}, got {tuple(bias.shape)}")
    for name, t in (("x", x), ("o", o), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {t.device}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be fp32, fp16, bf16 or fp64, got {t.dtype}")
    check_dtypes(x, "weight", weight, {"bias": bias})


def linear_residual(x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + o weightᵀ + bias.

    Args:
        x: (..., N), in the dtype of ``o`` or, over a 16-bit one, in fp32.
        o: (..., K), in the dtype of ``weight`` outside autocast.
        weight, bias: (N, K) and (N,).

    Returns:
        (..., N) in the dtype of ``x``.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before any launch.
    """
    _validate(x, o, weight, bias)
    low = autocast_dtype(weight)
    if o.dtype != weight.dtype and not autocast_on(x.device.type):
        raise TypeError(f"o is {o.dtype}, weight {weight.dtype}")
    if not on_triton():
        return (x + linear(o, weight, bias)).to(x.dtype)
    backend = select("linear_residual", x.device, x)
    o, weight, bias = o.to(low), weight.to(low), None if bias is None else bias.to(low)
    if backend == "reference":
        return linear_residual_ref(x, o, weight, bias)
    return linear_residual_fwd(
        x.contiguous(),
        o.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        backend,
    )


def linear_residual_cost(
    rows: int,
    depth: int,
    features: int,
    itemsize: int,
    *,
    x_itemsize: int | None = None,
    backward: bool = False,
) -> Cost:
    """Of one fused call: x, o and the weight read, y written. ``backward`` counts the backward
    alone with the weight's gradient: dy and o read, do written; the gradient of x is dy."""
    wide = itemsize if x_itemsize is None else x_itemsize
    product, weight = 2 * rows * depth * features, depth * features * itemsize
    if backward:
        moved = rows * (features * wide + 2 * depth * itemsize)
        return Cost(2 * product, moved + 2 * weight)
    return Cost(product, rows * (2 * features * wide + depth * itemsize) + weight)


@flops(linear_residual_fwd)
def _(*, o, weight, **_):
    return linear_residual_cost(prod(o[:-1]), weight[1], weight[0], 4)


@flops(linear_residual_bwd)
def _(*, o, weight, need_do, need_weight, **_):
    one = linear_residual_cost(prod(o[:-1]), weight[1], weight[0], 4)
    return (need_do + need_weight) * one.flops

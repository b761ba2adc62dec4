"""Linear attention with the projection before it: x → q, k, v → out.

The packed qkv is the largest tensor of the network (3 heads D features a pixel). On a CPU the C++
kernel projects a few frames at a time and reads them while they are in the cache, in the backward
again: the whole of qkv never exists, and recomputing it there costs no more than writing it out
and reading it back. Elsewhere this is ``linear``, then ``linear_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.config import get_config
from fastvdm.dispatch import (
    ByDesign,
    autocast_dtype,
    autocast_on,
    launchers,
    register,
    select,
)
from fastvdm.ops.cost import Cost
from fastvdm.ops.define import autograd, define, fake, no_double_backward
from fastvdm.ops.linear import linear
from fastvdm.ops.linear_attention import linear_attention, linear_attention_cost
from fastvdm.ops.linear_attention import unsupported as attention_unsupported


@define
def linear_attention_projected_fwd(
    x: Tensor, weight: Tensor, heads: int, sm_scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, F, H, W, heads, D); k_lse and ctx as in ``linear_attention_fwd``."""
    return launchers("linear_attention_projected", backend).linear_attention_projected_fwd(
        x, weight, heads, sm_scale
    )


@fake(linear_attention_projected_fwd)
def _(x, weight, heads, sm_scale, backend):
    b, f, h, w, _ = x.shape
    d = weight.shape[0] // (3 * heads)
    return (
        x.new_empty((b, f, h, w, heads, d)),
        x.new_empty((b, f, heads, d), dtype=torch.float32),
        x.new_empty((b, f, heads, d, d), dtype=torch.float32),
    )


@define
def linear_attention_projected_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    k_lse: Tensor,
    ctx: Tensor,
    heads: int,
    sm_scale: float,
    need_dx: bool,
    need_dweight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), of shape (0,) where not wanted; dweight summed over frames in fp64."""
    return launchers("linear_attention_projected", backend).linear_attention_projected_bwd(
        dout, x, weight, k_lse, ctx, heads, sm_scale, need_dx, need_dweight
    )


@fake(linear_attention_projected_bwd)
def _(dout, x, weight, k_lse, ctx, heads, sm_scale, need_dx, need_dweight, backend):
    return (
        x.new_empty(x.shape if need_dx else (0,)),
        weight.new_empty(weight.shape if need_dweight else (0,)),
    )


def _save(ctx, inputs, output):
    x, weight, ctx.heads, ctx.sm_scale, ctx.backend = inputs
    _, k_lse, context = output
    ctx.save_for_backward(x, weight, k_lse, context)
    ctx.mark_non_differentiable(k_lse, context)
    ctx.set_materialize_grads(False)  # else zeros are made for those two


def _backward(ctx, dout, *_):
    if dout is None:
        return None, None, None, None, None
    dx, dweight = linear_attention_projected_bwd(
        dout.contiguous(),
        *ctx.saved_tensors,
        ctx.heads,
        ctx.sm_scale,
        *ctx.needs_input_grad[:2],
        ctx.backend,
    )
    need_dx, need_dweight = ctx.needs_input_grad[:2]
    return dx if need_dx else None, dweight if need_dweight else None, None, None, None


autograd(linear_attention_projected_fwd, _backward, setup_context=_save)
no_double_backward(linear_attention_projected_bwd)


def unsupported(backend: str, x: Tensor, head_dim: int) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    if x.dtype == torch.float64:
        return ByDesign("fp64 runs on the torch reference")
    return attention_unsupported(backend, x.new_empty((1, 1, 1, 1, 3, 1, head_dim)))


register(
    "linear_attention_projected",
    stem="linear_attention_projected",
    names=("linear_attention_projected_fwd", "linear_attention_projected_bwd"),
    unsupported=unsupported,
    backends=("cpu",),
)


def linear_attention_projected(
    x: Tensor, weight: Tensor, *, heads: int, sm_scale: float | None = None
) -> Tensor:
    """``linear_attention`` of the heads that ``x weightᵀ`` holds.

    Args:
        x: (B, F, H, W, C), fp32, fp16, bf16 or fp64.
        weight: (3 heads D, C), the packed projection without a bias.
        heads: number of heads.
        sm_scale: factor on softmax_D(q); D**-0.5 by default.

    Returns:
        (B, F, H, W, heads, D) in the dtype of ``x`` (of autocast, where it is on).

    Raises:
        ValueError: shapes that do not fit.
        TypeError: x and weight differ in dtype outside autocast.
    """
    if x.ndim != 5 or weight.ndim != 2 or weight.shape[1] != x.shape[4]:
        raise ValueError(
            f"expected x (B, F, H, W, C) and weight (3 heads D, C), got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    if heads < 1 or weight.shape[0] % (3 * heads):
        raise ValueError(f"{weight.shape[0]} features are not 3 x {heads} heads")
    dtype = autocast_dtype(x)
    if x.dtype != weight.dtype and not autocast_on(x.device.type):
        raise TypeError(f"x is {x.dtype}, the weight {weight.dtype}")
    d = weight.shape[0] // (3 * heads)
    x = x.to(dtype)
    here = x.device.type == "cpu" and get_config().backend in ("auto", "cpu")
    backend = select("linear_attention_projected", x.device, x, d) if here else None
    if backend != "cpu":
        return linear_attention(linear(x, weight).unflatten(-1, (3, heads, d)), sm_scale=sm_scale)
    weight = weight.to(dtype)
    scale = d**-0.5 if sm_scale is None else float(sm_scale)
    return linear_attention_projected_fwd(
        x.contiguous(), weight.contiguous(), heads, scale, backend
    )[0]


def linear_attention_projected_cost(
    shape: tuple[int, ...], features: int, heads: int, itemsize: int, *, backward: bool = False
) -> Cost:
    """Of one call on x of this shape without the traffic of qkv, which stays in the cache;
    ``backward`` counts the backward alone, projecting again included."""
    b, f, h, w, c = shape
    rows = b * f * h * w
    inner = linear_attention_cost(
        (b, f, h, w, 3, heads, features // (3 * heads)), itemsize, backward=backward
    )
    products = 2 * rows * c * features * (3 if backward else 1)
    moved = (2 if backward else 1) * c + features // 3
    return Cost(flops=inner.flops + products, bytes=rows * moved * itemsize)

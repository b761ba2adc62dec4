"""``norm_linear``: LayerNorm_C(x) weightᵀ + bias, the first half of an attention block.

For blocks that no one kernel does whole (``attention_block``). The Triton kernel normalises
x between its load and the product, so that the normalised x is never written; nothing but the
inputs is saved for the backward. Where there is no such kernel it is ``norm_act``, then ``linear``.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastvdm.kernels.limits import MAX_ROW_CHANNELS
from fastvdm.ops._call import autocast_dtype, autocast_on, check_tensors, run, select, wrong_form
from fastvdm.ops._check import check_eps, check_projection, check_video
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.ops.linear import linear
from fastvdm.ops.norm_act import norm_act
from fastvdm.runtime.dispatch import FP64, ByDefault, ByName, Implementations, implementations


@op(
    "norm_linear",
    backward="dy x norm_weight norm_bias weight bias eps",
    grads="x:dx norm_weight:norm norm_bias:norm weight:weight bias:bias",
)
def norm_linear_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """y (B, F, H, W, N) in the dtype of weight, of contiguous inputs. In the backward x is
    normalised again, for the gradient of the weight alone."""
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


norm_linear_bwd = backward_of(norm_linear_fwd)


@implementations(
    "norm_linear", "norm_linear_fwd", "norm_linear_bwd", backends=("triton",),
    examples=lambda device: {"fp32": (torch.empty(1, 1, 1, 1, 64, device=device),)},
)  # fmt: skip
def _(x: Tensor) -> Implementations:
    if x.dtype == torch.float64 and x.is_cuda:
        # Triton 3.6 fails to compile fp64 products of computed operands; interpreted they work.
        yield "triton", FP64
    elif x.shape[-1] > MAX_ROW_CHANNELS:
        widest = f"{MAX_ROW_CHANNELS}, the widest row of the norm's backward"
        yield "triton", ByDefault(f"C = {x.shape[-1]} is above {widest}")
    else:
        yield "triton", ByName("not measured against cuBLAS, which such wide products are bound by")
    yield "parts", None


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm_C(x) weightᵀ + bias.

    Args:
        x: (B, F, H, W, C); may be fp32 with a 16-bit weight (as under autocast). B may be 0.
        norm_weight, norm_bias: (C,), the channel LayerNorm (biased variance, ``eps``).
        weight, bias: (N, C) and (N,).

    Returns:
        (B, F, H, W, N) in the dtype of ``weight`` (of autocast, where it is on).

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before any launch.
    """
    if getattr(x, "ndim", 0) != 5:
        check_video(x)
    c = x.shape[-1]
    if getattr(weight, "ndim", 0) != 2 or weight.shape[1] != c:
        raise wrong_form("weight", weight, f"(N, {c})")
    n = weight.shape[0]
    if min(*x.shape[1:], n) < 1:
        raise ValueError(f"only the batch may be empty, got {tuple(x.shape)} to {n}")
    check_tensors(
        x, ("x", x, tuple(x.shape)), ("norm_weight", norm_weight, (c,)),
        ("norm_bias", norm_bias, (c,)), ("weight", weight, (n, c)), ("bias", bias, (n,)),
    )  # fmt: skip
    check_projection(x, "weight", weight, ("bias", bias))
    check_eps(eps)
    which = select("norm_linear", x.device, x)
    if which != "triton":
        normed = norm_act(x, norm_weight, norm_bias, kind="layer", eps=eps, act=False)
        if not autocast_on(x.device.type):
            normed = normed.to(weight.dtype)
        return linear(normed, weight, bias)
    low = autocast_dtype(weight)
    weight, bias = weight.to(low), None if bias is None else bias.to(low)
    return run(
        norm_linear_fwd, x, norm_weight, norm_bias,
        weight, bias, float(eps), which,
    )  # fmt: skip


def norm_linear_cost(
    rows: int,
    channels: int,
    features: int,
    itemsize: int,
    *,
    x_itemsize: int | None = None,
    backward: bool = False,
) -> Cost:
    """Of one fused call: x and the weight read, y written. ``backward`` counts the backward alone
    with the weight's gradient: dy and x read, dx written; the weight read and its gradient written.
    """
    wide = itemsize if x_itemsize is None else x_itemsize
    product, moved = 2 * rows * channels * features, rows * (channels * wide + features * itemsize)
    weight = channels * features * itemsize
    if backward:
        return Cost(2 * product, moved + rows * channels * wide + 2 * weight)
    return Cost(product, moved + weight)


@flops(norm_linear_fwd)
def _(*, x, weight, **_):
    return norm_linear_cost(prod(x[:-1]), weight[1], weight[0], 4)


@flops(norm_linear_bwd)
def _(*, x, weight, need_dx, need_norm, need_weight, **_):
    products = (need_dx or need_norm) + need_weight
    return products * norm_linear_cost(prod(x[:-1]), weight[1], weight[0], 4).flops

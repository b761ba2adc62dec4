"""``linear_residual``: x + o weightᵀ + bias, the second half of an attention block.

``attention_block`` uses it if no single kernel computes the whole block. The Triton kernel adds
bias and residual to its accumulator and rounds once. Without that kernel the op is ``linear``
followed by a sum.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastvdm.ops._call import autocast_dtype, cast, check_tensors, run, select, wrong_form
from fastvdm.ops._check import check_projection
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.ops.linear import linear
from fastvdm.runtime.dispatch import FP64, ByDesign, Implementations, implementations


@op(
    "linear_residual",
    backward="dy o weight bias",
    grads="o:do weight:weight bias:bias",
    residual="x",
)
def linear_residual_fwd(
    x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None, backend: str
) -> Tensor:
    """y like x; the inputs are contiguous, and o, weight and bias share a dtype."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


linear_residual_bwd = backward_of(linear_residual_fwd)


# Counted, not measured: a step of depth 64 takes 134 issue cycles beside 256 cycles of the tensor
# cores (sm_90), so the kernel reaches 50 to 60 % of their rate; cuBLAS reaches 75 %. cuBLAS needs a
# sum afterwards, three passes over x. At 3 to 4 TB/s the passes cost more than that difference up
# to a depth of 1300 to 1900 (H200, H100) or 1100 (A100).
_DEEPEST = 1024


def _examples(device: torch.device) -> dict[str, tuple]:
    def call(dtype: torch.dtype, depth: int) -> tuple:
        return torch.empty(1, 1, device=device, dtype=dtype), torch.empty(1, depth, device=device)

    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    found = {name: call(dtype, _DEEPEST) for name, dtype in types.items()}
    return found | {"bf16, deep": call(torch.bfloat16, 2 * _DEEPEST)}


@implementations(
    "linear_residual", "linear_residual_fwd", "linear_residual_bwd", backends=("triton",),
    examples=_examples,
)  # fmt: skip
def _(x: Tensor, weight: Tensor) -> Implementations:
    if x.dtype == torch.float64 and x.is_cuda:
        yield "triton", FP64
    elif weight.shape[1] > _DEEPEST:
        yield "triton", ByDesign(f"deeper than {_DEEPEST}, cuBLAS gains more than the sum costs")
    else:
        yield "triton", None
    yield "parts", None


def linear_residual(x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + o weightᵀ + bias.

    Args:
        x: (..., N), in the dtype of ``o``, or in fp32 if that is 16-bit.
        o: (..., K), in the dtype of ``weight`` outside autocast.
        weight: (N, K).
        bias: (N,), or None.

    Returns:
        (..., N) in the dtype of ``x``.

    Raises:
        ValueError: a shape or a device does not fit; raised before any launch.
        TypeError: a dtype does not fit; raised before any launch.
    """
    if getattr(weight, "ndim", 0) != 2 or min(weight.shape) < 1:
        raise wrong_form("weight", weight, "(N, K)")
    n, k = weight.shape
    if getattr(x, "ndim", 0) < 1 or x.shape[-1] != n:
        raise wrong_form("x", x, f"(..., {n})")
    if getattr(o, "shape", None) != (*x.shape[:-1], k):
        raise wrong_form("o", o, str((*x.shape[:-1], k)))
    check_tensors(
        x, ("x", x, x.shape), ("o", o, o.shape), ("weight", weight, (n, k)),
        ("bias", bias, (n,)),
    )  # fmt: skip
    check_projection(x, "weight", weight, ("o", o), ("bias", bias))
    which = select("linear_residual", x.device, x, weight)
    if which != "triton":
        return (x + linear(o, weight, bias)).to(x.dtype)
    return run(linear_residual_fwd, x, *cast(autocast_dtype(weight), o, weight, bias), which)


def linear_residual_cost(
    rows: int,
    depth: int,
    features: int,
    itemsize: int,
    *,
    x_itemsize: int | None = None,
    backward: bool = False,
) -> Cost:
    """The cost of one fused call: reads x, o and the weight, writes y. ``backward`` counts the
    backward alone, with the weight's gradient: reads dy and o, writes do; the gradient of x is dy.
    """
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

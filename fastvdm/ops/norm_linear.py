"""``norm_linear``: LayerNorm_C(x) weightᵀ + bias, the first half of an attention block.

Ho et al. 2022, "Video Diffusion Models", section 3, where C is too wide for the one kernel of
``temporal_block``. The Triton kernel normalises x between its load and the product, so that the
normalised x is never written; nothing but the inputs is saved for the backward. Where there is no
such kernel it is ``norm_act``, then ``linear``.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastvdm.ops._check import check_dtypes
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.ops.linear import linear
from fastvdm.ops.norm_act import norm_act
from fastvdm.reference.norm_linear import norm_linear_ref
from fastvdm.runtime.dispatch import (
    ByDesign,
    autocast_dtype,
    autocast_on,
    backend_in_force,
    launchers,
    register,
    select,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_CHANNELS = 4096


@define
def norm_linear_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """y (B, F, H, W, N) in the dtype of weight, of contiguous inputs."""
    return launchers("norm_linear", backend).norm_linear_fwd(
        x, norm_weight, norm_bias, weight, bias, eps
    )


@fake(norm_linear_fwd)
def _(x, norm_weight, norm_bias, weight, bias, eps, backend):
    return weight.new_empty((*x.shape[:-1], weight.shape[0]))


@define
def norm_linear_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    need_dx: bool,
    need_norm: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dnorm_weight, dnorm_bias, dweight, dbias), each shaped and typed as its input, or of
    shape (0,) where not wanted or its input is None. x is normalised again for dweight alone."""
    return launchers("norm_linear", backend).norm_linear_bwd(
        dy, x, norm_weight, norm_bias, weight, bias, eps, need_dx, need_norm, need_weight, need_bias
    )


@fake(norm_linear_bwd)
def _(
    dy, x, norm_weight, norm_bias, weight, bias, eps,
    need_dx, need_norm, need_weight, need_bias, backend,
):  # fmt: skip
    wanted = (
        *((x, need_dx), (norm_weight, need_norm), (norm_bias, need_norm)),
        *((weight, need_weight), (bias, need_bias)),
    )
    return tuple(
        t.new_empty(t.shape) if t is not None and need else x.new_empty((0,)) for t, need in wanted
    )


def _save(ctx, inputs, output):
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy):
    need = ctx.needs_input_grad[:5]
    found = norm_linear_bwd(
        dy.contiguous(), *ctx.saved_tensors, ctx.eps, need[0], need[1] or need[2], *need[3:],
        ctx.backend,
    )  # fmt: skip
    return *(g if n else None for g, n in zip(found, need)), None, None


autograd(norm_linear_fwd, _backward, setup_context=_save)
no_double_backward(norm_linear_bwd)


def unsupported(backend: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    if x.dtype == torch.float64 and x.is_cuda:
        # Triton 3.6 fails to compile fp64 products of computed operands; interpreted they work.
        return ByDesign("fp64 runs on the torch reference")
    if x.shape[-1] > _MAX_CHANNELS:
        return f"C = {x.shape[-1]} is above {_MAX_CHANNELS}, the widest row of the norm's backward"
    return None


register(
    "norm_linear",
    stem="norm_linear",
    names=("norm_linear_fwd", "norm_linear_bwd"),
    unsupported=unsupported,
    backends=("triton",),
)


def on_triton() -> bool:
    """Whether the halves run as kernels; elsewhere they are composed of the package's parts.

    | device | choice       | why                                                                  |
    |--------|--------------|----------------------------------------------------------------------|
    | cuda   | composed     | NOT MEASURED against cuBLAS, which such wide products are bound by:  |
    |        |              | taken only by name (FASTVDM_BACKEND=triton)                          |
    | cpu    | composed     | no kernel                                                            |
    """
    return backend_in_force() == "triton"


def _validate(x, norm_weight, weight, norm_bias, bias, eps) -> None:
    if x.ndim != 5:
        raise ValueError(f"x must be (B, F, H, W, C), got {tuple(x.shape)}")
    c = x.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != c:
        raise ValueError(f"weight must be (N, {c}), got {tuple(weight.shape)}")
    if min(*x.shape[1:], weight.shape[0]) < 1:
        raise ValueError(f"only the batch may be empty, got {tuple(x.shape)} to {weight.shape[0]}")
    for name, t, shape in (
        ("norm_weight", norm_weight, (c,)), ("norm_bias", norm_bias, (c,)),
        ("bias", bias, (weight.shape[0],)),
    ):  # fmt: skip
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
    for name, t in (
        ("x", x), ("norm_weight", norm_weight), ("weight", weight), ("norm_bias", norm_bias),
        ("bias", bias),
    ):  # fmt: skip
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {t.device}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be fp32, fp16, bf16 or fp64, got {t.dtype}")
    check_dtypes(x, "weight", weight, {"bias": bias})
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def _parts(x, norm_weight, weight, norm_bias, bias, eps) -> Tensor:
    normed = norm_act(x, norm_weight, norm_bias, kind="layer", eps=eps, act=False)
    if not autocast_on(x.device.type):
        normed = normed.to(weight.dtype)
    return linear(normed, weight, bias)


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
    _validate(x, norm_weight, weight, norm_bias, bias, eps)
    if not on_triton():
        return _parts(x, norm_weight, weight, norm_bias, bias, eps)
    backend = select("norm_linear", x.device, x)
    low = autocast_dtype(weight)
    weight, bias = weight.to(low), None if bias is None else bias.to(low)
    if backend == "reference":
        return norm_linear_ref(x, norm_weight, weight, norm_bias=norm_bias, bias=bias, eps=eps)
    return norm_linear_fwd(
        x.contiguous(),
        norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        float(eps),
        backend,
    )


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

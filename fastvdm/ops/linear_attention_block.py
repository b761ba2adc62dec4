"""x + out(linear attention(LayerNorm_C(x))) over the pixels of each frame: contract, op, autograd.

    q' = softmax_D(x̂ W_qᵀ),  k' = softmax_N(x̂ W_kᵀ),  G = k'ᵀ x̂,  ctx = sm_scale G W_vᵀ,
    y = x + q' (ctx W_outᵀ) + b

with N = H*W pixels. v and the output of the attention, the largest tensors of the network after
q and k, are never made: k'ᵀ v = (k'ᵀ x̂) W_vᵀ and (q' ctx) W_outᵀ = q' (ctx W_outᵀ), both once per
frame and head. Of 4 C heads D multiplications a pixel and twice those of the attention itself only
the former remain. Saved for the backward: x, G and log Σ exp k. On a CPU this is one C++ op;
elsewhere norm_linear, linear_attention and linear_residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._check import check_block
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.reference.linear_attention_block import linear_attention_block_ref
from fastvdm.runtime.dispatch import (
    ByDesign,
    autocast_dtype,
    backend_in_force,
    launchers,
    register,
    select,
)


@define
def linear_attention_block_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
    sm_scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, F, H, W, C); G (B, F, heads, D, C) and k's log Σ exp (B, F, heads, D) in fp32."""
    return launchers("linear_attention_block", backend).linear_attention_block_fwd(
        x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, heads, eps, sm_scale
    )


@fake(linear_attention_block_fwd)
def _(x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, heads, eps, sm_scale, backend):
    b, f, _, _, c = x.shape
    d = qkv_weight.shape[0] // (3 * heads)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((b, f, heads, d, c), dtype=torch.float32),
        x.new_empty((b, f, heads, d), dtype=torch.float32),
    )


@define
def linear_attention_block_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    g: Tensor,
    lse: Tensor,
    heads: int,
    eps: float,
    sm_scale: float,
    need_norm: bool,
    need_qkv: bool,
    need_out: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx and, of shape (0,) where not wanted, the gradients of norm weight and bias, qkv_weight,
    out_weight and out_bias; summed over frames in fp64."""
    return launchers("linear_attention_block", backend).linear_attention_block_bwd(
        dy, x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, g, lse, heads, eps,
        sm_scale, need_norm, need_qkv, need_out,
    )  # fmt: skip


@fake(linear_attention_block_bwd)
def _(
    dy, x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias, g, lse, heads, eps, sm_scale,
    need_norm, need_qkv, need_out, backend,
):  # fmt: skip
    def like(t: Tensor | None, need: bool) -> Tensor:
        return torch.empty_like(t) if need and t is not None else x.new_empty(0)

    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        like(norm_weight, need_norm),
        like(norm_bias, need_norm),
        like(qkv_weight, need_qkv),
        like(out_weight, need_out),
        like(out_bias, need_out),
    )


def _save(ctx, inputs, output):
    *tensors, ctx.heads, ctx.eps, ctx.sm_scale, ctx.backend = inputs
    _, g, lse = output
    ctx.save_for_backward(*tensors, g, lse)
    ctx.mark_non_differentiable(g, lse)
    ctx.set_materialize_grads(False)  # else zeros are made for those two


def _backward(ctx, dy, *_):
    if dy is None:
        return (None,) * 10
    need = ctx.needs_input_grad[:6]
    found = linear_attention_block_bwd(
        dy.contiguous(), *ctx.saved_tensors, ctx.heads, ctx.eps, ctx.sm_scale,
        need[1] or need[2], need[3], need[4] or need[5], ctx.backend,
    )  # fmt: skip
    return *(grad if wanted else None for grad, wanted in zip(found, need)), *(None,) * 4


autograd(linear_attention_block_fwd, _backward, setup_context=_save)
no_double_backward(linear_attention_block_bwd)


def unsupported(backend: str, x: Tensor) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    if x.dtype == torch.float64:
        return ByDesign("fp64 runs on the torch reference")
    return None


register(
    "linear_attention_block",
    stem="linear_attention_block",
    names=("linear_attention_block_fwd", "linear_attention_block_bwd"),
    unsupported=unsupported,
    backends=("cpu",),
)


def linear_attention_block(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    *,
    heads: int,
    norm_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    eps: float = 1e-5,
    sm_scale: float | None = None,
) -> Tensor:
    """x + out(linear attention(LayerNorm_C(x))) over the pixels of each frame.

    Args:
        x: (B, F, H, W, C); may be fp32 with 16-bit projections (as under autocast).
        norm_weight, norm_bias: (C,), the channel LayerNorm (biased variance, ``eps``).
        qkv_weight: (3 * heads * D, C); q | k | v, head-major, without a bias.
        out_weight, out_bias: (C, heads * D) and (C,).
        heads: number of heads.
        sm_scale: factor on softmax_D(q); D**-0.5 by default.

    Returns:
        (B, F, H, W, C) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before any launch.
    """
    check_block(x, norm_weight, norm_bias, qkv_weight, None, out_weight, out_bias, heads, eps)
    low = autocast_dtype(qkv_weight)
    qkv_weight, out_weight = qkv_weight.to(low), out_weight.to(low)
    out_bias = None if out_bias is None else out_bias.to(low)
    d = qkv_weight.shape[0] // (3 * heads)
    scale = d**-0.5 if sm_scale is None else float(sm_scale)
    forced = backend_in_force()
    fused = x.device.type == "cpu" and forced in ("auto", "cpu")
    backend = select("linear_attention_block", x.device, x) if fused else forced
    if backend == "cpu":
        tensors = (x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias)
        dense = (None if t is None else t.contiguous() for t in tensors)
        return linear_attention_block_fwd(*dense, heads, eps, scale, backend)[0]
    if backend == "reference":
        return linear_attention_block_ref(
            x, norm_weight, qkv_weight, out_weight, heads=heads, norm_bias=norm_bias,
            out_bias=out_bias, eps=eps, sm_scale=scale,
        )  # fmt: skip
    qkv = norm_linear(x, norm_weight, qkv_weight, norm_bias=norm_bias, eps=eps)
    out = linear_attention(qkv.unflatten(-1, (3, heads, d)), sm_scale=scale)
    return linear_residual(x, out.flatten(-2), out_weight, out_bias)


def linear_attention_block_cost(
    shape: tuple[int, ...],
    heads: int,
    dim: int,
    itemsize: int,
    *,
    backward: bool = False,
    need_qkv: bool = True,
    need_out: bool = True,
) -> Cost:
    """Of one fused call on x of this shape; ``backward`` counts the backward alone, with the
    gradients of the projections that are needed and, of what it recomputes, ctx and M alone.

    Forward: x read twice, y written, the projections read; four products of rows by C by heads D,
    and per frame two of heads D² C. Backward: x and dy read twice, dx written, the projections
    read and their gradients written; per row dM, dq', dk', x̂'s three shares and two of the weight.
    """
    b, f, h, w, c = shape
    rows, inner = b * f * h * w, heads * dim
    weights, fold = 4 * c * inner, 2 * b * f * inner * dim * c
    product = 2 * rows * c * inner
    if backward:
        work = (6 + 2 * need_qkv) * product + (4 + need_qkv + need_out) * fold
        written = (3 * need_qkv + need_out) * c * inner
        return Cost(work, (5 * rows * c + weights + written) * itemsize)
    return Cost(4 * product + 2 * fold, (3 * rows * c + weights) * itemsize)


@flops(linear_attention_block_fwd)
def _(*, x, qkv_weight, heads, **_):
    return linear_attention_block_cost(x, heads, qkv_weight[0] // (3 * heads), 4)


@flops(linear_attention_block_bwd)
def _(*, x, qkv_weight, heads, need_qkv, need_out, **_):
    return linear_attention_block_cost(
        x, heads, qkv_weight[0] // (3 * heads), 4, backward=True, need_qkv=need_qkv,
        need_out=need_out,
    )  # fmt: skip

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

from fastvdm.ops._call import autocast_dtype, run, select
from fastvdm.ops._check import check_block
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.reference.linear_attention_block import linear_attention_block_ref
from fastvdm.runtime.dispatch import FP64, ByName, Implementations, implementations


@op(
    "linear_attention_block",
    outputs="y g lse",
    backward="dy x norm_weight norm_bias qkv_weight out_weight out_bias g lse heads eps sm_scale",
    grads="x! norm_weight:norm norm_bias:norm qkv_weight:qkv out_weight:out out_bias:out",
)
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
    b, f, _, _, c = x.shape
    d = qkv_weight.shape[0] // (3 * heads)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((b, f, heads, d, c), dtype=torch.float32),
        x.new_empty((b, f, heads, d), dtype=torch.float32),
    )


linear_attention_block_bwd = backward_of(linear_attention_block_fwd)


@implementations(
    "linear_attention_block", "linear_attention_block_fwd", "linear_attention_block_bwd",
    backends=("cpu",), examples=lambda device: {"fp32": (torch.empty(1, device=device),)},
)  # fmt: skip
def _(x: Tensor) -> Implementations:
    fp64 = x.dtype == torch.float64
    yield "cpu", FP64 if fp64 else None
    here = "on a CPU what the C++ kernel leaves runs on the torch reference"
    yield "parts", ByName(here) if x.device.type == "cpu" else None


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
    which = select("linear_attention_block", x.device, x)
    if which == "parts":  # each chooses its own backend
        qkv = norm_linear(x, norm_weight, qkv_weight, norm_bias=norm_bias, eps=eps)
        out = linear_attention(qkv.unflatten(-1, (3, heads, d)), sm_scale=scale)
        return linear_residual(x, out.flatten(-2), out_weight, out_bias)
    if which == "reference":
        return linear_attention_block_ref(
            x, norm_weight, qkv_weight, out_weight, heads=heads, norm_bias=norm_bias,
            out_bias=out_bias, eps=eps, sm_scale=scale,
        )  # fmt: skip
    return run(
        linear_attention_block_fwd, x, norm_weight, norm_bias, qkv_weight, out_weight, out_bias,
        heads, eps, scale, which,
    )[0]  # fmt: skip


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

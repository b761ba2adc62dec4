"""x + out(linear attention(LayerNorm_C(x))) over the pixels of each frame in one op.

    q' = softmax_D(x̂ W_qᵀ),  k' = softmax_N(x̂ W_kᵀ),  G = k'ᵀ x̂,  ctx = D^-½ G W_vᵀ,
    y = x + q' (ctx W_outᵀ) + b

with N = H*W pixels. v and the output of the attention, the largest tensors of the network after q
and k, are never computed: k'ᵀ v = (k'ᵀ x̂) W_vᵀ and (q' ctx) W_outᵀ = q' (ctx W_outᵀ), both once per
frame and head. This takes 4 C heads D multiplications per pixel; separate steps take as many, and
the two products of the attention. Saved for the backward are x, G and log Σ exp k. On a CPU, and on
a GPU unless ``exceeds_registers`` gives a reason, ``attention_block`` with linear attention is this
op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op


@op(
    "linear_attention_block",
    outputs="y g lse",
    backward="dy x norm_weight norm_bias qkv_weight out_weight out_bias g lse heads eps",
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, F, H, W, C); G (B, F, heads, D, C) and log Σ exp k (B, F, heads, D), both in fp32 (fp64
    for fp64)."""
    b, f, _, _, c = x.shape
    d = qkv_weight.shape[0] // (3 * heads)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty((b, f, heads, d, c), dtype=wide),
        x.new_empty((b, f, heads, d), dtype=wide),
    )


linear_attention_block_bwd = backward_of(linear_attention_block_fwd)


def exceeds_registers(x: Tensor, qkv_weight: Tensor, heads: int, low: torch.dtype) -> str | None:
    """Why Triton's kernels cannot, or should not, hold the block in registers; None if they do.

    A frame's G and M are heads D by C. With fewer pixels than channels they are larger than q and
    k, which they replace, and M takes more products than the attention. The programs keep tiles of
    pixels with all C channels, and sums of features by channels: above C = 128 ptxas spills on
    sm_80, sm_90 and sm_100. It also spills with fp32 operands.
    """
    pixels, channels = x.shape[2] * x.shape[3], x.shape[-1]
    dim = qkv_weight.shape[0] // (3 * heads)
    if low == torch.float32:
        return "fp32 products exceed the registers"
    if channels > 128:
        return f"C = {channels} is above 128"
    if dim > 64:
        return f"head dim {dim} is above 64"
    if pixels < channels:
        return f"C = {channels} is above the {pixels} pixels of a frame"
    return None


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
    """The cost of one fused call on x of this shape; ``backward`` counts the backward alone: the
    needed gradients of the projections and, of what it recomputes, only ctx and M.

    Forward: reads x twice and the projections, writes y; four products of rows by C by heads D, and
    two of heads D² C per frame. Backward: reads x and dy twice and the projections, writes dx and
    gradients of the projections; per row dM, dq', dk', three terms of x̂ and two of the weight.
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

"""x + out(attention(LayerNorm_C(x))) over the frames of each pixel in one kernel.

``attention_block`` over time uses this op if ``exceeds_registers`` gives no reason against it. The
kernel reads x once and writes y once. Only the inputs are saved; the backward recomputes from x.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.ops.axis_attention import axis_attention_cost, table_rows


@op(
    "temporal_block",
    backward="dy x norm_weight norm_bias qkv_weight qkv_bias out_weight out_bias heads eps options",
    grads="x! norm_weight:norm norm_bias:norm qkv_weight:qkv qkv_bias:qkv out_weight:out "
    "out_bias:out bias:bias rel_k:rel rel_v:rel",
)
def temporal_block_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
    options: AttentionOptions,
    backend: str,
) -> Tensor:
    """y (B, F, H, W, C) in the dtype of x. The backward always computes dx; for frozen weights it
    computes no gradient. Shaw tables exclude a rotary embedding and a bias."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


temporal_block_bwd = backward_of(temporal_block_fwd)


def exceeds_registers(
    x: Tensor, qkv_weight: Tensor, heads: int, tables: bool, low: torch.dtype
) -> str | None:
    """Why Triton's fused kernel cannot hold the block in registers, or None.

    A program keeps in registers one tile of rows with all C channels, its fp32 accumulator, and
    whole sequences. Above C = 256 this does not fit with enough rows per tile to pay for reading
    the 4*C*heads*D weights from the L2 cache once per tile; the block is then bound by its matrix
    products anyway. Above F = 32 a sequence does not fit one tile. fp32 operands and split products
    take two to four times the registers: ptxas spills from 68 bytes at C = 64 to 76 KB at C = 256
    (sm_90). fp64 would spill too, but it is used only for gradcheck.

    The other bounds were read off ptxas for sm_80, sm_90 and sm_100 and the available tiles. Calls
    are divided into classes by width, length, head size, dtype of the residual stream and Shaw
    ``tables``. A class is refused if any call in it spills, so a call without other options may fit
    although its class is refused.
    """
    frames, channels = x.shape[1], x.shape[-1]
    dim = qkv_weight.shape[0] // (3 * heads)
    if prod(x.shape[:4]) >= 2**31:
        return "2^31 rows or more: the kernels count them in 32 bits"
    if low == torch.float32:
        return "fp32 products exceed the registers"
    if channels > 256:
        return f"C = {channels} is above 256"
    if frames > 32:
        return f"F = {frames} is above 32"
    if dim > 64:
        return f"head dim {dim} is above 64"
    if frames > 16 and (channels > 64 or dim > 32):
        return f"F = {frames} is above 16 at C = {channels}, head dim {dim}"
    wide = x.dtype == torch.float32
    if channels > 128 and (dim > 32 or wide):
        return f"C = {channels} is above 128 at head dim {dim}, {x.dtype}"
    narrow = 64 if wide and dim > 32 else 128
    if tables and channels > narrow:
        return "the Shaw tables are above what the registers hold beside the rest"
    return None


def temporal_block_cost(
    shape: tuple[int, ...],
    heads: int,
    dim: int,
    itemsize: int,
    *,
    num_images: int = 0,
    rel_k: int = 0,
    rel_v: int = 0,
    backward: bool = False,
    need_qkv: bool = True,
    need_out: bool = True,
    need_rel: bool = True,
) -> Cost:
    """The cost of one fused call on x of this shape; ``backward`` counts the backward alone, with
    the weight gradients that are needed and without the projections that it recomputes.

    Forward: reads x and the four projections, writes y. Backward: reads x, dy and the projections,
    writes dx and the gradients of the projections; it takes twice the products of the forward. The
    attention between the projections is counted by ``axis_attention_cost``, with its images and
    Shaw tables.
    """
    b, f, h, w, c = shape
    rows, inner = b * f * h * w, heads * dim
    weights = 4 * c * inner
    attend = axis_attention_cost(
        (b, f, h, w, 3, heads, dim), itemsize, "time", num_images=num_images, rel_k=rel_k,
        rel_v=rel_v, backward=backward, need_drel_k=need_rel, need_drel_v=need_rel,
    ).flops  # fmt: skip
    if backward:
        written = (3 * need_qkv + need_out) * c * inner
        project = 2 * rows * (weights + written)
        return Cost(project + attend, (3 * rows * c + weights + written) * itemsize)
    return Cost(2 * rows * weights + attend, (2 * rows * c + weights) * itemsize)


@flops(temporal_block_fwd)
def _(*, x, qkv_weight, heads, rel_k, rel_v, num_images, **_):
    return temporal_block_cost(
        x, heads, qkv_weight[0] // (3 * heads), 4, num_images=num_images, rel_k=table_rows(rel_k),
        rel_v=table_rows(rel_v),
    )  # fmt: skip


@flops(temporal_block_bwd)
def _(*, x, qkv_weight, heads, rel_k, rel_v, num_images, need_qkv, need_out, need_rel, **_):
    return temporal_block_cost(
        x, heads, qkv_weight[0] // (3 * heads), 4, num_images=num_images, rel_k=table_rows(rel_k),
        rel_v=table_rows(rel_v), backward=True, need_qkv=need_qkv, need_out=need_out,
        need_rel=need_rel,
    )  # fmt: skip

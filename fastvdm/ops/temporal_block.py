"""x + out(attention(LayerNorm_C(x))) over the frames of each pixel: contract, op, autograd.

Ho et al. 2022, "Video Diffusion Models", section 3. The fused kernel reads x once and writes y
once; nothing but the inputs is saved for the backward, which recomputes from x. What exceeds a
GPU's registers is composed of other ops: norm_linear, axis_attention, linear_residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvdm.ops._call import autocast_dtype, run, select
from fastvdm.ops._check import check_block, check_options
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.ops.axis_attention import axis_attention, axis_attention_cost, table_rows
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.reference.temporal_block import temporal_block_ref
from fastvdm.runtime.dispatch import FP64, ByDesign, ByName, Implementations, implementations


@op(
    "temporal_block",
    backward="dy x norm_weight norm_bias qkv_weight qkv_bias out_weight out_bias heads eps bias "
    "rel_k rel_v rotary focus_mask num_images sm_scale",
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
    bias: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    rotary: Tensor | None,
    focus_mask: Tensor | None,
    num_images: int,
    sm_scale: float,
    backend: str,
) -> Tensor:
    """y (B, F, H, W, C) in the dtype of x. The backward gives dx always; with frozen weights no
    gradient of them is computed."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


temporal_block_bwd = backward_of(temporal_block_fwd)


def exceeds_registers(
    x: Tensor, qkv_weight: Tensor, heads: int, tables: bool = False, biased: bool = False
) -> str | None:
    """Why Triton's fused kernel would not hold the block in registers, or None.

    The program keeps one tile of rows, all C channels wide, and its fp32 accumulator in registers,
    and the whole sequence in that tile. Above C = 256 that no longer fits at a number of rows that
    would pay for streaming the 4*C*heads*D weights from the L2 once per tile, and there the block
    is bound by its matrix products anyway. Above F = 32 the sequence no longer fits one tile. In
    fp32 operands and split products take two to four times the registers: ptxas spills from 68
    bytes at C = 64 to 76 KB at C = 256 (sm_90). fp64 would too, but is there for gradcheck alone.

    Below these bounds ptxas was asked, for sm_80, sm_90 and sm_100 and the tiles that there are:
    where some call of a class spills, all of the class is refused. A class is the width, the
    length, the head, the dtype of the stream and two options: ``tables``, Shaw tables; ``biased``,
    a rotary embedding or a bias. So a call without options may fit where its class does not.
    """
    frames, channels = x.shape[1], x.shape[-1]
    dim = qkv_weight.shape[0] // (3 * heads)
    if qkv_weight.dtype == torch.float32:
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
    if tables and (biased or channels > narrow):
        return "the Shaw tables are above what the registers hold beside the rest"
    return None


def _examples(device: torch.device) -> dict[str, tuple]:
    x, weight = torch.empty(1, 16, 1, 1, 64, device=device), torch.empty(3, 64, device=device)
    return {
        "fp32": (x, weight, 1),
        "bf16": (x.bfloat16(), weight.bfloat16(), 1),
    }


@implementations("temporal_block", "temporal_block_fwd", "temporal_block_bwd", examples=_examples)
def _(
    x: Tensor, qkv_weight: Tensor, heads: int, tables: bool = False, biased: bool = False
) -> Implementations:
    fp64 = x.dtype == torch.float64
    yield "cpu", FP64 if fp64 else None
    exceeds = exceeds_registers(x, qkv_weight, heads, tables, biased)
    if exceeds is not None:
        yield "triton", ByDesign(exceeds)
    elif fp64 and x.is_cuda:
        # Triton 3.6 fails to compile fp64 products of computed operands; interpreted they work.
        yield "triton", FP64
    else:
        yield "triton", None
    if exceeds is None:
        yield "parts", "the fused kernels do without"
    else:
        here = "on a CPU what the C++ kernel leaves runs on the torch reference"
        yield "parts", ByName(here) if x.device.type == "cpu" else None


def temporal_block(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    *,
    heads: int,
    norm_bias: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    rel_k: Tensor | None = None,
    rel_v: Tensor | None = None,
    rotary: Tensor | None = None,
    focus_mask: Tensor | None = None,
    num_images: int = 0,
    sm_scale: float | None = None,
) -> Tensor:
    """x + out(attention(LayerNorm_C(x))), attention over the frames of each pixel.

    Args:
        x: (B, F, H, W, C); may be fp32 with 16-bit projections (as under autocast).
        norm_weight, norm_bias: (C,), the channel LayerNorm (biased variance, ``eps``).
        qkv_weight, qkv_bias: (3 * heads * D, C) and (3 * heads * D,); q | k | v, head-major.
        out_weight, out_bias: (C, heads * D) and (C,).
        bias: (heads, F, F), added to the logits [query, key].
        rel_k, rel_v: (1 or heads, 2R+1, D), Shaw vectors of the clipped distance key - query.
        rotary: (2, F, at most D/2), cos and sin in fp32 of interleaved pairs; not differentiated.
        focus_mask: (B,) bool; True: each frame of this sample attends only to itself.
        num_images: the last this many frames attend only to themselves, and no frame to them.
        sm_scale: D**-0.5 by default.

    Returns:
        (B, F, H, W, C) in the dtype of x.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit, before any launch.
    """
    check_block(x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps)
    shape = (*x.shape[:4], 3, heads, qkv_weight.shape[0] // (3 * heads))
    check_options(x, shape, "time", bias, rel_k, rel_v, rotary, focus_mask, num_images)
    low = autocast_dtype(qkv_weight)
    qkv_weight, out_weight = qkv_weight.to(low), out_weight.to(low)
    qkv_bias, out_bias, rel_k, rel_v = [
        None if t is None else t.to(low) for t in (qkv_bias, out_bias, rel_k, rel_v)
    ]
    scale = (qkv_weight.shape[0] // (3 * heads)) ** -0.5 if sm_scale is None else float(sm_scale)
    options: dict[str, Any] = dict(
        bias=bias, rel_k=rel_k, rel_v=rel_v, rotary=rotary, focus_mask=focus_mask,
        num_images=num_images, sm_scale=scale,
    )  # fmt: skip
    tables, biased = rel_k is not None or rel_v is not None, rotary is not None or bias is not None
    which = select("temporal_block", x.device, x, qkv_weight, heads, tables, biased)
    if which == "parts":  # each chooses its own backend
        qkv = norm_linear(x, norm_weight, qkv_weight, norm_bias=norm_bias, bias=qkv_bias, eps=eps)
        qkv = qkv.unflatten(-1, (3, heads, qkv_weight.shape[0] // (3 * heads)))
        out = axis_attention(qkv, axis="time", **options).flatten(-2)
        return linear_residual(x, out, out_weight, out_bias)
    if which == "reference":
        return temporal_block_ref(
            x, norm_weight, qkv_weight, out_weight, heads=heads, norm_bias=norm_bias,
            qkv_bias=qkv_bias, out_bias=out_bias, eps=eps, **options,
        )  # fmt: skip
    return run(
        temporal_block_fwd, x, norm_weight, norm_bias,
        qkv_weight, qkv_bias, out_weight, out_bias, heads,
        eps, bias, rel_k, rel_v, rotary, focus_mask, num_images,
        scale, which,
    )  # fmt: skip


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
    """Of one fused call on x of this shape; ``backward`` counts the backward alone, with the
    weight gradients that are needed and without the projections that it recomputes.

    Forward: x read, y written, the four projections read. Backward: x, dy read, dx written, the
    projections read and their gradients written; twice the products of the forward. The attention
    between them is ``axis_attention_cost``'s, with its images and Shaw tables.
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

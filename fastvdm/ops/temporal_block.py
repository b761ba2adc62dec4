"""x + out(attention(LayerNorm_C(x))) over the frames of each pixel: contract, op, autograd.

Ho et al. 2022, "Video Diffusion Models", section 3. The fused kernel reads x once and writes y
once; nothing but the inputs is saved for the backward, which recomputes from x. Where a kernel
does not take the width or the length (``parts_reason``), the block is composed of the package's
parts: norm_linear, axis_attention, linear_residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvdm.ops._check import check_block
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.ops.axis_attention import (
    axis_attention,
    axis_attention_cost,
    check_options,
    table_rows,
)
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.reference.temporal_block import temporal_block_ref
from fastvdm.runtime.dispatch import (
    ByDesign,
    autocast_dtype,
    backend_in_force,
    launchers,
    register,
    select,
)


@define
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
    """y (B, F, H, W, C) in the dtype of x."""
    return launchers("temporal_block", backend).temporal_block_fwd(
        x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
        bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale,
    )  # fmt: skip


@fake(temporal_block_fwd)
def _(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@define
def temporal_block_bwd(
    dy: Tensor,
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
    need_norm: bool,
    need_qkv: bool,
    need_out: bool,
    need_bias: bool,
    need_rel: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dx, dnorm_weight, dnorm_bias, dqkv_weight, dqkv_bias, dout_weight, dout_bias, dbias,
    drel_k, drel_v), each shaped and typed as its input; dx always. A flag asks for the gradients
    of one group: norm (weight, bias), qkv (weight, bias), out (weight, bias), bias, rel (k, v).
    What is not asked for, or belongs to an input that is None, is an empty (0,) tensor and costs
    nothing: with frozen weights no weight gradient is computed.
    """
    return launchers("temporal_block", backend).temporal_block_bwd(
        dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
        bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale,
        need_norm, need_qkv, need_out, need_bias, need_rel,
    )  # fmt: skip


@fake(temporal_block_bwd)
def _(
    dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
    bias, rel_k, rel_v, rotary, focus_mask, num_images, sm_scale,
    need_norm, need_qkv, need_out, need_bias, need_rel, backend,
):  # fmt: skip
    def like(t: Tensor | None, need: bool) -> Tensor:
        if t is None or not need:
            return x.new_empty((0,))
        return torch.empty_like(t, memory_format=torch.contiguous_format)

    return (
        like(x, True),
        like(norm_weight, need_norm),
        like(norm_bias, need_norm),
        like(qkv_weight, need_qkv),
        like(qkv_bias, need_qkv),
        like(out_weight, need_out),
        like(out_bias, need_out),
        like(bias, need_bias),
        like(rel_k, need_rel),
        like(rel_v, need_rel),
    )


_TENSORS = (
    "x", "norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "out_weight", "out_bias",
    "bias", "rel_k", "rel_v", "rotary", "focus_mask",
)  # fmt: skip
_NAMES = _TENSORS[:7] + ("heads", "eps") + _TENSORS[7:] + ("num_images", "sm_scale", "backend")
# The differentiable inputs, in the order in which the backward op returns their gradients.
_GRADS = _TENSORS[:10]


def _save(ctx, inputs, output):
    args = dict(zip(_NAMES, inputs))
    ctx.save_for_backward(*(args[name] for name in _TENSORS))
    ctx.heads, ctx.eps, ctx.num_images = args["heads"], args["eps"], args["num_images"]
    ctx.sm_scale, ctx.backend = args["sm_scale"], args["backend"]


def _backward(ctx, dy):
    saved = dict(zip(_TENSORS, ctx.saved_tensors))
    need = dict(zip(_NAMES, ctx.needs_input_grad))
    found = temporal_block_bwd(
        dy.contiguous(),
        *(saved[name] for name in _TENSORS[:7]),
        ctx.heads,
        ctx.eps,
        *(saved[name] for name in _TENSORS[7:]),
        ctx.num_images,
        ctx.sm_scale,
        need["norm_weight"] or need["norm_bias"],
        need["qkv_weight"] or need["qkv_bias"],
        need["out_weight"] or need["out_bias"],
        need["bias"],
        need["rel_k"] or need["rel_v"],
        ctx.backend,
    )
    grads = dict(zip(_GRADS, found))
    return tuple(grads[name] if name in grads and need[name] else None for name in _NAMES)


autograd(temporal_block_fwd, _backward, setup_context=_save)
no_double_backward(temporal_block_bwd)


def parts_reason(
    backend: str,
    x: Tensor,
    qkv_weight: Tensor,
    heads: int,
    *,
    tables: bool = False,
    turned: bool = False,
) -> str | None:
    """Why the block is better made of its parts than by ``backend``'s fused kernel, or None.

    The fused Triton program keeps one tile of rows, all C channels wide, and its fp32 accumulator
    in registers, and the whole sequence in that tile. Above C = 256 that no longer fits at a number
    of rows that would pay for streaming the 4*C*heads*D weights from the L2 once per tile
    (performance.md §3.4), and there the block is bound by its matrix products anyway. Above F = 32
    the sequence no longer fits one tile. In fp32 operands and split products take two to four times
    the registers: ptxas spills from 68 bytes at C = 64 to 76 KB at C = 256 (sm_90). fp64 would too,
    but is there for gradcheck alone.

    Below these bounds what stands together decides: the classes of width, length, head, stream and
    options of which some call spills, for one architecture, in the tiles that were tried. They are
    coarse: a call without options may fit where its class does not. ``tables``: there are Shaw
    tables; ``turned``: there is a rotary embedding or a bias.
    """
    frames, channels = x.shape[1], x.shape[-1]
    dim = qkv_weight.shape[0] // (3 * heads)
    if backend == "triton":
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
        if tables and (turned or channels > narrow):
            return "the Shaw tables are above what the registers hold beside the rest"
    return None


def unsupported(
    backend: str, x: Tensor, qkv_weight: Tensor, heads: int, **options: bool
) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    if x.dtype == torch.float64 and (backend == "cpu" or x.is_cuda):
        # Triton 3.6 fails to compile fp64 products of computed operands; interpreted they work.
        return ByDesign("fp64 runs on the torch reference")
    return parts_reason(backend, x, qkv_weight, heads, **options)


register(
    "temporal_block",
    stem="temporal_block",
    names=("temporal_block_fwd", "temporal_block_bwd"),
    unsupported=unsupported,
    backends=("triton", "cpu"),
)


def _fused_backend(device: torch.device) -> str:
    """Whose limits decide between the fused kernel and the parts."""
    forced = backend_in_force()
    if forced != "auto":
        return forced
    return "triton" if device.type == "cuda" else "cpu"


def _parts(
    x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps, **options
) -> Tensor:  # fmt: skip
    """The block as its parts, each choosing its own backend."""
    qkv = norm_linear(x, norm_weight, qkv_weight, norm_bias=norm_bias, bias=qkv_bias, eps=eps)
    dim = qkv_weight.shape[0] // (3 * heads)
    out = axis_attention(qkv.unflatten(-1, (3, heads, dim)), axis="time", **options)
    return linear_residual(x, out.flatten(-2), out_weight, out_bias)


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
    qkv_bias, out_bias, rel_k, rel_v = (
        None if t is None else t.to(low) for t in (qkv_bias, out_bias, rel_k, rel_v)
    )
    scale = (qkv_weight.shape[0] // (3 * heads)) ** -0.5 if sm_scale is None else float(sm_scale)
    options: dict[str, Any] = dict(
        bias=bias, rel_k=rel_k, rel_v=rel_v, rotary=rotary, focus_mask=focus_mask,
        num_images=num_images, sm_scale=scale,
    )  # fmt: skip
    asked = {
        "tables": rel_k is not None or rel_v is not None,
        "turned": rotary is not None or bias is not None,
    }
    wanted = _fused_backend(x.device)
    if wanted != "reference" and parts_reason(wanted, x, qkv_weight, heads, **asked) is not None:
        return _parts(
            x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
            **options,
        )  # fmt: skip
    backend = select("temporal_block", x.device, x, qkv_weight, heads, **asked)
    if backend == "reference":
        return temporal_block_ref(
            x, norm_weight, qkv_weight, out_weight, heads=heads, norm_bias=norm_bias,
            qkv_bias=qkv_bias, out_bias=out_bias, eps=eps, **options,
        )  # fmt: skip
    return temporal_block_fwd(
        x.contiguous(), norm_weight.contiguous(), _contiguous(norm_bias), qkv_weight.contiguous(),
        _contiguous(qkv_bias), out_weight.contiguous(), _contiguous(out_bias), heads, eps,
        _contiguous(bias), _contiguous(rel_k), _contiguous(rel_v), _contiguous(rotary),
        _contiguous(focus_mask), num_images, scale, backend,
    )  # fmt: skip


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


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

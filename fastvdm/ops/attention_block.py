"""``attention_block``: x + out(core(norm(x))), an attention block with norm and residual.

The core is softmax attention over the frames of each pixel or over the pixels of each frame, or
linear attention over the pixels of each frame. Ho et al. 2022, "Video Diffusion Models", section 3;
linear attention by Shen et al. 2021 (arXiv 1812.01243). Attention over time is one kernel
(``temporal_block``) and linear attention is one op (``linear_attention_block``): always on a CPU,
and on a GPU if its registers can hold them. Otherwise the block is run in parts: norm_act, linear,
the attention, linear_residual.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.ops._call import autocast_dtype, autocast_on, cast, run, select
from fastvdm.ops._check import check_block, check_options
from fastvdm.ops.axis_attention import attend
from fastvdm.ops.linear import linear
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_attention_block import exceeds_registers as exceeds_registers_linear
from fastvdm.ops.linear_attention_block import linear_attention_block_fwd
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.temporal_block import exceeds_registers, temporal_block_fwd
from fastvdm.reference.attention_block import attention_block_ref
from fastvdm.runtime.dispatch import FP64, ByDesign, ByName, Implementations, implementations

CORES = ("time", "space", "linear")
NO_OPTIONS = AttentionOptions()
FUSED = "the fused kernels do without"


def _examples(device: torch.device) -> dict[str, tuple]:
    x, weight = torch.empty(1, 16, 8, 8, 64, device=device), torch.empty(3, 64, device=device)
    types = {"fp32": (x, weight, 1), "bf16": (x.bfloat16(), weight.bfloat16(), 1)}
    return {f"{core} in {name}": (core, *call) for core in CORES for name, call in types.items()}


@implementations(
    "attention_block", "temporal_block_fwd", "temporal_block_bwd", "linear_attention_block_fwd",
    "linear_attention_block_bwd", examples=_examples,
)  # fmt: skip
def _(
    core: str,
    x: Tensor,
    qkv_weight: Tensor,
    heads: int,
    options: AttentionOptions = NO_OPTIONS,
    low: torch.dtype | None = None,
) -> Implementations:
    """``low`` is the dtype of the projections if it differs from that of ``qkv_weight``."""
    low = low or qkv_weight.dtype
    fp64 = x.dtype == torch.float64
    shaw = options.rel_k is not None or options.rel_v is not None
    biased = options.rotary is not None or options.bias is not None
    left = ByName("on a CPU what the C++ kernel leaves runs on the torch reference")
    if core == "space":
        yield "parts", None
    elif core == "linear":
        yield "cpu", FP64 if fp64 else None
        exceeds = exceeds_registers_linear(x, qkv_weight, heads, low)
        if exceeds is not None:
            yield "triton", ByDesign(exceeds)
            yield "parts", left if x.device.type == "cpu" else None
        else:
            yield "triton", FP64 if fp64 and x.is_cuda else None
            yield "parts", FUSED
    elif shaw and biased:
        never = ByDesign("only causal networks have Shaw tables beside a bias")
        yield "cpu", never
        yield "triton", never
        yield "parts", None
    else:
        yield "cpu", FP64 if fp64 else None
        exceeds = exceeds_registers(x, qkv_weight, heads, shaw, low)
        if exceeds is not None:
            yield "triton", ByDesign(exceeds)
            yield "parts", left if x.device.type == "cpu" else None
        else:
            # Triton 3.6 cannot compile fp64 products of computed operands; its interpreter can.
            yield "triton", FP64 if fp64 and x.is_cuda else None
            yield "parts", FUSED


def attention_block(
    x: Tensor,
    norm_weight: Tensor,
    qkv_weight: Tensor,
    out_weight: Tensor,
    *,
    core: str,
    heads: int,
    norm_bias: Tensor | None = None,
    qkv_bias: Tensor | None = None,
    out_bias: Tensor | None = None,
    eps: float = 1e-5,
    options: AttentionOptions = NO_OPTIONS,
) -> Tensor:
    """x + out(core(qkv(LayerNorm_C(x)))).

    Args:
        x: (B, F, H, W, C); it may be fp32 with 16-bit projections (as under autocast).
        norm_weight: (C,), weight of the LayerNorm over channels (biased variance).
        qkv_weight: (3 * heads * D, C); rows q | k | v, head-major.
        out_weight: (C, heads * D).
        core: "time" or "space" for softmax attention (``axis_attention``), or "linear"
            (``linear_attention``), which takes no ``qkv_bias``.
        heads: number of heads.
        norm_bias: (C,), or None.
        qkv_bias: (3 * heads * D,), or None.
        out_bias: (C,), or None.
        eps: epsilon of the LayerNorm.
        options: options of attention over time.

    Returns:
        (B, F, H, W, C) in the dtype of x.

    Raises:
        ValueError: a shape, device or value does not fit; raised before any launch.
        TypeError: a dtype does not fit; raised before any launch.
    """
    check_block(x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps)
    low = autocast_dtype(qkv_weight)
    if core == "time":
        shape = (*x.shape[:4], 3, heads, qkv_weight.shape[0] // (3 * heads))
        options = check_options(x, shape, core, options, low)
    elif core not in CORES:
        raise ValueError(f"core must be one of {', '.join(CORES)}, got {core!r}")
    elif options != NO_OPTIONS:
        raise ValueError(f"core {core!r} takes no options, got {_given(options)}")
    elif core == "linear" and qkv_bias is not None:
        raise ValueError("core 'linear' takes no qkv_bias")
    which = select("attention_block", x.device, core, x, qkv_weight, heads, options, low)
    if which != "cpu":  # the C++ kernels take weights of any dtype and cache their packed form
        qkv_weight, qkv_bias, out_weight, out_bias = cast(
            low, qkv_weight, qkv_bias, out_weight, out_bias
        )
    if which == "parts":  # each part chooses its own backend
        normed = norm_act(x, norm_weight, norm_bias, kind="layer", eps=eps, act=False)
        if not autocast_on(x.device.type):
            normed = normed.to(low)
        qkv = linear(normed, qkv_weight, qkv_bias)
        return linear_residual(x, attention(qkv, core, heads, options), out_weight, out_bias)
    if which == "reference":
        return attention_block_ref(
            x, norm_weight, qkv_weight, out_weight, core=core, heads=heads, norm_bias=norm_bias,
            qkv_bias=qkv_bias, out_bias=out_bias, eps=eps,
            **(options._asdict() if core == "time" else {}),
        )  # fmt: skip
    if core == "linear":
        return run(
            linear_attention_block_fwd, x, norm_weight, norm_bias, qkv_weight, out_weight,
            out_bias, heads, eps, which,
        )[0]  # fmt: skip
    return run(
        temporal_block_fwd, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias,
        heads, eps, *options, which,
    )  # fmt: skip


def attention(qkv: Tensor, core: str, heads: int, options: AttentionOptions) -> Tensor:
    """The attention between the projections: (..., 3 * heads * D) to (..., heads * D)."""
    qkv = qkv.unflatten(-1, (3, heads, qkv.shape[-1] // (3 * heads)))
    found = linear_attention(qkv) if core == "linear" else attend(qkv, core, options)
    return found.flatten(-2)


def _given(options: AttentionOptions) -> str:
    pairs = zip(options._fields, options, NO_OPTIONS)
    return ", ".join(name for name, t, none in pairs if t is not none)

"""The temporal attention block with its norm, projections and residual, in plain torch.

Ho et al. 2022, "Video Diffusion Models", section 3: attention over the frames, space as batch.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastvdm.reference.axis_attention import axis_attention_ref


def temporal_block_ref(
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
    """x + out(attention(LayerNorm_C(x))) over the frames of each pixel; (B, F, H, W, C) in and out.

    Arguments as ``fastvdm.ops.temporal_block``. The residual stream may be fp32 while the
    projections are 16-bit: the normalised x takes the dtype of ``qkv_weight``.
    """
    shift = None if norm_bias is None else norm_bias.to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), shift, eps)
    qkv = F.linear(normed.to(qkv_weight.dtype), qkv_weight, qkv_bias)
    out = axis_attention_ref(
        rearrange(qkv, "b f h w (three n d) -> b f h w three n d", three=3, n=heads),
        axis="time",
        bias=bias,
        rel_k=rel_k,
        rel_v=rel_v,
        rotary=rotary,
        focus_mask=focus_mask,
        num_images=num_images,
        sm_scale=sm_scale,
    )
    out = F.linear(rearrange(out, "b f h w n d -> b f h w (n d)"), out_weight, out_bias)
    return (x + out).to(x.dtype)

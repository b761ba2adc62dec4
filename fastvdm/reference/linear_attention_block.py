"""The linear attention block with its norm, projections and residual, in plain torch.

Ho et al. 2022, "Video Diffusion Models", has full attention over space; the networks that follow it
in the open take the linear attention of Shen et al. 2021 (arXiv 1812.01243) at the large levels.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastvdm.reference.linear_attention import linear_attention_ref


def linear_attention_block_ref(
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
    """x + out(linear attention(LayerNorm_C(x))), each frame by itself; (B, F, H, W, C) in and out.

    Arguments as ``fastvdm.ops.linear_attention_block``. The residual stream may be fp32 while the
    projections are 16-bit: the normalised x takes the dtype of ``qkv_weight``.
    """
    shift = None if norm_bias is None else norm_bias.to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), shift, eps)
    qkv = F.linear(normed.to(qkv_weight.dtype), qkv_weight)
    out = linear_attention_ref(
        rearrange(qkv, "b f h w (three n d) -> b f h w three n d", three=3, n=heads),
        sm_scale=sm_scale,
    )
    out = F.linear(rearrange(out, "b f h w n d -> b f h w (n d)"), out_weight, out_bias)
    return (x + out).to(x.dtype)

"""An attention block with its norm, projections and residual, in plain torch.

Ho et al. 2022, "Video Diffusion Models", section 3: attention over space with the frames as batch,
over time with the pixels as batch. Open implementations use the linear attention of Shen et al.
2021 (arXiv 1812.01243) over space at the large levels.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.reference.linear_residual import linear_residual_ref


def attention_block_ref(
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
    **options: Any,
) -> Tensor:
    """x + out(core(qkv(LayerNorm_C(x)))); (B, F, H, W, C) in and out.

    The arguments are those of ``fastvdm.ops.attention_block``, with ``options`` given one by one.
    The residual stream may be fp32 with 16-bit projections: the normalised x is converted to the
    dtype of ``qkv_weight``.
    """
    shift = None if norm_bias is None else norm_bias.to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), shift, eps)  # Ba et al. 2016
    qkv = F.linear(normed.to(qkv_weight.dtype), qkv_weight, qkv_bias)
    qkv = qkv.unflatten(-1, (3, heads, qkv_weight.shape[0] // (3 * heads)))
    if core == "linear":
        out = linear_attention_ref(qkv, **options)
    else:
        out = axis_attention_ref(qkv, axis=core, **options)
    return linear_residual_ref(x, out.flatten(-2), out_weight, out_bias)

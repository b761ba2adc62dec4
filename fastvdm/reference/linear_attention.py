"""Linear attention over the pixels of each frame, in plain torch.

Shen et al. 2021, "Efficient Attention: Attention with Linear Complexities" (arXiv 1812.01243),
Eq. 4 with softmax normalisation (its section 3.3), once per frame and head.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def linear_attention_ref(qkv: Tensor, *, sm_scale: float | None = None) -> Tensor:
    """out = softmax_D(q) * sm_scale @ (softmax_N(k)ᵀ @ v).

    Args:
        qkv: packed projections (B, F, H, W, 3, heads, D).
        sm_scale: factor on the normalised queries; D**-0.5 by default.

    Returns:
        (B, F, H, W, heads, D) in the dtype of ``qkv``.
    """
    height, width, dim = qkv.shape[2], qkv.shape[3], qkv.shape[-1]
    scale = dim**-0.5 if sm_scale is None else sm_scale
    q, k, v = rearrange(qkv, "b f h w three n d -> three b f n (h w) d").unbind(0)
    q = q.softmax(dim=-1)
    k = k.softmax(dim=-2)
    ctx = torch.einsum("bfnpd,bfnpe->bfnde", k, v) * scale
    out = torch.einsum("bfnpd,bfnde->bfnpe", q, ctx).to(qkv.dtype)
    return rearrange(out, "b f n (h w) e -> b f h w n e", h=height, w=width)

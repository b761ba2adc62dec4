"""LayerNorm over channels and the projection after it, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def norm_linear_ref(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    norm_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """LayerNorm_C(x) weightᵀ + bias: x (B, F, H, W, C) → (B, F, H, W, N) in the dtype of weight.

    Ba et al. 2016, Eq. 3, over channels. x may be fp32 while the projection is 16-bit.
    """
    shift = None if norm_bias is None else norm_bias.to(x.dtype)
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), shift, eps)
    return F.linear(normed.to(weight.dtype), weight, bias)

"""A projection and the residual after it, in plain torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear_residual_ref(x: Tensor, o: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x + (o weightᵀ + bias): x (..., N), o (..., K), weight (N, K) → (..., N) as x."""
    return (x + F.linear(o, weight, bias)).to(x.dtype)

"""``conv_group_norm`` in plain torch: a per-frame convolution, then a norm and what follows it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.reference.space_conv import space_conv_ref


def conv_group_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    upsample: str | None = None,
    **norm: Any,
) -> Tensor:
    """norm_act_ref(space_conv_ref(x, weight, bias, x2=x2), norm_weight, norm_bias, **norm)."""
    y = space_conv_ref(x, weight, bias, x2=x2, upsample=upsample)
    return norm_act_ref(y, norm_weight, norm_bias, **norm)

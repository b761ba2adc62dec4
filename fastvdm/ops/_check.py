"""What the attention blocks ask of their norm and projections, before anything is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.runtime.dispatch import autocast_on

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_dtypes(x: Tensor, name: str, weight: Tensor, biases: dict[str, Tensor | None]) -> None:
    """Raises TypeError unless the residual stream ``x`` has the dtype of the projection ``weight``,
    or is fp32 over a 16-bit one, and the biases have its dtype. Under autocast all but fp64 mix."""
    if (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"fp64 only throughout: x is {x.dtype}, {name} {weight.dtype}")
    if autocast_on(x.device.type):
        return
    if x.dtype not in (weight.dtype, torch.float32):
        raise TypeError(
            f"x is {x.dtype}, {name} {weight.dtype}: outside autocast only an fp32 x may differ"
        )
    for bias_name, t in biases.items():
        if t is not None and t.dtype != weight.dtype:
            raise TypeError(f"{bias_name} is {t.dtype}, {name} {weight.dtype}")


def check_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
) -> None:
    """Raises ValueError or TypeError for the first that does not fit: x (B, F, H, W, C), the norm
    (C,), qkv (3 * heads * D, C), out (C, heads * D)."""
    if x.ndim != 5:
        raise ValueError(f"x must be (B, F, H, W, C), got {tuple(x.shape)}")
    channels = x.shape[4]
    if qkv_weight.ndim != 2 or heads < 1 or qkv_weight.shape[0] % (3 * heads):
        raise ValueError(
            f"qkv_weight must be (3 * heads * D, C) with heads = {heads}, "
            f"got {tuple(qkv_weight.shape)}"
        )
    features = qkv_weight.shape[0]
    for name, t, shape in (
        ("x", x, tuple(x.shape)),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        ("qkv_weight", qkv_weight, (features, channels)),
        ("qkv_bias", qkv_bias, (features,)),
        ("out_weight", out_weight, (channels, features // 3)),
        ("out_bias", out_bias, (channels,)),
    ):
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {t.device}")
        if t.dtype not in _DTYPES:
            raise TypeError(f"{name} must be fp32, fp16, bf16 or fp64, got {t.dtype}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    if out_weight.dtype != qkv_weight.dtype:
        raise TypeError(
            f"out_weight must have the dtype of qkv_weight, {qkv_weight.dtype}, "
            f"got {out_weight.dtype}"
        )
    check_dtypes(x, "qkv_weight", qkv_weight, {"qkv_bias": qkv_bias, "out_bias": out_bias})

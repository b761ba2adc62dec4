"""Space-only convolutions of the factorized network, in plain torch: the contract of space_conv.

A 1x3x3 convolution over (B, F, H, W, C) is a 2-D one over B*F channels-last images (Ho et al. 2022,
Video Diffusion Models, §3: "each 2D convolution into a space-only 3D convolution").
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def space_conv_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    x2: Tensor | None = None,
    stride: int = 1,
    residual: Tensor | None = None,
    upsample: str | None = None,
) -> Tensor:
    """conv2d([x, x2]) + residual on every frame; see ``fastvdm.ops.space_conv``."""
    kernel = weight.shape[-1]
    padding = kernel // 2 if kernel % 2 else kernel // 2 - 1
    images = x if x2 is None else torch.cat([x, x2], dim=-1)
    images = rearrange(images, "b f h w c -> (b f) c h w")
    if upsample == "nearest":
        images = F.interpolate(images, scale_factor=2, mode="nearest")
    y = F.conv2d(images, weight, bias, stride=stride, padding=padding)
    y = rearrange(y, "(b f) c h w -> b f h w c", b=x.shape[0], f=x.shape[1])
    if residual is not None:
        y = y + residual.to(y.dtype)
    return y.contiguous()


def space_conv_transpose_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed 4x4 convolution with stride 2 and padding 1; H and W double."""
    images = rearrange(x, "b f h w c -> (b f) c h w")
    y = F.conv_transpose2d(images, weight, bias, stride=2, padding=1)
    return rearrange(y, "(b f) c h w -> b f h w c", b=x.shape[0], f=x.shape[1]).contiguous()


def group_stats_ref(
    y: Tensor, groups: int, per_frame: bool = False, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """GroupNorm statistics of y (B, F, H, W, C): mean and 1/std, each (B, groups), or (B*F, groups)
    per frame, in fp32 (fp64 for fp64 input)."""
    wide = y.double() if y.dtype == torch.float64 else y.float()
    if per_frame:
        wide = rearrange(wide, "b f h w (g c) -> (b f) g (h w c)", g=groups)
    else:
        wide = rearrange(wide, "b f h w (g c) -> b g (f h w c)", g=groups)
    variance, mean = torch.var_mean(wide, dim=-1, correction=0)
    return mean, torch.rsqrt(variance + eps)

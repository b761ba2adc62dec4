"""The downsampling D of Eq. 8 and its largest gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Downsample = Callable[[Tensor], Tensor]  # (B, C, L, H, W) -> (B, C, L, h, w), differentiable


def average_downsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average pooling over blocks: (B, C, F, H, W) -> (B, C, F, *size), whole factors."""
    return F.avg_pool3d(x, (1, x.shape[3] // size[0], x.shape[4] // size[1]))


def bilinear_downsample(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation of each frame, without antialiasing (averaging at factor 2)."""
    b, c, f = x.shape[:3]
    images = x.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    return small.unflatten(0, (b, f)).transpose(1, 2)


def norm_squared(down: Downsample, zeros: Tensor) -> Tensor:
    """Measure |D|^2, the largest ||D v||^2/||v||^2, per sample (B,) by power iteration. If D is not
    linear its derivative is used. The result is 1 for a sample that D ignores.

    Raises:
        ValueError: D is not differentiable, not finite, or does not depend on its input.
    """
    g = torch.Generator().manual_seed(0)
    at, v = torch.rand((2, *zeros.shape), generator=g, dtype=zeros.dtype).to(zeros.device)
    at = 2 * at - 1
    v, step = v + 1, 0.01  # averages have their largest gain on constants
    with torch.enable_grad():
        at.requires_grad_()
        value = down(at)
        if not value.requires_grad:
            raise ValueError("downsample must be differentiable: its output has no gradient")
        size = _size(v)
        gain = torch.zeros(len(v))
        for _ in range(16):
            v = v / size.to(v).clamp_min(1e-30)
            slope = (
                down(at.detach() + step * v).detach() - value.detach()
            ) / step  # J v, D's Jacobian J
            (v,) = torch.autograd.grad(
                value, at, slope, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            size = _size(v)
            before, gain = gain, size.flatten().cpu().double()
            if bool(((gain - before).abs() <= 1e-3 * gain).all()):
                break
    if not bool(torch.isfinite(gain).all()) or not bool((gain > 0).any()):
        raise ValueError(
            "downsample must depend on its input and be finite, its largest gain is "
            f"{float(gain.max())}"
        )
    return torch.where(gain > 0, gain, 1.0)


def _size(v: Tensor) -> Tensor:
    """(B, 1, 1, 1, 1) root mean square of every sample."""
    return v.square().mean((1, 2, 3, 4), keepdim=True).sqrt()

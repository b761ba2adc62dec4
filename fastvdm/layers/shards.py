"""Frames sharded over ranks: the exchanges that layers need. See ``fastvdm.parallel``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor


class _Exchange(torch.autograd.Function):
    """All-to-all of equal parts along axis 0; it is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _wait(collectives.all_to_all_single(x.contiguous(), None, None, group))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _wait(collectives.all_to_all_single(dy.contiguous(), None, None, ctx.group)), None


class _Sum(torch.autograd.Function):
    """Sum over the ranks. Every rank's copy contributes to the loss, so its transpose is a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _wait(collectives.all_reduce(x.contiguous(), "sum", group))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _wait(collectives.all_reduce(dy.contiguous(), "sum", ctx.group)), None


def _wait(x: Tensor) -> Tensor:
    return collectives.wait_tensor(x)


class FrameShards:
    """The ``size`` ranks of ``group`` that share a video. It counts the bytes that it sends."""

    def __init__(self, group: Any, size: int) -> None:
        self.group, self.size = group, size
        self.bytes_sent, self.calls = 0, 0

    def __deepcopy__(self, memo: dict) -> FrameShards:
        return self  # a process group cannot be copied; a copied model uses the same one

    def _count(self, x: Tensor, share: float) -> None:
        if not torch.compiler.is_compiling():
            self.bytes_sent += int(x.numel() * x.element_size() * share)
            self.calls += 1

    def to_pixels(self, x: Tensor) -> Tensor:
        """(B, F/P, H, W, C) → (B, F, 1, H*W/P, C): all frames of this rank's pixels.

        Raises:
            ValueError: P does not divide H * W.
        """
        b, f, h, w, c = x.shape
        p = self.size
        if h * w % p:
            raise ValueError(f"{p} ranks do not divide the {h} x {w} pixels of a feature map")
        self._count(x, (p - 1) / p)
        parts = x.reshape(b, f, p, h * w // p, c).permute(2, 0, 1, 3, 4)
        parts = _Exchange.apply(parts, self.group)
        return parts.transpose(0, 1).reshape(b, p * f, 1, h * w // p, c)

    def to_frames(self, x: Tensor, height: int, width: int) -> Tensor:
        """The inverse of ``to_pixels``."""
        b, frames, _, s, c = x.shape
        p = self.size
        self._count(x, (p - 1) / p)
        parts = _Exchange.apply(x.reshape(b, p, frames // p, s, c).transpose(0, 1), self.group)
        return parts.permute(1, 2, 0, 3, 4).reshape(b, frames // p, height, width, c)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the ranks."""
        self._count(x, 2 * (self.size - 1) / self.size)
        return _Sum.apply(x, self.group) / self.size

    def group_stats(self, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and 1/std, each (B, groups), of GroupNorm over a whole video of which x
        (B, F/P, H, W, C) is this rank's part. Chan et al. 1983: first means, then deviations."""
        b, c = x.shape[0], x.shape[-1]
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide.reshape(b, -1, groups, c // groups)
        variance, mean = torch.var_mean(wide, dim=(1, 3), correction=0)
        whole = self.mean(mean)
        return whole, torch.rsqrt(self.mean(variance + (mean - whole).square()) + eps)

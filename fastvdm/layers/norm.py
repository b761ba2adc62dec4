"""The normalisations of both layouts: one module around one op."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvdm.layers.conv import join
from fastvdm.layers.plain import weights_of
from fastvdm.ops.conv_group_norm import norm_act

if TYPE_CHECKING:
    from fastvdm.layers.shards import FrameShards

KINDS = ("group", "rms", "layer")


class Norm(nn.Module):
    """Normalise (B, F, H, W, C), then affine, FiLM, SiLU, dropout mask and residual in one op.

    ``kind`` is "group" (statistics over the video, or over each frame with ``per_frame``), "rms" or
    "layer" (both over the channels of one pixel).
    """

    def __init__(
        self,
        kind: str,
        channels: int,
        *,
        groups: int = 1,
        per_frame: bool = False,
        eps: float | None = None,
        bias: bool | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"norm must be one of {', '.join(KINDS)}, got {kind!r}")
        if kind == "group" and channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels")
        self.kind, self.channels, self.groups = kind, channels, groups
        self.per_frame, self.eps = per_frame, eps
        self.weight = nn.Parameter(torch.ones(channels))
        has_bias = kind == "group" if bias is None else bias
        self.bias = nn.Parameter(torch.zeros(channels)) if has_bias else None
        self.shards: FrameShards | None = None

    def extra_repr(self) -> str:
        groups = f", groups={self.groups}, per_frame={self.per_frame}"
        return f"{self.kind}, {self.channels}{groups if self.kind == 'group' else ''}"

    def forward(
        self,
        x: Tensor,
        *,
        x2: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        act: bool = False,
        dropout_mask: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        stats = None
        if self.shards is not None and self.kind == "group" and not self.per_frame:
            x, x2 = join(x, x2), None
            stats = self.shards.group_stats(x, self.groups, 1e-5 if self.eps is None else self.eps)
            if torch.is_grad_enabled():  # the kernel's backward would lack the other ranks' terms
                y = self._apply_stats(x, *stats)
                return _finish(y, scale, shift, act, dropout_mask, residual).to(x.dtype)
        return norm_act(
            x,
            self.weight,
            self.bias,
            kind=self.kind,
            groups=self.groups,
            per_frame=self.per_frame,
            eps=self.eps,
            scale=scale,
            shift=shift,
            act=act,
            residual=residual,
            dropout_mask=dropout_mask,
            x2=x2,
            stats=stats,
        )

    def _apply_stats(self, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        """GroupNorm and affine with given statistics (B, groups), in plain torch."""
        b, c = x.shape[0], self.channels
        mean, rstd = (
            t.repeat_interleave(c // self.groups, dim=1).view(b, 1, 1, 1, c) for t in (mean, rstd)
        )
        y = (x - mean) * rstd * self.weight
        return y if self.bias is None else y + self.bias


def _finish(
    y: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = False,
    dropout_mask: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """What ``Norm`` does after the affine map, in plain torch."""
    b, c = y.shape[0], y.shape[-1]
    y = y if scale is None else y * (1 + scale.view(b, 1, 1, 1, c))
    y = y if shift is None else y + shift.view(b, 1, 1, 1, c)
    y = F.silu(y) if act else y
    y = y if dropout_mask is None else y * dropout_mask
    return y if residual is None else y + residual


def normalise(norm: nn.Module, x: Tensor, x2: Tensor | None = None, **options: Any) -> Tensor:
    """norm([x, x2]), then ``options`` as in ``Norm.forward``. A plain ``Norm`` runs as one op. Any
    other module is called on one tensor, and the options follow in at least fp32."""
    if weights_of(norm, Norm) is not None:
        return norm(x, x2=x2, **options)
    y = norm(join(x, x2))
    return _finish(y.to(torch.promote_types(y.dtype, torch.float32)), **options).to(y.dtype)

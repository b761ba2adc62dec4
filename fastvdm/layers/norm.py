"""The normalisations of both network families, one module over one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvdm.ops.conv_group_norm import norm_act

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
        )

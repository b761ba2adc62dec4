"""The parts of both network layouts: units, levels and heads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvdm.layers.attention import Attention, TimeContext
from fastvdm.layers.conv import SpaceConv, SpaceConvTranspose, convolve
from fastvdm.layers.norm import Norm, normalise
from fastvdm.layers.plain import hangs_on
from fastvdm.layers.resnet import Films, PreNormResnetBlock, ResnetBlock

Block = ResnetBlock | PreNormResnetBlock
Resample = SpaceConv | SpaceConvTranspose | PreNormResnetBlock


def attend(layer: nn.Module, x: Tensor, time: TimeContext) -> Tensor:
    """Temporal attention. An identity that replaces it takes one argument."""
    return layer(x) if isinstance(layer, nn.Identity) else layer(x, time)


def residual(
    block: nn.Module, x: Tensor, emb: Tensor | Films, skip: Tensor | None = None
) -> Tensor:
    """Apply a residual block. If every frame has its own embedding, the block sees each frame as a
    video of its own: its convolutions are spatial, and its norms are then those of single frames.
    """
    rows = (emb.emb if isinstance(emb, Films) else emb).shape[0]
    if rows == x.shape[0]:
        return block(x, emb, skip)
    frames = x.shape[:2]
    skip = None if skip is None else skip.flatten(0, 1)[:, None]
    return block(x.flatten(0, 1)[:, None], emb, skip)[:, 0].unflatten(0, frames)


class Unit(nn.Module):
    """Residual blocks, then spatial and temporal attention; the first block takes the skip."""

    def __init__(
        self,
        blocks: Iterable[Block],
        spatial: Attention | None = None,
        temporal: Attention | None = None,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.spatial = spatial
        self.temporal = temporal
        self.recompute = False  # True: recompute activations in the backward pass

    def forward(
        self, x: Tensor, emb: Tensor | Films, time: TimeContext, skip: Tensor | None = None
    ) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, emb, time, skip, use_reentrant=False)
        return self._forward(x, emb, time, skip)

    def _forward(
        self, x: Tensor, emb: Tensor | Films, time: TimeContext, skip: Tensor | None
    ) -> Tensor:
        own: dict[str, Any] = self._modules  # faster than attribute access to a module
        for block in own["blocks"]:
            x, skip = residual(block, x, emb, skip), None
        spatial, temporal = own.get("spatial"), own.get("temporal")
        if spatial is not None:
            x = spatial(x)
        return x if temporal is None else attend(temporal, x, time)


class Level(nn.Module):
    """The units of one resolution, then the resampling to the next (None at the last level). With
    ``upsample`` height and width are doubled before the resampling convolution."""

    def __init__(
        self, units: Iterable[Unit], resample: Resample | None, *, upsample: bool = False
    ) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)
        self.resample, self.upsample = resample, upsample
        self.resample_takes_emb = isinstance(resample, PreNormResnetBlock)

    def down(
        self, x: Tensor, emb: Tensor | Films, time: TimeContext, push_resampled: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the input of the next level and the skips that this level pushes."""
        skips = []
        for unit in self.units:
            x = unit(x, emb, time)
            skips.append(x)
        if self.resample is not None:
            x = self._change_resolution(x, emb)
            if push_resampled:
                skips.append(x)
        return x, skips

    def up(self, x: Tensor, emb: Tensor | Films, time: TimeContext, skips: list[Tensor]) -> Tensor:
        """``skips`` are in the order in which they were pushed, one per unit."""
        for unit, skip in zip(self.units, reversed(skips), strict=True):
            x = unit(x, emb, time, skip)
        return x if self.resample is None else self._change_resolution(x, emb)

    def _change_resolution(self, x: Tensor, emb: Tensor | Films) -> Tensor:
        resample = self.resample
        assert resample is not None
        if self.resample_takes_emb:
            return residual(resample, x, emb)
        return convolve(resample, x, upsample=self.upsample)


def film_layers(levels: Iterable[nn.Module], middle: Iterable[nn.Module]) -> list[nn.Module]:
    """The FiLM layers of all blocks. The list is empty if a module between the network and a layer
    has a hook or was replaced: each block then projects the embedding itself."""
    found: list[nn.Module] = []
    units: list[nn.Module] = [*middle]
    blocks: list[nn.Module] = []
    for level in levels:
        if not isinstance(level, Level):
            return []
        units += level.units
        if level.resample_takes_emb and level.resample is not None:
            blocks.append(level.resample)
    for unit in units:
        if not isinstance(unit, Unit) or hangs_on(unit):
            return []
        blocks += unit.blocks
    for block in blocks:
        if not isinstance(block, Block) or hangs_on(block):
            return []
        if block.film is not None:
            found.append(block.film)
    return found


class PeerHead(nn.Module):
    """A residual block over [x, stem output], then a 1x1 convolution."""

    def __init__(self, block: ResnetBlock, conv: SpaceConv) -> None:
        super().__init__()
        self.block, self.conv = block, conv

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        return convolve(self.conv, self.block(x, None, skip))


class PaperHead(nn.Module):
    """A norm, SiLU and a 3x3 convolution."""

    def __init__(self, norm: Norm, conv: SpaceConv) -> None:
        super().__init__()
        self.norm, self.conv = norm, conv

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        return convolve(self.conv, normalise(self.norm, x, skip, act=True))

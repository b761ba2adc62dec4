"""The two residual blocks: conv-norm-act (peer layout) and norm-act-conv (paper layout)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvdm.layers.conv import SpaceConv, convolve, join, nearest_up
from fastvdm.layers.norm import Norm, normalise
from fastvdm.layers.plain import weights_of
from fastvdm.ops.conv_group_norm import conv_group_norm

MakeNorm = Callable[[int], Norm]


def dropout_mask(
    x: Tensor, channels: int, p: float, training: bool, factor: int = 1
) -> Tensor | None:
    """(B, F, H * factor, W * factor, channels): 0 with probability p, otherwise 1 / (1 - p). None
    if dropout is off."""
    if not training or p == 0:
        return None
    b, f, h, w, _ = x.shape
    return F.dropout(x.new_ones(b, f, h * factor, w * factor, channels), p)


class Films:
    """The embedding together with the outputs of FiLM layers, computed in one product."""

    def __init__(self, emb: Tensor, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight for layer in layers])
        bias = torch.cat([layer.bias for layer in layers])
        widths = [layer.out_features for layer in layers]
        self.emb = emb
        self.made = dict(zip(layers, F.linear(emb, weight, bias).split(widths, dim=-1)))


def films(emb: Tensor | Films, layers: Sequence[nn.Module]) -> Tensor | Films:
    """Project ``emb`` for all ``layers`` in one product, if all of them are plain and none needs a
    weight gradient, which would have to be split between them. Otherwise return ``emb``."""
    if torch.compiler.is_compiling() or not layers or isinstance(emb, Films):
        return emb
    plain = [layer for layer in layers if weights_of(layer, nn.Linear) is not None]
    weights = (p for layer in plain for p in layer.parameters())
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in weights)
    if trained or len(plain) < len(layers) or any(layer.bias is None for layer in plain):
        return emb
    return Films(emb, plain)  # type: ignore[arg-type]


def _project(layer: nn.Module, emb: Tensor | Films) -> Tensor:
    if isinstance(emb, Films):
        found = emb.made.get(layer)  # type: ignore[call-overload]
        if found is not None:
            return found
        emb = emb.emb
    weights = weights_of(layer, nn.Linear)
    return layer(emb) if weights is None else F.linear(emb, *weights)


def _film(
    layer: nn.Linear | None, emb: Tensor | Films | None
) -> tuple[Tensor | None, Tensor | None]:
    """(scale, shift), each (B, C), from the activated embedding."""
    if layer is None or emb is None:
        return None, None
    scale, shift = _project(layer, emb).chunk(2, dim=-1)
    return scale, shift


def _conv_norm(
    conv: SpaceConv,
    norm: Norm,
    x: Tensor,
    x2: Tensor | None = None,
    *,
    upsample: bool = False,
    **options: Any,
) -> Tensor:
    """conv → norm → FiLM → SiLU → dropout → + residual. The convolution's kernel computes the
    statistics if it can, unless they are combined over ranks."""
    first, last = weights_of(conv, SpaceConv), weights_of(norm, Norm)
    if first is None or last is None or norm.shards is not None:  # call each module
        return normalise(norm, convolve(conv, x, x2, upsample=upsample), act=True, **options)
    return conv_group_norm(
        x,
        *first,
        *last,
        kind=norm.kind,
        groups=norm.groups,
        per_frame=norm.per_frame,
        eps=norm.eps,
        x2=x2,
        upsample="nearest" if upsample else None,
        **options,
    )


class ResnetBlock(nn.Module):
    """conv → norm → FiLM → SiLU → conv → norm → SiLU → + skip(x)   (peer order).

    ``forward(x, emb, x2)``: x (B, F, H, W, C1); x2 (B, F, H, W, C2), the skip connection, whose
    channels follow those of x; emb (B, emb_dim), the conditioning embedding after its SiLU, or its
    ``films``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: MakeNorm,
        *,
        emb_dim: int | None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.film = None if emb_dim is None else nn.Linear(emb_dim, 2 * out_channels)
        self.conv1 = SpaceConv(in_channels, out_channels, 3)
        self.norm1 = norm(out_channels)
        self.conv2 = SpaceConv(out_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        same = in_channels == out_channels
        self.skip = None if same else SpaceConv(in_channels, out_channels, 1)
        self.out_channels, self.dropout = out_channels, dropout

    def forward(self, x: Tensor, emb: Tensor | Films | None, x2: Tensor | None = None) -> Tensor:
        own: dict[str, Any] = self._modules
        scale, shift = _film(own.get("film"), emb)
        if x2 is not None and x.is_cuda and not torch.is_grad_enabled():
            # cuDNN needs one tensor, and the skip becomes one product. A backward would save it.
            x, x2 = join(x, x2), None
        mask = dropout_mask(x, self.out_channels, self.dropout, self.training)
        conv, norm, skip = own["conv1"], own["norm1"], own.get("skip")
        h = _conv_norm(conv, norm, x, x2, scale=scale, shift=shift, dropout_mask=mask)
        residual = join(x, x2) if skip is None else convolve(skip, x, x2)
        return _conv_norm(own["conv2"], own["norm2"], h, residual=residual)


class PreNormResnetBlock(nn.Module):
    """norm → SiLU → [resample] → conv → norm → FiLM → SiLU → dropout → conv → + skip(x).

    The layout of the distillation code, inflated to 1x3x3 (Salimans & Ho 2022; Ho et al. 2022 use
    the names of its keys). ``resample`` "down" halves height and width by average pooling, "up"
    doubles them by nearest neighbour, on both branches. ``conditioning`` "scale_shift" is FiLM in
    the second norm; "add" adds the embedding to the output of the first convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: MakeNorm,
        *,
        emb_dim: int | None,
        dropout: float = 0.0,
        resample: str | None = None,
        conditioning: str = "scale_shift",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        if conditioning not in ("scale_shift", "add"):
            raise ValueError(f"conditioning must be scale_shift or add, got {conditioning!r}")
        self.resample, self.additive = resample, conditioning == "add"
        self.out_channels, self.dropout = out_channels, dropout
        width = out_channels if self.additive else 2 * out_channels
        self.film = None if emb_dim is None else nn.Linear(emb_dim, width)
        self.norm1 = norm(in_channels)
        self.conv1 = SpaceConv(in_channels, out_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = SpaceConv(out_channels, out_channels, 3)
        same = in_channels == out_channels
        self.skip = None if same else SpaceConv(in_channels, out_channels, 1)
        if zero_init:
            nn.init.zeros_(self.conv2.weight)
            if self.conv2.bias is not None:
                nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor | Films | None, x2: Tensor | None = None) -> Tensor:
        h = normalise(self.norm1, x, x2, act=True)
        if self.resample == "down":
            h = avg_pool(h)
        up = self.resample == "up"  # folded into the convolution; pooling cannot be
        mask = dropout_mask(h, self.out_channels, self.dropout, self.training, 2 if up else 1)
        if self.additive and self.film is not None and emb is not None:
            h = convolve(self.conv1, h, upsample=up)  # the embedding is added before the norm
            h = h + _project(self.film, emb)[:, None, None, None].to(h.dtype)
            h = normalise(self.norm2, h, act=True, dropout_mask=mask)
        else:
            scale, shift = _film(None if self.additive else self.film, emb)
            h = _conv_norm(
                self.conv1,
                self.norm2,
                h,
                upsample=up,
                scale=scale,
                shift=shift,
                dropout_mask=mask,
            )  # fmt: skip
        return convolve(self.conv2, h, residual=self._shortcut(x, x2))

    def _shortcut(self, x: Tensor, x2: Tensor | None) -> Tensor:
        x = join(x, x2) if self.skip is None else convolve(self.skip, x, x2)
        if self.resample == "down":
            return avg_pool(x)
        return nearest_up(x) if self.resample == "up" else x


def avg_pool(x: Tensor) -> Tensor:
    """2 x 2 average pooling of every frame of (B, F, H, W, C)."""
    b, f, h, w, c = x.shape
    y = F.avg_pool2d(x.reshape(b * f, h, w, c).permute(0, 3, 1, 2), 2)
    return y.permute(0, 2, 3, 1).reshape(b, f, h // 2, w // 2, c)

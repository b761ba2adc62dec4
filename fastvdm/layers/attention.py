"""Attention layers with their norm and residual: x (B, F, H, W, C) in, the same out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastvdm.layers.norm import Norm
from fastvdm.layers.plain import is_plain
from fastvdm.layers.position import ShawTable
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.linear import Linear
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_attention_block import linear_attention_block
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.ops.temporal_block import temporal_block

if TYPE_CHECKING:
    from fastvdm.layers.shards import FrameShards


class TimeContext(NamedTuple):
    """What every temporal attention of one forward pass shares; computed once.

    biases: (heads, F, F) by number of heads; rotary (2, F, R/2) or None; focus_mask (B,) bool or
    None, True where each frame attends to itself only; num_images: the last frames are images, each
    on its own.
    """

    biases: dict[int, Tensor]
    rotary: Tensor | None = None
    focus_mask: Tensor | None = None
    num_images: int = 0


def _plain(layer: LinearAttention | AxisAttention) -> bool:
    """Whether the fused ops describe the layer: a LayerNorm and two projections, and nothing that
    hangs on one of them or stands in its place, which they would not call."""
    projections = is_plain(layer.qkv, Linear) and is_plain(layer.out, Linear)
    return projections and is_plain(layer.norm, Norm) and layer.norm.kind == "layer"


def _eps(norm: Norm) -> float:
    return 1e-5 if norm.eps is None else norm.eps


class LinearAttention(nn.Module):
    """x + out(linear attention over the pixels of each frame (norm(x)))."""

    def __init__(self, norm: Norm, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.norm = norm
        self.qkv = Linear(norm.channels, 3 * heads * head_dim, bias=False)
        self.out = Linear(heads * head_dim, norm.channels)

    def forward(self, x: Tensor, time: TimeContext | None = None) -> Tensor:
        if _plain(self):
            return linear_attention_block(
                x,
                self.norm.weight,
                self.qkv.weight,
                self.out.weight,
                heads=self.heads,
                norm_bias=self.norm.bias,
                out_bias=self.out.bias,
                eps=_eps(self.norm),
            )
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, self.head_dim))
        return x + self.out(linear_attention(qkv).flatten(-2))


class AxisAttention(nn.Module):
    """x + out(softmax attention along ``axis`` (norm(x))).

    Options are those of the two families: biases on the projections and a zero-initialised output
    (distillation code), a Shaw table of its own (paper §3), and along time whatever the
    ``TimeContext`` of the forward pass carries.
    """

    def __init__(
        self,
        axis: str,
        norm: Norm,
        heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        zero_init: bool = False,
        shaw: ShawTable | None = None,
    ) -> None:
        super().__init__()
        self.axis, self.heads, self.head_dim = axis, heads, head_dim
        self.norm = norm
        self.qkv = Linear(norm.channels, 3 * heads * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, norm.channels, bias=bias)
        self.shaw = shaw
        self.shards: FrameShards | None = None
        if zero_init:
            for p in self.out.parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor, time: TimeContext | None = None) -> Tensor:
        options: dict[str, Any] = {}
        if time is not None and self.axis == "time":
            options = {
                "bias": time.biases.get(self.heads),
                "rotary": time.rotary,
                "focus_mask": time.focus_mask,
                "num_images": time.num_images,
            }
        if self.shaw is not None:
            options["rel_k"], options["rel_v"] = self.shaw()
        if self.axis == "time" and self.shards is not None:
            # Statistics over frames need the frames' layout, sequences need the pixels'.
            height, width = x.shape[2:4]
            h = self.shards.to_pixels(self.norm(x))
            return x + self.shards.to_frames(self._attend(h, options), height, width)
        if not _plain(self):
            return x + self._attend(self.norm(x), options)
        norm, qkv, out = self.norm, self.qkv, self.out
        if self.axis == "time":
            return temporal_block(
                x, norm.weight, qkv.weight, out.weight, heads=self.heads, norm_bias=norm.bias,
                qkv_bias=qkv.bias, out_bias=out.bias, eps=_eps(norm), **options,
            )  # fmt: skip
        h = norm_linear(
            x, norm.weight, qkv.weight, norm_bias=norm.bias, bias=qkv.bias, eps=_eps(norm)
        )
        return linear_residual(x, self._core(h, options), out.weight, out.bias)

    def _attend(self, h: Tensor, options: dict[str, Any]) -> Tensor:
        """qkv, attention and output projection of the normalised input."""
        return self.out(self._core(self.qkv(h), options))

    def _core(self, qkv: Tensor, options: dict[str, Any]) -> Tensor:
        """The attention between the two projections."""
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        return axis_attention(qkv, axis=self.axis, **options).flatten(-2)

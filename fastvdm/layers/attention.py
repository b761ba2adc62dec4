"""The attention layer with its norm and residual: x (B, F, H, W, C) to the same shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from fastvdm.layers.norm import Norm
from fastvdm.layers.plain import weights_of
from fastvdm.layers.position import ShawTable
from fastvdm.ops.attention_block import NO_OPTIONS, AttentionOptions, attention, attention_block
from fastvdm.ops.linear import Linear
from fastvdm.ops.linear_residual import linear_residual

if TYPE_CHECKING:
    from fastvdm.layers.shards import FrameShards


class TimeContext(NamedTuple):
    """Values that all temporal attentions of one forward pass share; computed once.

    biases: number of heads -> (heads, F, F). rotary: (2, F, R/2) or None. focus_mask: (B,) bool or
    None; True for samples in which each frame attends to itself only. num_images: the last frames
    are images, each of which attends to itself only.
    """

    biases: dict[int, Tensor]
    rotary: Tensor | None = None
    focus_mask: Tensor | None = None
    num_images: int = 0


class Attention(nn.Module):
    """x + out(core(qkv(norm(x)))).

    ``core`` is softmax attention over "time" or "space", or "linear" attention over space. The
    options are those of the two layouts: biases on the projections (linear attention always has one
    on the output and never on qkv), a zero-initialised output (distillation code), an own Shaw
    table (paper §3), and for time everything in the ``TimeContext`` of the forward pass.
    """

    def __init__(
        self,
        core: str,
        norm: Norm,
        heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        zero_init: bool = False,
        shaw: ShawTable | None = None,
    ) -> None:
        super().__init__()
        self.core, self.heads, self.head_dim = core, heads, head_dim
        self.norm = norm
        self.qkv = Linear(norm.channels, 3 * heads * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, norm.channels, bias=bias or core == "linear")
        self.shaw = shaw
        self.shards: FrameShards | None = None
        if zero_init:
            for p in self.out.parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor, time: TimeContext | None = None) -> Tensor:
        own: dict[str, Any] = self._modules
        options = self._options(time)
        norm, qkv, out = own["norm"], own["qkv"], own["out"]
        # None if a module was replaced or has hooks; then it must be called itself.
        first, last = weights_of(qkv, Linear), weights_of(out, Linear)
        shards = self.shards if self.core == "time" else None
        if shards is None and first is not None and last is not None:
            normed = weights_of(norm, Norm)
            if normed is not None and norm.kind == "layer":
                return attention_block(
                    x, normed[0], first[0], last[0], core=self.core, heads=self.heads,
                    norm_bias=normed[1], qkv_bias=first[1], out_bias=last[1],
                    eps=1e-5 if norm.eps is None else norm.eps, options=options,
                )  # fmt: skip
        h = norm(x)  # group statistics need the layout by frames, before it becomes one by pixels
        if shards is not None:
            h = out(attention(qkv(shards.to_pixels(h)), self.core, self.heads, options))
            return x + shards.to_frames(h, *x.shape[2:4])
        h = attention(qkv(h), self.core, self.heads, options)
        if first is not None and last is not None:
            return linear_residual(x, h, *last)
        return x + out(h)

    def _options(self, time: TimeContext | None) -> AttentionOptions:
        if self.core != "time":
            return NO_OPTIONS
        rel_k, rel_v = (None, None) if self.shaw is None else self.shaw()
        if time is None:
            return AttentionOptions(rel_k=rel_k, rel_v=rel_v)
        bias = time.biases.get(self.heads)
        return AttentionOptions(bias, rel_k, rel_v, time.rotary, time.focus_mask, time.num_images)

"""Composes the two layouts, the peer's and the paper's, of the same units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from fastvdm.layers.attention import AxisAttention, LinearAttention
from fastvdm.layers.conv import SpaceConv, SpaceConvTranspose
from fastvdm.layers.norm import Norm
from fastvdm.layers.position import ShawTable
from fastvdm.layers.resnet import PreNormResnetBlock, ResnetBlock
from fastvdm.unet.blocks import Level, PaperHead, PeerHead, Resample, Unit

# The peer's linear and middle spatial attentions have this head size whatever attn_dim_head is.
PEER_SPATIAL_HEAD_DIM = 32


@dataclass(frozen=True)
class Spec:
    """The constructor arguments of UNet3D after defaults and checks."""

    dim: int
    init_dim: int
    out_dim: int
    dim_mults: tuple[int, ...]
    emb_dim: int
    heads: int
    head_dim: int
    linear_attention: bool
    norm: str
    groups: int
    norm_eps: float | None
    per_frame: bool
    num_blocks: int
    dropout: float
    position: str
    shaw_max_distance: int
    shaw_values: bool
    shaw_per_head: bool
    conditioning: str
    resample: str
    zero_init: bool
    attn_resolutions: tuple[int, ...]
    image_size: int | None

    def shaw(self, heads: int) -> ShawTable | None:
        if self.position != "shaw":
            return None
        return ShawTable(
            self.head_dim,
            self.shaw_max_distance,
            values=self.shaw_values,
            heads=heads if self.shaw_per_head else 1,
        )

    def make_norm(self, channels: int) -> Norm:
        return Norm(
            self.norm, channels, groups=self.groups, per_frame=self.per_frame, eps=self.norm_eps
        )


class Parts(NamedTuple):
    stem_attention: AxisAttention | None
    downs: list[Level]
    middle: list[Unit]
    ups: list[Level]
    head: PeerHead | PaperHead
    push_resampled: bool


def peer_parts(s: Spec) -> Parts:
    """One skip a level, attention at every resolution, 4x4 strided and transposed convolutions."""

    def temporal(c: int) -> AxisAttention:
        norm = Norm("layer", c)
        return AxisAttention("time", norm, s.heads, s.head_dim, shaw=s.shaw(s.heads))

    def spatial(c: int) -> LinearAttention | None:
        if not s.linear_attention:
            return None
        return LinearAttention(Norm("layer", c), s.heads, PEER_SPATIAL_HEAD_DIM)

    block = partial(ResnetBlock, norm=s.make_norm, emb_dim=s.emb_dim, dropout=s.dropout)

    def level(c_in: int, c_out: int, resample: Resample | None) -> Level:
        blocks = [block(c_in, c_out), block(c_out, c_out)]
        return Level([Unit(blocks, spatial(c_out), temporal(c_out))], resample)

    widths = [s.init_dim, *(s.dim * m for m in s.dim_mults)]
    pairs = list(zip(widths[:-1], widths[1:]))
    last, mid = len(pairs) - 1, widths[-1]
    downs = [
        level(c_in, c_out, SpaceConv(c_out, c_out, 4, stride=2) if i < last else None)
        for i, (c_in, c_out) in enumerate(pairs)
    ]
    ups = [
        level(2 * c_out, c_in, SpaceConvTranspose(c_in, c_in) if i < last else None)
        for i, (c_in, c_out) in enumerate(reversed(pairs))
    ]
    full = AxisAttention("space", Norm("layer", mid), s.heads, PEER_SPATIAL_HEAD_DIM)
    middle = [Unit([block(mid, mid)], full, temporal(mid)), Unit([block(mid, mid)])]
    tail = ResnetBlock(2 * s.init_dim, s.dim, s.make_norm, emb_dim=None, dropout=s.dropout)
    head = PeerHead(tail, SpaceConv(s.dim, s.out_dim, 1))
    return Parts(temporal(s.init_dim), downs, middle, ups, head, push_resampled=False)


def paper_parts(s: Spec) -> Parts:
    """One skip a block, full attention at the attention resolutions (facts of Appendix A)."""
    assert s.image_size is not None
    make_block = partial(
        PreNormResnetBlock,
        norm=s.make_norm,
        emb_dim=s.emb_dim,
        dropout=s.dropout,
        conditioning=s.conditioning,
        zero_init=s.zero_init,
    )

    def attention(axis: str, c: int) -> AxisAttention:
        heads, rest = divmod(c, s.head_dim)
        if rest:
            raise ValueError(f"attn_dim_head must divide the width {c}, got {s.head_dim}")
        return AxisAttention(
            axis,
            s.make_norm(c),
            heads,
            s.head_dim,
            bias=True,
            zero_init=s.zero_init,
            shaw=s.shaw(heads) if axis == "time" else None,
        )

    def unit(c_in: int, c_out: int, attend: bool) -> Unit:
        pair = (attention("space", c_out), attention("time", c_out)) if attend else ()
        return Unit([make_block(c_in, c_out)], *pair)

    def resample(c: int, direction: str) -> Resample:
        if s.resample == "resblock":
            return make_block(c, c, resample=direction)
        if direction == "down":
            return SpaceConv(c, c, 3, stride=2)
        return SpaceConv(c, c, 3)  # behind a doubling by nearest neighbour

    widths = [s.dim * m for m in s.dim_mults]
    attends = [s.image_size >> i in s.attn_resolutions for i in range(len(widths))]
    top, pushed, c = len(widths) - 1, [s.init_dim], s.init_dim
    downs = []
    for i, width in enumerate(widths):
        units = []
        for _ in range(s.num_blocks):
            units.append(unit(c, width, attends[i]))
            pushed.append(c := width)
        downs.append(Level(units, resample(c, "down") if i < top else None))
        if i < top:
            pushed.append(c)

    middle = [
        Unit([make_block(c, c)], attention("space", c), attention("time", c)),
        Unit([make_block(c, c)]),
    ]
    ups = []
    for i, width in reversed(list(enumerate(widths))):
        units = []
        for _ in range(s.num_blocks + 1):
            units.append(unit(c + pushed.pop(), width, attends[i]))
            c = width
        up = resample(c, "up") if i > 0 else None
        ups.append(Level(units, up, upsample=s.resample == "conv"))

    conv = SpaceConv(c, s.out_dim, 3)
    if s.zero_init:
        for p in conv.parameters():
            nn.init.zeros_(p)
    head = PaperHead(s.make_norm(c), conv)
    return Parts(None, downs, middle, ups, head, push_resampled=True)

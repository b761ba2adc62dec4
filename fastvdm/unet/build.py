"""Builds the two layouts, the peer's and the paper's, from the same units."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import nn

from fastvdm.layers.attention import Attention
from fastvdm.layers.conv import SpaceConv, SpaceConvTranspose
from fastvdm.layers.norm import Norm
from fastvdm.layers.position import ShawTable
from fastvdm.layers.resnet import PreNormResnetBlock, ResnetBlock
from fastvdm.unet.blocks import Level, PaperHead, PeerHead, Resample, Unit
from fastvdm.unet.config import UNetConfig

# Head size of the peer's linear and middle spatial attentions; it ignores attn_dim_head there.
PEER_SPATIAL_HEAD_DIM = 32


class Parts(NamedTuple):
    stem_attention: Attention | None
    downs: list[Level]
    middle: list[Unit]
    ups: list[Level]
    head: PeerHead | PaperHead
    push_resampled: bool


def _norm(config: UNetConfig, channels: int) -> Norm:
    return Norm(
        config.norm, channels, groups=config.resnet_groups, per_frame=config.norm_per_frame,
        eps=config.norm_eps,
    )  # fmt: skip


def _shaw(config: UNetConfig, heads: int) -> ShawTable | None:
    if config.position != "shaw":
        return None
    return ShawTable(
        config.attn_dim_head,
        config.shaw_max_distance,
        values=config.shaw_values,
        heads=heads if config.shaw_per_head else 1,
    )


def peer_parts(config: UNetConfig) -> Parts:
    """One skip per level, attention at every resolution, 4x4 convolutions for resampling."""
    heads, norm = config.attn_heads, partial(_norm, config)

    def temporal(c: int) -> Attention:
        shaw = _shaw(config, heads)
        return Attention("time", Norm("layer", c), heads, config.attn_dim_head, shaw=shaw)

    def spatial(c: int) -> Attention | None:
        if not config.use_sparse_linear_attn:
            return None
        return Attention("linear", Norm("layer", c), heads, PEER_SPATIAL_HEAD_DIM)

    block = partial(ResnetBlock, norm=norm, emb_dim=config.emb_width, dropout=config.dropout)

    def level(c_in: int, c_out: int, resample: Resample | None) -> Level:
        blocks = [block(c_in, c_out), block(c_out, c_out)]
        return Level([Unit(blocks, spatial(c_out), temporal(c_out))], resample)

    stem, dim = config.stem_width, config.dim
    widths = [stem, *(dim * m for m in config.dim_mults)]
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
    full = Attention("space", Norm("layer", mid), heads, PEER_SPATIAL_HEAD_DIM)
    middle = [Unit([block(mid, mid)], full, temporal(mid)), Unit([block(mid, mid)])]
    tail = ResnetBlock(2 * stem, dim, norm, emb_dim=None, dropout=config.dropout)
    head = PeerHead(tail, SpaceConv(dim, config.out_channels, 1))
    return Parts(temporal(stem), downs, middle, ups, head, push_resampled=False)


def paper_parts(config: UNetConfig) -> Parts:
    """One skip per block, full attention at the attention resolutions (Appendix A)."""
    assert config.image_size is not None
    norm, head_dim = partial(_norm, config), config.attn_dim_head
    make_block = partial(
        PreNormResnetBlock,
        norm=norm,
        emb_dim=config.emb_width,
        dropout=config.dropout,
        conditioning=config.conditioning,
        zero_init=config.zero_init,
    )

    def attention(core: str, c: int) -> Attention:
        heads, rest = divmod(c, head_dim)
        if rest:
            raise ValueError(f"attn_dim_head must divide the width {c}, got {head_dim}")
        return Attention(
            core,
            norm(c),
            heads,
            head_dim,
            bias=True,
            zero_init=config.zero_init,
            shaw=_shaw(config, heads) if core == "time" else None,
        )

    def unit(c_in: int, c_out: int, attend: bool) -> Unit:
        pair = (attention("space", c_out), attention("time", c_out)) if attend else ()
        return Unit([make_block(c_in, c_out)], *pair)

    def resample(c: int, direction: str) -> Resample:
        if config.resample == "resblock":
            return make_block(c, c, resample=direction)
        if direction == "down":
            return SpaceConv(c, c, 3, stride=2)
        return SpaceConv(c, c, 3)  # after nearest-neighbour doubling

    widths = [config.dim * m for m in config.dim_mults]
    attends = [config.image_size >> i in config.attn_resolutions for i in range(len(widths))]
    top, pushed, c = len(widths) - 1, [config.stem_width], config.stem_width
    downs = []
    for i, width in enumerate(widths):
        units = []
        for _ in range(config.num_blocks):
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
        for _ in range(config.num_blocks + 1):
            units.append(unit(c + pushed.pop(), width, attends[i]))
            c = width
        up = resample(c, "up") if i > 0 else None
        ups.append(Level(units, up, upsample=config.resample == "conv"))

    conv = SpaceConv(c, config.out_channels, 3)
    if config.zero_init:
        for p in conv.parameters():
            nn.init.zeros_(p)
    head = PaperHead(norm(c), conv)
    return Parts(None, downs, middle, ups, head, push_resampled=True)

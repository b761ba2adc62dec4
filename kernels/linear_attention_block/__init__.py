"""x + out(linear attention(LayerNorm_C(x))) over the pixels of each frame; no q, k, v in memory.

    q' = softmax_D(x̂ W_qᵀ),  k' = softmax_N(x̂ W_kᵀ),  G = k'ᵀ x̂,  M = D^-½ G W_vᵀ W_outᵀ,
    y = x + q' M + b

x is (B, F, H, W, C) with N = H*W pixels per frame; G and M are (D, C) per frame and head. Saved for
the backward: G and log Σ exp k. R is the number of rows of x, inner = heads * D.

Forward: "sum" computes partials of G over splits of the pixels, like flash attention with features
as queries and x̂ as keys and values; "fold" merges them per frame and head and computes M; "apply"
computes y. It reads x twice and writes y: 3*R*C*e bytes, and (8 + 8 splits)*C*inner bytes per frame
for G and M, through the L2 cache if they fit there. 8*R*C*inner FLOPs.

Backward: "fold" recomputes M, "dm" sums dM = q'ᵀ dy, "unfold" derives dG from it, "dx" computes all
of dx. x and dy are read twice, dx is written: 5*R*C*e bytes and 18*R*C*inner FLOPs. The gradients
of the projections are sums over all rows of (inner, C). Those of W_v and W_out are small products
of per-frame values ("frames"). That of W_q is computed with dM up to C = 64, otherwise by a second
"dm" (configuration "dq"). That of W_k is computed by "dk", which reads x again: R*C*e bytes, with
"dq" 3*R*C*e, and 10*R*C*inner FLOPs, less than storing dq and dk for a library product. Programs
that walk over splits write one partial each; partials are added in a fixed order, without atomics,
so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvdm.kernels.common import acc_dtype, acc_torch_dtype, cdiv, major, next_power_of_2
from fastvdm.kernels.linear_attention_block.backward import (
    _dk_kernel,
    _dm_kernel,
    _dx_kernel,
    _frames_kernel,
    _unfold_kernel,
)
from fastvdm.kernels.linear_attention_block.forward import (
    _apply_kernel,
    _fold_kernel,
    _sum_kernel,
)
from fastvdm.kernels.linear_attention_block.shared import pick_config
from fastvdm.runtime.device import H200, facts


class _Sizes:
    """The sizes that the launches of one call share."""

    def __init__(self, x: Tensor, qkv_weight: Tensor, heads: int) -> None:
        b, f, h, w, self.channels = x.shape
        self.heads, self.inner = heads, qkv_weight.shape[0] // 3
        self.dim, self.frames, self.pixels = self.inner // heads, b * f, h * w
        self.itemsizes = qkv_weight.element_size(), x.element_size()
        self.major = major(x.device)
        # Decides only how far to split; under the interpreter that of an H200.
        self.multiprocessors = facts(x.device).multiprocessors or H200.multiprocessors
        self.block_c = max(16, next_power_of_2(self.channels))
        self.block_d = max(16, next_power_of_2(self.dim))
        self.acc = acc_dtype(x.dtype)
        # Whether one pass sums both dM and W_q's gradient: the registers must hold both.
        self.together = self.block_c <= 64 and x.element_size() == 2 and self.major >= 9

    def tile(self, kind: str) -> dict[str, Any]:
        """Constants and options of a kernel over tiles of pixels."""
        tile = pick_config(kind, self.channels, self.dim, *self.itemsizes, major=self.major)
        found = dict(C=self.channels, D=self.dim, BC=self.block_c, ACC=self.acc)
        found |= dict(BN=tile.block_n, BF=tile.block_f, num_warps=tile.num_warps)
        by_heads = kind in ("apply", "dm", "dq", "dx")
        whole = self.inner % tile.block_f == 0
        if by_heads:
            found["BD"] = self.block_d
            whole = self.heads % (tile.block_f // self.block_d) == 0 and self.dim == self.block_d
        found["EVEN"] = self.pixels % tile.block_n == 0
        found["WHOLE"] = whole and self.channels == self.block_c
        # The loop of these kernels is over the heads; a loop over pixels needs num_stages.
        found["STAGES" if kind in ("apply", "dx") else "num_stages"] = tile.num_stages
        if kind in ("dm", "dq") and self.major != 9:
            found["maxnreg"] = 255  # otherwise ptxas limits registers for occupancy, and spills
        return found

    def fold(self) -> dict[str, Any]:
        """Constants and options of a kernel over frames and heads."""
        narrow = self.major < 9 and self.block_d > 32
        block = min(32 if narrow else 64, self.block_c)
        whole = self.channels % block == 0 and self.dim == self.block_d
        sizes = dict(C=self.channels, D=self.dim, BD=self.block_d, CB=block, ACC=self.acc)
        return sizes | dict(WHOLE=whole, num_warps=8 if narrow else 4, num_stages=1)

    def blocks(self, tile: dict[str, Any]) -> int:
        """The number of programs that share the pixels."""
        if "BD" in tile:
            return cdiv(self.heads, tile["BF"] // tile["BD"])
        return cdiv(self.inner, tile["BF"])

    def split(self, tile: dict[str, Any]) -> tuple[int, int]:
        """(splits, pixels per split): at most two programs per multiprocessor, unless frames and
        blocks alone are more, and at least four tiles per split, because each costs a partial."""
        tiles = cdiv(self.pixels, tile["BN"])
        programs = self.frames * self.blocks(tile)
        wanted = max(1, min(2 * self.multiprocessors // programs, tiles // 4))
        chunk = cdiv(tiles, wanted) * tile["BN"]
        return cdiv(self.pixels, chunk), chunk


def linear_attention_block_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher of ``fastvdm::linear_attention_block_fwd``."""
    s = _Sizes(x, qkv_weight, heads)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    acc = acc_torch_dtype(x.dtype)
    g = x.new_empty((*x.shape[:2], heads, s.dim, s.channels), dtype=acc)
    lse = x.new_empty(g.shape[:-1], dtype=acc)
    if x.numel() == 0:
        return y, g, lse
    tile = s.tile("sum")
    splits, chunk = s.split(tile)
    part = g.view(s.frames, s.inner, s.channels)  # a single partial is merged in place
    if splits > 1:
        part = x.new_empty((s.frames * splits, s.inner, s.channels), dtype=acc)
    top, total = (x.new_empty(part.shape[:-1], dtype=acc) for _ in range(2))
    _sum_kernel[(s.frames * splits * s.blocks(tile),)](
        *(x, norm_weight, norm_bias, qkv_weight, top, total, part),
        *(s.pixels, heads, splits, chunk, eps),
        **tile,
    )
    m = x.new_empty((s.frames, s.inner, s.channels), dtype=qkv_weight.dtype)
    _fold_kernel[(s.frames * heads,)](
        *(top, total, part, g, lse, qkv_weight, out_weight, None, m),
        *(heads, splits, s.dim**-0.5),
        **s.fold(),
    )
    tile = s.tile("apply")
    tiles = cdiv(s.pixels, tile["BN"])
    _apply_kernel[(s.frames * tiles,)](
        *(x, y, norm_weight, norm_bias, qkv_weight, out_bias, m),
        *(s.pixels, heads, tiles, eps),
        **tile,
    )
    return y, g, lse


def linear_attention_block_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    out_weight: Tensor,
    out_bias: Tensor | None,
    g: Tensor,
    lse: Tensor,
    heads: int,
    eps: float,
    need_norm: bool,
    need_qkv: bool,
    need_out: bool,
) -> tuple[Tensor, ...]:
    """The launcher of ``fastvdm::linear_attention_block_bwd``."""
    s = _Sizes(x, qkv_weight, heads)
    acc, low = acc_torch_dtype(x.dtype), qkv_weight.dtype
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    asked = (
        *((norm_weight, need_norm), (norm_bias, need_norm), (qkv_weight, need_qkv)),
        *((out_weight, need_out), (out_bias, need_out)),
    )
    if x.numel() == 0:
        return (
            dx,
            *(torch.zeros_like(t) if n and t is not None else x.new_empty((0,)) for t, n in asked),
        )

    def per_frame(dtype: torch.dtype, *shape: int) -> Tensor:
        return x.new_empty((s.frames, *shape), dtype=dtype)

    norm, matrix = (norm_weight, norm_bias), (s.inner, s.channels)
    m, dg, r = per_frame(low, *matrix), per_frame(low, *matrix), per_frame(acc, s.inner)
    ctx = per_frame(acc, s.inner, s.dim) if need_out else None
    dctx = per_frame(acc, s.inner, s.dim) if need_qkv else None
    fold, scale = s.fold(), s.dim**-0.5
    _fold_kernel[(s.frames * heads,)](
        *(None, None, None, g, lse, qkv_weight, out_weight, ctx, m),
        *(heads, 1, scale),
        **fold,
    )

    tile = s.tile("dm")
    splits, chunk = s.split(tile)
    parts = walkers = s.frames * splits
    dqkv = None
    if need_qkv:  # one sum over frames for each concurrent program
        walkers = min(parts, cdiv(2 * s.multiprocessors, s.blocks(tile)))
        dqkv = x.new_empty((walkers, 3 * s.inner, s.channels), dtype=acc)
    dm, together = x.new_empty((parts, *matrix), dtype=acc), s.together and need_qkv
    pixels = (s.pixels, heads)
    _dm_kernel[((walkers if together else parts) * s.blocks(tile),)](
        *(dy, x, *norm, qkv_weight, m, dm, dqkv if together else None),
        *(*pixels, splits, chunk, parts, walkers if together else parts, eps),
        **tile,
    )
    _unfold_kernel[(s.frames * heads,)](
        *(dm, g, qkv_weight, out_weight, dg, r, dctx, heads, splits, scale),
        **fold,
    )
    dout = None
    if need_qkv or need_out:
        if dqkv is None:
            walkers = min(s.frames, 16)
        if need_out:
            dout = x.new_empty((walkers, *matrix), dtype=acc)
        _frames_kernel[(walkers * heads * cdiv(s.channels, fold["CB"]),)](
            *(dm, g, ctx, dctx, dqkv, dout, heads, splits, s.frames, walkers),
            **fold,
        )
    tile = s.tile("dx")
    tiles = cdiv(s.pixels, tile["BN"])
    sums = None
    if need_norm or (need_out and out_bias is not None):
        sums = x.new_empty((s.frames * tiles, 3, s.channels), dtype=acc)
    _dx_kernel[(s.frames * tiles,)](
        *(dy, x, *norm, qkv_weight, m, lse, dg, r, dx, sums),
        *(*pixels, tiles, eps),
        **tile,
    )
    if dqkv is not None:
        if not together:
            tile = s.tile("dq")
            splits, chunk = s.split(tile)
            _dm_kernel[(walkers * s.blocks(tile),)](
                *(dy, x, *norm, qkv_weight, m, None, dqkv),
                *(*pixels, splits, chunk, s.frames * splits, walkers, eps),
                **tile,
            )
        tile = s.tile("dk")
        splits, chunk = s.split(tile)
        _dk_kernel[(walkers * s.blocks(tile),)](
            *(x, *norm, qkv_weight, lse, dg, r, dqkv),
            *(*pixels, splits, chunk, s.frames * splits, walkers, eps),
            **tile,
        )

    rows = [None] * 3 if sums is None else sums.sum(0)
    dqkv_weight = None if dqkv is None else dqkv.sum(0)
    dout_weight = None if dout is None else dout.sum(0).t()
    made = (rows[0], rows[1], dqkv_weight, dout_weight, rows[2])

    def grad(t: Tensor | None, need: bool, value: Tensor | None) -> Tensor:
        if t is None or not need or value is None:
            return x.new_empty((0,))
        found = torch.empty_like(t, memory_format=torch.contiguous_format)
        return found.copy_(value)  # a tensor of its own: outputs of an op may not alias

    return dx, *(grad(t, need, value) for (t, need), value in zip(asked, made))

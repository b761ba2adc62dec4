"""``axis_attention`` beyond one tile: online softmax over blocks of keys, any N.

Forward after Dao 2023 (FlashAttention-2, arXiv 2307.08691); it saves lse. The backward has two
kernels, one over queries (dq and δ = rowsum(dout*out)) and one over keys (dk, dv). The gradients of
bias and tables have their own kernels: each recomputes ds for one tile of (query, key), sums it
over the sequences in registers and writes one partial per split. This is deterministic and never
expanded over the batch. Recomputing costs two of five products; atomics would make the order of the
sum vary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.axis_attention.long_backward import (
    _long_bwd_dbias_kernel,
    _long_bwd_dkv_kernel,
    _long_bwd_dq_kernel,
    _long_bwd_drel_kernel,
)
from fastvdm.kernels.axis_attention.long_forward import _long_fwd_kernel
from fastvdm.kernels.axis_attention.long_tiles import LongConfig, pick_config
from fastvdm.kernels.axis_attention.shared import Geometry, split_scale, strides, table_sizes
from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    major,
    next_power_of_2,
    program_budget,
)


def _common(
    geo: Geometry, qkv: Tensor, options: AttentionOptions, config: LongConfig, **more: bool
) -> dict:
    return dict(
        D=geo.d,
        HALF=options.pairs,
        BM=config.BM,
        BN=config.BN,
        BD=max(16, next_power_of_2(geo.d)),
        ACC=acc_dtype(qkv.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=config.maxnreg,
        **more,
    )


def _config(kind: str, geo: Geometry, qkv: Tensor, options: AttentionOptions) -> LongConfig:
    has = {"bias": options.bias is not None, "rotary": options.rotary is not None}
    bd = max(16, next_power_of_2(geo.d))
    has["shaw"] = options.shaw
    return pick_config(kind, bd, qkv.element_size(), geo.n, major=major(qkv.device), **has)


def long_fwd(
    geo: Geometry,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    options: AttentionOptions,
    sm_scale: float,
) -> None:
    """``options`` are ``prepared``; it writes n rows of out and of the parts of lse."""
    config = _config("fwd", geo, qkv, options)
    fold = options.bias is None and sm_scale > 0
    grid = (geo.batch * geo.outer * geo.heads * cdiv(geo.n, config.BM),)
    _long_fwd_kernel[grid](
        *(qkv, *options[:5], out, lse),
        *(geo.outer, geo.total, geo.n, geo.heads, *split_scale(sm_scale)),
        *(*geo.qkv, *geo.out, *table_sizes(options)),
        **_common(geo, qkv, options, config, FOLD=fold, EVEN=geo.n % config.BN == 0),
    )


def _add_diagonals(partial: Tensor, n: int, block: int) -> Tensor:
    """(splits, heads, diagonals, 2*block, D) → (1, heads, 2n-1, D). Neighbouring diagonals overlap
    by one block; they are summed in order."""
    partial = partial.sum(0)
    heads, diagonals, _, d = partial.shape
    rows = partial.new_zeros(heads, diagonals + 1, block, d)
    rows[:, :-1] += partial[:, :, :block]
    rows[:, 1:] += partial[:, :, block:]
    # Row 0 is the distance -(blocks*block - 1).
    first = (diagonals + 1) // 2 * block - n
    return rows.flatten(1, 2)[None, :, first : first + 2 * n - 1].contiguous()


def long_bwd(
    geo: Geometry,
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    axis: int,
    options: AttentionOptions,
    sm_scale: float,
    dqkv: Tensor | None,
    need_dbias: bool,
    need_drel_k: bool,
    need_drel_v: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Writes the first n rows of dqkv. Returns dbias (heads, n, n) and the gradients of the tables
    by distance (1, heads, 2n-1, D), in the accumulator's dtype."""
    acc = acc_torch_dtype(qkv.dtype)
    sequences = geo.batch * geo.outer
    scale = split_scale(sm_scale)
    fold = options.bias is None and sm_scale > 0
    given, tables = options[:5], table_sizes(options)
    reads = (*geo.qkv, *strides(dout, axis))
    delta = lse.new_empty((*lse.shape[:3], geo.total))

    def splits_of(tiles: int) -> int:
        return max(1, min(sequences, program_budget(qkv.device) // tiles))

    by_query = _config("dq", geo, qkv, options)
    _long_bwd_dq_kernel[(sequences * geo.heads * cdiv(geo.n, by_query.BM),)](
        *(dout, qkv, out, lse, delta, *given, dqkv),
        *(geo.outer, geo.total, geo.n, geo.heads, *scale),
        *(*reads, *geo.out, *geo.dqkv, *tables),
        **_common(geo, qkv, options, by_query, FOLD=fold, EVEN=geo.n % by_query.BN == 0),
    )
    if dqkv is not None:
        by_key = _config("dkv", geo, qkv, options)
        _long_bwd_dkv_kernel[(sequences * geo.heads * cdiv(geo.n, by_key.BN),)](
            *(dout, qkv, lse, delta, *given, dqkv),
            *(geo.outer, geo.total, geo.n, geo.heads, *scale),
            *(*reads, *geo.dqkv, *tables),
            **_common(geo, qkv, options, by_key, FOLD=fold, EVEN=geo.n % by_key.BM == 0),
        )
    dbias = drel_k = drel_v = None
    if need_dbias:
        tile = _config("dbias", geo, qkv, options)
        tiles = geo.heads * cdiv(geo.n, tile.BM) * cdiv(geo.n, tile.BN)
        splits = splits_of(tiles)
        dbias = torch.empty((splits, geo.heads, geo.n, geo.n), dtype=acc, device=qkv.device)
        _long_bwd_dbias_kernel[(tiles * splits,)](
            *(dout, qkv, lse, delta, *given, dbias),
            *(geo.outer, geo.total, geo.n, geo.heads, sequences, splits, *scale),
            *(*reads, *tables),
            **_common(geo, qkv, options, tile),
        )
        dbias = dbias.sum(0)
    if need_drel_k or need_drel_v:
        tile = _config("drel", geo, qkv, options)
        diagonals = 2 * cdiv(geo.n, tile.BN) - 1
        splits = splits_of(geo.heads * diagonals)
        size = (splits, geo.heads, diagonals, 2 * tile.BN, geo.d)
        drel_k = torch.empty(size, dtype=acc, device=qkv.device) if need_drel_k else None
        drel_v = torch.empty(size, dtype=acc, device=qkv.device) if need_drel_v else None
        _long_bwd_drel_kernel[(geo.heads * diagonals * splits,)](
            *(dout, qkv, lse, delta, *given, drel_k, drel_v),
            *(geo.outer, geo.total, geo.n, geo.heads, sequences, splits, *scale),
            *(*reads, *tables),
            **_common(geo, qkv, options, tile, FOLD=fold),
        )
        drel_k = None if drel_k is None else _add_diagonals(drel_k, geo.n, tile.BN)
        drel_v = None if drel_v is None else _add_diagonals(drel_v, geo.n, tile.BN)
    return dbias, drel_k, drel_v

"""x + out(attention(LayerNorm_C(x))) over the frames of each pixel; x is read and y written once.

    xn = (x - mean) rstd w + b,  q, k, v = xn Wᵀ + b,  p = softmax(D^-½ (q'k' + q rel_k) + bias)
    y = x + (p (v + rel_v)) W_outᵀ + b_out,   q', k' with the rotary embedding

Shaw tables, rel_k and rel_v, exclude a rotary embedding and a bias.

x is (B, F, H, W, C). A program holds P pixels with all their frames, padded to BN = 16 or 32, i.e.
P * BN rows of all C channels, and loops over the heads; it reads the weights from the L2 cache.
2*M*C*e bytes and 8*M*C*inner + 4*M*F*inner FLOPs (M rows of x, inner = heads * D).

The backward recomputes everything from x in one kernel and writes dx. The gradients of the norm and
of the bias are written as one partial per program and summed in a fixed order (no atomics: two runs
give the same bits). The gradients of the two projections are sums over all rows of x of a matrix as
large as the weights. Partials per program would take 4*C*inner*4 bytes each, more than the rows of
a program. So the kernel stores xn, dq|dk|dv and the attention's output in the dtype of the weights,
and library GEMMs reduce them; only if the weights are trained, and only during this call. With
frozen weights only dx is written: 3*M*C*e bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels import axis_attention
from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.axis_attention.shared import prepared, split_scale, table_sizes
from fastvdm.kernels.common import acc_dtype, acc_torch_dtype, cdiv, major, program_budget
from fastvdm.kernels.limits import TIME
from fastvdm.kernels.temporal_block.backward import _bwd_kernel
from fastvdm.kernels.temporal_block.forward import _fwd_kernel
from fastvdm.kernels.temporal_block.tiles import _REGISTER_CHANNELS, pick_config


def fuse_backward(channels: int, frames: int, dim: int, *, tables: bool) -> bool:
    """Whether the backward is one kernel. Above 64 channels its two operands of all channels, xn
    and dy, leave no registers for the attention (ptxas: kilobytes of spills at 128), and the
    recomputed products are large enough to run near peak in library GEMMs. At 64 channels the
    gradients for 32 frames, for heads above 32 features or for Shaw tables spill too: up to 2.5 KB.
    """
    return channels <= 64 and frames <= 16 and dim <= 32 and not tables


def _composed_backward(
    dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, heads, eps,
    options, need_norm, need_qkv, need_out, need_bias, need_rel,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The backward from recomputed buffers: the library's norm and GEMMs, and attention kernels."""
    b, f, h, w, c = x.shape
    low, dim = qkv_weight.dtype, qkv_weight.shape[0] // (3 * heads)
    bias, rel_k, rel_v = options[:3]

    def nothing() -> Tensor:  # a new tensor each time: outputs of an op may not alias
        return x.new_empty((0,))

    if x.numel() == 0:
        wanted = (
            *((norm_weight, need_norm), (norm_bias, need_norm), (qkv_weight, need_qkv)),
            *((qkv_bias, need_qkv), (out_weight, need_out), (out_bias, need_out)),
            *((bias, need_bias), (rel_k, need_rel), (rel_v, need_rel)),
        )
        zeros = [nothing() if t is None or not n else torch.zeros_like(t) for t, n in wanted]
        return (torch.empty_like(x, memory_format=torch.contiguous_format), *zeros)
    rows, wide = x.reshape(-1, c), acc_torch_dtype(x.dtype)
    gain = norm_weight.to(x.dtype)
    shift = None if norm_bias is None else norm_bias.to(x.dtype)
    xn, mean, rstd = torch.native_layer_norm(rows, [c], gain, shift, eps)
    xn = xn.to(low)
    qkv = torch.nn.functional.linear(xn, qkv_weight, qkv_bias).view(b, f, h, w, 3, heads, dim)
    low_dy = dy.reshape(-1, c).to(low)
    attend = (TIME, options, dim**-0.5)
    dout_weight, dout_bias, dqkv_weight, dqkv_bias = (nothing() for _ in range(4))
    if need_out:
        o, _ = axis_attention.axis_attention_fwd(qkv, *attend)
        dout_weight = low_dy.t() @ o.view(-1, heads * dim)
        if out_bias is not None:
            dout_bias = dy.reshape(-1, c).sum(0, dtype=wide).to(out_bias.dtype)
    do = (low_dy @ out_weight).view(b, f, h, w, heads, dim)
    dqkv, dbias, drel_k, drel_v = axis_attention.axis_attention_bwd(
        *(do, qkv, nothing(), nothing(), *attend),
        *(True, need_bias and bias is not None),
        *(need_rel and rel_k is not None, need_rel and rel_v is not None),
    )
    dqkv = dqkv.view(-1, 3 * heads * dim)
    if need_qkv:
        dqkv_weight = dqkv.t() @ xn
        if qkv_bias is not None:
            dqkv_bias = dqkv.sum(0, dtype=wide).to(qkv_bias.dtype)
    dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_layer_norm_backward(
        (dqkv @ qkv_weight).to(x.dtype), rows, [c], mean, rstd, gain, shift,
        [True, need_norm, need_norm and norm_bias is not None],
    )  # fmt: skip
    return (
        (dx + dy.reshape(-1, c)).view(x.shape),
        dnorm_weight.to(norm_weight.dtype) if need_norm else nothing(),
        dnorm_bias.to(norm_bias.dtype) if need_norm and norm_bias is not None else nothing(),
        *(dqkv_weight, dqkv_bias, dout_weight, dout_bias),
        # Gradients that are not needed are empty tensors of x's dtype, as the op's fake declares.
        dbias if need_bias and bias is not None else nothing(),
        drel_k if need_rel and rel_k is not None else nothing(),
        drel_v if need_rel and rel_v is not None else nothing(),
    )


def temporal_block_fwd(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
    options: AttentionOptions,
) -> Tensor:
    """y like x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    b, f, h, w, c = x.shape
    if y.numel() == 0:
        return y
    dim, pixels = qkv_weight.shape[0] // (3 * heads), b * h * w
    config = pick_config(
        f,
        c,
        dim,
        pixels,
        x.element_size(),
        tables=options.shaw,
        backward=False,
        major=major(x.device),
    )
    tiles, scratch = cdiv(pixels, config.P), None
    walkers = tiles
    if config.BC > _REGISTER_CHANNELS:
        walkers = min(tiles, program_budget(x.device))
        size = (walkers * config.P * config.BN, heads * dim)
        scratch = torch.empty(size, dtype=qkv_weight.dtype, device=x.device)
    options = prepared(options, f)
    _fwd_kernel[(walkers,)](
        *(x, y, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias),
        *(*options[:5], scratch, pixels, h * w, f, f - options.num_images, heads, tiles, walkers),
        *(*split_scale(dim**-0.5), eps, *table_sizes(options)),
        MASKED=options.masked,
        C=c,
        D=dim,
        HALF=options.pairs,
        P=config.P,
        BN=config.BN,
        BC=config.BC,
        BD=config.BD,
        ACC=acc_dtype(x.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


def temporal_block_bwd(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
    options: AttentionOptions,
    need_norm: bool,
    need_qkv: bool,
    need_out: bool,
    need_bias: bool,
    need_rel: bool,
) -> tuple[Tensor, ...]:
    """The launcher of ``fastvdm::temporal_block_bwd``."""
    b, f, h, w, c = x.shape
    dim = qkv_weight.shape[0] // (3 * heads)
    if not fuse_backward(c, f, dim, tables=options.shaw):
        return _composed_backward(
            *(dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias),
            *(heads, eps, options, need_norm, need_qkv, need_out, need_bias, need_rel),
        )
    options = prepared(options, f)
    pixels, rows = b * h * w, b * f * h * w
    inner, acc, device = heads * dim, acc_torch_dtype(x.dtype), x.device
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    need_bias = need_bias and options.bias is not None
    config = pick_config(
        f, c, dim, pixels, x.element_size(), tables=False, backward=True, major=major(x.device)
    )
    tiles = cdiv(pixels, config.P)
    walkers = min(tiles, program_budget(device))

    def partial(need: bool, *shape: int) -> Tensor | None:
        return torch.empty((walkers, *shape), dtype=acc, device=device) if need else None

    def per_row(need: bool, width: int) -> Tensor | None:
        return torch.empty((rows, width), dtype=qkv_weight.dtype, device=device) if need else None

    dnorm_weight, dnorm_bias = partial(need_norm, c), partial(need_norm, c)
    dbias = partial(need_bias, heads, f, f)
    xn, o = per_row(need_qkv, c), per_row(need_out, inner)
    # With frozen weights dq|dk|dv of a tile only pass through the L2 cache; otherwise all are kept.
    size = (rows if need_qkv else walkers * config.P * config.BN, 3 * inner)
    dqkv = torch.empty(size, dtype=qkv_weight.dtype, device=device)
    if tiles:
        _bwd_kernel[(walkers,)](
            *(dy, x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight),
            *(options.bias, options.rotary, options.focus_mask),
            *(dx, dnorm_weight, dnorm_bias, dbias, xn, dqkv, o),
            *(pixels, h * w, f, f - options.num_images, heads, tiles, walkers),
            *(*split_scale(dim**-0.5), eps),
            TRAIN=need_qkv,
            MASKED=options.masked,
            C=c,
            D=dim,
            HALF=options.pairs,
            P=config.P,
            BN=config.BN,
            BC=config.BC,
            BD=config.BD,
            ACC=acc_dtype(x.dtype),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def reduced(part: Tensor | None, like: Tensor | None) -> Tensor:
        if part is None or like is None:
            return x.new_empty((0,))
        return part.sum(0).to(like.dtype)

    def summed(per_row: Tensor, like: Tensor | None) -> Tensor:
        return x.new_empty((0,)) if like is None else per_row.sum(0, dtype=acc).to(like.dtype)

    def product(left: Tensor | None, right: Tensor | None) -> Tensor:
        if left is None or right is None:
            return x.new_empty((0,))
        return left.t() @ right

    low_dy = dy.reshape(rows, c).to(qkv_weight.dtype) if need_out else None
    return (
        dx,
        reduced(dnorm_weight, norm_weight),
        reduced(dnorm_bias, norm_bias),
        product(dqkv, xn),
        summed(dqkv, qkv_bias if need_qkv else None),
        product(low_dy, o),
        # Not in the kernel, where its sums would spill. Few networks have it; it reads dy again.
        summed(dy.reshape(rows, c), out_bias if need_out else None),
        reduced(dbias, options.bias),
        *(x.new_empty((0,)) for _ in range(2)),  # no gradients of tables: see _composed_backward
    )

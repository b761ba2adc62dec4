"""Softmax attention along one axis, read by strides from the packed (B, F, H, W, 3, heads, D).

    out_i = Σ_j softmax_j(sm_scale * (q_i·k_j + q_i·rel_k[j-i]) + bias_ij) (v_j + rel_v[j-i])

Nothing is permuted: the kernels are told which axis is the sequence. Up to ``SHORT`` positions one
tile holds all keys of several sequences (``short.py``); beyond that the softmax runs online
(``long.py``). The images of a joint batch are copied through in two copies.

Forward: 4*N*D FLOPs per row and 4 rows moved. Backward: 10*N*D and 7 (8 beyond one tile).
Ho et al. 2022 (Video Diffusion Models), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.axis_attention.long import long_bwd, long_fwd
from fastvdm.kernels.axis_attention.shared import Geometry, geometry, prepared, roll_up
from fastvdm.kernels.axis_attention.short import short_bwd, short_fwd
from fastvdm.kernels.common import acc_torch_dtype
from fastvdm.kernels.limits import SHORT


def axis_attention_fwd(
    qkv: Tensor, axis: int, options: AttentionOptions, sm_scale: float
) -> tuple[Tensor, Tensor]:
    rel_v, num_images = options.rel_v, options.num_images
    geo = geometry(qkv, axis, num_images)
    b, f, h, w, _, heads, d = qkv.shape
    out = torch.empty((b, f, h, w, heads, d), dtype=qkv.dtype, device=qkv.device)
    parts = 1 if options.bias is None else 2
    size = (b, geo.outer, heads, parts, geo.total) if geo.total > SHORT else (0,)
    # Rows that the kernel skips (images, focused samples) must be 0.
    make = torch.zeros if options.masked else torch.empty
    lse = make(size, dtype=acc_torch_dtype(qkv.dtype), device=qkv.device)
    if out.numel() == 0:
        return out, lse
    if num_images:
        passed = qkv[:, geo.n :, :, :, 2]
        if rel_v is None:
            out[:, geo.n :] = passed
        else:
            torch.add(passed, rel_v[:, rel_v.shape[1] // 2], out=out[:, geo.n :])
    if geo.n == 0:
        return out, lse
    options = prepared(options, geo.n)
    if geo.total > SHORT:
        long_fwd(geo, qkv, out, lse, options, sm_scale)
    else:
        short_fwd(geo, qkv, out, options, sm_scale)
    return out, lse


def _empty(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device)


def _dbias(grad: Tensor, bias: Tensor, geo: Geometry) -> Tensor:
    if geo.n == geo.total:
        return grad.to(bias.dtype)
    whole = torch.zeros_like(bias)
    whole[:, : geo.n, : geo.n] = grad
    return whole


def axis_attention_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    axis: int,
    options: AttentionOptions,
    sm_scale: float,
    need_dqkv: bool,
    need_dbias: bool,
    need_drel_k: bool,
    need_drel_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias, rel_k, rel_v, num_images = *options[:3], options.num_images
    geo = geometry(qkv, axis, num_images)
    dqkv = None
    if need_dqkv:
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        if num_images:
            dqkv[:, geo.n :, :, :, :2] = 0
            dqkv[:, geo.n :, :, :, 2] = dout[:, geo.n :]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if geo.n and dout.numel():
        rest = (prepared(options, geo.n), sm_scale, dqkv, need_dbias, need_drel_k, need_drel_v)
        if geo.total > SHORT:
            grads = long_bwd(geo, dout, qkv, out, lse, axis, *rest)
        else:
            grads = short_bwd(geo, dout, qkv, axis, *rest)

    def table(need: bool, grad: Tensor | None, of: Tensor | None) -> Tensor | None:
        if not need or of is None:
            return None
        if num_images:  # the images' gradient is added below
            of = of.to(acc_torch_dtype(qkv.dtype))
        return torch.zeros_like(of) if grad is None else roll_up(grad, of)

    drel_k = table(need_drel_k, grads[1], rel_k)
    drel_v = table(need_drel_v, grads[2], rel_v)
    if drel_v is not None and num_images:
        images = dout[:, geo.n :].sum((0, 1, 2, 3), dtype=drel_v.dtype)  # (heads, D)
        center = drel_v.shape[1] // 2
        drel_v[:, center] += images if drel_v.shape[0] > 1 else images.sum(0, keepdim=True)
    dbias = None
    if need_dbias and bias is not None:
        dbias = torch.zeros_like(bias) if grads[0] is None else _dbias(grads[0], bias, geo)
    return (
        _empty(qkv) if dqkv is None else dqkv,
        _empty(qkv) if dbias is None else dbias,
        _empty(qkv) if drel_k is None or rel_k is None else drel_k.to(rel_k.dtype),
        _empty(qkv) if drel_v is None or rel_v is None else drel_v.to(rel_v.dtype),
    )

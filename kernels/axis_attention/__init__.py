"""Softmax attention along one axis, read by strides from the packed (B, F, H, W, 3, heads, D).

    out_i = Σ_j softmax_j(sm_scale * (q_i·k_j + q_i·rel_k[j-i]) + bias_ij) (v_j + rel_v[j-i])

Nothing is permuted: the kernels are told which axis is the sequence. Up to ``SHORT`` positions one
tile holds all keys of several sequences (``axis_attention_short``), beyond that the softmax runs
online (``axis_attention_long``). The images of a joint batch pass through in two copies.

Forward 4*N*D FLOPs a row and 4 rows moved, backward 10*N*D and 7 (8 beyond one tile).
Ho et al. 2022 (Video Diffusion Models), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels.axis_attention.long import long_bwd, long_fwd
from fastvdm.kernels.axis_attention.shared import Geometry, geometry, roll_up, unroll_table
from fastvdm.kernels.axis_attention.short import short_bwd, short_fwd
from fastvdm.kernels.common import acc_torch_dtype
from fastvdm.kernels.limits import SHORT


def _attended(bias: Tensor | None, n: int) -> Tensor | None:
    return None if bias is None else bias[:, :n, :n].contiguous()


def _bytes(focus_mask: Tensor | None) -> Tensor | None:
    return None if focus_mask is None else focus_mask.view(torch.uint8)


def axis_attention_fwd(
    qkv: Tensor,
    axis: int,
    bias: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    rotary: Tensor | None,
    focus_mask: Tensor | None,
    num_images: int,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    geo = geometry(qkv, axis, num_images)
    b, f, h, w, _, heads, d = qkv.shape
    out = torch.empty((b, f, h, w, heads, d), dtype=qkv.dtype, device=qkv.device)
    size = (b, geo.outer, heads, geo.total) if geo.total > SHORT else (0,)
    # Rows that the kernel skips (images, focused samples) read as 0.
    make = torch.empty if num_images == 0 and focus_mask is None else torch.zeros
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
    args = (
        *(_attended(bias, geo.n), unroll_table(rel_k, geo.n), unroll_table(rel_v, geo.n)),
        *(rotary, _bytes(focus_mask), sm_scale),
    )
    if geo.total > SHORT:
        long_fwd(geo, qkv, out, lse, *args)
    else:
        short_fwd(geo, qkv, out, *args)
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
    bias: Tensor | None,
    rel_k: Tensor | None,
    rel_v: Tensor | None,
    rotary: Tensor | None,
    focus_mask: Tensor | None,
    num_images: int,
    sm_scale: float,
    need_dqkv: bool,
    need_dbias: bool,
    need_drel_k: bool,
    need_drel_v: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    geo = geometry(qkv, axis, num_images)
    dqkv = None
    if need_dqkv:
        dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
        if num_images:
            dqkv[:, geo.n :, :, :, :2] = 0
            dqkv[:, geo.n :, :, :, 2] = dout[:, geo.n :]
    grads: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if geo.n and dout.numel():
        options = (
            *(_attended(bias, geo.n), unroll_table(rel_k, geo.n), unroll_table(rel_v, geo.n)),
            *(rotary, _bytes(focus_mask), sm_scale),
        )
        wanted = (dqkv, need_dbias, need_drel_k, need_drel_v)
        if geo.total > SHORT:
            grads = long_bwd(geo, dout, qkv, out, lse, axis, *options, *wanted)
        else:
            grads = short_bwd(geo, dout, qkv, axis, *options, *wanted)

    def table(need: bool, grad: Tensor | None, of: Tensor | None) -> Tensor | None:
        if not need or of is None:
            return None
        wide = of.to(acc_torch_dtype(qkv.dtype))
        return torch.zeros_like(wide) if grad is None else roll_up(grad, wide)

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

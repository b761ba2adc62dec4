"""Norm → affine → FiLM → SiLU → dropout → + residual on (B, F, H, W, C), in plain torch."""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor


def _has_tangent(*tensors: Tensor | None) -> bool:
    if fwAD._current_level < 0:
        return False
    return any(t is not None and fwAD.unpack_dual(t).tangent is not None for t in tensors)


def _group_norm(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, eps: float) -> Tensor:
    """GroupNorm of x (N, L, C) over (L, C/groups). Wu & He 2018, Eq. 1-2.

    torch's channels-last CPU kernel computes E[x²] - E[x]²: at 1e4 ± 1 in fp32 its result is off by
    1e3 (torch 2.13). Subtracting a constant per group changes neither the result nor any
    derivative, so a rough mean is subtracted first.
    """
    n, _, c = x.shape
    acc = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        mean = x.mean(1, dtype=acc).view(n, groups, c // groups).mean(2, keepdim=True)
        mean = mean.expand(n, groups, c // groups).reshape(n, 1, c)
    # Neither vmap nor forward-mode autograd has a rule for channels-last.
    if torch._C._functorch.get_dynamic_layer_stack_depth() or _has_tangent(x, weight, bias):
        return F.group_norm((x - mean).mT, groups, weight, bias, eps).mT
    centred = (x - mean).unsqueeze(2).permute(0, 3, 1, 2)  # (N, C, L, 1): a channels-last view
    return F.group_norm(centred, groups, weight, bias, eps).permute(0, 2, 3, 1).squeeze(2)


def _group_norm_given(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    eps: float,
    stats: tuple[Tensor, Tensor],
) -> Tensor:
    """GroupNorm of x (N, L, C) with given mean and rstd (N, groups), through which it still
    differentiates. They may be statistics of more than x, e.g. if ranks share a video."""
    n, length, c = x.shape
    rows = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(n, length, groups, -1)
    variance, mean = torch.var_mean(rows, dim=(1, 3), keepdim=True, correction=0)
    own = mean, torch.rsqrt(variance + eps)
    mean, rstd = (o + (t.view(n, 1, groups, 1) - o).detach() for o, t in zip(own, stats))
    y = ((rows - mean) * rstd).view(n, length, c) * weight
    return y if bias is None else y + bias


def norm_act_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: str,
    groups: int = 1,
    per_frame: bool = False,
    eps: float = 1e-5,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    residual: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    x2: Tensor | None = None,
    stats: tuple[Tensor, Tensor] | None = None,
    x_bias: Tensor | None = None,
) -> Tensor:
    """y = SiLU((norm(x + x_bias) weight + bias) (1 + scale) + shift) dropout_mask + residual.

    x is (B, F, H, W, C); x2 is (B, F, H, W, C2) or None, and its channels follow those of x. weight
    and bias are (C + C2,), scale and shift (B, C + C2), residual, dropout_mask and the result (B,
    F, H, W, C + C2). It computes in fp32 (fp64 for fp64 input) and rounds once, to the dtype of x.
    ``groups`` and ``per_frame`` matter only for kind "group", as do ``stats``: (mean, rstd) of (B,
    groups) or (B*F, groups), which replace those of x + x_bias, with x_bias (C,).
    """
    dtype = x.dtype
    acc = torch.promote_types(dtype, torch.float32)
    x = x if x_bias is None else x.to(acc) + x_bias.to(acc)
    x = x if x2 is None else torch.cat([x, x2], dim=-1)
    b, f, h, w, c = x.shape
    weight = weight.to(acc)
    bias = None if bias is None else bias.to(acc)
    if kind == "group":
        rows = x.reshape(b * f if per_frame else b, -1, c)
        if stats is None:
            y = _group_norm(rows, weight, bias, groups, eps)
        else:
            y = _group_norm_given(rows, weight, bias, groups, eps, stats)
        y = y.reshape(b, f, h, w, c)
    elif kind == "rms":  # Zhang & Sennrich 2019, Eq. 4, on the L2 norm: x / max(||x||, eps) √C
        y = F.normalize(x.to(acc), dim=-1, eps=eps) * (weight * c**0.5)
        y = y if bias is None else y + bias
    elif kind == "layer":  # Ba et al. 2016, Eq. 3, over channels
        y = F.layer_norm(x.to(acc), (c,), weight, bias, eps)
    else:
        raise ValueError(f'kind must be "group", "rms" or "layer", got {kind!r}')
    if scale is not None:
        y = y * (1 + scale.to(acc).view(b, 1, 1, 1, c))
    if shift is not None:
        y = y + shift.to(acc).view(b, 1, 1, 1, c)
    y = F.silu(y) if act else y
    y = y if dropout_mask is None else y * dropout_mask
    y = y if residual is None else y + residual
    return y.to(dtype)

"""``axis_attention`` by fused kernels of torch and xformers.

They get views of qkv; nothing is copied if the sequence is space or the batch is one video. The
only option is a bias. Gradients come from their own autograd.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvdm.kernels.limits import SPACE
from fastvdm.runtime.optional import require

HAS_XFORMERS = importlib.util.find_spec("xformers") is not None
_ALIGNED = 8  # xformers requires each row of the bias to begin at a multiple of this


def _sequences(t: Tensor, axis: int) -> Tensor:
    """(B, F, H, W, ...) → (batch, N, ...)."""
    if axis == SPACE:
        return t.flatten(2, 3).flatten(0, 1)
    return t.flatten(2, 3).transpose(1, 2).flatten(0, 1)


def _video(out: Tensor, qkv: Tensor, axis: int) -> Tensor:
    """The inverse: (batch, N, heads, D) → (B, F, H, W, heads, D), contiguous."""
    b, f, h, w, _, heads, d = qkv.shape
    if axis == SPACE:
        return out.reshape(b, f, h, w, heads, d).contiguous()
    return out.reshape(b, h * w, f, heads, d).transpose(1, 2).reshape(b, f, h, w, heads, d)


def _cast(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in a dtype whose numbers may end earlier: what is finite stays so, as -inf masks."""
    cast, low = bias.to(dtype), torch.finfo(dtype).min
    if torch.finfo(bias.dtype).min == low:
        return cast
    return torch.where((cast == -torch.inf) & (bias != -torch.inf), low, cast)


def by_torch(qkv: Tensor, axis: int, bias: Tensor | None, sm_scale: float) -> Tensor:
    """One call of ``scaled_dot_product_attention``."""
    q, k, v = (t.transpose(1, 2) for t in _sequences(qkv, axis).unbind(2))
    mask = None if bias is None else _cast(bias, q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=sm_scale)
    return _video(out.transpose(1, 2), qkv, axis)


def by_xformers(qkv: Tensor, axis: int, bias: Tensor | None, sm_scale: float) -> Tensor:
    """One call of ``memory_efficient_attention``.

    Raises:
        ImportError: xformers is not installed; the message names the extra.
    """
    ops = require("xformers.ops", "xformers")
    q, k, v = _sequences(qkv, axis).unbind(2)
    mask = None
    if bias is not None:
        n = bias.shape[-1]
        padded = F.pad(_cast(bias, q.dtype), (0, -n % _ALIGNED))
        mask = padded[..., :n].expand(q.shape[0], -1, -1, -1)
    out = ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=sm_scale)
    return _video(out, qkv, axis)

"""Softmax attention along one axis of a video, in plain torch.

Ho et al. 2022, "Video Diffusion Models", section 3: attention over space with the frames as batch,
over time with the pixels as batch. Shaw et al. 2018 (arXiv 1803.02155), Eq. 3-4, for the relative
key and value vectors; Su et al. 2021 (arXiv 2104.09864) for the rotary embedding.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of the first R features of x (..., N, D) by the table (2, N, R/2)
    of cosines and sines. Products are in fp32 (fp64 for fp64), the result in the dtype of x."""
    half = rotary.shape[-1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    pairs = torch.complex(wide[..., 0 : 2 * half : 2], wide[..., 1 : 2 * half : 2])
    turn = torch.complex(*rotary.to(wide.dtype))  # exp(i angle)
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    if 2 * half < x.shape[-1]:
        turned = torch.cat((turned, wide[..., 2 * half :]), dim=-1)
    return turned.to(x.dtype)


def relative(table: Tensor, n: int) -> Tensor:
    """Shaw table (T, 2R+1, D) → one vector per query and key (T, N, N, D): row clip(j-i) + R."""
    reach = table.shape[1] // 2
    position = torch.arange(n, device=table.device)
    return table[:, (position[None, :] - position[:, None]).clamp(-reach, reach) + reach]


def axis_attention_ref(
    qkv: Tensor,
    *,
    axis: str,
    bias: Tensor | None = None,
    rel_k: Tensor | None = None,
    rel_v: Tensor | None = None,
    rotary: Tensor | None = None,
    focus_mask: Tensor | None = None,
    num_images: int = 0,
    sm_scale: float | None = None,
) -> Tensor:
    """Arguments and result are those of ``fastvdm.ops.axis_attention.axis_attention``."""
    b, f, h, w = qkv.shape[:4]
    scale = qkv.shape[-1] ** -0.5 if sm_scale is None else sm_scale
    split = {
        "time": "b f h w three n d -> three b (h w) n f d",
        "space": "b f h w three n d -> three b f n (h w) d",
    }[axis]
    q, k, v = rearrange(qkv, split).unbind(0)  # (B, outer, heads, N, D)
    identity = v if rel_v is None else v + rel_v[:, rel_v.shape[1] // 2, None, :]

    n = q.shape[-2] - num_images  # the images of a joint batch attend to themselves only
    q, k, v = q[..., :n, :], k[..., :n, :], v[..., :n, :]
    q_plain = q
    if rotary is not None:
        q, k = rotate(q, rotary[:, :n]), rotate(k, rotary[:, :n])
    logits = torch.einsum("bonid,bonjd->bonij", q, k) * scale
    if rel_k is not None:
        # With a rotated query the term would depend on absolute positions.
        rel = relative(rel_k, n).expand(q.shape[2], -1, -1, -1)
        logits = logits + torch.einsum("bonid,nijd->bonij", q_plain, rel) * scale
    if bias is not None:
        # A query whose keys are all masked by the bias gets zeros, not NaN.
        empty = (bias[:, :n, :n] == -torch.inf).all(dim=-1, keepdim=True)
        logits = logits + bias[:, :n, :n].masked_fill(empty, 0.0)
    attn = logits.softmax(dim=-1).to(v.dtype)
    if bias is not None:
        attn = attn.masked_fill(empty, 0.0)
    out = torch.einsum("bonij,bonjd->bonid", attn, v)
    if rel_v is not None:
        rel = relative(rel_v, n).expand(q.shape[2], -1, -1, -1)
        out = out + torch.einsum("bonij,nijd->bonid", attn, rel)

    if num_images:
        out = torch.cat((out, identity[..., n:, :]), dim=-2)
    if focus_mask is not None:
        out = torch.where(focus_mask[:, None, None, None, None], identity, out)
    merge = {
        "time": "b (h w) n f d -> b f h w n d",
        "space": "b f n (h w) d -> b f h w n d",
    }[axis]
    return rearrange(out.to(qkv.dtype), merge, h=h, w=w)

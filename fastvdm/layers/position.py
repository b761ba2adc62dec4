"""Relative positions of frames: T5 buckets, Shaw vectors, rotary tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastvdm.layers.kept import kept
from fastvdm.layers.plain import weights_of


def t5_bucket(relative: Tensor, num_buckets: int = 32, max_distance: int = 32) -> Tensor:
    """The bucket of ``relative`` = key - query (Raffel et al. 2020, §2.1), as the peer computes it.

    Each direction has half of the buckets. Half of those are exact distances; the others grow
    logarithmically up to ``max_distance``.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = relative.abs()
    growth = torch.log(distance.clamp_min(1).float() / exact) / math.log(max_distance / exact)
    far = (exact + (growth * (half - exact)).long()).clamp_max(half - 1)
    return (relative > 0).long() * half + torch.where(distance < exact, distance, far)


@kept
def _t5_buckets(n: int, num_buckets: int, max_distance: int, device: torch.device) -> Tensor:
    """(n, n) [query, key]: the bucket of every pair of positions."""
    position = torch.arange(n, device=device)
    return t5_bucket(position - position[:, None], num_buckets, max_distance)


@kept
def causal_bias(heads: int, n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(heads, n, n) [query, key]: -inf for keys after the query, 0 otherwise."""
    future = torch.ones(n, n, dtype=torch.bool, device=device).triu(1)
    table = torch.zeros(heads, n, n, dtype=dtype, device=device)
    return table.masked_fill(future, -torch.inf)


class T5RelativeBias(nn.Module):
    """A learned bias (heads, n, n) [query, key], one number per head and bucket."""

    def __init__(self, heads: int, num_buckets: int = 32, max_distance: int = 32) -> None:
        super().__init__()
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    def forward(self, n: int, device: torch.device) -> Tensor:
        bucket = _t5_buckets(n, self.num_buckets, self.max_distance, device)
        table = self.relative_attention_bias
        # Contiguous, as kernels read it; otherwise each attention of a forward would copy it.
        weights = None if torch.is_grad_enabled() else weights_of(table, nn.Embedding)
        if weights is None:
            return table(bucket).permute(2, 0, 1).contiguous()
        return weights[0].t().index_select(1, bucket.flatten()).view(-1, n, n)


class ShawTable(nn.Module):
    """Vectors (T, 2R+1, head_dim) per clipped distance key - query (Shaw et al. 2018, Eq. 3-4).

    T is ``heads``, or 1 if the heads share the table; ``values`` adds a table for the values.
    """

    def __init__(self, head_dim: int, max_distance: int, *, values: bool, heads: int = 1) -> None:
        super().__init__()
        shape = (heads, 2 * max_distance + 1, head_dim)
        self.rel_k = nn.Parameter(head_dim**-0.5 * torch.randn(shape))
        self.rel_v = nn.Parameter(head_dim**-0.5 * torch.randn(shape)) if values else None

    def forward(self) -> tuple[Tensor, Tensor | None]:
        return self.rel_k, self.rel_v


def rotary_frequencies(
    rotary_dim: int, device: torch.device | None = None, theta: float = 1e4
) -> Tensor:
    """(rotary_dim / 2,) fp32: theta^(-2i / rotary_dim) (Su et al. 2021, §3.2.2)."""
    exponent = torch.arange(0, rotary_dim, 2, device=device).float() / rotary_dim
    return 1.0 / theta**exponent


@kept
def rotary_table(n: int, rotary_dim: int, device: torch.device, theta: float = 1e4) -> Tensor:
    """(2, n, rotary_dim / 2) fp32: cos and sin of position * frequency."""
    position = torch.arange(n, device=device, dtype=torch.float32)
    angle = position[:, None] * rotary_frequencies(rotary_dim, device, theta)
    return torch.stack((angle.cos(), angle.sin()))

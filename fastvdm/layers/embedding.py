"""Time and conditioning embeddings. Every tensor here is a batch of vectors (B, ...)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastvdm.layers.kept import kept, watched


@kept
def _frequencies(count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    rate = math.log(10000.0) / (count - 1)
    return torch.exp(torch.arange(count, device=device, dtype=dtype) * -rate)


def sinusoid(t: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """(B,) → (B, dim) in ``dtype``: sines, then cosines of t * 10000^(-i / (dim/2 - 1)) for
    i = 0 .. dim/2 - 1."""
    half = dim // 2
    angle = t[:, None] * _frequencies(half, t.device, t.dtype)
    if torch.is_grad_enabled() or watched():
        return torch.cat((angle.sin(), angle.cos()), dim=-1).to(dtype)
    out = t.new_empty((len(t), 2 * half), dtype=dtype)  # two launches instead of three or four
    torch.sin(angle, out=out[:, :half])
    torch.cos(angle, out=out[:, half:])
    return out


def log_snr_to_unit(log_snr: Tensor) -> Tensor:
    """arctan(exp(-λ/2)) / (π/2), λ clipped to [-20, 20]: 0 is clean, 1 is noise ("inv_cos")."""
    return torch.atan(torch.exp(-0.5 * log_snr.clamp(-20.0, 20.0))) / (0.5 * math.pi)


def mlp(in_dim: int, dim: int, num_layers: int, act: type[nn.Module]) -> nn.Sequential:
    """``num_layers`` linear layers with ``act`` between them."""
    layers: list[nn.Module] = [nn.Linear(in_dim, dim)]
    for _ in range(num_layers - 1):
        layers += [act(), nn.Linear(dim, dim)]
    return nn.Sequential(*layers)


class TimeEmbedding(nn.Module):
    """Embed a step index or log-SNR: (B,) to (B, emb_dim).

    ``time_input`` "index" embeds the number itself (the peer); "logsnr" maps λ to [0, 1] and embeds
    1000 times that (the distillation code).
    """

    def __init__(
        self, dim: int, emb_dim: int, *, time_input: str, num_layers: int, act: type[nn.Module]
    ) -> None:
        super().__init__()
        self.dim, self.time_input = dim, time_input
        self.mlp = mlp(dim, emb_dim, num_layers, act)

    def forward(self, time: Tensor) -> Tensor:
        # Layers may have been replaced; quantised ones may have no floating-point parameter.
        dtypes = (p.dtype for p in self.parameters() if p.is_floating_point())
        dtype = next(dtypes, torch.float32)
        # Angles reach 1000 rad, so they need at least fp32.
        time = time.to(torch.promote_types(dtype, torch.float32))
        if self.time_input == "logsnr":
            time = 1000.0 * log_snr_to_unit(time)
        return self.mlp(sinusoid(time, self.dim, dtype))


def probability_mask(batch: int, prob: float, device: torch.device) -> Tensor | None:
    """(batch,) bool, True with probability ``prob``; None for prob = 0. It does not synchronise."""
    if prob <= 0:
        return None
    if prob >= 1:
        return torch.ones(batch, device=device, dtype=torch.bool)
    return torch.rand(batch, device=device) < prob  # not in place, so that vmap can batch it

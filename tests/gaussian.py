"""Gaussian videos: the perfect denoiser is linear and known, and so is the result of a sampler.

x ~ N(mean, cov) over the frames, independent over batch, channels and pixels: one call draws as
many independent samples as there are pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.diffusion import alpha_of, convert, sigma_of

DOUBLE = torch.float64


class Gaussian:
    """N(mean, cov) over F frames with its perfect denoiser."""

    def __init__(self, frames: int = 6, rho: float = 0.9, mean: float = 0.0) -> None:
        i = torch.arange(frames, dtype=DOUBLE)
        self.frames = frames
        # unequal variances, so that no frame can be taken for another
        scale = 0.6 + 0.1 * i
        self.cov = rho ** (i[:, None] - i[None]).abs() * scale[:, None] * scale[None]
        self.mean = mean + 0.1 * i

    def gain(self, log_snr: float) -> tuple[Tensor, Tensor]:
        """(K, k) with E[x | z] = K z + k at one level."""
        level = torch.tensor(log_snr, dtype=DOUBLE)
        alpha, sigma = alpha_of(level), sigma_of(level)
        total = alpha**2 * self.cov + sigma**2 * torch.eye(self.frames, dtype=DOUBLE)
        gain = torch.linalg.solve(total, alpha * self.cov).T
        return gain, self.mean - alpha * gain @ self.mean

    def denoiser(self, prediction: str = "eps"):
        """model(z, log_snr) → the perfect prediction, in the dtype of z."""

        def model(z: Tensor, log_snr: Tensor) -> Tensor:
            gain, offset = self.gain(float(log_snr[0]))
            x = torch.einsum("ij,bcjhw->bcihw", gain, z.double()) + offset.reshape(1, 1, -1, 1, 1)
            level = log_snr.double()
            return convert(x, z.double(), level, source="x", target=prediction).to(z.dtype)

        return model

    def conditional(self, known: list[int], values: Tensor) -> tuple[list[int], Tensor, Tensor]:
        """(other frames, their mean, their covariance) given the known frames."""
        rest = [i for i in range(self.frames) if i not in known]
        gain = torch.linalg.solve(self.cov[known][:, known], self.cov[known][:, rest]).T
        mean = self.mean[rest] + gain @ (values - self.mean[known])
        return rest, mean, self.cov[rest][:, rest] - gain @ self.cov[known][:, rest]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and covariance (F, F) over every other axis of (B, C, F, H, W)."""
    flat = x.double().transpose(0, 2).flatten(1)
    return flat.mean(dim=1), torch.cov(flat)

"""Samplers: the coefficients of a step from level t to level s, per sample.

Every rule of the paper is linear: z_s = u_z z_t + u_x x_hat + u_n noise. A sampler here is the
function that gives (u_z, u_x, u_n) from the two log-SNRs, in fp64 and in numerically stable forms
(Ho et al. 2022, §2; stable forms as in Salimans & Ho 2022). ``fastvdm.ops.guidance`` applies them
to videos.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastvdm.diffusion.schedule import alpha_of, sigma_of


class Update(NamedTuple):
    """z_next = u_z z + u_x x_hat + u_n noise; all three have one shape."""

    u_z: Tensor
    u_x: Tensor
    u_n: Tensor


class Sampler(Protocol):
    def update(self, log_snr_t: Tensor, log_snr_s: Tensor) -> Update: ...


def _one_minus_r(log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """1 - e^(lt - ls), which is 1 if s is clean (ls = inf)."""
    return -torch.expm1(log_snr_t - log_snr_s)


def _alpha_ratio(log_snr_t: Tensor, log_snr_s: Tensor) -> Tensor:
    """alpha_s/alpha_t = sqrt((1 + e^-lt)/(1 + e^-ls))."""
    return torch.exp(0.5 * (softplus(-log_snr_t) - softplus(-log_snr_s)))


def posterior(log_snr_t: Tensor, log_snr_s: Tensor, gamma: float = 0.0) -> Update:
    """q(z_s | z_t, x), with mean e^(lt-ls) (alpha_s/alpha_t) z_t + (1 - e^(lt-ls)) alpha_s x.

    The standard deviation is sqrt(tilde_sigma^(2(1-gamma)) sigma_{t|s}^(2 gamma)) of Eq. 4. The two
    variances are (1 - e^(lt-ls)) times sigma_s^2 and times sigma_t^2.
    """
    one_minus_r = _one_minus_r(log_snr_t, log_snr_s)
    u_z = torch.exp(log_snr_t - log_snr_s) * _alpha_ratio(log_snr_t, log_snr_s)
    u_x = one_minus_r * alpha_of(log_snr_s)
    sigma = sigma_of(log_snr_s) ** (1 - gamma) * sigma_of(log_snr_t) ** gamma
    return Update(u_z, u_x, one_minus_r.sqrt() * sigma)


def marginal(log_snr: Tensor) -> Update:
    """q(z_s | x) = N(alpha_s x, sigma_s^2)."""
    return Update(torch.zeros_like(log_snr), alpha_of(log_snr), sigma_of(log_snr))


@dataclass(frozen=True)
class Ancestral:
    """The ancestral sampler (Ho et al. 2022, Eq. 4).

    Args:
        gamma: interpolates the log-variance between its lower bound (0, "fixed small", the peer's
            choice) and its upper bound (1, "fixed large"). The paper uses 0 for BAIR and Kinetics,
            0.1 for UCF101 and 0.3 for text. The default is 0.

    Raises:
        ValueError: ``gamma`` is outside [0, 1].
    """

    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma}")

    def update(self, log_snr_t: Tensor, log_snr_s: Tensor) -> Update:
        """Coefficients of the step from t to s: ``posterior``."""
        return posterior(log_snr_t, log_snr_s, self.gamma)


@dataclass(frozen=True)
class DDIM:
    """The DDIM sampler (Song et al. 2021, Eq. 12).

    z_s = alpha_s x_hat + sqrt(sigma_s^2 - eta^2 v) eps_hat + eta sqrt(v) noise, where v is the
    posterior variance.

    Args:
        eta: 0 (default) is deterministic, 1 is ``Ancestral(0)``.

    Raises:
        ValueError: ``eta`` is outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in [0, 1], got {self.eta}")

    def update(self, log_snr_t: Tensor, log_snr_s: Tensor) -> Update:
        """Coefficients of the step from t to s."""
        one_minus_r = _one_minus_r(log_snr_t, log_snr_s)
        keep = (1 - self.eta**2 * one_minus_r).clamp_min(0).sqrt()  # fraction of sigma_s
        # sigma_s/sigma_t and (alpha_t/sigma_t) sigma_s without a division by a small sigma
        ratio = torch.exp(0.5 * (softplus(log_snr_t) - softplus(log_snr_s)))
        u_z = keep * ratio
        u_x = alpha_of(log_snr_s) - keep * ratio * alpha_of(log_snr_t)
        return Update(u_z, u_x, self.eta * one_minus_r.sqrt() * sigma_of(log_snr_s))


@dataclass(frozen=True)
class Langevin:
    """The Langevin corrector (Ho et al. 2022, Eq. 5).

    z_s <- z_s - (delta/2) sigma_s eps(z_s) + sqrt(delta) sigma_s noise. It takes one more network
    call after each step of the sampler, at the new level. After the final step sigma is 0 and
    nothing can be corrected, so it is skipped there (the paper does not say). Known frames do not
    change. It pays from about 50 + 50 calls on; below, as many ancestral steps are better.

    Args:
        delta: step size in (0, 1]; the paper fixes 0.1.
        guided: compute eps from the guided x_tilde, so that sampler and corrector have the same
            target (default; the paper leaves it open). False uses the network's own eps and saves
            the second backward pass.

    Raises:
        ValueError: ``delta`` is outside (0, 1].
    """

    delta: float = 0.1
    guided: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1:
            raise ValueError(f"delta must be in (0, 1], got {self.delta}")

    def update(self, log_snr: Tensor) -> Update:
        """With sigma eps = z - alpha x_hat the step is z (1 - delta/2) + (delta/2) alpha x_hat +
        sqrt(delta) sigma noise."""
        half = 0.5 * self.delta
        sigma = sigma_of(log_snr)
        return Update(
            torch.full_like(log_snr, 1 - half), half * alpha_of(log_snr), self.delta**0.5 * sigma
        )

"""Noise schedules: the paper's continuous cosine in log-SNR, and the peer's discrete one.

Throughout, log_snr = log(alpha^2 / sigma^2), alpha^2 = sigmoid(log_snr), sigma^2 =
sigmoid(-log_snr), z_t = alpha_t x + sigma_t noise (Ho et al. 2022, Video Diffusion Models, §2).
The peer is ``video-diffusion-pytorch`` (lucidrains).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastvdm.runtime.choices import check_choice

TimeInput = Literal["logsnr", "t", "index"]


def alpha_of(log_snr: Tensor) -> Tensor:
    """alpha = sqrt(sigmoid(log_snr)), same shape."""
    return torch.sigmoid(log_snr).sqrt()


def sigma_of(log_snr: Tensor) -> Tensor:
    """sigma = sqrt(sigmoid(-log_snr)), same shape; accurate also where alpha is near 1."""
    return torch.sigmoid(-log_snr).sqrt()


class Levels(NamedTuple):
    """The noise levels of a sampling run, noisiest first: CPU tensors, fp64 (indices: int64)."""

    log_snr: Tensor  # (N + 1,); the final step ends at the last one
    t: Tensor  # (N + 1,) in [0, 1]
    indices: Tensor | None  # (N,) step index of a discrete schedule, None for a continuous one

    def network_time(self, time_input: str) -> Tensor:
        """The time (N,) that the network takes at each level.

        Raises:
            ValueError: "index" is asked of a continuous schedule, or the name is unknown.
        """
        check_choice("time_input", time_input, TimeInput)
        if time_input == "logsnr":
            return self.log_snr[:-1]
        if time_input == "t":
            return self.t[:-1]
        if self.indices is None:
            raise ValueError("time_input='index' needs a DiscreteSchedule, got a continuous one")
        return self.indices


class Schedule(Protocol):
    """The interface of schedules that samplers and losses use."""

    @property
    def time_input(self) -> str: ...  # what the network takes unless the caller says otherwise

    def log_snr(self, t: Tensor) -> Tensor: ...

    def levels(self, num_steps: int | None) -> Levels: ...

    def draw(
        self, batch: int, *, device: torch.device | str, generator: torch.Generator | None
    ) -> Tensor: ...

    def network_time(self, t: Tensor, time_input: str) -> Tensor: ...


def _check_steps(num_steps: int, most: int | None = None) -> None:
    if isinstance(num_steps, bool) or not isinstance(num_steps, Integral):
        raise TypeError(f"num_steps must be an int, got {type(num_steps).__name__}")
    if num_steps < 1 or (most is not None and num_steps > most):
        limit = "at least 1" if most is None else f"between 1 and {most}"
        raise ValueError(f"num_steps must be {limit}, got {num_steps}")


@dataclass(frozen=True)
class CosineSchedule:
    """The paper's schedule: log_snr(t) = -2 log tan(a t + b), t in [0, 1].

    b = arctan(e^(-max/2)), a + b = arctan(e^(-min/2)), with the log-SNR truncated to [min, max]
    (Ho et al. 2022, Appendix A). The network takes the log-SNR (``time_input="logsnr"``).

    Args:
        logsnr_min: log-SNR at t = 1; -20 in the paper.
        logsnr_max: log-SNR at t = 0; 20 in the paper.
        time_input: what the network takes: the log-SNR, as in the paper, or t.

    Raises:
        ValueError: the bounds are not finite or not in order.
    """

    logsnr_min: float = -20.0
    logsnr_max: float = 20.0
    time_input: Literal["logsnr", "t"] = "logsnr"

    def __post_init__(self) -> None:
        bounds = (self.logsnr_min, self.logsnr_max)
        if not all(math.isfinite(b) for b in bounds) or bounds[0] >= bounds[1]:
            raise ValueError(f"logsnr_min < logsnr_max must be finite, got {bounds}")
        if self.time_input not in ("logsnr", "t"):
            raise ValueError(f"time_input must be 'logsnr' or 't', got {self.time_input!r}")

    @property
    def _ends(self) -> tuple[float, float, float]:
        """(a, b, c): the angle is a t + b, and pi/2 minus the angle is a (1 - t) + c."""
        b = math.atan(math.exp(-0.5 * self.logsnr_max))
        c = math.atan(math.exp(0.5 * self.logsnr_min))
        return 0.5 * math.pi - b - c, b, c

    def log_snr(self, t: Tensor) -> Tensor:
        """The log-SNR of times in [0, 1], with their shape and dtype.

        Beyond t = 1/2 it is computed from the complement of the angle, because the tangent loses
        digits near pi/2 (in fp32 the error would be 2e-3 at t = 1).
        """
        a, b, c = self._ends
        early = -2 * torch.log(torch.tan(a * t.clamp_max(0.5) + b))
        late = 2 * torch.log(torch.tan(a * (1 - t.clamp_min(0.5)) + c))
        return torch.where(t <= 0.5, early, late)

    def levels(self, num_steps: int | None = None) -> Levels:
        """Levels at uniform t from 1 to 0, in ``num_steps`` steps (the paper's 256 by default)."""
        num_steps = 256 if num_steps is None else num_steps
        _check_steps(num_steps)
        t = torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
        return Levels(self.log_snr(t), t, None)

    def draw(
        self,
        batch: int,
        *,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """t ~ U[0, 1], (batch,) fp32, as in the paper's training loss."""
        return torch.rand(batch, device=device, generator=generator)

    def network_time(self, t: Tensor, time_input: str) -> Tensor:
        """What the network takes at times ``t``: the log-SNR for "logsnr", ``t`` for "t"."""
        if time_input == "logsnr":
            return self.log_snr(t)
        if time_input == "t":
            return t
        raise ValueError(f"CosineSchedule gives 'logsnr' or 't', not {time_input!r}")


class DiscreteSchedule:
    """The T-step schedule of the peer's ``GaussianDiffusion`` (``video-diffusion-pytorch``).

    alpha_bar(i) = cos^2(((i/T) + s)/(1 + s) pi/2) / alpha_bar(0), with beta clipped to [0, 0.9999].
    Everything is derived in fp64 and returned in fp32 (``buffers``). Index i = 0..T-1 has the
    continuous time t = (i + 1)/T, so t = 0 is clean data. The network takes the index.

    Args:
        timesteps: T.
        s: offset of the cosine; the peer's is 0.008.
        betas: (T,) betas of another discrete schedule, e.g. those of a checkpoint.
        time_input: what the network takes: "index" (the peer's networks), "logsnr" or "t".
    """

    def __init__(
        self,
        timesteps: int = 1000,
        *,
        s: float = 0.008,
        betas: Tensor | None = None,
        time_input: TimeInput = "index",
    ) -> None:
        check_choice("time_input", time_input, TimeInput)
        if betas is None:
            _check_steps(timesteps)
            i = torch.arange(timesteps + 1, dtype=torch.float64)
            bar = torch.cos((i / timesteps + s) / (1 + s) * torch.pi * 0.5) ** 2
            bar = bar / bar[0]
            betas = (1 - bar[1:] / bar[:-1]).clamp(0, 0.9999)
        elif not isinstance(betas, Tensor):
            raise TypeError(f"betas must be a tensor, got {type(betas).__name__}")
        elif betas.ndim != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(f"betas must be 1-D in (0, 1), got shape {tuple(betas.shape)}")
        self.betas = betas.detach().to("cpu", torch.float64)
        self.timesteps = len(self.betas)
        self.time_input = time_input
        self.alphas_cumprod = torch.cumprod(1 - self.betas, 0)
        self._log_snr = torch.log(self.alphas_cumprod) - torch.log(1 - self.alphas_cumprod)

    def __repr__(self) -> str:
        return f"DiscreteSchedule(timesteps={self.timesteps}, time_input={self.time_input!r})"

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Tensor]) -> DiscreteSchedule:
        """The schedule of a peer checkpoint (``GaussianDiffusion.state_dict()``).

        A checkpoint stores betas rounded to fp32. If they are those of the cosine schedule to that
        rounding, the exact fp64 schedule is returned.

        Raises:
            KeyError: the state_dict has no ``betas``.
        """
        if "betas" not in state_dict:
            raise KeyError("no 'betas' in this state_dict: not a GaussianDiffusion checkpoint")
        betas = state_dict["betas"].detach().cpu()
        cosine = cls(len(betas))
        if torch.equal(cosine.betas.float(), betas.float()):
            return cosine
        return cls(betas=betas)

    def buffers(self) -> dict[str, Tensor]:
        """The twelve fp32 buffers of the peer's ``GaussianDiffusion``, by its names."""
        bar = self.alphas_cumprod
        prev = torch.cat((bar.new_ones(1), bar[:-1]))
        variance = self.betas * (1 - prev) / (1 - bar)
        wide = {
            "betas": self.betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": prev,
            "sqrt_alphas_cumprod": bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - bar).log(),
            "sqrt_recip_alphas_cumprod": (1 / bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / bar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp_min(1e-20).log(),
            "posterior_mean_coef1": self.betas * prev.sqrt() / (1 - bar),
            "posterior_mean_coef2": (1 - prev) * (1 - self.betas).sqrt() / (1 - bar),
        }
        return {name: value.float() for name, value in wide.items()}

    def index_to_t(self, index: Tensor) -> Tensor:
        """t = (index + 1)/T, fp32 (fp64 for fp64 indices)."""
        wide = index if index.is_floating_point() else index.float()
        return (wide + 1) / self.timesteps

    def t_to_index(self, t: Tensor) -> Tensor:
        """The nearest index in 0..T-1 to times in [0, 1], int64."""
        return (t * self.timesteps).round().long().sub(1).clamp(0, self.timesteps - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        """The log-SNR of times in [0, 1], rounded to an index, in the dtype of ``t``."""
        return self._log_snr.to(t.device)[self.t_to_index(t)].to(t.dtype)

    def levels(self, num_steps: int | None = None) -> Levels:
        """Indices from T-1 down to 0, evenly strided; by default all T, as in the peer.

        The final step ends at clean data (log-SNR +inf).
        """
        num_steps = self.timesteps if num_steps is None else num_steps
        _check_steps(num_steps, self.timesteps)
        if num_steps == 1:
            index = torch.tensor([self.timesteps - 1])
        else:
            index = torch.linspace(self.timesteps - 1, 0, num_steps, dtype=torch.float64)
            index = index.round().long()
        log_snr = torch.cat((self._log_snr[index], torch.tensor([torch.inf], dtype=torch.float64)))
        t = torch.cat((self.index_to_t(index.double()), torch.zeros(1, dtype=torch.float64)))
        return Levels(log_snr, t, index)

    def draw(
        self,
        batch: int,
        *,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Times of uniformly drawn indices 0..T-1, (batch,) fp32."""
        index = torch.randint(0, self.timesteps, (batch,), device=device, generator=generator)
        return self.index_to_t(index)

    def network_time(self, t: Tensor, time_input: str) -> Tensor:
        """What the network takes at times ``t``: "index" (int64), "logsnr" or "t"."""
        check_choice("time_input", time_input, TimeInput)
        if time_input == "index":
            return self.t_to_index(t)
        return t if time_input == "t" else self.log_snr(t)

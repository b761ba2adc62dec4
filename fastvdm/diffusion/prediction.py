"""What a network predicts (noise, v or x) and the conversions between the three.

Salimans & Ho 2022: v = alpha noise - sigma x. Every conversion is linear in (z, prediction), so
classifier-free guidance acts on all three alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.diffusion.schedule import alpha_of, sigma_of
from fastvdm.runtime.choices import check_choice
from fastvdm.unet.settings import Prediction


def check_prediction(prediction: str) -> None:
    """Raise ValueError unless ``prediction`` is "eps", "v" or "x"."""
    check_choice("prediction", prediction, Prediction)


def x_coefficients(log_snr: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(p_z, p_m) with x_hat = p_z z + p_m prediction, each with the shape of ``log_snr``.

    eps: x_hat = (z - sigma eps)/alpha with 1/alpha = sqrt(1 + e^-log_snr) and sigma/alpha =
    e^(-log_snr/2); v: x_hat = alpha z - sigma v; x: x_hat is the prediction.
    """
    check_prediction(prediction)
    if prediction == "eps":
        # e^(softplus/2) = sqrt(1 + e^-l), finite in fp32 for all levels in use
        return torch.exp(0.5 * torch.nn.functional.softplus(-log_snr)), -torch.exp(-0.5 * log_snr)
    if prediction == "v":
        return alpha_of(log_snr), -sigma_of(log_snr)
    return torch.zeros_like(log_snr), torch.ones_like(log_snr)


def eps_coefficients(log_snr: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(e_z, e_m) with eps_hat = e_z z + e_m prediction.

    v: eps_hat = sigma z + alpha v; x: eps_hat = (z - alpha x)/sigma.
    """
    check_prediction(prediction)
    if prediction == "eps":
        return torch.zeros_like(log_snr), torch.ones_like(log_snr)
    if prediction == "v":
        return sigma_of(log_snr), alpha_of(log_snr)
    # 1/sigma = sqrt(1 + e^log_snr), alpha/sigma = e^(log_snr/2)
    return torch.exp(0.5 * torch.nn.functional.softplus(log_snr)), -torch.exp(0.5 * log_snr)


def v_coefficients(log_snr: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """(v_z, v_m) with v_hat = v_z z + v_m prediction.

    v = (alpha z - x)/sigma = (eps - sigma z)/alpha.
    """
    check_prediction(prediction)
    if prediction == "eps":
        inv_alpha = torch.exp(0.5 * torch.nn.functional.softplus(-log_snr))
        return -torch.exp(-0.5 * log_snr), inv_alpha
    if prediction == "v":
        return torch.zeros_like(log_snr), torch.ones_like(log_snr)
    inv_sigma = torch.exp(0.5 * torch.nn.functional.softplus(log_snr))
    return torch.exp(0.5 * log_snr), -inv_sigma


_TARGETS = {"x": x_coefficients, "eps": eps_coefficients, "v": v_coefficients}


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Reshape (B,) scalars of samples to broadcast over ``like`` (B, ...), or (B, F) scalars of
    frames to broadcast over (B, C, F, H, W)."""
    if value.ndim == 2:
        return value.to(like.dtype)[:, None, :, None, None]
    return value.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def convert(
    value: Tensor, z: Tensor, log_snr: Tensor, *, source: Prediction, target: Prediction
) -> Tensor:
    """Convert a network's output to another parametrisation.

    Args:
        value: (B, ...) the network's output.
        z: (B, ...) the noisy input of the network.
        log_snr: (B,) the level of each sample.
        source: the parametrisation of ``value``: "eps", "v" or "x".
        target: the parametrisation of the result.

    Returns:
        The converted output, (B, ...).

    Raises:
        ValueError: a parametrisation is unknown, or shapes differ.
    """
    check_prediction(source)
    check_prediction(target)
    if value.shape != z.shape:
        raise ValueError(
            f"value and z must have one shape, got {tuple(value.shape)}, {tuple(z.shape)}"
        )
    if source == target:
        return value
    c_z, c_m = _TARGETS[target](log_snr, source)
    return expand(c_z, z) * z + expand(c_m, z) * value


def slope(log_snr: Tensor, source: Prediction, target: Prediction) -> Tensor:
    """d target / d source at fixed z: the factor between errors in two parametrisations."""
    return _TARGETS[target](log_snr, source)[1]

"""The training loss: mean squared error in epsilon space, t uniform (Ho et al. 2022, §2)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from fastvdm.diffusion.defaults import schedule_for
from fastvdm.diffusion.denoiser import Model, prediction_of, time_input_of, unwrap
from fastvdm.diffusion.prediction import Prediction, check_prediction, expand, slope
from fastvdm.diffusion.schedule import Schedule, TimeInput, alpha_of, sigma_of
from fastvdm.layers.kept import watched
from fastvdm.runtime.choices import check_choice
from fastvdm.unet.settings import ScheduleName

LossType = Literal["mse", "l1"]
Reduction = Literal["mean", "none"]


def q_sample(x: Tensor, log_snr: Tensor, noise: Tensor) -> Tensor:
    """z_t = alpha_t x + sigma_t noise, the forward process (Ho et al. 2022, eq. 1).

    Args:
        x: data (B, ...).
        log_snr: (B,), or (B, F) with x (B, C, F, H, W): a level per frame.
        noise: standard normal, of the shape of x.
    """
    return expand(alpha_of(log_snr), x) * x + expand(sigma_of(log_snr), x) * noise


def drop_cond(cond: Tensor, prob: float, generator: torch.Generator | None = None) -> Tensor:
    """Replace each sample's condition by zeros with probability ``prob`` (paper: c = 0)."""
    keep = torch.rand(cond.shape[0], device=cond.device, generator=generator) >= prob
    return cond * expand(keep, cond)


def _check_times(t: Tensor) -> None:
    """Raise an error if these are not times in [0, 1]. On a GPU nobody looks at their values, as
    that would wait for it."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t must be a tensor of times in [0, 1], got {type(t).__name__}")
    if not t.is_floating_point():
        raise TypeError(
            f"t must be floating-point times in [0, 1], got {t.dtype}; of step indices they are "
            "DiscreteSchedule.index_to_t(indices)"
        )
    near = 1e-6  # times that somebody computed may be off by a rounding
    if t.device.type == "cpu" and not watched() and not bool((t - 0.5).abs().le(0.5 + near).all()):
        raise ValueError(f"t must be in [0, 1], got {t.min().item()} to {t.max().item()}")


def diffusion_loss(
    model: Model,
    x: Tensor,
    *,
    schedule: Schedule | ScheduleName | None = None,
    prediction: Prediction | None = None,
    cond: Tensor | None = None,
    loss_space: Prediction | Literal["prediction"] = "eps",
    loss_type: LossType = "mse",
    time_input: TimeInput | None = None,
    t: Tensor | None = None,
    noise: Tensor | None = None,
    cond_drop_prob: float = 0.0,
    frame_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """The training loss E ||eps_hat(z_t) - eps||^2 over t ~ U[0, 1] (Ho et al. 2022, §2).

    Args:
        model: called as ``model(z, time, cond=cond, **model_kwargs)``.
        x: (B, C, F, H, W) clean videos in [-1, 1].
        schedule: noise schedule; the default is that of ``sample``.
        prediction: what the network returns; the default is that of ``sample``.
        cond: (B, cond_dim) conditions, or None.
        loss_space: the space of the error. "eps" (default) is what the paper says in general, also
            for its v models; "prediction" is the network's own target; "x" and "v" are the others.
            In epsilon space an x prediction is weighted by the SNR, up to e^20.
        loss_type: "mse" (paper) or "l1" (the peer's default).
        time_input: what the network takes as time: "logsnr", "t" or "index"; by default its own
            ``time_input``, else that of the schedule.
        t: times (B,) in [0, 1] instead of random ones; or (B, F), one per frame (diffusion
            forcing). The network then gets (B, F) too, as a ``UNet3D`` with norms over single
            frames takes it. Only on a CPU are the values checked.
        noise: (B, C, F, H, W) instead of random noise.
        cond_drop_prob: probability of training a sample without its condition, which
            classifier-free guidance requires. The paper gives no value; the default is 0. A network
            whose forward takes ``null_cond_prob`` (``UNet3D``, the peer's) gets it as such; for
            other callables the condition is set to zeros.
        frame_weight: (F,) or (B, F) weights of the frames, e.g. of appended images; 1 by default.
            The mean is the weighted mean.
        reduction: "mean", or "none" for one loss per sample.
        generator: generator of all random numbers drawn here.
        model_kwargs: further arguments of the network.

    Returns:
        A scalar, or (B,) with ``reduction="none"``.

    Raises:
        ValueError: shapes do not agree, or an option is out of range.
        TypeError: ``t`` is not of times.
    """
    schedule = schedule_for(model, schedule, time_input)
    prediction = prediction_of(model, prediction)
    space = prediction if loss_space == "prediction" else loss_space
    check_prediction(space)
    check_choice("loss_type", loss_type, LossType)
    check_choice("reduction", reduction, Reduction)
    if x.ndim != 5 or not x.is_floating_point():
        raise ValueError(f"x must be a float (B, C, F, H, W), got {x.dtype} {tuple(x.shape)}")
    if not 0 <= cond_drop_prob <= 1:
        raise ValueError(f"cond_drop_prob must be in [0, 1], got {cond_drop_prob}")
    batch = x.shape[0]
    if t is None:
        t = schedule.draw(batch, device=x.device, generator=generator)
    else:
        _check_times(t)
    if t.shape not in ((batch,), (batch, x.shape[2])):
        raise ValueError(f"t must be ({batch},) or ({batch}, {x.shape[2]}), got {tuple(t.shape)}")
    if noise is None:
        noise = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    if noise.shape != x.shape:
        raise ValueError(f"noise must be {tuple(x.shape)}, got {tuple(noise.shape)}")
    # Levels are at least fp32: a 16-bit time cannot distinguish steps.
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    log_snr = schedule.log_snr(t)
    time = schedule.network_time(t, time_input_of(model, schedule.time_input, time_input))
    z = q_sample(x, log_snr, noise)
    if cond is not None:
        if cond_drop_prob > 0 and hasattr(unwrap(model), "forward_with_cond_scale"):
            model_kwargs = {"null_cond_prob": cond_drop_prob, **model_kwargs}
        elif cond_drop_prob > 0:
            cond = drop_cond(cond, cond_drop_prob, generator)
        model_kwargs = {**model_kwargs, "cond": cond}
    out = model(z, time, **model_kwargs)
    if out.shape != x.shape:
        raise ValueError(f"the model returned {tuple(out.shape)} for an input {tuple(x.shape)}")
    acc = torch.promote_types(out.dtype, torch.float32)
    x, out, noise = x.to(acc), out.to(acc), noise.to(acc)
    if prediction == "v":
        target = expand(alpha_of(log_snr), x) * noise - expand(sigma_of(log_snr), x) * x
    else:
        target = noise if prediction == "eps" else x
    # All parametrisations are affine in the output at the same z, so their errors differ by the
    # slope alone. Scaling the error keeps digits that converting both sides would cancel.
    error = expand(slope(log_snr, prediction, space), x) * (out - target)
    error = error.square() if loss_type == "mse" else error.abs()
    per_frame = error.mean(dim=(1, 3, 4))  # (B, F)
    if frame_weight is None:
        per_sample = per_frame.mean(dim=1)
    else:
        weight = frame_weight.to(per_frame).expand_as(per_frame)
        per_sample = (per_frame * weight).sum(dim=1) / weight.sum(dim=1)
    return per_sample.mean() if reduction == "mean" else per_sample

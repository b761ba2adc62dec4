"""Sampling: the loop over noise levels, guided or not (Ho et al. 2022, §2 and §3.1)."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastvdm.diffusion.condition import Condition
from fastvdm.diffusion.defaults import Clip, CorrectorName, SamplerName
from fastvdm.diffusion.denoiser import Model, evaluating, input_gradient
from fastvdm.diffusion.graphs import StepGraphs
from fastvdm.diffusion.run import Noise, Run
from fastvdm.diffusion.samplers import Langevin, Sampler
from fastvdm.diffusion.schedule import Schedule, TimeInput
from fastvdm.diffusion.setup import prepare
from fastvdm.unet.settings import Prediction, ScheduleName


class Step(NamedTuple):
    """What a callback receives after each step (corrector included)."""

    number: int  # 0 .. num_steps - 1
    num_steps: int
    log_snr: float  # of z; the last z is clean, whatever the end of the schedule
    z: Tensor  # (B, C, F, H, W) the new state
    x_tilde: Tensor  # (B, C, F, H, W) the (guided, clipped) estimate of the clean video


def _progress(count: int, on: bool) -> Iterator[int]:
    if not on:
        return iter(range(count))
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm (pip install 'fastvdm[cli]')") from error
    return iter(tqdm(range(count), desc="sampling"))


def _callers_level() -> int:
    """The ``stacklevel`` of a warning in ``sample`` that points outside this package."""
    frame, level = sys._getframe(2), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith("fastvdm.diffusion."):
        frame, level = frame.f_back, level + 1
    return level


def sample(
    model: Model,
    shape: Sequence[int] | int | None = None,
    *,
    schedule: Schedule | ScheduleName | None = None,
    prediction: Prediction | None = None,
    sampler: Sampler | SamplerName | None = None,
    corrector: Langevin | CorrectorName | None = "auto",
    num_steps: int | None = None,
    clip: Clip | None = "auto",
    clip_percentile: float = 0.9,
    cond: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_cond: Tensor | None = None,
    condition: Condition | None = None,
    time_input: TimeInput | None = None,
    generator: torch.Generator | None = None,
    seed: int | Sequence[int] | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[float, float] = (-1.0, 1.0),
    cuda_graph: bool | Literal["auto"] = "auto",
) -> Tensor:
    """Draw videos from a network: (B, C, F, H, W) in [-1, 1], or in ``value_range``.

    The defaults come from ``model.settings`` (``fastvdm.unet.Settings``), which
    ``UNet3D.from_pretrained`` loads with the weights. ``sample(model)`` then draws one video as the
    model is meant to be sampled.

    Args:
        model: any callable ``model(z, time)`` or ``model(z, time, cond=cond)``; see ``Denoiser``.
            Pass an EMA copy to sample with averaged weights. A module runs in eval mode; its
            training flags are restored. If it is wrapped in a function, its mode and ``time_input``
            are unknown.
        shape: (B, C, F, H, W); or B (default 1) if the settings give the rest.
        schedule: "cosine" (the paper's), "discrete" (the peer's, with the timesteps and betas of
            the settings) or an object such as ``CosineSchedule()``. The default is that of the
            settings, else "discrete" for a network that takes step indices (peer checkpoints) and
            "cosine" for any other.
        prediction: what the network returns: "eps", "v" or "x"; by default what the settings say,
            else "eps".
        sampler: "ancestral" (default, with the gamma of the settings, else 0), "ddim", or an object
            with ``update`` such as ``DDIM(eta=0.5)``.
        corrector: "langevin" or ``Langevin(delta)`` for the paper's predictor-corrector, with one
            more network call per step; None for none. "auto" (default) means none unless the
            settings ask for it and no ``sampler`` is given.
        num_steps: number of steps; by default that of the settings unless ``schedule`` is an
            object, else 256, or all T of a ``DiscreteSchedule``.
        clip: clipping of x_tilde: "static" to [-1, 1] (the paper does not say; the code of its
            nearest relative does it), "dynamic" to a quantile of |x_tilde| per sample, or None.
            "auto" (default) means "static", and None for a network of latents
            (``value_range=None`` in its settings).
        clip_percentile: the quantile for "dynamic"; the peer's is 0.9.
        cond: conditioning vector (B, cond_dim).
        guidance_scale: scale 1 + w of classifier-free guidance (Eq. 6).
        null_cond: see ``Denoiser``.
        condition: known frames or a low-resolution video; see ``Condition``.
        time_input: what the network takes as time: "logsnr", "t" or "index"; by default its own
            ``time_input``, else that of the schedule.
        generator: source of the noise, through ``torch.randn`` on the device of the videos.
        seed: one int, or B ints, for counter-based noise drawn inside the update kernel. The noise
            of a video is the same in any batch and, to rounding, on any backend. Without ``seed``
            and ``generator``, a seed is taken from torch's global generator.
        callback: called after every step with a ``Step``.
        progress: show a progress bar.
        device: device of the videos; by default that of the network.
        dtype: dtype of the state, fp32 or fp64; the network's may be narrower.
        value_range: the range to which [-1, 1] is mapped in the result; ``write_video`` takes
            (0, 1). The videos of ``condition`` and those for ``callback`` stay in [-1, 1].
        cuda_graph: record a step as a CUDA graph and replay it. The model must not synchronise with
            the device nor keep state in Python, and its weights may change only in place. The noise
            is that of ``seed``. "auto" does this on CUDA for small batches, a network of this
            package without hooks, and at least 16 steps.

    Returns:
        (B, C, F, H, W) of dtype ``dtype``.

    Raises:
        ValueError: a shape, option or condition does not fit; raised before any network call.
        TypeError: an argument has the wrong type; raised before any network call.
        RuntimeError: ``cuda_graph=True`` and a step cannot be recorded.

    Example:
        >>> from fastvdm import UNet3D
        >>> from fastvdm.diffusion import DDIM, sample
        >>> network = UNet3D(16, dim_mults=(1, 2), attn_heads=2)
        >>> sample(network, (1, 3, 4, 16, 16), sampler=DDIM(), num_steps=8, seed=0).shape
        torch.Size([1, 3, 4, 16, 16])
    """
    shape, denoiser, given, plan, where, record, clip = prepare(
        model,
        shape,
        schedule=schedule,
        prediction=prediction,
        sampler=sampler,
        corrector=corrector,
        num_steps=num_steps,
        clip=clip,
        clip_percentile=clip_percentile,
        cond=cond,
        guidance_scale=guidance_scale,
        null_cond=null_cond,
        condition=condition,
        time_input=time_input,
        generator=generator,
        device=device,
        dtype=dtype,
        value_range=value_range,
        cuda_graph=cuda_graph,
    )
    for note in plan.notes:
        warnings.warn(note, stacklevel=_callers_level())
    # Guided steps differentiate, so the caller's no_grad or inference_mode must not apply.
    with torch.inference_mode(False), torch.no_grad():
        noise = Noise(shape[0], where, generator, seed)
        run = Run(denoiser, given, noise, clip, clip_percentile, callback is not None)
        with evaluating(denoiser.model), input_gradient(denoiser.model):
            z = run.start(plan, shape, where, dtype)
            advance: Callable[..., tuple[Tensor, Tensor]] = run.advance
            if record and noise.rng is not None:
                rows, asked = (*plan.steps, *plan.corrections[1:]), cuda_graph is True
                advance = StepGraphs(run.advance, noise.rng, rows, noise.count, asked=asked)
            for i in _progress(plan.num_steps, progress):
                x_tilde, z = advance(z, plan.steps[i])
                if plan.corrections and i + 1 < plan.num_steps:
                    x_tilde, z = advance(z, plan.corrections[i + 1])
                if callback is not None:
                    kept = (z.clone(), x_tilde.clone()) if record else (z, x_tilde)
                    callback(Step(i, plan.num_steps, plan.log_snr[i + 1], *kept))
        low, high = value_range
        if (low, high) != (-1, 1):
            return (z + 1) * ((high - low) / 2) + low
        return z.clone() if record else z  # the graph's memory is freed with the graph

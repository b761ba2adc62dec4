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
    """What a callback sees after each step (corrector included)."""

    number: int  # 0 .. num_steps - 1
    num_steps: int
    log_snr: float  # of z; the last z is clean, whatever the schedule ends at
    z: Tensor  # (B, C, F, H, W) the state reached
    x_tilde: Tensor  # (B, C, F, H, W) the (guided, clipped) estimate it was made from


def _progress(count: int, on: bool) -> Iterator[int]:
    if not on:
        return iter(range(count))
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm (pip install 'fastvdm[cli]')") from error
    return iter(tqdm(range(count), desc="sampling"))


def _callers_level() -> int:
    """``stacklevel`` of a warning in ``sample`` for the first caller outside this package."""
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
    """Draws videos from a network: (B, C, F, H, W) in [-1, 1], or in ``value_range``.

    What the caller does not say is taken from ``model.settings`` (``fastvdm.unet.Settings``), with
    which ``UNet3D.from_pretrained`` loads a network: ``sample(model)`` is one video as the model is
    meant to be sampled.

    Args:
        model: any callable ``model(z, time)`` or ``model(z, time, cond=cond)``; see ``Denoiser``.
            Give an EMA copy to sample with averaged weights. A module runs in eval mode, its flags
            are put back; of a function around one neither mode nor ``time_input`` are known.
        shape: (B, C, F, H, W); an int B or None, for B = 1, where the settings say the rest.
        schedule: "cosine", "discrete" (the peer's; with the timesteps and betas of the settings) or
            an object such as ``CosineSchedule()``; by default as the settings say, or else discrete
            for a network that takes step indices (peer checkpoints) and cosine for any other.
        prediction: what the network returns, "eps", "v" or "x"; by default what the settings say,
            or else "eps".
        sampler: "ancestral" (with the gamma of the settings, or else 0; the default), "ddim", or an
            object such as ``DDIM(eta=0.5)``, with ``update``.
        corrector: "langevin", or ``Langevin(delta)``, is the paper's predictor-corrector: one more
            call a step. None is none; "auto" (default) is none unless the settings say it and no
            ``sampler`` is given.
        num_steps: any number; by default as the settings say, unless ``schedule`` is an object, or
            else 256, all T of a ``DiscreteSchedule``.
        clip: of x_tilde, "static" to [-1, 1] (the paper is silent, the code of its nearest relative
            does it), "dynamic" to a quantile of |x_tilde| per sample, or None; "auto" (default) is
            "static", and None for a network of latents (``value_range=None`` in its settings).
        clip_percentile: of "dynamic", the peer's 0.9.
        cond, guidance_scale, null_cond: conditioning vector and classifier-free guidance; the scale
            is 1 + w of Eq. 6.
        condition: known frames or a low-resolution video; see ``Condition``.
        time_input: "logsnr", "t" or "index"; by default the network's own ``time_input``, or else
            that of the schedule.
        generator: noise from it, by ``torch.randn`` (on the device of the videos).
        seed: one int or B of them: counter-based noise, drawn inside the update kernel, the same
            for a video in any batch and on any backend to rounding. Without either, a seed is
            taken from torch's global generator.
        callback: called after every step with a ``Step``.
        dtype: of the state, fp32 or fp64; the network may be narrower.
        value_range: what -1 and 1 become in the result: (0, 1) is what ``write_video`` takes. All
            else stays in [-1, 1]: the videos of ``condition``, and what ``callback`` sees.
        cuda_graph: record a step as a CUDA graph and replay it; the model must then neither wait
            for the device nor keep state in Python, and its weights may change in place alone.
            Noise is that of ``seed``. "auto" does it on CUDA at small batches, for a network of
            this package without hooks and at least 16 steps.

    Raises:
        ValueError, TypeError: a shape, option or condition that does not fit; before any call.
        RuntimeError: with ``cuda_graph=True``, a step that cannot be recorded.
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
    # A guided step differentiates: neither no_grad nor inference_mode of the caller may reach it.
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
        return z.clone() if record else z  # a graph's own memory goes with it

"""Sampling: the loop over noise levels, guided or not (Ho et al. 2022, §2 and §3.1)."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvdm.diffusion.condition import Condition, Given
from fastvdm.diffusion.denoiser import Denoiser, Model, evaluating, input_gradient
from fastvdm.diffusion.graphs import DeviceNoise, StepGraphs
from fastvdm.diffusion.plan import Plan, Row
from fastvdm.diffusion.prediction import Prediction
from fastvdm.diffusion.samplers import Langevin, Sampler
from fastvdm.diffusion.schedule import Schedule
from fastvdm.diffusion.setup import prepare
from fastvdm.ops.guidance import guidance_seed, guidance_update


class Step(NamedTuple):
    """What a callback sees after each step (corrector included)."""

    number: int  # 0 .. num_steps - 1
    num_steps: int
    log_snr: float  # of z; the last z is clean, whatever the schedule ends at
    z: Tensor  # (B, C, F, H, W) the state reached
    x_tilde: Tensor  # (B, C, F, H, W) the (guided, clipped) estimate it was made from


class _Noise:
    """Standard normals from a torch generator, or the (seed, counter) pairs of in-kernel Philox."""

    def __init__(
        self,
        batch: int,
        device: torch.device,
        generator: torch.Generator | None,
        seed: int | Sequence[int] | None,
    ) -> None:
        if generator is not None and seed is not None:
            raise ValueError("give generator or seed, not both")
        self.generator, self.count = generator, 0
        self.rng: Tensor | None = None
        if generator is not None:
            return
        if seed is None:  # follows torch.manual_seed
            seed = int(torch.randint(2**62, (1,)).item())
        try:
            if isinstance(seed, Sequence):
                seeds = [operator.index(s) % 2**63 for s in seed]
            else:
                one = operator.index(seed)
                # distinct keys; a video's noise does not depend on how many are in the batch
                seeds = [(one + i * 0x9E3779B97F4A7C15) % 2**63 for i in range(batch)]
        except TypeError:
            raise TypeError(f"seed must be one int or {batch} of them, got {seed!r}") from None
        if len(seeds) != batch:
            raise ValueError(f"seed must be one int or {batch} of them, got {len(seeds)}")
        self.rng = torch.tensor(seeds, dtype=torch.int64).to(device)

    def draw(self, like: Tensor) -> dict[str, Any]:
        """Arguments of ``guidance_update`` for the next draw."""
        self.count += 1
        if self.rng is not None:
            return {"rng": self.rng, "step": self.count - 1}
        noise = torch.randn(
            like.shape, dtype=like.dtype, device=like.device, generator=self.generator
        )
        return {"noise": noise}


class _Run:
    """One sampling run: the state z and how a row of the plan advances it."""

    def __init__(
        self,
        denoiser: Denoiser,
        given: Given | None,
        noise: _Noise,
        clip: str | None,
        percentile: float,
        want_x: bool,
    ) -> None:
        self.denoiser, self.given, self.noise = denoiser, given, noise
        self.clip, self.percentile, self.want_x = clip, percentile, want_x

    def start(
        self, plan: Plan, shape: Sequence[int], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """z_1 ~ N(0, I), given frames at their own marginal."""
        z = torch.zeros(tuple(shape), device=device, dtype=dtype)
        return guidance_update(
            z, z, plan.start, **self._frames(), **self.noise.draw(z), want_x=False
        )[1]

    def _frames(self) -> dict[str, Any]:
        if self.given is None or self.given.known is None:
            return {}
        return {"known": self.given.known, "slot": self.given.slot}

    def advance(
        self, z: Tensor, row: Row, noise: _Noise | DeviceNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x_tilde, z_next): one network call, and its backward pass where the row is guided.

        A function of its tensors alone, apart from the place in the stream of ``_Noise``.
        """
        options: dict[str, Any] = {}
        if row.guided:
            assert self.given is not None
            estimate, options = self._guide(z, row)
            coef = row.after
        else:
            with torch.no_grad():
                estimate = self.denoiser(z, row.time)
            coef = row.direct
        if self.clip == "dynamic":
            options["threshold"] = self._threshold(z, estimate, coef, options)
        if row.noisy:
            options |= (noise or self.noise).draw(z)
        return guidance_update(
            z,
            estimate,
            coef,
            **options,
            **self._frames(),
            clip=self.clip is not None,
            want_x=self.want_x,
        )

    def _guide(self, z: Tensor, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        """x_hat, and the gradient that Eqs. 7 and 8 subtract from it."""
        given = self.given
        assert given is not None
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            out = self.denoiser(leaf, row.time)
        if not out.requires_grad:
            raise RuntimeError(
                "the model's output does not depend on its input through autograd (does it detach, "
                "or run under inference_mode?): reconstruction guidance needs its gradient"
            )
        detached = out.detach()
        extra = given.extra_gradient(z, detached, row.guide) if given.autograd_low_res else None
        half = torch.float16 in (out.dtype, self.denoiser.compute_dtype(z.device.type))
        x_hat, cotangent = guidance_seed(
            z,
            detached.to(z.dtype) if half else detached,
            row.guide,
            **given.targets(),
            extra=extra,
            clip=given.clip_before_loss,
        )
        gradient = _scaled_gradient if half else _gradient
        options = {"grad": gradient(out, leaf, cotangent)}
        if given.has_low_res:  # D(x_hat) depends on z directly as well, x_hat^a on z^b does not
            options["seed"] = cotangent
        return x_hat, options

    def _threshold(
        self, z: Tensor, estimate: Tensor, coef: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """Dynamic thresholding: the larger of 1 and a quantile of |x_tilde| per sample.

        A quantile is not elementwise, so this mode costs launches of its own. torch.quantile
        refuses 2^24 elements and reads a tensor on the host; this is its formula.
        """
        x, _ = guidance_update(z, estimate, coef, **options, **self._frames())
        ordered = x.abs().flatten(1).sort(dim=1).values
        place = self.percentile * (ordered.shape[1] - 1)
        low, high = ordered[:, math.floor(place)], ordered[:, math.ceil(place)]
        return torch.lerp(low, high, place - math.floor(place)).clamp_min(1.0)


def _gradient(out: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(out, leaf, cotangent)
    return grad


def _scaled_gradient(out: Tensor, leaf: Tensor, cotangent: Tensor) -> Tensor:
    """The same in fp16, whose largest number a cotangent passes where there is much noise: scaled
    by a power of two per sample, so that its largest value is near 1."""
    tiny = torch.finfo(cotangent.dtype).tiny
    most = cotangent.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(tiny)
    scale = torch.exp2(most.log2().round())
    return _gradient(out, leaf, (cotangent / scale).to(out.dtype)) * scale


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
    shape: Sequence[int],
    *,
    schedule: Schedule | None = None,
    prediction: Prediction | None = None,
    sampler: Sampler | None = None,
    corrector: Langevin | None = None,
    num_steps: int | None = None,
    clip: Literal["static", "dynamic"] | None = "static",
    clip_percentile: float = 0.9,
    cond: Tensor | None = None,
    guidance_scale: float = 1.0,
    null_cond: Tensor | None = None,
    condition: Condition | None = None,
    time_input: str | None = None,
    generator: torch.Generator | None = None,
    seed: int | Sequence[int] | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    cuda_graph: bool | Literal["auto"] = "auto",
) -> Tensor:
    """Draws videos from a network: (B, C, F, H, W) in [-1, 1].

    Args:
        model: any callable ``model(z, time)`` or ``model(z, time, cond=cond)``; see ``Denoiser``.
            Give an EMA copy to sample with averaged weights. A module runs in eval mode, its flags
            are put back; of a function around one neither mode nor ``time_input`` are known.
        shape: (B, C, F, H, W).
        schedule: ``CosineSchedule()`` by default; ``DiscreteSchedule()`` for peer checkpoints.
        prediction: what the network returns, "eps", "v" or "x"; by default what the settings it
            was loaded with say (``UNet3D.from_pretrained``), or else "eps".
        sampler: ``Ancestral(0)`` by default; ``DDIM``, or any object with ``update``.
        corrector: ``Langevin(0.1)`` is the paper's predictor-corrector: one more call a step.
        num_steps: any number; 256 by default, all T of a ``DiscreteSchedule``.
        clip: of x_tilde, "static" to [-1, 1] (default; the paper is silent, the code of its nearest
            relative does it), "dynamic" to a quantile of |x_tilde| per sample, or None.
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
        cuda_graph: record a step as a CUDA graph and replay it; the model must then neither wait
            for the device nor keep state in Python, and its weights may change in place alone.
            Noise is that of ``seed``. "auto" does it on CUDA at small batches, for a network of
            this package without hooks and at least 16 steps.

    Raises:
        ValueError, TypeError: a shape, option or condition that does not fit; before any call.
        RuntimeError: with ``cuda_graph=True``, a step that cannot be recorded.
    """
    denoiser, given, plan, where, record = prepare(
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
        cuda_graph=cuda_graph,
    )
    for note in plan.notes:
        warnings.warn(note, stacklevel=_callers_level())
    # A guided step differentiates: neither no_grad nor inference_mode of the caller may reach it.
    with torch.inference_mode(False), torch.no_grad():
        noise = _Noise(shape[0], where, generator, seed)
        run = _Run(denoiser, given, noise, clip, clip_percentile, callback is not None)
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
        return z.clone() if record else z  # a graph's own memory goes with it

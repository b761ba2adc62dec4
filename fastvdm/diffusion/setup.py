"""The checks of ``sample``, all done before its first network call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastvdm.diffusion.condition import Condition, check_range
from fastvdm.diffusion.defaults import (
    Clip,
    CorrectorName,
    SamplerName,
    check_value_range,
    clip_for,
    sampler_for,
    schedule_for,
    shape_for,
    steps_for,
)
from fastvdm.diffusion.denoiser import Denoiser, Model, module_of, prediction_of, time_input_of
from fastvdm.diffusion.given import Given
from fastvdm.diffusion.graphs import decide, why_not
from fastvdm.diffusion.plan import Plan
from fastvdm.diffusion.samplers import Langevin, Sampler
from fastvdm.diffusion.schedule import Schedule, TimeInput
from fastvdm.unet.settings import Prediction, ScheduleName


class Setup(NamedTuple):
    """The parts of a run."""

    shape: tuple[int, ...]  # (B, C, F, H, W)
    denoiser: Denoiser
    given: Given | None
    plan: Plan
    device: torch.device
    record: bool  # whether steps become CUDA graphs
    clip: Clip | None  # never "auto"


def prepare(
    model: Model,
    shape: Sequence[int] | int | None,
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
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    value_range: tuple[float, float] = (-1.0, 1.0),
    cuda_graph: bool | Literal["auto"] = False,
    **_: Any,
) -> Setup:
    """Check the arguments of ``sample``; those used only by its loop are ignored here."""
    num_steps = steps_for(model, num_steps, schedule)
    schedule = schedule_for(model, schedule, time_input)
    sampler, corrector = sampler_for(model, sampler, corrector)
    shape = shape_for(model, shape)
    check_value_range(value_range)
    if condition is not None and not isinstance(condition, Condition):
        raise TypeError(f"condition must be a Condition, got {type(condition).__name__}")
    prediction = prediction_of(model, prediction)
    clip = clip_for(model, clip)
    if not 0 < clip_percentile <= 1:
        raise ValueError(f"clip_percentile must be in (0, 1], got {clip_percentile}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    for name, values in (("cond", cond), ("null_cond", null_cond)):
        if values is not None and not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(values).__name__}")
    if cond is not None and cond.shape[0] != shape[0]:
        raise ValueError(f"cond must have {shape[0]} rows, got {tuple(cond.shape)}")
    if condition is not None:
        check_range("frames", condition.known_values(), clip)
        if not callable(condition.downsample):  # a caller's D may map values outside [-1, 1]
            check_range("low_res", condition.low_res, clip)
    where = torch.device(device) if device is not None else _device_of(model, condition, cond)
    reason = why_not(where, generator, condition.downsample if condition else None)
    seen = (2 * shape[0] if guidance_scale != 1 else shape[0], *shape[1:])
    record = decide(cuda_graph, model, seen, reason)
    with torch.inference_mode(False), torch.no_grad():
        if cond is not None:
            cond = (cond.clone() if cond.is_inference() else cond).to(where)
        denoiser = Denoiser(model, cond=cond, guidance_scale=guidance_scale, null_cond=null_cond)
        given = Given(condition, shape, where, dtype) if condition is not None else None
        plan = Plan(
            schedule,
            prediction,
            sampler,
            corrector,
            num_steps,
            time_input_of(model, schedule.time_input, time_input),
            given,
            shape[0],
            where,
            dtype,
        )
    return Setup(shape, denoiser, given, plan, where, record, clip)


def _device_of(model: Model, condition: Condition | None, cond: Tensor | None) -> torch.device:
    module = module_of(model)
    first = next(iter(module.parameters()), None) if module is not None else None
    if first is not None:
        return first.device
    for t in (
        cond,
        condition.frames if condition else None,
        condition.low_res if condition else None,
    ):
        if t is not None:
            return t.device
    return torch.device("cpu")

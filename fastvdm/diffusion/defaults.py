"""The defaults that a run takes from the settings of its network (``fastvdm.unet.Settings``), and
the names of schedules and samplers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, Literal

import torch

from fastvdm.diffusion.denoiser import Model, told_by, unwrap
from fastvdm.diffusion.samplers import DDIM, Ancestral, Langevin, Sampler
from fastvdm.diffusion.schedule import CosineSchedule, DiscreteSchedule, Schedule, TimeInput
from fastvdm.runtime.choices import check_choice
from fastvdm.unet.settings import ScheduleName, Settings, settings_of

SamplerName = Literal["ancestral", "ddim"]
CorrectorName = Literal["auto", "langevin"]
Clip = Literal["auto", "static", "dynamic"]


def make_schedule(settings: Settings, time_input: str | None) -> CosineSchedule | DiscreteSchedule:
    """Make the schedule of the settings. ``time_input`` is what the network takes as time; None
    means the schedule's own.

    Raises:
        ValueError: the schedule is "cosine" and the network takes step indices.
    """
    index = time_input == "index"
    kind: dict[str, Any] = {} if time_input is None else {"time_input": time_input}
    if settings.schedule == "discrete" or (settings.schedule is None and index):
        betas = settings.betas
        table = None if betas is None else torch.tensor(betas, dtype=torch.float64)
        return DiscreteSchedule(settings.timesteps, betas=table, **kind)
    if index:
        raise ValueError("this network takes step indices: its schedule is 'discrete'")
    return CosineSchedule(**kind)


def schedule_for(
    model: Model, asked: Schedule | ScheduleName | None, time_input: str | None
) -> Schedule:
    """The schedule that was asked for, else that of the settings, else the one whose time the
    network takes.

    Raises:
        ValueError: the name is unknown, or the schedule does not fit the network.
        TypeError: the object is not a schedule.
    """
    check_choice("time_input", time_input, TimeInput | None)
    if isinstance(asked, str):
        check_choice("schedule", asked, ScheduleName)
    elif asked is not None:
        check_object("schedule", asked, "levels", "CosineSchedule()", ScheduleName)
        return asked
    told, own = told_by(model), getattr(unwrap(model), "time_input", None)
    if asked is not None:
        told = {**told, "schedule": asked}
    elif not told and not isinstance(own, str):
        return CosineSchedule()
    return make_schedule(settings_of(told), time_input or own)


def sampler_for(
    model: Model, sampler: Sampler | SamplerName | None, corrector: Langevin | str | None
) -> tuple[Sampler, Langevin | None]:
    """The sampler and corrector that were asked for. Without a sampler the settings decide both;
    "ancestral" takes its gamma from them.

    Raises:
        ValueError: a name is unknown.
        TypeError: an object is not a sampler or corrector.
    """
    told = told_by(model)
    if isinstance(corrector, str):
        check_choice("corrector", corrector, CorrectorName | None)
        by_settings = corrector == "auto" and sampler is None and told.get("langevin", False)
        corrector = Langevin() if corrector == "langevin" or by_settings else None
    elif corrector is not None and not isinstance(corrector, Langevin):
        raise TypeError(f"corrector must be Langevin(), 'langevin' or None, got {corrector!r}")
    if isinstance(sampler, str):
        check_choice("sampler", sampler, SamplerName)
    if isinstance(sampler, Langevin):
        raise TypeError("sampler must be one such as DDIM(), got a corrector: corrector=Langevin()")
    if sampler is None or sampler == "ancestral":
        return Ancestral(told.get("gamma", 0.0)), corrector
    if sampler == "ddim":
        return DDIM(), corrector
    check_object("sampler", sampler, "update", "DDIM()", SamplerName)
    return sampler, corrector


def steps_for(model: Model, asked: int | None, schedule: Any) -> int | None:
    """The number asked for, else that of the settings unless the schedule is an object."""
    if asked is not None or not (schedule is None or isinstance(schedule, str)):
        return asked
    return told_by(model).get("num_steps")


def clip_for(model: Model, asked: Clip | None) -> Clip | None:
    """The clipping asked for. "auto" means none if the settings say that the network draws latents.

    Raises:
        ValueError: the word is unknown.
    """
    check_choice("clip", asked, Clip | None)
    if asked != "auto":
        return asked
    return None if told_by(model).get("value_range", (0, 1)) is None else "static"


def shape_for(model: Model, asked: Sequence[int] | int | None) -> tuple[int, ...]:
    """The shape (B, C, F, H, W): as asked, or B videos (default 1) as the settings describe them.

    Raises:
        ValueError: there are not five extents, or the network's settings do not say them.
        TypeError: an extent is not an int.
    """
    if (isinstance(asked, Integral) and not isinstance(asked, bool)) or asked is None:
        told, channels = told_by(model), getattr(unwrap(model), "channels", None)
        if not isinstance(channels, int) or not {"num_frames", "image_size"} <= told.keys():
            raise ValueError(
                "shape must be (B, C, F, H, W): the settings of this model do not say num_frames "
                "and image_size (model.settings = Settings(num_frames=..., image_size=...))"
            )
        asked = (1 if asked is None else int(asked), channels, told["num_frames"],
                 *told["image_size"])  # fmt: skip
    if not isinstance(asked, Sequence):
        raise TypeError(f"shape must be (B, C, F, H, W), a number of videos or None, got {asked!r}")
    if len(asked) != 5 or any(
        not isinstance(n, Integral) or isinstance(n, bool) or n < 1 for n in asked
    ):
        raise ValueError(f"shape must be five positive extents (B, C, F, H, W), got {tuple(asked)}")
    return tuple(asked)


def check_value_range(value_range: Any) -> tuple[float, float]:
    """Check that it is (low, high), finite, with low < high; raise ValueError or TypeError."""
    try:
        low, high = value_range
    except (TypeError, ValueError):
        low = high = None
    if not isinstance(low, Real) or not isinstance(high, Real):
        raise TypeError(f"value_range must be two numbers such as (0, 1), got {value_range!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"value_range must be (low, high), finite, got {value_range!r}")
    return float(low), float(high)


def check_object(name: str, value: Any, method: str, example: str, names: Any) -> None:
    """Check that it is an object with the method. A class in its place has the method, too.

    Raises:
        TypeError: the object lacks the method, or it is a class.
    """
    if isinstance(value, type) or not callable(getattr(value, method, None)):
        words = ", ".join(map(repr, names.__args__))
        raise TypeError(f"{name} must be {words} or an object such as {example}, got {value!r}")

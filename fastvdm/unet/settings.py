"""What sampling must know about a network's training. It is stored with the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from fastvdm.runtime.choices import check_choice

Prediction = Literal["eps", "v", "x"]
ScheduleName = Literal["cosine", "discrete"]
Pooling = Literal["attention", "mean", "cls"]


@dataclass(frozen=True)
class Settings:
    """What sampling must know about the training, and the sampling defaults of the model.

    With ``model.settings = Settings(prediction="v", num_frames=8)``, ``fastvdm.diffusion.sample``
    and ``diffusion_loss`` take from it all that the caller does not pass. ``Bundle`` and training
    runs set it. It is stored with the network, in settings.json.

    Args:
        num_frames: frames of the training clips.
        image_size: (H, W) of the training clips.
        frameskip: every frameskip-th frame of a video was taken.
        fps: frames per second of the clips.
        prediction: what the network returns: "eps", "v" or "x".
        schedule: "cosine", the paper's in log-SNR, or "discrete", the peer's. None means "discrete"
            for a network that takes step indices and "cosine" for one that takes log-SNRs.
        timesteps: steps of the discrete schedule.
        betas: betas of the discrete schedule; None means the peer's cosine schedule.
        value_range: range of the data. None means latents, which are neither scaled nor clipped.
        data_fps: frame rate to which the videos were resampled before frames were skipped; None if
            they were not resampled.
        classes: names of the classes of a class-conditional network.
        text_encoder: name of the text encoder.
        text_pooling: pooling of its outputs.
        text_max_length: tokens of a caption.
        num_steps: default for sampling (Appendix A gives it for the paper's models).
        gamma: default for ancestral sampling (Appendix A).
        langevin: whether sampling uses the Langevin corrector (Appendix A).

    Raises:
        ValueError: a field is outside its range.
        TypeError: a field has the wrong type.
    """

    num_frames: int = 16
    image_size: tuple[int, int] = (64, 64)
    frameskip: int = 1
    fps: float = 8.0
    prediction: str = "eps"
    schedule: ScheduleName | None = None
    timesteps: int = 1000
    betas: tuple[float, ...] | None = None
    value_range: tuple[float, float] | None = (0.0, 1.0)
    data_fps: float | None = None
    classes: tuple[str, ...] | None = None
    text_encoder: str | None = None
    text_pooling: str = "attention"
    text_max_length: int = 128
    num_steps: int | None = None
    gamma: float = 0.0
    langevin: bool = False

    def __post_init__(self) -> None:
        check_choice("prediction", self.prediction, Prediction)
        check_choice("schedule", self.schedule, ScheduleName | None)
        check_choice("text_pooling", self.text_pooling, Pooling)
        for name in ("image_size", "betas", "value_range", "classes"):  # JSON has lists
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name in ("num_frames", "frameskip", "timesteps", "num_steps", "text_max_length"):
            value = getattr(self, name)
            if not (value is None and name == "num_steps"):
                _check_count(name, value)
        if not isinstance(self.image_size, tuple) or len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width), got {self.image_size!r}")
        for value in self.image_size:
            _check_count("image_size", value)
        if not (_is_number(self.fps) and math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be positive, got {self.fps!r}")
        if not (
            self.data_fps is None or _is_number(self.data_fps) and 0 < self.data_fps < math.inf
        ):
            raise ValueError(f"data_fps must be positive or None, got {self.data_fps!r}")
        if self.value_range is not None:
            low, high = self.value_range if len(self.value_range) == 2 else (0, 0)
            if not (_is_number(low) and _is_number(high) and low < high):
                raise ValueError(f"value_range must be (low, high), got {self.value_range!r}")
        names = self.classes
        if names is not None and not (
            isinstance(names, tuple)
            and all(isinstance(c, str) for c in names)
            and len(set(names)) == len(names)
        ):
            raise ValueError(f"classes must be different names, got {names!r}")
        if self.text_encoder is not None and not isinstance(self.text_encoder, str):
            raise TypeError(f"text_encoder must be a name or None, got {self.text_encoder!r}")
        if self.betas is not None and not (
            isinstance(self.betas, tuple) and all(_is_number(b) and 0 < b < 1 for b in self.betas)
        ):
            raise ValueError("betas must be numbers between 0 and 1")
        if not (_is_number(self.gamma) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma must be in [0, 1], got {self.gamma!r}")
        if not isinstance(self.langevin, bool):
            raise TypeError(f"langevin must be a bool, got {self.langevin!r}")
        if self.betas is not None and len(self.betas) != self.timesteps:
            raise ValueError(
                f"timesteps is {self.timesteps}, but there are {len(self.betas)} betas"
            )


def _is_number(value: Any) -> bool:
    """Whether it is a number that a float can hold."""
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < 1e300


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def settings_of(told: Mapping[str, Any]) -> Settings:
    """Settings from some fields; the others keep their defaults.

    Raises:
        ValueError: there is no such field, or a value is out of range.
        TypeError: a value has the wrong type.
    """
    unknown = sorted(str(name) for name in told.keys() - {f.name for f in fields(Settings)})
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}")
    return Settings(**told)

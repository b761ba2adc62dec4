"""The configuration of a training run: its fields, their meaning, their checks."""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastvdm.bundle import Settings
from fastvdm.training.recipes import TRAINING
from fastvdm.unet.config import RECIPES, UNetConfig, preset


def _of(group: str, default: Any, help: str, *, free: bool = False) -> Any:
    """A field: its group, its meaning, and whether a resumed run may change it."""
    metadata = {"group": group, "help": help, "free": free}
    if default is dict:
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.

    Each field's metadata has its meaning; ``fastvdm config`` prints them all. The paper uses Adam,
    with weight decay 0.01 on BAIR only. It does not mention warm-up, gradient clipping or a rate
    of dropped conditions. The defaults of the first two (none, and a norm of 1) do not affect a
    healthy run.

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """

    output: str = _of("Run", "", "Folder for checkpoints, logs and samples.", free=True)

    data: str = _of("Data", "", "Folder of videos; its subfolders are searched too.", free=True)
    num_frames: int = _of("Data", 16, "Frames per clip.")
    size: tuple[int, int] = _of(
        "Data", (64, 64), "Height and width; videos are resized and cropped to it."
    )
    fps: float | None = _of("Data", None, "Resample every video to this rate; none keeps its own.")
    frameskip: int = _of("Data", 1, "Take every n-th frame of a video.")
    flip: bool = _of("Data", False, "Mirror half of the clips left to right.")
    short: Literal["error", "repeat"] = _of(
        "Data", "error", "Reject a video that is too short, or repeat its last frame."
    )
    background: float = _of("Data", 0.0, "Brightness behind transparent pixels, 0 to 1.")
    value_range: tuple[float, float] | None = _of(
        "Data", (0.0, 1.0), "Range of float arrays (npy, npz); none for latents, used as they are."
    )
    conditioning: Literal["captions", "classes", "vectors"] | None = _of(
        "Data", None, "What each video comes with; captions by default if text_encoder is set."
    )
    bad_clips: Literal["skip", "error"] = _of(
        "Data", "skip", "If a video cannot be read, take another one or end the run.",
        free=True,
    )  # fmt: skip
    validation: str | None = _of("Data", None, "Folder of held-out videos.", free=True)
    holdout: float = _of("Data", 0.0, "Share of the videos to hold out, chosen by file name.")
    num_workers: int | None = _of(
        "Data",
        None,
        "Processes that read videos; by default up to 8 on a GPU, 0 on a CPU.",
        free=True,
    )

    preset: str | None = _of(
        "Network", None, f"Model of the paper with its training recipe: {', '.join(TRAINING)}."
    )
    model: dict[str, Any] = _of(
        "Network", dict, "Arguments of UNet3D, over those of the preset or the default, dim 64."
    )
    timesteps: int = _of("Network", 1000, "Steps of the discrete schedule (time_input index).")

    prediction: Literal["eps", "v", "x"] = _of("Loss", "eps", "What the network predicts.")
    loss_space: Literal["eps", "v", "x", "prediction"] = _of(
        "Loss", "eps", "Quantity whose error is the loss."
    )
    loss_type: Literal["mse", "l1"] = _of(
        "Loss", "mse", "Squared error, as in the paper, or absolute error."
    )
    text_encoder: str | None = _of(
        "Loss", None, "BERT-family encoder of the captions: a name on the hub or a folder."
    )
    text_pooling: Literal["attention", "mean", "cls"] = _of(
        "Loss",
        "attention",
        "How token states become one vector; attention, the paper's, is trained.",
    )
    cond_drop_prob: float = _of(
        "Loss", 0.1, "Share of samples without their condition, for classifier-free guidance."
    )
    num_images: int = _of("Loss", 0, "Joint training: independent image frames added to each clip.")
    image_source: Literal["dataset", "batch"] = _of(
        "Loss", "dataset", "Take image frames from any video, as in the paper, or from the batch."
    )
    image_weight: float = _of(
        "Loss", 1.0, "Weight of an image frame in the loss, relative to a video frame."
    )
    image_time: Literal["shared", "own"] = _of(
        "Loss", "shared", "Noise level of an image frame: that of its clip, or its own."
    )
    image_cond: Literal["shared", "own", "none"] = _of(
        "Loss", "shared", "Condition of an image frame: that of its clip, its own, or none."
    )

    steps: int = _of("Optimizer", 100_000, "Optimizer steps.", free=True)
    batch_size: int = _of("Optimizer", 8, "Clips per forward pass of one process.")
    accumulate: int = _of(
        "Optimizer", 1, "Forward passes per optimizer step (gradient accumulation)."
    )
    lr: float = _of("Optimizer", 1e-4, "Learning rate of AdamW.")
    lr_schedule: Literal["constant", "cosine"] = _of(
        "Optimizer", "constant", "After the warm-up, keep the rate or let it fall to 0 at the end."
    )
    betas: tuple[float, float] = _of("Optimizer", (0.9, 0.99), "Betas of AdamW.")
    weight_decay: float = _of("Optimizer", 0.0, "Weight decay of AdamW.")
    warmup_steps: int = _of("Optimizer", 0, "Steps over which the learning rate rises from 0.")
    grad_clip: float = _of("Optimizer", 1.0, "Clip the gradient to this norm; 0 does not clip.")
    ema_decay: float = _of("Optimizer", 0.9999, "Decay of the averaged weights (EMA), 0 to 1.")
    ema_warmup: bool = _of(
        "Optimizer",
        True,
        "Limit the decay at step n to (1 + n)/(10 + n): forgets the first weights.",
    )

    seed: int = _of("Run", 0, "Random seed of the whole run.")
    mixed_precision: Literal["no", "bf16", "fp16"] = _of(
        "Run", "no", "Autocast; weights, optimizer and EMA stay in fp32. fp16 also scales the loss."
    )
    compile: bool = _of("Run", False, "Compile the network with torch.compile.")
    device: Literal["auto", "cpu"] = _of(
        "Run", "auto", "Device; auto is a GPU if there is one.", free=True
    )
    parallel: Literal["ddp", "fsdp"] = _of(
        "Run", "ddp",
        "With several processes: each has all weights (ddp) or shards of them (fsdp, FSDP2).",
    )  # fmt: skip
    save_every: int = _of("Run", 1000, "Steps between checkpoints.", free=True)
    keep: int = _of("Run", 2, "Number of checkpoints to keep.", free=True)

    log_every: int = _of("Watching", 10, "Steps between reads of the loss.", free=True)
    log: str = _of("Watching", "log.csv", "Log file, .csv or .jsonl; one row per step.", free=True)
    trackers: tuple[str, ...] = _of(
        "Watching", ("auto",),
        "tensorboard, wandb or another of accelerate; none; auto is tensorboard if installed.",
        free=True,
    )  # fmt: skip
    project: str = _of("Watching", "fastvdm", "Project name at the tracker.", free=True)
    sample_every: int = _of("Watching", 1000, "Steps between samples; 0 draws none.", free=True)
    num_samples: int = _of("Watching", 4, "Videos per sheet of samples.", free=True)
    sample_steps: int = _of("Watching", 50, "Sampling steps per video.", free=True)
    guidance_scale: float = _of(
        "Watching", 1.0, "Classifier-free guidance of the samples; 1 is no guidance.",
        free=True,
    )  # fmt: skip
    validate_every: int = _of(
        "Watching", 1000, "Steps between validations; 0 does none.", free=True
    )
    validation_clips: int = _of("Watching", 64, "Most held-out clips in one validation.", free=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name)))
        for name in _COUNTS:
            value, low = getattr(self, name), 0 if name in _MAY_BE_0 else 1
            if value is not None and value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value}")
            if value is not None and value > _MOST.get(name, value):
                raise ValueError(f"{name} must be at most {_MOST[name]}, got {value}")
        if not self.lr > 0 or not 0 <= self.ema_decay < 1 or self.grad_clip < 0:
            raise ValueError(
                "expected lr > 0, 0 <= ema_decay < 1 and grad_clip >= 0, got "
                f"{self.lr}, {self.ema_decay}, {self.grad_clip}"
            )
        if min(self.size) < 1:
            raise ValueError(f"size must be positive, got {self.size}")
        if self.image_weight < 0:
            raise ValueError(f"image_weight must be at least 0, got {self.image_weight}")
        for name in ("cond_drop_prob", "background"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}")
        if self.holdout and self.validation:
            raise ValueError("holdout takes clips from the folder, validation is another: not both")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range must be (low, high), got {self.value_range}")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.guidance_scale < 0:
            raise ValueError(f"guidance_scale must be at least 0, got {self.guidance_scale}")
        if self.text_encoder and self.conditioning not in (None, "captions"):
            raise ValueError(f"text_encoder is of captions, conditioning is {self.conditioning}")
        if self.conditioning == "captions" and not self.text_encoder:
            raise ValueError("conditioning on captions needs text_encoder")
        if self.image_cond == "own" and self.image_source == "batch":
            raise ValueError('image_cond="own" needs image_source="dataset"')
        if self.num_images and self.image_source == "batch" and self.batch_size < 2:
            raise ValueError('image_source="batch" needs a batch_size of at least 2')
        # Both become file names, and the configuration may come from somebody else.
        own = ("validation.csv", "bad-clips.csv")
        if not re.fullmatch(r"\w[\w.-]{0,99}\.(csv|jsonl)", self.log) or self.log in own:
            raise ValueError(
                "log must be the name of a .csv or .jsonl in the output folder, not "
                f"{', '.join(own)}, got {self.log!r}"
            )
        if not re.fullmatch(r"\w[\w .-]{0,99}", self.project):
            raise ValueError(f"project must be a name, got {self.project!r}")
        for name in ("data", "validation", "text_encoder"):  # absolute: resume from any directory
            path = getattr(self, name)
            if path and (name != "text_encoder" or Path(path).is_dir()):
                object.__setattr__(self, name, str(Path(path).absolute()))
        self.settings()

    @classmethod
    def create(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Make a configuration from plain values, as in JSON. ``preset`` sets the defaults to those
        of Appendix A.

        Raises:
            ValueError: a name is not a field, or a value is out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(
                f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        name = values.get("preset")
        if name is not None:
            side = preset(name).image_size  # raises if the preset is unknown
            recipe = RECIPES[name]
            shape = {"size": (side, side), "num_frames": recipe["num_frames"]}
            values = TRAINING[name] | shape | {"prediction": recipe["prediction"]} | dict(values)
        return cls(**values)

    def network(self) -> UNetConfig:
        """The configuration of the network; ``cond_dim`` depends on the conditions of the data."""
        if self.preset is not None:
            return preset(self.preset, **self.model)
        default: dict[str, Any] = {"dim": 64, "time_input": "logsnr"}
        if self.num_images:
            default["norm_per_frame"] = True  # otherwise the statistics mix images and video frames
        try:
            return UNetConfig(**default | {"cond_drop_prob": self.cond_drop_prob} | self.model)
        except TypeError as error:
            raise ValueError(
                f"model: {str(error).removeprefix('UNetConfig.__init__() ')}"
            ) from None

    def settings(self, classes: tuple[str, ...] | None = None, fps: float = 8.0) -> Settings:
        """What sampling must know; ``fps`` is the original frame rate of the videos."""
        recipe = RECIPES.get(self.preset or "", {})
        names = ("num_steps", "gamma", "langevin")
        return Settings(
            num_frames=self.num_frames,
            image_size=self.size,
            frameskip=self.frameskip,
            fps=(self.fps or fps) / self.frameskip,
            data_fps=self.fps,
            prediction=self.prediction,
            schedule="discrete" if self.network().time_input == "index" else "cosine",
            timesteps=self.timesteps,
            value_range=self.value_range,
            classes=classes,
            text_encoder=self.text_encoder,
            text_pooling=self.text_pooling,
            **{name: recipe[name] for name in names if name in recipe},
        )

    def folder_arguments(self, folder: str | None = None) -> dict[str, Any]:
        """The arguments of ``VideoFolder``."""
        if not (folder or self.data):
            raise ValueError("data: where are the videos?")
        return {
            "folder": folder or self.data,
            "num_frames": self.num_frames,
            "size": self.size,
            "frameskip": self.frameskip,
            "fps": self.fps,
            "channels": self.network().channels,
            "background": self.background,
            "value_range": self.value_range,
            "conditioning": "captions" if self.text_encoder else self.conditioning,
            "flip": self.flip,
            "short": self.short,
        }

    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a sample, including image frames if they come from the data set."""
        images = self.num_images if self.image_source == "dataset" else 0
        channels = self.network().channels
        return (channels, self.num_frames + images, *self.size)

    def check_resumable(self, stored: Mapping[str, Any]) -> None:
        """Raise ValueError if a run with configuration ``stored`` cannot continue as this one."""
        own = json.loads(json.dumps(asdict(self)))
        kept = {f.name for f in fields(self) if not f.metadata["free"]}
        if self.lr_schedule == "cosine":
            kept.add("steps")  # the learning rate of every step depends on it
        changed = [k for k in own if k in kept and stored.get(k, own[k]) != own[k]]
        if changed:
            lines = ", ".join(f"{k}: {stored.get(k)!r} -> {own[k]!r}" for k in changed)
            raise ValueError(f"a resumed run cannot change {lines}")


TYPES: dict[str, Any] = get_type_hints(TrainConfig)
_COUNTS = [f.name for f in fields(TrainConfig) if TYPES[f.name] in (int, int | None)]
_SIZES = ("num_frames", "frameskip", "num_images", "timesteps", "batch_size", "accumulate")
# More than any computer could take: the number of processes, and what multiplies tensors.
_MOST = {"num_workers": 1024} | dict.fromkeys(_SIZES, 1_000_000)
_MAY_BE_0 = {"num_images", "num_workers", "warmup_steps", "seed", "sample_every", "validate_every"}


def default_of(f: Field[Any]) -> Any:
    return f.default if f.default is not MISSING else {}


def choices_of(name: str) -> tuple[str, ...]:
    """The words that a field takes; none if it takes other values."""
    kinds = kinds_of(name)
    return tuple(word for k in kinds if get_origin(k) is Literal for word in get_args(k))


def kinds_of(name: str) -> list[Any]:
    """The types of a field, without None."""
    kind = TYPES[name]
    union = get_origin(kind) in (Union, types.UnionType)
    return [k for k in (get_args(kind) if union else (kind,)) if k is not type(None)]


def _checked(name: str, value: Any) -> Any:
    """Convert a value to the type of its field.

    Raises:
        ValueError: it cannot be converted.
    """
    if value is None and type(None) in get_args(TYPES[name]):
        return None
    (kind,) = kinds_of(name)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        wanted = f"one of {', '.join(get_args(kind))}"
    elif get_origin(kind) is tuple:
        return _checked_tuple(name, get_args(kind), value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        wanted = "an integer"
    elif kind is float:
        if _is_number(value):
            return float(value)
        wanted = "a number"
    elif kind is bool:
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif kind is str:
        if isinstance(value, str):
            return value
        wanted = "text"
    else:
        if isinstance(value, Mapping):
            return dict(value)
        wanted = 'a map such as {"dim": 64}'
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _checked_tuple(name: str, kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if isinstance(value, int) and name == "size" and not isinstance(value, bool):
        value = (value, value)
    kind, many = kinds[0], kinds[-1] is ...
    if isinstance(value, str) and many:
        value = (value,)
    fits = {int: lambda v: type(v) is int, float: _is_number, str: lambda v: isinstance(v, str)}
    if (
        isinstance(value, list | tuple)
        and (many or len(value) == len(kinds))
        and all(fits[kind](v) for v in value)
    ):
        return tuple(kind(v) for v in value)
    words = {int: "integers", float: "numbers", str: "names"}[kind]
    raise ValueError(f"{name} must be {'' if many else f'{len(kinds)} '}{words}, got {value!r}")

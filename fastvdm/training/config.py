"""The configuration of a training run, and those of the paper's six models."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastvdm.bundle import Settings
from fastvdm.unet.config import RECIPES, UNetConfig, preset

# Ho et al. 2022, Video Diffusion Models, Appendix A (batch: over all devices).
TRAINING: dict[str, dict[str, Any]] = {
    "ucf101": {"lr": 3e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 60_000,
               "num_images": 8},
    "bair": {"lr": 2e-4, "betas": (0.9, 0.999), "weight_decay": 0.01, "batch_size": 128,
             "steps": 660_000, "ema_decay": 0.999, "num_images": 8, "flip": True},
    "kinetics600": {"lr": 2e-4, "betas": (0.9, 0.99), "batch_size": 256, "steps": 220_000,
                    "num_images": 8},
    "t2v-small": {"lr": 3e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 200_000,
                  "num_images": 8},
    "t2v-large": {"lr": 3e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 700_000,
                  "num_images": 8},
    "t2v-128": {"lr": 2e-4, "betas": (0.9, 0.99), "batch_size": 128, "steps": 800_000,
                "num_images": 7},
}  # fmt: skip

# What a resumed run may change: none of these changes the loss of a step.
FREE = frozenset(
    {"output", "folder", "steps", "save_every", "log_every", "keep", "num_workers", "log", "device"}
)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run.

    Data: ``folder`` with videos, clips of ``num_frames`` at ``frameskip`` resized to ``size``;
    ``captions`` come from sidecar files whenever ``text_encoder`` is set; ``short`` as in
    ``VideoFolder``.

    Network: ``model`` are arguments of ``UNet3D`` over those of ``preset`` (a model of Appendix A).
    Without a preset the default is ``{"dim": 64}`` in the peer's layout with the log-SNR as time;
    ``time_input="index"`` trains the peer's discrete schedule with ``timesteps`` steps.

    Loss: ``prediction`` "eps", "v" or "x"; ``loss_space`` and ``loss_type`` as in
    ``diffusion_loss``. ``cond_drop_prob``: share of unconditional samples; 0.1 is usual, the paper
    gives none. ``text_pooling`` as in ``TextConditioner``.

    Joint training: ``num_images`` frames of other videos, from the whole data set
    (``image_source="dataset"``, the paper) or from the batch ("batch": no extra decoding), and the
    options of ``joint_loss``. ``image_cond="own"`` gives image frames their own caption.

    Optimiser: AdamW with ``lr``, ``betas``, ``weight_decay``; the paper says Adam, with 0.01 weight
    decay on BAIR only. Linear warm-up over ``warmup_steps`` and clipping to ``grad_clip`` (0: off)
    are not mentioned by it; the defaults, none and 1, change nothing in a healthy run. One step
    takes ``batch_size * accumulate`` clips on each process. ``ema_warmup``: see ``Averaged``.

    Run: ``mixed_precision`` "no" or "bf16" (autocast; weights, optimizer and EMA stay fp32);
    ``keep`` checkpoints are kept; ``device`` "auto" or "cpu"; ``compile``: torch.compile.
    """

    output: str
    folder: str = ""
    num_frames: int = 16
    size: tuple[int, int] = (64, 64)
    frameskip: int = 1
    fps: float = 8.0
    flip: bool = False
    short: str = "error"
    preset: str | None = None
    model: dict[str, Any] = field(default_factory=dict)
    timesteps: int = 1000
    prediction: str = "eps"
    loss_space: str = "eps"
    loss_type: str = "mse"
    text_encoder: str | None = None
    text_pooling: str = "attention"
    cond_drop_prob: float = 0.1
    num_images: int = 0
    image_source: str = "dataset"
    image_weight: float = 1.0
    image_time: str = "shared"
    image_cond: str = "shared"
    steps: int = 100_000
    batch_size: int = 8
    accumulate: int = 1
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = True
    seed: int = 0
    mixed_precision: str = "no"
    compile: bool = False
    device: str = "auto"
    save_every: int = 1000
    keep: int = 2
    log_every: int = 10
    log: str = "log.csv"
    num_workers: int = 0

    def __post_init__(self) -> None:
        choices = {
            "mixed_precision": ("no", "bf16"),
            "device": ("auto", "cpu"),
            "image_source": ("dataset", "batch"),
            "image_cond": ("shared", "own", "none"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}"
                )
        at_least = {"num_frames": 1, "frameskip": 1, "steps": 1, "batch_size": 1, "accumulate": 1}
        at_least |= {"save_every": 1, "log_every": 1, "keep": 1, "num_images": 0, "num_workers": 0}
        at_least |= {"warmup_steps": 0, "seed": 0}
        for name, low in at_least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "float" and (
                isinstance(value, bool) or not isinstance(value, int | float)
            ):
                raise ValueError(f"{f.name} must be a number, got {value!r}")
        if not self.lr > 0 or not 0 <= self.ema_decay < 1 or self.grad_clip < 0:
            raise ValueError(
                "expected lr > 0, 0 <= ema_decay < 1 and grad_clip >= 0, got "
                f"{self.lr}, {self.ema_decay}, {self.grad_clip}"
            )
        if self.image_cond == "own" and self.image_source == "batch":
            raise ValueError('image_cond="own" needs image_source="dataset"')
        if self.num_images and self.image_source == "batch" and self.batch_size < 2:
            raise ValueError('image_source="batch" needs a batch_size of at least 2')
        self.settings()

    @classmethod
    def create(cls, values: dict[str, Any]) -> TrainConfig:
        """From plain values, as JSON has them; ``preset`` brings Appendix A as defaults.

        Raises:
            ValueError: a name that is no field, or a value out of range.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(
                f"unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        name = values.get("preset")
        if name is not None:
            side = preset(name).image_size  # raises for an unknown one
            recipe = RECIPES[name]
            shape = {"size": (side, side), "num_frames": recipe["num_frames"]}
            values = TRAINING[name] | shape | {"prediction": recipe["prediction"]} | values
        values = dict(values)
        for key in ("size", "betas"):
            if isinstance(values.get(key), int) and key == "size":
                values[key] = (values[key], values[key])
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        return cls(**values)

    def network(self) -> UNetConfig:
        """The configuration of the network; with a text encoder, before it decides ``cond_dim``."""
        if self.preset is not None:
            return preset(self.preset, **self.model)
        default: dict[str, Any] = {"dim": 64, "time_input": "logsnr"}
        if self.num_images:
            default["norm_per_frame"] = True  # else image frames leak through the statistics
        return UNetConfig(**default | {"cond_drop_prob": self.cond_drop_prob} | self.model)

    def settings(self) -> Settings:
        """What sampling will need to know."""
        recipe = RECIPES.get(self.preset or "", {})
        names = ("num_steps", "gamma", "langevin")
        return Settings(
            num_frames=self.num_frames,
            image_size=self.size,
            frameskip=self.frameskip,
            fps=self.fps,
            prediction=self.prediction,
            schedule="discrete" if self.network().time_input == "index" else "cosine",
            timesteps=self.timesteps,
            text_encoder=self.text_encoder,
            text_pooling=self.text_pooling,
            **{name: recipe[name] for name in names if name in recipe},
        )

    def folder_arguments(self) -> dict[str, Any]:
        """The arguments of ``VideoFolder``."""
        if not self.folder:
            raise ValueError("folder: where are the videos?")
        return {
            "folder": self.folder,
            "num_frames": self.num_frames,
            "size": self.size,
            "frameskip": self.frameskip,
            "channels": self.network().channels,
            "conditioning": "captions" if self.text_encoder is not None else None,
            "flip": self.flip,
            "short": self.short,
        }

    def sample_shape(self) -> tuple[int, int, int, int]:
        """(C, F, H, W) of a sample, image frames included when the data set brings them."""
        images = self.num_images if self.image_source == "dataset" else 0
        channels = self.network().channels
        return (channels, self.num_frames + images, *self.size)

    def check_resumable(self, stored: dict[str, Any]) -> None:
        """Raises ValueError if a run of configuration ``stored`` cannot continue as this one."""
        own = json.loads(json.dumps(asdict(self)))
        changed = [k for k in own if k not in FREE and stored.get(k) != own[k]]
        if changed:
            lines = ", ".join(f"{k}: {stored.get(k)!r} -> {own[k]!r}" for k in changed)
            raise ValueError(f"a resumed run cannot change {lines}")

"""A model ready to sample: all checks before the first step, reading and writing."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer

from fastvdm import video as files
from fastvdm.bundle import Bundle
from fastvdm.cli.options import ModelOptions, Options, Windows
from fastvdm.unet.checkpoint import read_source

_MOST = 1_000_000


class Run:
    """A model ready to sample. All errors in the options are found here, before the first step.

    ``options`` are those of ``fastvdm.diffusion.sample``; with ``windows``, those of the functions
    of ``fastvdm.diffusion.extend``.
    """

    def __init__(
        self, model: str, outputs: list[Path], options: Options, windows: Windows | None = None
    ) -> None:
        from fastvdm.diffusion import DDIM, Ancestral, DiscreteSchedule, Langevin

        self.given = options
        check_positive(steps=options.steps, size=options.size, fps=options.fps)
        condition = {}
        if windows is not None:
            check_positive(window=windows.window)
            condition = guidance(windows)
        for output in outputs:
            check_output(output, options.overwrite, files.OUTPUTS)
        vectors = None if options.cond is None else read_cond(options.cond)
        told = ("prediction", "schedule", "timesteps", "text_encoder")
        self.bundle = load_model(model, options, **{name: getattr(options, name) for name in told})
        settings = self.settings = self.bundle.settings
        if options.timesteps is not None and not isinstance(self.bundle.schedule, DiscreteSchedule):
            raise ValueError("timesteps belong to the discrete schedule, the model's is the cosine")
        if self.unet.out_dim != self.unet.channels:
            raise ValueError(
                f"the model takes {self.unet.channels} channels and gives {self.unet.out_dim}: "
                "what it draws is no video"
            )
        self.is_pixels = settings.value_range is not None
        for output in outputs:
            files.check_output(output, self.unet.channels)
            if not self.is_pixels and output.suffix.lower() != ".npy":
                raise ValueError(f"the model draws latents: an .npy, not {output.name!r}")
        sampler = options.sampler or ("langevin" if settings.langevin else "ancestral")
        if sampler not in ("ancestral", "ddim", "langevin"):
            raise ValueError(f"sampler must be ancestral, ddim or langevin, got {sampler!r}")
        if sampler == "ddim" and options.gamma is not None:
            raise ValueError("gamma is of the ancestral sampler; ddim has eta")
        if sampler != "ddim" and options.eta is not None:
            raise ValueError(f"eta is of ddim; {sampler} has gamma")
        gamma = settings.gamma if options.gamma is None else options.gamma
        steps = settings.num_steps if options.steps is None else options.steps
        self.options: dict[str, Any] = {
            "schedule": self.bundle.schedule,
            "prediction": settings.prediction,
            "sampler": DDIM(options.eta or 0.0) if sampler == "ddim" else Ancestral(gamma),
            "corrector": Langevin() if sampler == "langevin" else None,
            "num_steps": steps,
            "cond": self.bundle.cond(options.caption, len(outputs), vectors, options.label),
            "guidance_scale": options.guidance_scale,
            "progress": True,
            "cuda_graph": "auto" if options.cuda_graph is None else options.cuda_graph,
            "device": self.unet.stem.weight.device,
            **condition,
        }
        if windows is not None:
            window = windows.window or settings.num_frames
            self.options |= {"window": window, "overlap": windows.overlap, "seed": options.seed}

    @property
    def unet(self) -> Any:
        return self.bundle.unet

    @property
    def side(self) -> tuple[int, int]:
        size = self.given.size
        return self.settings.image_size if size is None else (size, size)

    def read(
        self, path: Path, size: int | tuple[int, int] | None, frames: int | None = None,
        frameskip: int = 1, fps: float | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Read (1, C, F, H, W) in [-1, 1]; latents stay as they are."""
        clip = files.read_video(
            path,
            frames,
            frameskip,
            size,
            fps=fps,
            channels=self.unet.channels,
            value_range=self.settings.value_range,
        )[None]
        return 2 * clip - 1 if self.is_pixels else clip

    def rate(self, path: Path) -> float:
        """Frames per second of an input; the model's if it has none (pictures, arrays)."""
        try:
            return files.video_fps(path)
        except files.VideoReadError:
            return self.settings.fps * self.settings.frameskip

    def output_rate(self, path: Path, fps: float) -> float:
        """The rate to write at: ``fps``, unless the command line sets another. Raises ValueError if
        files of this kind cannot have it."""
        rate = fps if self.given.fps is None else self.given.fps
        files.check_output(path, self.unet.channels, rate)
        return rate

    def write(self, path: Path, video: torch.Tensor, fps: float) -> None:
        """Write (C, F, H, W) in [-1, 1]."""
        if self.is_pixels:
            video = (video + 1) / 2
        files.write_video(path, video, fps)
        typer.echo(f"{path}: {video.shape[1]} frames of {video.shape[2]} x {video.shape[3]}")


def guidance(windows: Windows) -> dict[str, Any]:
    """The options for a ``Condition``, checked before anything is read.

    Raises:
        ValueError: a weight is neither "auto" nor a number, or ``Condition`` refuses an option.
    """
    from fastvdm.diffusion import Condition

    options = {k: v for k, v in vars(windows).items() if k not in ("overlap", "window")}
    for name in ("guidance_weight", "low_res_weight"):
        if name in options and options[name] != "auto":
            try:
                options[name] = float(options[name])
            except ValueError:
                raise ValueError(
                    f"{name} must be auto or a number, got {options[name]!r}"
                ) from None
    frame = torch.zeros(1, 1, 1, 1, 1)
    Condition(frame, low_res=frame if "downsample" in options else None, **options)
    return options


def load_model(model: str, options: ModelOptions, **settings: Any) -> Bundle:
    """Load the model of a command line to its device; ``settings`` are fields of ``Settings``."""
    if options.weights not in ("ema", "raw"):
        raise ValueError(f"weights must be ema or raw, got {options.weights!r}")
    groups = options.resnet_groups
    check_positive(resnet_groups=groups, timesteps=settings.get("timesteps"))
    place = _device(options.device)
    network = {"resnet_groups": groups, "stem_skip": options.stem_skip}
    bundle = Bundle.load(
        model,
        ema=options.weights == "ema",
        prefix=options.prefix,
        network={k: v for k, v in network.items() if v is not None},
        allow_download=options.allow_download,
        **{k: v for k, v in settings.items() if v is not None},
    )
    return bundle.to(place)


def _device(name: str) -> torch.device:
    """The device. Raises ValueError if it does not exist on this machine."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def read_cond(path: Path) -> torch.Tensor:
    """Read the one tensor in a .npy, .pt or .safetensors file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file does not contain exactly one tensor of numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} for --cond")
    if path.suffix == ".npy":
        try:
            value: Any = torch.from_numpy(np.load(path, allow_pickle=False))
        except (TypeError, ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path} is not a readable array of numbers: {error}") from error
    else:
        value = read_source(path)
    if isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    if not isinstance(value, torch.Tensor) or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{path} must hold one tensor of numbers, got {type(value).__name__}")
    return value.float()


def check_positive(**values: float | None) -> None:
    """Raise ValueError if a given value is not above 0, or more than any computer could take; the
    names are those of the options."""
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{flag} must be positive, got {value}")
        if value is not None and value > _MOST:
            raise ValueError(f"{flag} must be at most {_MOST}, got {value}")


def check_output(path: Path, overwrite: bool, suffixes: tuple[str, ...]) -> None:
    """Check, before anything is computed, that the output can be written and does not exist.

    Raises:
        ValueError: the suffix is not one of ``suffixes``.
        OSError: the output exists, or its folder cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"the output must end in {', '.join(suffixes)}, got {path.name!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")
    folder = next(p for p in path.absolute().parents if p.exists())
    try:
        tempfile.NamedTemporaryFile(dir=folder, prefix=".writing-").close()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {folder}: {error.strerror}") from None

"""What the sampling commands share: their options, the model, and the checks before any step."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import numpy as np
import torch
import typer

from fastvdm import video as files
from fastvdm.bundle import Bundle
from fastvdm.unet.checkpoint import read_source

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A training output, a checkpoint, a folder of save_pretrained, a file of "
        "video-diffusion-pytorch, or a hub name.",
    ),
]
In = Annotated[Path, typer.Argument(metavar="VIDEO", help="The input video.")]
Out = Annotated[Path, typer.Argument(metavar="OUTPUT", help=".mp4, .webm or .gif")]


@dataclass(frozen=True)
class ModelOptions:
    """The options of every command that reads a model and writes a file."""

    size: Annotated[
        int | None, typer.Option(help="Height and width; the model's own by default.")
    ] = None
    weights: Annotated[str, typer.Option(help="ema or raw.")] = "ema"
    prefix: Annotated[
        str | None, typer.Option(help="Which network of a file with several: its path, or a part.")
    ] = None
    resnet_groups: Annotated[
        int | None, typer.Option(help="Groups of the GroupNorm in a file that does not say; 8.")
    ] = None
    stem_skip: Annotated[
        str | None,
        typer.Option(
            help="after or before the first attention, where a file does not say: releases up to "
            "0.5 have before."
        ),
    ] = None
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto"
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = (
        False
    )


@dataclass(frozen=True)
class Options(ModelOptions):
    """The options that every sampling command has."""

    caption: Annotated[
        list[str] | None, typer.Option(help="Once for all videos, or once for each.")
    ] = None
    cond: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The conditioning itself, (D,) or (N, D): .npy, .pt, .safetensors."
        ),
    ] = None
    guidance_scale: Annotated[
        float, typer.Option(help="Classifier-free guidance, 1 + w; 1 is none.")
    ] = 1.0
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps; the model's own by default.")
    ] = None
    sampler: Annotated[
        str | None, typer.Option(help="ancestral, ddim or langevin; the model's own by default.")
    ] = None
    gamma: Annotated[
        float | None, typer.Option(help="Variance of the ancestral sampler, 0 to 1.")
    ] = None
    eta: Annotated[float | None, typer.Option(help="Noise of DDIM, 0 to 1; 0.")] = None
    seed: Annotated[int, typer.Option(help="The same seed gives the same video.")] = 0
    fps: Annotated[float | None, typer.Option(help="Frames per second of the output.")] = None
    prediction: Annotated[
        str | None, typer.Option(help="eps, v or x, for a model that does not say; eps.")
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(help="cosine or discrete, for a model that does not say; its network's own."),
    ] = None
    timesteps: Annotated[
        int | None, typer.Option(help="Steps of the discrete schedule it was trained with; 1000.")
    ] = None
    text_encoder: Annotated[
        str | None,
        typer.Option(help="BERT-family encoder of the captions, for a model that does not say."),
    ] = None
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Record a step and replay it; by itself on CUDA at small batches.",
        ),
    ] = None


@dataclass(frozen=True)
class Windows:
    """The options of the commands that draw a video from another, window by window."""

    overlap: Annotated[
        int, typer.Option(help="Frames that a window shares with the one before.")
    ] = 1
    window: Annotated[
        int | None, typer.Option(help="Frames of one network call; those it was trained on.")
    ] = None
    guidance_weight: Annotated[
        str,
        typer.Option(help="w_r of the known frames: a number or auto, 2 F/n, n of F known."),
    ] = "auto"
    guidance_limit: Annotated[
        str,
        typer.Option(
            help="stable: no weight beyond what a step can bear. none: weights as they are."
        ),
    ] = "stable"


@dataclass(frozen=True)
class FrameWindows(Windows):
    """Where the input is frames of the output."""

    method: Annotated[str, typer.Option(help="reconstruction (Eq. 7) or replacement.")] = (
        "reconstruction"
    )


@dataclass(frozen=True)
class LowResWindows(Windows):
    """Where it is the output in a low resolution."""

    downsample: Annotated[str, typer.Option(help="average or bilinear: D of Eq. 8.")] = "average"
    low_res_weight: Annotated[
        str,
        typer.Option(help="Weight of the input in units of 1/|D|^2, or auto, which enforces it."),
    ] = "auto"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose arguments that are dataclasses become their fields on the command line, a
    class's own before those that it inherits."""
    shared: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    for p in inspect.signature(command, eval_str=True).parameters.values():
        kind = p.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            shared[p.name] = kind
            hints = get_type_hints(kind, include_extras=True)
            parameters += [
                p.replace(name=f.name, default=f.default, annotation=hints[f.name])
                for c in kind.__mro__
                for f in dataclasses.fields(kind)
                if f.name in inspect.get_annotations(c)
            ]
        else:
            parameters.append(p)

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, kind in shared.items():
            own = {f.name: values.pop(f.name) for f in dataclasses.fields(kind)}
            values[name] = kind(**own)
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


class Run:
    """A model ready to sample: everything that can be wrong is found here, before any step.

    ``options`` are those of ``fastvdm.diffusion.sample``; where there are ``windows``, of the
    functions of ``fastvdm.diffusion.extend``.
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
            check_output(output, options.overwrite)
        vectors = None if options.cond is None else read_cond(options.cond)
        told = ("prediction", "schedule", "timesteps", "text_encoder")
        self.bundle = load_model(model, options, **{name: getattr(options, name) for name in told})
        settings = self.settings = self.bundle.settings
        if options.timesteps is not None and not isinstance(self.bundle.schedule, DiscreteSchedule):
            raise ValueError("timesteps belong to the discrete schedule, the model's is the cosine")
        if self.unet.channels not in (1, 3) or self.unet.out_dim != self.unet.channels:
            raise ValueError(
                f"the model takes {self.unet.channels} channels and gives {self.unet.out_dim}: a "
                "video file has 3, or 1. fastvdm.bundle.Bundle and fastvdm.diffusion.sample draw "
                "anything else"
            )
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
            "cond": self.bundle.cond(options.caption, len(outputs), vectors),
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
        frameskip: int = 1,
    ) -> torch.Tensor:  # fmt: skip
        """(1, C, F, H, W) in [-1, 1]."""
        clip = files.read_video(path, frames, frameskip, size)
        return (clip.mean(0, keepdim=True) if self.unet.channels == 1 else clip)[None] * 2 - 1

    def write(self, path: Path, video: torch.Tensor, fps: float) -> None:
        """(C, F, H, W) in [-1, 1], at ``fps`` unless the command line says another rate."""
        files.write_video(path, (video + 1) / 2, fps if self.given.fps is None else self.given.fps)
        typer.echo(f"{path}: {video.shape[1]} frames of {video.shape[2]} x {video.shape[3]}")


def guidance(windows: Windows) -> dict[str, Any]:
    """Those that are of a ``Condition``, checked before anything is read.

    Raises:
        ValueError: a weight that is neither auto nor a number, or whatever a ``Condition`` refuses.
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
    """The model of a command line on its device; ``settings`` are fields of ``Settings``."""
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
        **{k: v for k, v in settings.items() if v is not None},
    )
    return bundle.to(place)


def _device(name: str) -> torch.device:
    """Raises ValueError for a device that does not exist, or not here."""
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
    """The one tensor in a .npy, .pt or .safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: it does not hold one tensor of numbers.
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
    """Raises ValueError for what was given and is not above 0; names as on the command line."""
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")


def check_output(
    path: Path, overwrite: bool, suffixes: tuple[str, ...] = (".mp4", ".webm", ".gif")
) -> None:
    """Before anything is computed: a name that can be written, and nothing in its place.

    Raises:
        ValueError: another suffix. OSError: something is there, or its folder cannot be written.
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

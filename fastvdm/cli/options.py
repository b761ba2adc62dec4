"""The options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Training output, checkpoint, folder of save_pretrained, file of "
        "video-diffusion-pytorch, or name on the hub.",
    ),
]
In = Annotated[Path, typer.Argument(metavar="VIDEO", help="Input video.")]
Out = Annotated[
    Path,
    typer.Argument(metavar="OUTPUT", help="File to write: .mp4, .webm, .gif, .webp or .npy."),
]


Weights = Annotated[
    str, typer.Option(metavar="ema|raw", help="Averaged or raw weights, if the file has both.")
]


@dataclass(frozen=True)
class ModelOptions:
    """Options of every command that reads a model and writes a file."""

    size: Annotated[
        int | None,
        typer.Option(show_default="the model's", help="Height and width in pixels."),
    ] = None
    weights: Weights = "ema"
    prefix: Annotated[
        str | None,
        typer.Option(help="Which network of a file with several: its path or a part of it."),
    ] = None
    resnet_groups: Annotated[
        int | None,
        typer.Option(show_default="8", help="Groups of the GroupNorm, if the file does not say."),
    ] = None
    stem_skip: Annotated[
        str | None,
        typer.Option(
            metavar="after|before",
            help="Where the outermost skip connection starts, after or before the first "
            "attention, if the file does not say. video-diffusion-pytorch up to 0.5: before.",
        ),
    ] = None
    allow_download: Annotated[
        bool,
        typer.Option(
            "--allow-download", help="Download the text encoder that the model names from the hub."
        ),
    ] = False
    device: Annotated[str, typer.Option(help="Device to run on: auto, cpu, cuda, cuda:1 ...")] = (
        "auto"
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = (
        False
    )


@dataclass(frozen=True)
class Options(ModelOptions):
    """Options of every sampling command."""

    caption: Annotated[
        list[str] | None, typer.Option(help="Caption: one for all videos, or one for each.")
    ] = None
    label: Annotated[
        list[str] | None,
        typer.Option(help="Class name: one for all videos, or one for each."),
    ] = None
    cond: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Conditioning vectors, (D,) or (N, D): .npy, .pt, .safetensors."
        ),
    ] = None
    guidance_scale: Annotated[
        float,
        typer.Option(
            help="Classifier-free guidance, 1 + w of Eq. 6: 1 is no guidance, with 3 to 8 the "
            "video follows caption, label or cond more strongly."
        ),
    ] = 1.0
    steps: Annotated[
        int | None, typer.Option(show_default="the model's", help="Sampling steps.")
    ] = None
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="ancestral|ddim|langevin",
            show_default="the model's",
            help="ancestral adds noise at every step, ddim none (see --eta), langevin also "
            "corrects every step.",
        ),
    ] = None
    gamma: Annotated[
        float | None,
        typer.Option(
            show_default="the model's",
            help="Noise of ancestral: 0 is the least, 1 the most (Eq. 4).",
        ),
    ] = None
    eta: Annotated[float | None, typer.Option(show_default="0", help="Noise of ddim, 0 to 1.")] = (
        None
    )
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0
    fps: Annotated[
        float | None,
        typer.Option(show_default="the model's", help="Frames per second of the output."),
    ] = None
    prediction: Annotated[
        str | None,
        typer.Option(
            metavar="eps|v|x",
            show_default="eps",
            help="What the network predicts, if the model does not say.",
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="cosine|discrete",
            show_default="its network's",
            help="Noise schedule, if the model does not say.",
        ),
    ] = None
    timesteps: Annotated[
        int | None,
        typer.Option(show_default="1000", help="Steps of the discrete schedule of the training."),
    ] = None
    text_encoder: Annotated[
        str | None,
        typer.Option(help="BERT-family encoder of the captions, if the model does not say."),
    ] = None
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            show_default="auto",
            help="Record a step as a CUDA graph and replay it; auto does so for small batches.",
        ),
    ] = None


@dataclass(frozen=True)
class Windows:
    """Options of the commands that draw a video from another one, window by window."""

    overlap: Annotated[
        int, typer.Option(help="Frames that a window shares with the previous one.")
    ] = 1
    window: Annotated[
        int | None,
        typer.Option(show_default="the model's", help="Frames per window."),
    ] = None
    guidance_weight: Annotated[
        str,
        typer.Option(
            metavar="auto|NUMBER",
            help="Reconstruction guidance, w_r of Eq. 7. auto is 2 F/n for n known frames of F; 1 "
            "is the derived value.",
        ),
    ] = "auto"
    guidance_limit: Annotated[
        str,
        typer.Option(
            metavar="stable|none",
            help="stable lowers a weight with which a step would diverge; none does not.",
        ),
    ] = "stable"


@dataclass(frozen=True)
class FrameWindows(Windows):
    """Options if the input is a part of the frames of the output."""

    method: Annotated[
        str,
        typer.Option(
            metavar="reconstruction|replacement",
            help="Guide the other frames by the known ones, or only put the known ones in place.",
        ),
    ] = "reconstruction"


@dataclass(frozen=True)
class LowResWindows(Windows):
    """Options if the input is the output in a lower resolution."""

    downsample: Annotated[
        str,
        typer.Option(
            metavar="average|bilinear", help="How the output is reduced to the input (Eq. 8)."
        ),
    ] = "average"
    low_res_weight: Annotated[
        str,
        typer.Option(
            metavar="auto|NUMBER",
            help="How strongly the output is held to the input; auto enforces it.",
        ),
    ] = "auto"


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace arguments that are dataclasses by options for their fields, a class's own fields
    before inherited ones."""
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

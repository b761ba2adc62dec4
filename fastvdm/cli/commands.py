"""The commands that need typer. Each reads, checks everything, computes, then writes atomically."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fastvdm import video as files
from fastvdm.cli.options import (
    FrameWindows,
    In,
    LowResWindows,
    Model,
    ModelOptions,
    Options,
    Out,
    Run,
    check_output,
    check_positive,
    load_model,
    with_options,
)

app = typer.Typer(
    help="Video diffusion with factorized space-time 3D U-Nets. Also: fastvdm info.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@with_options
def sample(
    model: Model,
    output: Out,
    *,
    num: Annotated[int, typer.Option(help="Videos; more than one become output-0, -1 ...")] = 1,
    batch_size: Annotated[int, typer.Option(help="Videos drawn at a time.")] = 4,
    frames: Annotated[int | None, typer.Option(help="Frames; the model's own.")] = None,
    options: Options,
) -> None:
    """Draw videos."""
    from fastvdm import diffusion

    check_positive(num=num, batch_size=batch_size, frames=frames)
    names = [output] if num == 1 else [_numbered(output, i, num) for i in range(num)]
    run = Run(model, names, options)
    cond = run.options.pop("cond")
    shape = (run.unet.channels, frames or run.settings.num_frames, *run.side)
    for first in range(0, num, batch_size):
        part = range(first, min(first + batch_size, num))
        videos = diffusion.sample(
            run.unet,
            (len(part), *shape),
            cond=None if cond is None else cond[first : first + len(part)],
            seed=[options.seed + i for i in part],  # a video does not depend on the batch size
            **run.options,
        )
        for i, clip in zip(part, videos):
            run.write(names[i], clip, run.settings.fps)


def _numbered(path: Path, i: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{i:0{len(str(count - 1))}d}{path.suffix}")


@app.command()
@with_options
def extend(
    model: Model,
    video: In,
    output: Out,
    *,
    num_frames: Annotated[int, typer.Option(help="Frames of the result, input included.")],
    given: Annotated[
        int | None, typer.Option(help="Use only the first so many frames of the input.")
    ] = None,
    windows: FrameWindows,
    options: Options,
) -> None:
    """Continue a video, block by block, to any length."""
    from fastvdm.diffusion.extend import extend as run_extend

    check_positive(num_frames=num_frames, given=given)
    run = Run(model, [output], options, windows)
    frameskip = run.settings.frameskip
    clip = run.read(video, run.side, given, frameskip)
    result = run_extend(run.unet, clip, num_frames, **run.options)
    run.write(output, result[0], files.video_fps(video) / frameskip)


@app.command()
@with_options
def interpolate(
    model: Model,
    video: In,
    output: Out,
    *,
    factor: Annotated[int, typer.Option(help="Input frame i becomes frame factor * i.")] = 2,
    windows: FrameWindows,
    options: Options,
) -> None:
    """Raise the frame rate: every frame of the input is kept, those between are drawn."""
    from fastvdm.diffusion.extend import interpolate_frames

    check_positive(factor=factor)
    run = Run(model, [output], options, windows)
    result = interpolate_frames(run.unet, run.read(video, run.side), factor, **run.options)
    run.write(output, result[0], files.video_fps(video) * factor)


@app.command()
@with_options
def upscale(
    model: Model,
    video: In,
    output: Out,
    *,
    low_size: Annotated[
        int | None, typer.Option(help="Resize and crop the input to this side first.")
    ] = None,
    frameskip: Annotated[
        int, typer.Option(help="Input frame i becomes frame frameskip * i: raises the rate too.")
    ] = 1,
    windows: LowResWindows,
    options: Options,
) -> None:
    """Draw a larger version of a video (Eq. 8) with a model of the larger size."""
    from fastvdm.diffusion.extend import upscale as run_upscale

    check_positive(low_size=low_size, frameskip=frameskip)
    run = Run(model, [output], options, windows)
    clip = run.read(video, low_size)
    result = run_upscale(run.unet, clip, run.side, frameskip=frameskip, **run.options)
    run.write(output, result[0], files.video_fps(video) * frameskip)


@app.command()
def train(
    output: Annotated[Path, typer.Argument(help="Folder for checkpoints, log and config.json.")],
    data: Annotated[str | None, typer.Option(help="Folder of videos.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in OUTPUT.")] = False,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with fields of TrainConfig.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="A model of the paper, with its training recipe.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Arguments of UNet3D as JSON: '{\"dim\": 64}'.")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip.")] = None,
    size: Annotated[int | None, typer.Option(help="Height and width of a clip.")] = None,
    num_images: Annotated[
        int | None, typer.Option(help="Joint training: image frames for each video.")
    ] = None,
    text_encoder: Annotated[
        str | None, typer.Option(help="BERT-family encoder; captions from sidecar files.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Clips a step and process.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no or bf16.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    num_workers: Annotated[int | None, typer.Option(help="Processes that read videos.")] = None,
    seed: Annotated[int | None, typer.Option(help="Decides everything random.")] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field of TrainConfig."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Train a model. Several GPUs: accelerate launch -m fastvdm.cli train ...

    A run that was stopped or killed continues exactly: fastvdm train OUTPUT --resume
    """
    # Imported here: it pulls in accelerate.
    training = importlib.import_module("fastvdm.training.trainer")
    from fastvdm.training.config import TrainConfig

    given = {
        "folder": data, "preset": preset, "num_frames": num_frames, "size": size,
        "num_images": num_images, "text_encoder": text_encoder, "steps": steps,
        "batch_size": batch_size, "lr": lr, "mixed_precision": mixed_precision,
        "save_every": save_every, "num_workers": num_workers, "seed": seed, "device": device,
    }  # fmt: skip
    values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    if model is not None:
        values["model"] = _json("--model", model)
    for assignment in set_ or []:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE, got {assignment!r}")
        values[name] = _value(text)
    stored = output / "config.json"
    if resume and data is None and config is None and not stored.is_file():
        raise FileNotFoundError(f"no run to resume in {output}")
    if config is None and resume and stored.is_file():
        config = stored
    base = _json(str(config), config.read_text()) if config is not None else {}
    settings = TrainConfig.create({**base, **values, "output": str(output)})
    trainer = training.Trainer(settings, resume=resume, progress=not quiet)
    last = trainer.run()
    if trainer.is_main:
        typer.echo(f"{last}")
    trainer.accelerator.end_training()


@app.command()
@with_options
def export(
    model: Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="The package, .pt2.")],
    batch: Annotated[int, typer.Option(help="Videos of one call.")] = 1,
    frames: Annotated[int | None, typer.Option(help="Frames; the model's own.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance inside the package, 1 + w.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    options: ModelOptions,
) -> None:
    """Compile the network ahead of time (torch.export, AOTInductor) for one size of input."""
    from fastvdm import export as exporting

    size = options.size
    check_positive(batch=batch, frames=frames, size=size)
    check_output(output, options.overwrite, (".pt2",))
    loaded = load_model(model, options)
    height, width = loaded.settings.image_size if size is None else (size, size)
    count = loaded.settings.num_frames if frames is None else frames
    inputs = exporting.example_inputs(loaded.unet, batch, count, height, width)
    path = exporting.export_unet(
        loaded.unet, output, inputs, backend=backend, cond_scale=guidance_scale
    )
    typer.echo(f"{path}: " + ", ".join(str(tuple(t.shape)) for t in inputs))


def _json(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def _value(text: str) -> Any:
    """JSON where it is JSON, else a plain string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

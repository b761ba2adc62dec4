"""The commands that draw. Each one reads, checks everything, computes, and writes atomically."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastvdm.cli.app import app
from fastvdm.cli.options import (
    FrameWindows,
    In,
    LowResWindows,
    Model,
    ModelOptions,
    Options,
    Out,
    with_options,
)
from fastvdm.cli.run import Run, check_output, check_positive, load_model


@app.command()
@with_options
def sample(
    model: Model,
    output: Out,
    *,
    num: Annotated[
        int,
        typer.Option(
            help="Number of videos; several are OUTPUT-0 of --seed, OUTPUT-1 of the next ..."
        ),
    ] = 1,
    batch_size: Annotated[int, typer.Option(help="Videos per batch.")] = 4,
    frames: Annotated[
        int | None, typer.Option(show_default="the model's", help="Frames per video.")
    ] = None,
    options: Options,
) -> None:
    """Generate videos."""
    from fastvdm import diffusion

    check_positive(num=num, batch_size=batch_size, frames=frames)
    names = [output] if num == 1 else [_numbered(output, i, num) for i in range(num)]
    run = Run(model, names, options)
    cond = run.options.pop("cond")
    shape = (run.unet.channels, frames or run.settings.num_frames, *run.side)
    rate = run.output_rate(output, run.settings.fps)
    for first in range(0, num, batch_size):
        part = range(first, min(first + batch_size, num))
        videos = diffusion.sample(
            run.unet,
            (len(part), *shape),
            cond=None if cond is None else cond[first : first + len(part)],
            seed=[options.seed + i for i in part],  # so a video does not depend on the batch size
            **run.options,
        )
        for i, clip in zip(part, videos):
            run.write(names[i], clip, rate)


def _numbered(path: Path, i: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{i:0{len(str(count - 1))}d}{path.suffix}")


@app.command()
@with_options
def extend(
    model: Model,
    video: In,
    output: Out,
    *,
    num_frames: Annotated[int, typer.Option(help="Frames of the output, input included.")],
    given: Annotated[
        int | None, typer.Option(help="Use only the first N frames of the input.")
    ] = None,
    windows: FrameWindows,
    options: Options,
) -> None:
    """Continue a video to any length, at the frame rate of the model's videos."""
    from fastvdm.diffusion.extend import extend as run_extend

    check_positive(num_frames=num_frames, given=given)
    run = Run(model, [output], options, windows)
    frameskip, data_fps = run.settings.frameskip, run.settings.data_fps
    clip = run.read(video, run.side, given, frameskip, data_fps)
    rate = run.output_rate(output, (data_fps or run.rate(video)) / frameskip)
    result = run_extend(run.unet, clip, num_frames, **run.options)
    run.write(output, result[0], rate)


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
    """Raise the frame rate: keep every frame of the input, generate those between."""
    from fastvdm.diffusion.extend import interpolate_frames

    check_positive(factor=factor)
    run = Run(model, [output], options, windows)
    clip = run.read(video, run.side)
    rate = run.output_rate(output, run.rate(video) * factor)
    result = interpolate_frames(run.unet, clip, factor, **run.options)
    run.write(output, result[0], rate)


@app.command()
@with_options
def upscale(
    model: Model,
    video: In,
    output: Out,
    *,
    low_size: Annotated[
        int | None, typer.Option(help="Resize and crop the input to this size first.")
    ] = None,
    frameskip: Annotated[
        int,
        typer.Option(help="Input frame i becomes frame frameskip * i, which raises the rate too."),
    ] = 1,
    windows: LowResWindows,
    options: Options,
) -> None:
    """Generate a larger version of a video (Eq. 8) with a model of that size."""
    from fastvdm.diffusion.extend import upscale as run_upscale

    check_positive(low_size=low_size, frameskip=frameskip)
    run = Run(model, [output], options, windows)
    clip = run.read(video, low_size)
    rate = run.output_rate(output, run.rate(video) * frameskip)
    result = run_upscale(run.unet, clip, run.side, frameskip=frameskip, **run.options)
    run.write(output, result[0], rate)


@app.command()
@with_options
def export(
    model: Model,
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Package to write, .pt2.")],
    batch: Annotated[int, typer.Option(help="Videos per call.")] = 1,
    frames: Annotated[
        int | None, typer.Option(show_default="the model's", help="Frames per video.")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance in the package, 1 + w.")
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="auto|reference|cpu|triton", help="Kernels to compile in.")
    ] = "auto",
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

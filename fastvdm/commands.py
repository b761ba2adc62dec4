"""The commands that need typer. Each reads, checks everything, computes, then writes atomically."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastvdm import video as files
from fastvdm.bundle import Bundle

app = typer.Typer(
    help="Video diffusion with factorized space-time 3D U-Nets. Also: fastvdm info.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[
    str, typer.Argument(help="A training output, a checkpoint, a peer .pt file or a hub name.")
]
In = Annotated[Path, typer.Argument(metavar="VIDEO", help="The input video.")]
Out = Annotated[Path, typer.Argument(metavar="OUTPUT", help=".mp4, .webm or .gif")]
Caption = Annotated[list[str] | None, typer.Option(help="Once for all videos, or once for each.")]
Scale = Annotated[float, typer.Option(help="Classifier-free guidance, 1 + w; 1 is none.")]
Steps = Annotated[int | None, typer.Option(help="Sampling steps; the model's own by default.")]
Sampler = Annotated[
    str | None, typer.Option(help="ancestral, ddim or langevin; the model's own by default.")
]
Gamma = Annotated[float | None, typer.Option(help="Variance of the ancestral sampler, 0 to 1.")]
Eta = Annotated[float, typer.Option(help="Noise of DDIM, 0 to 1.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same video.")]
Weights = Annotated[str, typer.Option(help="ema or raw.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Record a step and replay it; CUDA only.")
]
Fps = Annotated[float | None, typer.Option(help="Frames per second of the output.")]
Size = Annotated[int | None, typer.Option(help="Height and width; the model's own by default.")]
Window = Annotated[
    int | None, typer.Option(help="Frames of one network call; those it was trained on.")
]
Overlap = Annotated[int, typer.Option(help="Frames that a window shares with the one before.")]
Method = Annotated[str, typer.Option(help="reconstruction (Eq. 7) or replacement.")]
WeightR = Annotated[
    float | None, typer.Option(help="w_r of reconstruction guidance; the model's own or 1.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Prediction = Annotated[str | None, typer.Option(help="eps, v or x, for a model that does not say.")]


class _Run:
    """A model ready to sample, with the options that all sampling commands share."""

    def __init__(
        self,
        model: str,
        output: Path,
        *,
        overwrite: bool,
        weights: str,
        device: str,
        prediction: str | None,
        sampler: str | None,
        gamma: float | None,
        eta: float,
        steps: int | None,
        caption: list[str] | None,
        scale: float,
        batch: int = 1,
        cuda_graph: bool = False,
    ) -> None:
        from fastvdm.diffusion import DDIM, Ancestral, Langevin

        check_output(output, overwrite)
        changes = {} if prediction is None else {"prediction": prediction}
        self.bundle = _load(model, weights, device, **changes)
        settings = self.settings = self.bundle.settings
        sampler = sampler or ("langevin" if settings.langevin else "ancestral")
        if sampler not in ("ancestral", "ddim", "langevin"):
            raise ValueError(f"sampler must be ancestral, ddim or langevin, got {sampler!r}")
        cond = self.bundle.cond(caption, batch)
        self.options: dict[str, Any] = {
            "schedule": self.bundle.schedule,
            "prediction": settings.prediction,
            "sampler": DDIM(eta)
            if sampler == "ddim"
            else Ancestral(settings.gamma if gamma is None else gamma),
            "corrector": Langevin() if sampler == "langevin" else None,
            "num_steps": steps or settings.num_steps,
            "cond": cond,
            "guidance_scale": scale,
            "progress": True,
            "cuda_graph": cuda_graph,
            "device": self.unet.stem.weight.device,
        }

    @property
    def unet(self) -> Any:
        return self.bundle.unet

    def side(self, size: int | None) -> tuple[int, int]:
        return self.settings.image_size if size is None else (size, size)

    def guidance(self, method: str, weight: float | None) -> dict[str, Any]:
        own = self.settings.guidance_weight
        return {"method": method, "guidance_weight": weight if weight is not None else own or 1.0}

    def read(self, path: Path, size: tuple[int, int], frames: int | None = None) -> torch.Tensor:
        """(1, C, F, H, W) in [-1, 1]."""
        clip = files.read_video(path, frames, self.settings.frameskip, size)
        return _channels(clip, self.unet.channels)[None] * 2 - 1


def _channels(clip: torch.Tensor, channels: int) -> torch.Tensor:
    if channels == 1:
        return clip.mean(0, keepdim=True)
    if channels != clip.shape[0]:
        raise ValueError(f"videos have 3 channels, the model has {channels}")
    return clip


def _load(model: str, weights: str, device: str, **changes: Any) -> Bundle:
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights must be ema or raw, got {weights!r}")
    place = _device(device)
    return Bundle.load(model, ema=weights == "ema", **changes).to(place)


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


def check_output(path: Path, overwrite: bool) -> None:
    """Before anything is computed: a name that can be written, and nothing in its place."""
    _check_free(path, (".mp4", ".webm", ".gif"), overwrite)


def _check_free(path: Path, suffixes: tuple[str, ...], overwrite: bool) -> None:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"the output must end in {', '.join(suffixes)}, got {path.name!r}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; --overwrite replaces it")


def _write(path: Path, video: torch.Tensor, fps: float) -> None:
    """(C, F, H, W) in [-1, 1]."""
    files.write_video(path, (video + 1) / 2, fps)
    typer.echo(f"{path}: {video.shape[1]} frames of {video.shape[2]} x {video.shape[3]}")


@app.command()
def sample(
    model: Model,
    output: Out,
    num: Annotated[int, typer.Option(help="Videos; more than one become output-0, -1 ...")] = 1,
    batch_size: Annotated[int, typer.Option(help="Videos drawn at a time.")] = 4,
    caption: Caption = None,
    guidance_scale: Scale = 1.0,
    frames: Annotated[int | None, typer.Option(help="Frames; the model's own.")] = None,
    size: Size = None,
    steps: Steps = None,
    sampler: Sampler = None,
    gamma: Gamma = None,
    eta: Eta = 0.0,
    seed: Seed = 0,
    fps: Fps = None,
    weights: Weights = "ema",
    prediction: Prediction = None,
    device: Device = "auto",
    cuda_graph: CudaGraph = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw videos."""
    from fastvdm import diffusion

    if num < 1 or batch_size < 1:
        raise ValueError(f"num and batch-size must be at least 1, got {num} and {batch_size}")
    names = [output] if num == 1 else [_numbered(output, i, num) for i in range(num)]
    for name in names:
        check_output(name, overwrite)
    run = _Run(
        model, output, overwrite=overwrite or num > 1, weights=weights, device=device,
        prediction=prediction, sampler=sampler, gamma=gamma, eta=eta, steps=steps, caption=caption,
        scale=guidance_scale, batch=num, cuda_graph=cuda_graph,
    )  # fmt: skip
    cond = run.options.pop("cond")
    shape = (run.unet.channels, frames or run.settings.num_frames, *run.side(size))
    for first in range(0, num, batch_size):
        part = range(first, min(first + batch_size, num))
        videos = diffusion.sample(
            run.unet,
            (len(part), *shape),
            cond=None if cond is None else cond[first : first + len(part)],
            seed=[seed + i for i in part],  # a video does not depend on the batch size
            **run.options,
        )
        for i, clip in zip(part, videos):
            _write(names[i], clip, fps or run.settings.fps)


def _numbered(path: Path, i: int, count: int) -> Path:
    return path.with_name(f"{path.stem}-{i:0{len(str(count - 1))}d}{path.suffix}")


@app.command()
def extend(
    model: Model,
    video: In,
    output: Out,
    num_frames: Annotated[int, typer.Option(help="Frames of the result, input included.")],
    given: Annotated[
        int | None, typer.Option(help="Use only the first so many frames of the input.")
    ] = None,
    overlap: Overlap = 1,
    window: Window = None,
    method: Method = "reconstruction",
    guidance_weight: WeightR = None,
    caption: Caption = None,
    guidance_scale: Scale = 1.0,
    size: Size = None,
    steps: Steps = None,
    sampler: Sampler = None,
    gamma: Gamma = None,
    eta: Eta = 0.0,
    seed: Seed = 0,
    fps: Fps = None,
    weights: Weights = "ema",
    prediction: Prediction = None,
    device: Device = "auto",
    cuda_graph: CudaGraph = False,
    overwrite: Overwrite = False,
) -> None:
    """Continue a video, block by block, to any length."""
    from fastvdm.diffusion.extend import extend as run_extend

    run = _Run(
        model, output, overwrite=overwrite, weights=weights, device=device, prediction=prediction,
        sampler=sampler, gamma=gamma, eta=eta, steps=steps, caption=caption, scale=guidance_scale,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    clip = run.read(video, run.side(size), given)
    result = run_extend(
        run.unet,
        clip,
        num_frames,
        window=window or run.settings.num_frames,
        overlap=overlap,
        seed=seed,
        **run.guidance(method, guidance_weight),
        **run.options,
    )
    _write(output, result[0], fps or files.video_fps(video) / run.settings.frameskip)


@app.command()
def interpolate(
    model: Model,
    video: In,
    output: Out,
    factor: Annotated[int, typer.Option(help="New frames for each input frame.")] = 2,
    overlap: Overlap = 1,
    window: Window = None,
    method: Method = "reconstruction",
    guidance_weight: WeightR = None,
    caption: Caption = None,
    guidance_scale: Scale = 1.0,
    size: Size = None,
    steps: Steps = None,
    sampler: Sampler = None,
    gamma: Gamma = None,
    eta: Eta = 0.0,
    seed: Seed = 0,
    fps: Fps = None,
    weights: Weights = "ema",
    prediction: Prediction = None,
    device: Device = "auto",
    cuda_graph: CudaGraph = False,
    overwrite: Overwrite = False,
) -> None:
    """Raise the frame rate: every frame of the input is kept, those between are drawn."""
    from fastvdm.diffusion.extend import interpolate_frames

    run = _Run(
        model, output, overwrite=overwrite, weights=weights, device=device, prediction=prediction,
        sampler=sampler, gamma=gamma, eta=eta, steps=steps, caption=caption, scale=guidance_scale,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    clip = _channels(files.read_video(video, size=run.side(size)), run.unet.channels)[None]
    result = interpolate_frames(
        run.unet,
        clip * 2 - 1,
        factor,
        window=window or run.settings.num_frames,
        overlap=overlap,
        seed=seed,
        **run.guidance(method, guidance_weight),
        **run.options,
    )
    _write(output, result[0], fps or files.video_fps(video) * factor)


@app.command()
def upscale(
    model: Model,
    video: In,
    output: Out,
    low_size: Annotated[
        int | None, typer.Option(help="Resize and crop the input to this side first.")
    ] = None,
    frameskip: Annotated[
        int, typer.Option(help="Input frame i becomes frame frameskip * i: raises the rate too.")
    ] = 1,
    downsample: Annotated[str, typer.Option(help="average or bilinear: D of Eq. 8.")] = "average",
    overlap: Overlap = 1,
    window: Window = None,
    guidance_weight: WeightR = None,
    caption: Caption = None,
    guidance_scale: Scale = 1.0,
    size: Size = None,
    steps: Steps = None,
    sampler: Sampler = None,
    gamma: Gamma = None,
    eta: Eta = 0.0,
    seed: Seed = 0,
    fps: Fps = None,
    weights: Weights = "ema",
    prediction: Prediction = None,
    device: Device = "auto",
    cuda_graph: CudaGraph = False,
    overwrite: Overwrite = False,
) -> None:
    """Draw a larger version of a video (Eq. 8) with a model of the larger size."""
    from fastvdm.diffusion.extend import upscale as run_upscale

    run = _Run(
        model, output, overwrite=overwrite, weights=weights, device=device, prediction=prediction,
        sampler=sampler, gamma=gamma, eta=eta, steps=steps, caption=caption, scale=guidance_scale,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    clip = _channels(files.read_video(video, size=low_size), run.unet.channels)[None]
    weight = run.guidance("reconstruction", guidance_weight)["guidance_weight"]
    result = run_upscale(
        run.unet,
        clip * 2 - 1,
        run.side(size),
        window=window or run.settings.num_frames,
        overlap=overlap,
        frameskip=frameskip,
        seed=seed,
        downsample=downsample,
        guidance_weight=weight,
        **run.options,
    )
    _write(output, result[0], fps or files.video_fps(video) * frameskip)


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
    training = importlib.import_module("fastvdm.training")
    from fastvdm.train_config import TrainConfig

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
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The package, .pt2.")],
    batch: Annotated[int, typer.Option(help="Videos of one call.")] = 1,
    frames: Annotated[int | None, typer.Option(help="Frames; the model's own.")] = None,
    size: Size = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Classifier-free guidance inside the package, 1 + w.")
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, reference, cpu or triton.")] = "auto",
    weights: Weights = "ema",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Compile the network ahead of time (torch.export, AOTInductor) for one size of input."""
    from fastvdm import export as exporting

    _check_free(output, (".pt2",), overwrite)
    loaded = _load(model, weights, device)
    height, width = loaded.settings.image_size if size is None else (size, size)
    count = frames or loaded.settings.num_frames
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

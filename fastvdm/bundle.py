"""A trained model on disk: the network, its text conditioning, and how it has to be sampled."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvdm.diffusion.prediction import check_prediction
from fastvdm.diffusion.schedule import CosineSchedule, DiscreteSchedule
from fastvdm.unet import UNet3D
from fastvdm.unet import checkpoint as files

SCHEDULES = ("cosine", "discrete")


@dataclass(frozen=True)
class Settings:
    """What sampling must know of the training, and the sampling defaults of the model.

    num_frames, image_size (H, W), frameskip and fps describe the clips it was trained on.
    schedule "cosine" is the paper's in log-SNR, "discrete" the peer's with ``timesteps`` steps.
    num_steps, gamma, langevin and guidance_weight (w_r) are defaults for sampling (Appendix A has
    them for the paper's models).
    """

    num_frames: int = 16
    image_size: tuple[int, int] = (64, 64)
    frameskip: int = 1
    fps: float = 8.0
    prediction: str = "eps"
    schedule: str = "cosine"
    timesteps: int = 1000
    text_encoder: str | None = None
    text_pooling: str = "attention"
    text_max_length: int = 128
    num_steps: int | None = None
    gamma: float = 0.0
    langevin: bool = False
    guidance_weight: float | None = None

    def __post_init__(self) -> None:
        check_prediction(self.prediction)
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}"
            )

    def make_schedule(self, time_input: str) -> CosineSchedule | DiscreteSchedule:
        """The schedule, giving the network the time it takes ("logsnr" or "index")."""
        if self.schedule == "discrete":
            return DiscreteSchedule(self.timesteps, time_input=time_input)
        return CosineSchedule(time_input=time_input)


class Bundle:
    """A network, its settings, and the text conditioner if it has one."""

    def __init__(self, unet: Any, settings: Settings, text: Any = None) -> None:
        self.unet, self.settings, self.text = unet, settings, text

    @property
    def schedule(self) -> CosineSchedule | DiscreteSchedule:
        return self.settings.make_schedule(self.unet.time_input)

    def to(self, device: str | torch.device) -> Bundle:
        self.unet.to(device)
        if self.text is not None:
            self.text.to(device)
        return self

    def cond(self, captions: list[str] | None, batch: int) -> Tensor | None:
        """The conditioning (batch, cond_dim) of captions: one for all, or one for each.

        Raises:
            ValueError: captions for an unconditional model, none for a conditional one, or a number
                of them that is neither 1 nor ``batch``.
        """
        if self.text is None:
            if captions:
                raise ValueError("captions were given, but this model has no text conditioning")
            return None
        if not captions:
            raise ValueError("this model is conditioned on text: give a caption")
        if len(captions) not in (1, batch):
            raise ValueError(f"expected 1 or {batch} captions, got {len(captions)}")
        with torch.no_grad():
            return self.text.eval()(captions).expand(batch, -1)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """config.json, model.safetensors (``UNet3D.from_pretrained`` reads these two),
        settings.json, and text.safetensors where there is one."""
        from safetensors.torch import save_file

        directory = Path(directory)
        self.unet.save_pretrained(directory)
        (directory / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2))
        if self.text is not None and self.text.state_dict():
            save_file(_contiguous(self.text), directory / "text.safetensors")

    def load_weights(self, directory: Path) -> None:
        """Load the weights that ``save`` wrote into this model's own modules."""
        from safetensors.torch import load_file

        self.unet.load_state_dict(load_file(directory / "model.safetensors"))
        if self.text is not None and self.text.state_dict():
            self.text.load_state_dict(load_file(directory / "text.safetensors"))

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, ema: bool = True, **overrides: Any) -> Bundle:
        """Read a model.

        Args:
            source: the output folder of a training run (its latest checkpoint), one of its
                checkpoints, a folder written by ``save``, a ``Trainer`` or ``GaussianDiffusion``
                file (.pt) of video-diffusion-pytorch, or a name on the Hugging Face hub.
            ema: the averaged weights, where there is a choice.
            overrides: fields of ``Settings`` to replace.
        Raises:
            FileNotFoundError: nothing is there. ValueError: it is no readable model.
        """
        path = Path(source)
        if path.is_file():
            return _load_peer(path, ema, overrides)
        if not path.is_dir() and str(source).count("/") == 1 and not path.is_absolute():
            path = _from_hub(str(source))
        path = _model_folder(path, ema)
        try:
            unet = UNet3D(**json.loads((path / "config.json").read_text()))
            settings = _read_settings(path, overrides)
            text = make_text(settings, unet.cond_dim) if settings.text_encoder else None
            bundle = cls(unet.eval(), settings, text)
            bundle.load_weights(path)
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the model in {path}: {error}") from error
        return bundle


def _contiguous(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}


def checkpoints(output: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a training run, oldest first."""
    return sorted(p for p in Path(output).glob("checkpoints/step-*") if p.is_dir())


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:  # a mistyped local path ends here too
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no model at {name}, and none on the hub: {reason}") from error


def _model_folder(path: Path, ema: bool) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"no model at {path}")
    runs = checkpoints(path)
    path = runs[-1] if runs else path
    for inner in ("ema", "model") if ema else ("model", "ema"):
        if (path / inner / "config.json").is_file():
            return path / inner
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has neither a checkpoint nor a config.json")
    return path


def _read_settings(path: Path, overrides: dict[str, Any]) -> Settings:
    file = path / "settings.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    known = {f.name for f in fields(Settings)}
    unknown = sorted((stored.keys() | overrides.keys()) - known)
    if unknown:
        raise ValueError(f"{file}: unknown settings {', '.join(unknown)}")
    stored |= overrides
    if "image_size" in stored:
        stored["image_size"] = tuple(stored["image_size"])
    return Settings(**stored)


def make_text(settings: Settings, cond_dim: int | None) -> Any:
    """The ``TextConditioner`` of the settings, with new weights."""
    from fastvdm.text import TextConditioner, TextEncoder

    encoder = TextEncoder(str(settings.text_encoder), max_length=settings.text_max_length)
    return TextConditioner(encoder, cond_dim, pooling=settings.text_pooling)


def _load_peer(path: Path, ema: bool, overrides: dict[str, Any]) -> Bundle:
    try:
        state = files.read_source(path)
    except ValueError as error:  # torch's own message is a page long
        raise ValueError(str(error).splitlines()[0]) from error
    ema = ema and "ema" in state
    unet = UNet3D.from_unet3d(state, ema=ema, exact=True)
    entry = state["ema" if ema else "model"] if "model" in state else state
    steps = len(entry["betas"]) if "betas" in entry else 1000
    settings = {"schedule": "discrete", "timesteps": steps, **overrides}
    return Bundle(unet.eval(), _read_settings(path.parent / ".none", settings))


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that becomes ``target`` when the block ends without an error.

    Its files are on disk before it gets its name, so that a power failure leaves a whole folder or
    none. Folders left behind by a killed process are removed by ``remove_unfinished``.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(temporary, 0o755)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_unfinished(parent: Path) -> None:
    for folder in parent.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)

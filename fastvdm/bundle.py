"""A trained model on disk: the network, its text conditioning, and how to sample it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvdm.diffusion.defaults import make_schedule
from fastvdm.diffusion.schedule import CosineSchedule, DiscreteSchedule
from fastvdm.unet import UNet3D
from fastvdm.unet import checkpoint as files
from fastvdm.unet.config import BERT_DIM
from fastvdm.unet.folder import (
    checkpoints,
    find_folder,
    read_config,
    read_settings,
    stored_arguments,
)
from fastvdm.unet.settings import Settings, settings_of

__all__ = ["Bundle", "Settings", "atomic_directory", "checkpoints", "make_text"]


class Bundle:
    """A network, its settings, and its text conditioner if it has one.

    Args:
        unet: the network.
        settings: how to sample it.
        text: a ``TextConditioner``, or None.
    """

    def __init__(self, unet: Any, settings: Settings, text: Any = None) -> None:
        self.unet, self.settings, self.text = unet, settings, text
        make_schedule(settings, unet.time_input)  # raises if the two do not fit
        # The network does not own the text conditioner: saved alone, it takes vectors.
        kept = {k: v for k, v in asdict(settings).items() if not k.startswith("text_")}
        unet.settings = kept

    @property
    def schedule(self) -> CosineSchedule | DiscreteSchedule:
        return make_schedule(self.settings, self.unet.time_input)

    def to(self, device: str | torch.device) -> Bundle:
        """Move the network and the text encoder to ``device``; return the bundle."""
        self.unet.to(device)
        if torch.device(device).type == "cuda":  # otherwise cuDNN converts the layout at every call
            self.unet.to(memory_format=torch.channels_last)
        if self.text is not None:
            self.text.to(device)
        return self

    def cond(
        self,
        captions: list[str] | None,
        batch: int,
        vectors: Tensor | None = None,
        labels: list[str] | None = None,
    ) -> Tensor | None:
        """The conditioning (batch, cond_dim) of a network.

        A network of video-diffusion-pytorch of width 768 takes captions as that package does: the
        mean of the token states of bert-base-cased.

        Args:
            captions: one caption for all videos, or one per video.
            batch: number of videos.
            vectors: (cond_dim,), (1, cond_dim) or (batch, cond_dim), instead of captions.
            labels: names of classes, one for all videos or one per video, instead of captions.

        Raises:
            ValueError: the model is unconditional and something is given; it is conditional and
                none or several are given; a number or width does not fit; or there is no encoder
                for captions.
        """
        dim = self.unet.cond_dim
        words = {"captions": captions, "labels": labels, "a vector": vectors}
        given = [name for name, value in words.items() if value is not None]
        if dim is None:
            if given:
                raise ValueError(f"{given[0]} given, but this model has no conditioning")
            return None
        if len(given) > 1:
            raise ValueError(f"give captions, labels or a vector (cond), not {' and '.join(given)}")
        classes = self.settings.classes
        if classes is not None and vectors is None:
            return self._one_hot(labels, classes, batch)
        if labels is not None:
            raise ValueError("labels were given, but this model names no classes")
        if vectors is not None:
            rows = vectors[None] if vectors.ndim == 1 else vectors
            if rows.ndim != 2 or rows.shape[1] != dim or len(rows) not in (1, batch):
                raise ValueError(
                    f"cond must be ({dim},) or ({batch}, {dim}), got {tuple(vectors.shape)}"
                )
            if not rows.isfinite().all():
                raise ValueError("cond has NaN or infinite values")
            return rows.to(self.unet.stem.weight).expand(batch, -1)
        mean = self.settings.text_pooling == "mean"  # mean pooling has no weights to be missing
        if self.text is None and captions and dim == BERT_DIM and mean:
            self.text = _peer_text(self.settings).to(self.unet.stem.weight.device)
        if self.text is None:
            raise ValueError(
                f"this model is conditioned on {dim} numbers: give them (--cond FILE), or a "
                "caption and the text encoder that it was trained with (--text-encoder)"
            )
        if not captions:
            raise ValueError("this model is conditioned on text: give a caption")
        if len(captions) not in (1, batch):
            raise ValueError(f"expected 1 or {batch} captions, got {len(captions)}")
        with torch.no_grad():
            return self.text.eval()(captions).expand(batch, -1)

    def _one_hot(self, labels: list[str] | None, classes: tuple[str, ...], batch: int) -> Tensor:
        some = ", ".join(classes[:8]) + (" ..." if len(classes) > 8 else "")
        if not labels:
            raise ValueError(f"this model is conditioned on a class: give a label of {some}")
        unknown = [label for label in labels if label not in classes]
        if unknown:
            raise ValueError(f"no class {unknown[0]!r}: the model has {some}")
        if len(labels) not in (1, batch):
            raise ValueError(f"expected 1 or {batch} labels, got {len(labels)}")
        numbers = torch.tensor([classes.index(label) for label in labels])
        rows = torch.nn.functional.one_hot(numbers, len(classes))
        return rows.to(self.unet.stem.weight).expand(batch, -1)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write a folder: config.json and model.safetensors (``UNet3D.from_pretrained`` reads these
        two), settings.json, and text.safetensors if there is a text conditioner."""
        directory = Path(directory)
        self.unet.save_pretrained(directory)
        (directory / "settings.json").write_text(json.dumps(asdict(self.settings), indent=2))
        if self.text is not None and self.text.state_dict():
            files.save_tensors(self.text.state_dict(), directory / "text.safetensors")

    def load_weights(self, directory: Path) -> None:
        """Load weights that ``save`` wrote into the modules of this model."""
        self.unet.load_state_dict(files.read_source(directory / "model.safetensors"))
        _load_text(self.text, directory)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        ema: bool = True,
        prefix: str | None = None,
        network: Mapping[str, Any] | None = None,
        allow_download: bool = False,
        **overrides: Any,
    ) -> Bundle:
        """Read a model.

        Args:
            source: the output folder of a training run (its latest checkpoint), one of its
                checkpoints, a folder written by ``save`` or ``save_pretrained`` (or the weights in
                it), a file of video-diffusion-pytorch in any wrapper (``UNet3D.from_unet3d``), or a
                name on the Hugging Face hub.
            ema: take the averaged weights if there are both.
            prefix: which network of a file that contains several.
            network: constructor arguments that the weights in a file do not show, e.g.
                ``{"resnet_groups": 4}``.
            allow_download: download the text encoder that the model names if it is not on this
                machine. One that the caller names, ``text_encoder=...``, is always downloaded.
            overrides: fields of ``Settings`` to replace. If the model does not say, the schedule is
                "discrete" for a network that takes step indices and "cosine" for the log-SNR.

        Raises:
            FileNotFoundError: there is nothing under that name.
            ValueError: it cannot be read as a model.
        """
        path, state = Path(source), None
        fetch = allow_download or "text_encoder" in overrides
        if path.is_file():
            state = files.read_source(path)
        elif prefix is not None:
            raise ValueError(f"prefix chooses among the networks of a file, {source} is none")
        else:
            path = find_folder(source, ema=ema)
        try:
            if state is None:
                bundle, told = _read_folder(path, None, overrides, fetch), True
            else:
                found = files.find_network(state, ema=None if ema else False, prefix=prefix)
                told = stored_arguments(path, found) is not None
                bundle = (
                    _read_folder(path.parent, found.state, overrides, fetch)
                    if told
                    else _of_peer(state, found, ema, dict(network or {}), overrides)
                )
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"cannot read the model in {path}: {error}") from error
        if network and told:
            raise ValueError(f"{path}: config.json says {', '.join(network)}, not the caller")
        return bundle


def _read_folder(
    folder: Path, weights: Mapping[str, Any] | None, overrides: dict[str, Any], fetch: bool
) -> Bundle:
    """Read a folder of ``Bundle.save`` or ``save_pretrained``, or use other ``weights`` with it."""
    unet = UNet3D(**read_config(folder))
    settings = settings_of(read_settings(folder) | overrides)
    text = make_text(settings, unet.cond_dim, fetch=fetch) if settings.text_encoder else None
    weights = files.read_source(folder / "model.safetensors") if weights is None else weights
    unet.load_state_dict(weights)
    _load_text(text, folder)
    return Bundle(unet.eval(), settings, text)


def _load_text(text: Any, folder: Path) -> None:
    if text is not None and text.state_dict():
        text.load_state_dict(files.read_source(folder / "text.safetensors"))


def _of_peer(
    state: Mapping[str, Any],
    found: files.Network,
    ema: bool,
    network: dict[str, Any],
    overrides: dict[str, Any],
) -> Bundle:
    unet = UNet3D.from_unet3d(
        state, ema=None if ema else False, prefix=found.path, exact=True, **network
    )
    stored: dict[str, Any] = {"text_pooling": "mean", "text_max_length": 512}
    betas = found.beside("betas")
    if isinstance(betas, Tensor):
        steps = stored["timesteps"] = len(betas)
        if overrides.get("timesteps", steps) != steps:
            raise ValueError(f"it was trained with {steps} timesteps")
        if not torch.equal(DiscreteSchedule(steps).betas.to(betas), betas):
            stored["betas"] = betas.tolist()
    settings = settings_of(stored | overrides)
    text = make_text(settings, unet.cond_dim) if settings.text_encoder else None
    return Bundle(unet.eval(), settings, text)


def make_text(settings: Settings, cond_dim: int | None, *, fetch: bool = True) -> Any:
    """Make the ``TextConditioner`` of the settings, with new weights.

    Args:
        settings: name the encoder, its length and its pooling.
        cond_dim: features of the conditioning vector; None: those of the encoder.
        fetch: allow a download; else the encoder must be in a folder or in this machine's cache.

    Raises:
        ValueError: the encoder cannot be loaded, or only by downloading it.
    """
    from fastvdm.text import TextConditioner, TextEncoder

    name = str(settings.text_encoder)
    place: dict[str, Any] = {} if fetch else {"local_files_only": True}
    try:
        encoder = TextEncoder(name, max_length=settings.text_max_length, **place)
    except ValueError as error:
        if fetch:
            raise
        raise ValueError(
            f"the model wants the text encoder {name!r}, which is not on this machine, and nothing "
            "is fetched because a model says so: allow_download=True (--allow-download) allows it, "
            f"text_encoder (--text-encoder) names another. {error}"
        ) from error
    return TextConditioner(encoder, cond_dim, pooling=settings.text_pooling)


def _peer_text(settings: Settings) -> Any:
    """The text conditioning of video-diffusion-pytorch, which has no weights of its own."""
    name = "bert-base-cased"
    warnings.warn(
        f"captions go through {name}, as in video-diffusion-pytorch; text_encoder names another",
        stacklevel=3,
    )
    try:
        return make_text(replace(settings, text_encoder=name), BERT_DIM)
    except ValueError as error:
        raise ValueError(
            f"{name}, which makes captions {BERT_DIM} numbers, is not at hand: name a folder that "
            f"has it (--text-encoder), or give the numbers (--cond FILE): {error}"
        ) from error


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A new folder beside ``target`` that becomes ``target`` if the block ends without an error.

    Its files are on disk before it is renamed, so a power failure leaves a complete folder or none.
    ``remove_unfinished`` removes folders left by a killed process.
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

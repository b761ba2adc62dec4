"""Folders with a model, as ``save_pretrained`` and training write them, and names on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin

from fastvdm.unet import checkpoint as files
from fastvdm.unet.card import MARK, OUTPUT
from fastvdm.unet.config import SETTABLE
from fastvdm.unet.peer import warn_caller
from fastvdm.unet.settings import Settings, settings_of

if TYPE_CHECKING:
    from typing_extensions import Self

# The files of a model. A checkpoint of a training run has two such folders.
_FILES = ("config.json", "settings.json", "model.safetensors", "text.safetensors")
# A network may lack these although an earlier network in the folder had them.
LEFT = ("settings.json", "text.safetensors")
_PLACES = ("", "ema/", "model/", "checkpoints/step-*/ema/", "checkpoints/step-*/model/")


def checkpoints(output: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a training run, oldest first."""
    found = Path(output).glob("checkpoints/step-*")
    steps = {p: p.name.removeprefix("step-") for p in found if p.is_dir()}
    return sorted((p for p in steps if steps[p].isdigit()), key=lambda p: int(steps[p]))


def find_folder(source: str | os.PathLike[str], *, ema: bool, **download: Any) -> Path:
    """Find the folder that has config.json and model.safetensors of a model.

    Args:
        source: such a folder, the output folder of a training run (its latest checkpoint), one of
            its checkpoints, or a name on the hub.
        ema: take the averaged weights if a checkpoint has both.
        download: options of ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: there is no such folder or name, or it has no model.
    """
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{path} is a file: UNet3D.from_unet3d and Bundle.load read files")
    if not path.is_dir():
        path = _from_hub(str(source), download)
    runs = checkpoints(path)
    path = runs[-1] if runs else path
    for inner in ("ema", "model") if ema else ("model", "ema"):
        if (path / inner / "config.json").is_file():
            return path / inner
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"{path} has neither a checkpoint nor a config.json")
    return path


def _from_hub(name: str, download: dict[str, Any]) -> Path:
    if name.count("/") != 1 or name.startswith(("/", ".", "~")) or name.endswith("/"):
        raise FileNotFoundError(f"no model at {name}")
    from huggingface_hub import snapshot_download

    patterns = [place + file for place in _PLACES for file in _FILES]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **download))
    except (OSError, ValueError) as error:  # also a mistyped local path
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"no model at {name}, and none on the hub: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file is anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return json_object(str(path), text)


def json_object(name: str, text: str) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError, with ``name``, if the text is anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The constructor arguments in config.json.

    Raises:
        ValueError: the file is no JSON object, or it is the config.json of something else.
    """
    config = read_json(folder / "config.json")
    if "save_every" in config:  # fields of TrainConfig
        raise ValueError(f"{folder} is a training run that has no checkpoint yet")
    if not _is_network(config):
        raise ValueError(f"{folder / 'config.json'} does not hold the arguments of a UNet3D")
    return config


def _is_network(config: Mapping[str, Any]) -> bool:
    return "dim" in config


def read_settings(folder: Path) -> dict[str, Any]:
    """The fields of ``Settings`` in settings.json; empty if there is no such file."""
    file = folder / "settings.json"
    stored = read_json(file) if file.is_file() else {}
    stored.pop("guidance_weight", None)  # w_r is an argument of a call, never a setting
    return stored


def arguments_of(network: Any) -> dict[str, Any]:
    """The current constructor arguments of a UNet3D; some of them may have been set on it."""
    return network._hub_mixin_config | {name: getattr(network, name) for name in SETTABLE}


def stored_arguments(source: Any, network: files.Network) -> dict[str, Any] | None:
    """The constructor arguments in the config.json next to the weights of a UNet3D, or None."""
    if not network.is_own or isinstance(source, Mapping):
        return None
    file = Path(source).parent / "config.json"
    config = read_json(file) if file.is_file() else {}
    return config if _is_network(config) else None


def check_assumed(
    network: files.Network, arguments: Mapping[str, Any], given: Mapping[str, Any]
) -> None:
    """Check the arguments that the weights of a UNet3D do not show and the caller did not pass.
    One without a usual value is an error, one with a usual value a warning.

    Raises:
        ValueError: it is unknown which time the network takes.
    """
    if "time_input" not in given and network.beside("betas") is None:
        raise ValueError(
            "weights of a UNet3D do not say whether it takes the step index or the log-SNR, and "
            "there is no config.json of it beside them: pass time_input, or build the network and "
            "use load_state_dict"
        )
    if arguments["norm"] == "group" and not {"resnet_groups", "stem_skip"} <= given.keys():
        warn_caller(
            "GroupNorm with 8 groups is assumed, and stem_skip='after': weights do not tell; pass "
            "resnet_groups and stem_skip to choose, and norm_per_frame, norm_eps, position and "
            "causal if they were no defaults"
        )
    if arguments["norm"] == "rms" and "causal" not in given:
        warn_caller("causal=False is assumed: weights do not tell; pass causal to choose")


class Pretrained(PyTorchModelHubMixin):
    """``save_pretrained``, ``push_to_hub`` and ``from_pretrained``, which also reads training runs.

    Unlike the mixin of huggingface_hub it refuses unknown fields in config.json and weights that do
    not fit.
    """

    _settings: dict[str, Any] = {}

    @property
    def settings(self) -> Mapping[str, Any]:
        """How to sample the network: fields of ``fastvdm.unet.Settings``.

        They came with the weights or were set, with ``model.settings = Settings(prediction="v",
        num_frames=8)`` or a mapping of some fields. ``save_pretrained`` and ``push_to_hub`` store
        them, except those of a text conditioner, which is not part of the network.

        Raises:
            ValueError: when set: ``Settings`` has no such field, or a value is out of range.
            TypeError: when set: a value has the wrong type.
        """
        return MappingProxyType(self._settings)

    @settings.setter
    def settings(self, told: Settings | Mapping[str, Any]) -> None:
        if not isinstance(told, Settings | Mapping):
            raise TypeError(f"settings must be Settings or a mapping, got {type(told).__name__}")
        given = asdict(told) if isinstance(told, Settings) else dict(told)
        settings_of(given)
        self._settings = {k: v for k, v in given.items() if not k.startswith("text_")}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        ema: bool = True,
        strict: bool = True,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **overrides: Any,
    ) -> Self:
        """Load a network that ``save_pretrained`` or a training run wrote, in evaluation mode.

        If the folder has a settings.json, its content becomes ``settings``, and
        ``fastvdm.diffusion.sample`` takes its defaults from there. ``fastvdm.bundle.Bundle.load``
        loads the text conditioning too.

        Args:
            pretrained_model_name_or_path: a folder with config.json and model.safetensors, the
                output folder of a training run (its latest checkpoint), one of its checkpoints, or
                a name on the hub.
            ema: take the averaged weights if a checkpoint has both.
            strict: as in ``load_state_dict``.
            map_location: device of the weights.
            revision: revision on the hub.
            token: token for the hub.
            cache_dir: folder for downloads.
            force_download: download even if the files are cached.
            local_files_only: never download.
            overrides: constructor arguments that replace those of config.json.

        Returns:
            The network.

        Raises:
            FileNotFoundError: there is no such folder or name, or it has no model.
            ValueError: the weights or config.json do not fit.
        """
        folder = find_folder(
            pretrained_model_name_or_path, ema=ema, revision=revision, token=token,
            cache_dir=cache_dir, force_download=force_download, local_files_only=local_files_only,
        )  # fmt: skip
        try:
            model: Any = cls(**(read_config(folder) | overrides))
        except TypeError as error:  # a field that this version does not have
            given = f" with {', '.join(overrides)} of the caller" if overrides else ""
            raise ValueError(f"{folder / 'config.json'}{given}: {error}") from error
        model.load_state_dict(files.read_source(folder / "model.safetensors"), strict=strict)
        model.settings = read_settings(folder)
        return model.to(map_location).eval()

    def _save_pretrained(self: Any, save_directory: Path) -> None:
        files.save_weights(self, save_directory)
        self._hub_mixin_config = arguments_of(self)  # the mixin writes it next
        card = save_directory / "README.md"
        own = card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace")
        for name in (*LEFT, *("README.md",) * own):  # left by a network saved here before
            (save_directory / name).unlink(missing_ok=True)
        if self.settings:
            text = json.dumps(dict(self.settings), indent=2)
            (save_directory / "settings.json").write_text(text)

    def push_to_hub(
        self, repo_id: str, *, delete_patterns: list[str] | str | None = None, **options: Any
    ) -> str:
        """Upload the weights, config.json, settings.json and a model card in one commit.

        The commit deletes files of an earlier model that this model does not have.

        Args:
            repo_id: name on the hub, "owner/name".
            delete_patterns: what to delete instead.
            options: options of ``PyTorchModelHubMixin.push_to_hub``.
        """
        delete = list(LEFT) if delete_patterns is None else delete_patterns
        facts = {"repo_id": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(
            repo_id, delete_patterns=delete, model_card_kwargs=facts, **options
        )

    def generate_model_card(self: Any, **facts: Any) -> Any:
        """The model card: how to load and sample this network. ``facts`` go to its template."""
        told, shape, cond = self.settings, "", ""
        if not {"num_frames", "image_size"} <= told.keys():
            shape = f", (1, {self.channels}, num_frames, height, width)"
        if self.cond_dim is not None:
            cond = f", cond=torch.zeros(1, {self.cond_dim})"
        pixels = told.get("value_range", (0, 1)) is not None
        scaled = ", value_range=(0, 1)" if pixels else ""
        return super().generate_model_card(
            call=f"sample(model{shape}{cond}{scaled})", told=dict(told), file=OUTPUT[pixels],
            conditional=bool(cond), fps=told.get("fps", 8), **facts,
        )  # fmt: skip

"""Reading, checking and writing checkpoint files. Nothing here unpickles code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_WRAPPERS = ("denoise_fn.", "module.", "_orig_mod.")


def read_source(
    source: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
) -> Mapping[str, Any]:
    """The state of a module, a mapping as it is, or a .pt / .safetensors file.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read as a checkpoint.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error


def find_unet_state(state: Mapping[str, Any], *, ema: bool = False) -> dict[str, Any]:
    """The network's entries of a bare, a ``GaussianDiffusion`` or a ``Trainer`` state.

    Prefixes that wrappers add (``denoise_fn.``, ``module.``, ``_orig_mod.``) are removed.

    Raises:
        ValueError: ``ema`` is asked for and there is none, or the state is not a mapping.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"a state_dict must be a mapping, got {type(state).__name__}")
    if isinstance(state.get("model"), Mapping):
        if ema and not isinstance(state.get("ema"), Mapping):
            raise ValueError("the checkpoint has no averaged weights ('ema')")
        state = state["ema" if ema else "model"]
    elif ema:
        raise ValueError("only a Trainer checkpoint ({model, ema, ...}) has averaged weights")
    while True:
        inner = next((p for p in _WRAPPERS if any(k.startswith(p) for k in state)), None)
        if inner is None:
            return dict(state)
        # A GaussianDiffusion state also holds schedule buffers, which are not the network's.
        state = {k[len(inner) :]: v for k, v in state.items() if k.startswith(inner)}


def check_state(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Compare every key and shape before anything is copied.

    Raises:
        ValueError: with the first few of each kind of mismatch.
    """
    own = model.state_dict()
    problems = []
    if strict:
        missing = sorted(own.keys() - state.keys())
        extra = sorted(state.keys() - own.keys())
        problems += [f"{len(missing)} missing keys: {', '.join(missing[:4])}"] if missing else []
        problems += [f"{len(extra)} unexpected keys: {', '.join(extra[:4])}"] if extra else []
    wrong = []
    for key in own.keys() & state.keys():
        value = state[key]
        if not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif value.shape != own[key].shape:
            wrong.append(f"{key} has shape {tuple(value.shape)}, needs {tuple(own[key].shape)}")
    problems += sorted(wrong)[:4]
    if problems:
        raise ValueError("the checkpoint does not fit this UNet3D: " + "; ".join(problems))


def save_weights(model: nn.Module, directory: Path) -> None:
    """model.safetensors, written beside its place and renamed into it."""
    from safetensors.torch import save_file

    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
    os.close(handle)
    try:
        save_file(state, temporary, metadata={"format": "pt"})
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / "model.safetensors")
    finally:
        Path(temporary).unlink(missing_ok=True)

"""Read, check and write checkpoint files. Nothing here unpickles code."""

from __future__ import annotations

import os
import pickle
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastvdm.unet.choose import choose, listed, says_averaged
from fastvdm.unet.peer import is_peer_state

OWN_MARKS = ("stem.weight", "time_embedding.mlp.0.weight")  # keys of every UNet3D state_dict


class Network(NamedTuple):
    """The entries of one network in a state, and where they were found."""

    path: str  # e.g. "state_dict.diffusion.denoise_fn"; "" is the state itself
    state: dict[str, Any]  # keys without the prefix
    around: Mapping[str, Any]  # the mapping that contains the entries
    prefix: str  # of the keys in that mapping

    @property
    def is_own(self) -> bool:
        return all(mark in self.state for mark in OWN_MARKS)

    def beside(self, name: str) -> Any:
        """The entry ``name`` of the network or of a module around it, or None."""
        parts = self.prefix.split(".")
        keys = (".".join([*parts[:i], name]) for i in reversed(range(len(parts))))
        return next((self.around[key] for key in keys if key in self.around), None)

    @property
    def is_averaged(self) -> bool:
        """The path says so, or the wrapper is torch.optim.swa_utils.AveragedModel."""
        if self.prefix.endswith("module.") and f"{self.prefix[:-7]}n_averaged" in self.around:
            return True
        return says_averaged(self.path)


def read_source(
    source: nn.Module | Mapping[str, Any] | str | os.PathLike[str],
) -> Mapping[str, Any]:
    """Return the state of a module, a mapping unchanged, or the content of a file.

    The file was written by ``torch.save`` or is safetensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or reading it would run code that it contains.
    """
    if isinstance(source, nn.Module):
        return source.state_dict()
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, not a checkpoint file: use UNet3D.from_pretrained or Bundle.load"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with open(path, "rb") as file:
        head = file.read(9)
    if not head:
        raise ValueError(f"{path} is not a readable checkpoint: it is empty")
    if path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")) or head[8:] == b"{":
        return _read_safetensors(path)
    return _read_torch(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable checkpoint: {_first_line(error)}") from error


def _read_torch(path: Path) -> Any:
    """Errors do not chain torch's: its message advises to unpickle what it has just refused."""
    try:
        with open(path, "rb") as file, torch.serialization.safe_globals(_numbers()):
            # Pass an open file: torch would guess the format from a file name.
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = _objects(path, str(error))
    except Exception as error:
        reason = "a TorchScript archive" if "TorchScript" in str(error) else _first_line(error)
        raise ValueError(f"{path} is not a readable checkpoint: {reason}") from None
    if not names:
        raise ValueError(f"{path} is not a readable checkpoint: neither of torch nor safetensors")
    raise ValueError(
        f"{path} holds Python objects ({', '.join(names)}), and loading them would run code from "
        "the file. Where it was written, save the weights alone: torch.save(model.state_dict(), "
        '"weights.pt")'
    )


def _numbers() -> list[Any]:
    """The types of NumPy numbers, which trainers store e.g. as the best loss. None runs code."""
    scalar = np.float64(0).__reduce__()[0]
    types = {type(np.dtype(c)) for c in np.typecodes["AllFloat"] + np.typecodes["AllInteger"] + "?"}
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]  # NumPy 1 and 2
    return [np.dtype, *types, *((scalar, name) for name in names)]


def _objects(path: Path, message: str) -> list[str]:
    """The names in a pickle other than those of tensors and plain types."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(os.fspath(path))
    except Exception:  # not a zip file: torch's message has the first name
        names = re.findall(r"GLOBAL (\S+)", message)
    return sorted(names)[:4]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0] if lines else type(error).__name__


def _mappings(
    state: Mapping[str, Any], path: str = "", inside: tuple[int, ...] = ()
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (path ending in a dot, mapping) for ``state`` and every mapping inside it."""
    yield path, state
    for key, value in state.items():
        if isinstance(value, Mapping) and id(value) not in inside:
            yield from _mappings(value, f"{path}{key}.", (*inside, id(value)))


def _prefixes(state: Mapping[str, Any], names: Collection[str]) -> list[str]:
    """The prefixes under which a mapping holds a network, found by its marks or by ``names``."""
    every = {
        key[:i]: None
        for key in state
        if isinstance(key, str)
        for i in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
    }
    if names:
        return [p for p in every if any(p + name in state for name in names)]
    return [
        p for p in every if is_peer_state(state, p) or all(p + mark in state for mark in OWN_MARKS)
    ]


def _networks(state: Mapping[str, Any], names: Collection[str] = ()) -> list[Network]:
    found = []
    for path, mapping in _mappings(state):
        for prefix in _prefixes(mapping, names):
            inner = {
                k[len(prefix) :]: v
                for k, v in mapping.items()
                if isinstance(k, str) and k.startswith(prefix)
            }
            found.append(Network((path + prefix).rstrip("."), inner, mapping, prefix))
    return found


def find_network(
    state: Mapping[str, Any],
    *,
    ema: bool | None = False,
    prefix: str | None = None,
    names: Collection[str] = (),
) -> Network:
    """Find the one network in a state, under any prefix and in any nested mapping.

    A peer network is recognised by its table of relative positions, a ``UNet3D`` by its stem and
    time embedding. All other entries (schedule buffers, optimizers, other networks) are left out.

    Args:
        state: a state_dict, or a checkpoint that contains one.
        ema: True takes the averaged weights: their path says "ema", "averaged" or "swa", or they
            belong to an ``AveragedModel``. False takes the others. None takes the averaged weights
            if there are any. A single network is taken for False and None in any case; with True
            it must be averaged.
        prefix: the dotted path of the network or a part of it, if there are several.
        names: keys to look for if the marks are missing, as in a part of a state_dict.

    Returns:
        The network.

    Raises:
        ValueError: there is no network, there are several different ones (the message names them),
            or none is averaged.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"a state_dict must be a mapping, got {type(state).__name__}")
    found = _networks(state)
    if not found and names:
        found = _networks(state, names)
    if not found:
        if names and prefix is None and not ema:
            return Network("", dict(state), state, "")
        raise ValueError(f"no peer Unet3D and no UNet3D found: {_beginnings(state)}")
    kept = choose(found, prefix=prefix, ema=ema)
    # A network inside another is a part of it. A network under two names counts once.
    distinct: list[Network] = []
    for n in kept:
        if any(n is not o and n.around is o.around and n.prefix.startswith(o.prefix) for o in kept):
            continue
        if not any(_equal(n.state, o.state) for o in distinct):
            distinct.append(n)
    if len(distinct) > 1:
        raise ValueError(
            f"{len(distinct)} different networks found, under {listed(distinct)}: choose one with "
            "prefix"
        )
    return distinct[0]


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if x is y:
            return True
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.is_meta or y.is_meta:
            return False
        return x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)

    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)


def _beginnings(state: Mapping[str, Any]) -> str:
    """The first parts of the keys of a state, with their counts."""
    count = Counter(
        path + str(key).split(".")[0]
        for path, mapping in _mappings(state)
        for key, value in mapping.items()
        if not isinstance(value, Mapping)
    )
    most = [f"{name} ({n})" for name, n in count.most_common(6)]
    return "its keys begin with " + ", ".join(most) if most else "it is empty"


def check_state(model: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Compare all keys and shapes before anything is copied.

    Raises:
        ValueError: something does not fit. The message has the first few of each kind of mismatch.
    """
    own = model.state_dict()
    problems = []
    if strict:
        missing = sorted(own.keys() - state.keys())
        extra = sorted(state.keys() - own.keys())
        problems += [f"{len(missing)} missing keys: {', '.join(missing[:4])}"] if missing else []
        problems += [f"{len(extra)} unexpected keys: {', '.join(extra[:4])}"] if extra else []
        problems += [_beginnings(state)] if len(missing) == len(own) else []
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


def save_tensors(state: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a safetensors file. Raises OSError if that fails, e.g. on a full disk."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {_first_line(error)}") from error


def save_weights(model: nn.Module, directory: Path) -> None:
    """Write model.safetensors under a temporary name, then rename it into place."""
    handle, temporary = tempfile.mkstemp(dir=directory, suffix=".tmp")
    os.close(handle)
    try:
        save_tensors(model.state_dict(), Path(temporary), format="pt")
        os.chmod(temporary, 0o644)
        os.replace(temporary, directory / "model.safetensors")
    finally:
        Path(temporary).unlink(missing_ok=True)

"""The conditions of the videos in a folder: captions, class labels or vectors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvdm.video.arrays import BROKEN
from fastvdm.video.listing import beside


def read_captions(paths: Sequence[Path], folder: str | os.PathLike[str]) -> list[str]:
    """The caption of each video: from ``folder/captions.json`` if it exists (it maps the path
    relative to ``folder``, or the bare file name, to the caption), else from ``clip.txt`` next to
    ``clip.mp4``.

    Raises:
        ValueError: captions are missing (the message has their number and the first ones), or the
            JSON file is not such a map.
    """
    folder = Path(folder)
    index = folder / "captions.json"
    table = _table(index, "caption") or {}
    captions, missing = [], []
    for path in paths:
        text = table.get(path.relative_to(folder).as_posix(), table.get(path.name))
        sidecar = beside(path, ".txt")
        if text is None and sidecar.is_file():
            text = sidecar.read_text(encoding="utf-8")
        if text is None or not text.strip():
            missing.append(path)
        else:
            captions.append(text.strip())
    _report(missing, paths, folder, f"caption (a .txt beside the video, or an entry in {index})")
    return captions


def read_labels(paths: Sequence[Path], folder: str | os.PathLike[str]) -> list[str]:
    """The class of each video: from ``folder/labels.json`` if it exists (it maps the path relative
    to ``folder`` to the label), else the name of the top-level folder that contains it.

    Raises:
        ValueError: labels are missing (the message has their number and the first ones), or the
            JSON file is not such a map.
    """
    folder = Path(folder)
    index = folder / "labels.json"
    table = _table(index, "label")
    labels, missing = [], []
    for path in paths:
        name = path.relative_to(folder)
        if table is not None:
            label = table.get(name.as_posix())
        else:
            label = name.parts[0] if len(name.parts) > 1 else None
        if label is None:
            missing.append(path)
        else:
            labels.append(label)
    _report(missing, paths, folder, f"label (an entry in {index}, or without it a folder)")
    return labels


def read_vectors(paths: Sequence[Path], folder: str | os.PathLike[str]) -> Tensor:
    """The vector of each video, (N, D) float32: ``clip.cond.npy`` next to ``clip.mp4``, else the
    array in ``folder/vectors.npz`` under the path relative to ``folder``.

    Raises:
        ValueError: vectors are missing (the message has their number and the first ones), are not
            one-dimensional, are not finite, or differ in width.
    """
    folder = Path(folder)
    index = folder / "vectors.npz"
    table: dict[str, np.ndarray] = {}
    if index.is_file():
        table = _load(index)
    vectors: list[np.ndarray] = []
    missing = []
    for path in paths:
        sidecar = beside(path, ".cond.npy")
        name = path.relative_to(folder).as_posix()
        vector = _load(sidecar)[""] if sidecar.is_file() else table.get(name)
        if vector is None:
            missing.append(path)
            continue
        if vector.ndim != 1 or vector.dtype.kind not in "fiu" or not np.isfinite(vector).all():
            raise ValueError(
                f"the vector of {path} must be finite numbers (D,), got {vector.dtype} of shape "
                f"{vector.shape}"
            )
        if vectors and len(vector) != len(vectors[0]):
            raise ValueError(
                f"the vector of {path} has {len(vector)} entries, that of {paths[0]} "
                f"{len(vectors[0])}"
            )
        vectors.append(vector)
    _report(missing, paths, folder, f"vector (a .cond.npy beside the video, or one in {index})")
    return torch.from_numpy(np.stack(vectors).astype(np.float32))


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = np.load(path, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            return {"": arrays}
        with arrays:
            return dict(arrays)
    except BROKEN as error:
        raise ValueError(f"{path} is not a readable array: {error}") from error


def _table(index: Path, what: str) -> dict[str, str] | None:
    """A JSON file with one object of strings; None if the file does not exist."""
    if not index.is_file():
        return None
    try:
        table = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} is not JSON: {error}") from error
    if not isinstance(table, dict) or not all(isinstance(c, str) for c in table.values()):
        raise ValueError(f'{index} must be one object {{"clip.mp4": "{what}", ...}}')
    return table


def _report(missing: list[Path], paths: Sequence[Path], folder: Path, what: str) -> None:
    if missing:
        names = [path.relative_to(folder).as_posix() for path in missing]
        raise ValueError(
            f"{len(missing)} of {len(paths)} videos have no {what}: "
            f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        )

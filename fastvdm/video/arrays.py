"""Videos as arrays in .npy and .npz files: pixels, or latents."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from torch import Tensor

from fastvdm.video.index import Timeline, VideoReadError
from fastvdm.video.pixels import resize_crop, resize_picture, sides

ARRAYS = (".npy", ".npz")
# What NumPy raises for files that are not arrays.
BROKEN = (OSError, ValueError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error, TokenError)
_NAMES = ("video", "frames", "latents")


class ArraySource:
    """An array (C, F, H, W) or (F, H, W, C), or (F, H, W) with one channel. It has no times.

    Frames are returned as uint8 or as floats: in [0, 1], or unchanged if ``value_range`` is None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        channels: int,
        size: int | tuple[int, int] | None,
        value_range: tuple[float, float] | None,
    ) -> None:
        self.path, self.size, self.value_range = Path(path), size, value_range
        array = _load(self.path)
        kind = array.dtype.kind if array.dtype.itemsize <= 8 else "long"
        if kind != "f" and (array.dtype != np.uint8 or value_range is None):
            raise VideoReadError(
                f"{path} holds {array.dtype}: "
                + ("latents are floats" if value_range is None else "pixels are uint8 or floats")
            )
        if array.ndim == 3 and channels == 1:
            array = array[None]
        elif array.ndim == 4 and array.shape[0] == channels:
            pass
        elif array.ndim == 4 and array.shape[-1] == channels:
            array = array.transpose(3, 0, 1, 2)
        else:
            raise VideoReadError(
                f"{path} has shape {array.shape}: neither (C, F, H, W) nor (F, H, W, C) with "
                f"{channels} channels"
            )
        if 0 in array.shape:
            raise VideoReadError(f"{path} is empty: shape {array.shape}")
        self.array = array
        if value_range is None and size is not None and sides(size) != array.shape[-2:]:
            raise VideoReadError(
                f"{path} holds latents of {array.shape[-2]} x {array.shape[-1]}, asked for "
                f"{' x '.join(map(str, sides(size)))}: latents are not resized"
            )

    def timeline(self) -> Timeline:
        return Timeline(self.array.shape[1])

    def decodable(self) -> int:
        return self.array.shape[1]

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        return [self._frame(number) for number in numbers]

    def _frame(self, number: int) -> Tensor:
        values = np.array(self.array[:, number])
        frame = torch.from_numpy(values.astype(values.dtype.newbyteorder("="), copy=False))
        if frame.dtype == torch.uint8:
            return frame if self.size is None else resize_picture(frame, self.size)
        frame = frame.float()
        if not frame.isfinite().all():
            raise VideoReadError(f"{self.path} has NaN or infinite values in frame {number}")
        if self.value_range is None:
            return frame
        low, high = self.value_range
        frame = (frame - low) / (high - low)
        if frame.min() < -1e-3 or frame.max() > 1 + 1e-3:
            raise VideoReadError(
                f"{self.path} has values outside [{low}, {high}] in frame {number}; another "
                "value_range, or None for latents?"
            )
        frame = frame.clamp(0, 1)
        return frame if self.size is None else resize_crop(frame, self.size)


def _load(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {path}")
    try:
        if path.suffix.lower() == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            if len(names) > 1:
                names = [name for name in _NAMES if name in names]
            if len(names) != 1:
                raise VideoReadError(
                    f"{path} must hold one array, or one of those named {', '.join(_NAMES)}; it "
                    f"has {', '.join(arrays) or 'none'}"
                )
            return arrays[names[0]]
    except VideoReadError:
        raise
    except BROKEN as error:
        raise VideoReadError(f"{path} is not a readable array: {error}") from error

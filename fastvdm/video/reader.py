"""Read frames of a video from a file, a folder of pictures or an array."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastvdm.video.arrays import ARRAYS, ArraySource
from fastvdm.video.decode import FileSource
from fastvdm.video.index import Timeline, VideoReadError
from fastvdm.video.pictures import FolderSource, WebpSource
from fastvdm.video.pixels import resize_picture, sides, to_channels


class Source(Protocol):
    """One video."""

    def timeline(self) -> Timeline:
        """The frames that it claims to have."""
        ...

    def decodable(self) -> int:
        """The number of frames that decode, from the first one on."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """These frames (ascending, without repeats), each (C, H, W); if some do not decode, only
        those before the first failure."""
        ...


def open_source(
    path: str | os.PathLike[str],
    size: int | tuple[int, int] | None = None,
    *,
    channels: int = 3,
    background: float = 0.0,
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Source:
    """The source that reads this path. Arguments and errors are those of ``read_video``."""
    path = Path(path)
    check_arguments(size, channels, background, value_range)
    if path.suffix.lower() in ARRAYS:
        return ArraySource(path, channels, size, value_range)
    if channels not in (1, 3, 4):
        raise ValueError(f"pixels have 1, 3 or 4 channels, got channels={channels}: {path}")

    def finish(picture: np.ndarray) -> Tensor:
        pixels = to_channels(picture, channels, background)
        return pixels if size is None else resize_picture(pixels, size)

    if path.is_dir():
        return FolderSource(path, finish)
    return (WebpSource if path.suffix.lower() == ".webp" else FileSource)(path, finish)


def check_arguments(
    size: int | tuple[int, int] | None,
    channels: int,
    background: float,
    value_range: tuple[float, float] | None,
) -> None:
    """Raise ValueError if an argument is out of range for every video."""
    if size is not None:
        sides(size)
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if not 0 <= background <= 1:
        raise ValueError(f"background must be in [0, 1], got {background}")
    check_range(value_range)


def check_range(value_range: tuple[float, float] | None) -> None:
    """Raise ValueError unless it is (low, high) or None."""
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")


def check_fps(fps: float | None) -> None:
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps must be positive, got {fps}")


def check_counts(least: int = 1, **values: Any) -> list[int]:
    """The values as ints. Raises TypeError if one is not an integer, of Python, numpy or torch, and
    ValueError if it is below ``least``."""
    found = []
    for name, value in values.items():
        try:
            found.append(operator.index(value))
        except TypeError:
            raise TypeError(f"{name} must be an int, got {value!r}") from None
        if found[-1] < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return found


def count_frames(
    path: str | os.PathLike[str], fps: float | None = None, *, channels: int = 3
) -> int:
    """The number of frames that a decoder shows, resampled to ``fps`` if given.

    If each packet of the file is one frame, the packets are counted; otherwise the file is decoded.
    A truncated file counts as far as it decodes. Damage inside a packet is found only by decoding
    it (``check_video``).

    Args:
        path: as in ``read_video``.
        fps: as in ``read_video``.
        channels: identifies the channel axis of an array.

    Raises:
        FileNotFoundError: there is no such file or folder.
        VideoReadError: it is not a video.
        ValueError: ``fps`` or ``channels`` is out of range.
    """
    check_fps(fps)
    count = len(open_source(path, channels=channels).timeline().frames(fps))
    if not count:
        raise VideoReadError(f"{path} is not a readable video: no frame of it decodes")
    return count


def video_fps(path: str | os.PathLike[str]) -> float:
    """Average frames per second, from the times at which frames are shown.

    Raises:
        FileNotFoundError: there is no such file or folder.
        VideoReadError: it is not a video, or has no times (folders of pictures, arrays).
    """
    is_array = Path(path).suffix.lower() in ARRAYS and Path(path).is_file()
    fps = None if is_array else open_source(path).timeline().fps
    if fps is None:
        raise VideoReadError(f"{path} does not say when its frames are shown: it has no rate")
    return fps


def read_video(
    path: str | os.PathLike[str],
    num_frames: int | None = None,
    frameskip: int = 1,
    size: int | tuple[int, int] | None = None,
    *,
    start: int = 0,
    fps: float | None = None,
    channels: int = 3,
    background: float = 0.0,
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Tensor:
    """Read frames ``start, start + frameskip, ...`` of a video.

    Frame k is the k-th frame shown by a decoder that starts at the beginning, whatever the
    container says and wherever decoding starts here. Display matrices (of phones) and EXIF
    orientations are applied.

    Args:
        path: a video file that FFmpeg decodes; an animated .webp; a folder that directly contains
            the frames (png, jpg, bmp; frame2 comes before frame10); or an array, .npy or .npz (the
            only one in it, or the one named video, frames or latents). Arrays are (C, F, H, W) or
            (F, H, W, C), whichever axis has ``channels`` entries, (C, F, H, W) if both do; or
            (F, H, W) for one channel. uint8 arrays are pixels, floats are in ``value_range``.
        num_frames: number of frames; None for all that decode.
        frameskip: distance between two frames (1: every frame).
        size: resize so that the frame covers ``(H, W)`` (an int: a square), then crop the centre.
        start: first frame.
        fps: resample in time first: frame j is the one shown j / fps seconds after the first frame,
            and ``start`` and ``frameskip`` count these frames. Folders and arrays have no times and
            are not resampled.
        channels: 1 (luma, as Pillow's "L"), 3 (RGB) or 4 (RGBA); for arrays their number.
        background: grey level in [0, 1] behind transparent pixels, for 1 and 3 channels.
        value_range: range of floats in arrays. None means latents, which are read unchanged;
            ``size`` must then be theirs.

    Returns:
        (C, F, H, W) float32, in [0, 1] unless the values are latents.

    Raises:
        FileNotFoundError: there is no such file or folder.
        VideoReadError: it is not a video, is too short for ``num_frames``, or its frames differ in
            size; or an array has other channels, another size or other values.
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """
    if num_frames is not None:
        (num_frames,) = check_counts(num_frames=num_frames)
    (frameskip,), (start,) = check_counts(frameskip=frameskip), check_counts(least=0, start=start)
    check_fps(fps)
    source = open_source(
        path, size, channels=channels, background=background, value_range=value_range
    )
    shown = source.timeline().frames(fps)
    stop = len(shown) if num_frames is None else start + (num_frames - 1) * frameskip + 1
    frames = read_frames(source, shown[start:stop:frameskip])
    if not frames or (num_frames is not None and len(frames) < num_frames):
        if not len(shown) or not source.decodable():
            raise VideoReadError(f"{path} is not a readable video: no frame of it decodes")
        raise VideoReadError(
            f"{path}: expected {num_frames or 'some'} frames from frame {start} at frameskip "
            f"{frameskip}, got {len(frames)}"
        )
    return stack(path, frames)


def read_frames(source: Source, numbers: Sequence[int]) -> list[Tensor]:
    """These frames; they may repeat (if ``fps`` is above the rate of the file)."""
    distinct = sorted(set(numbers))
    found = dict(zip(distinct, source.read(distinct)))
    frames = []
    for number in numbers:
        if number not in found:
            break
        frames.append(found[number])
    return frames


def stack(path: str | os.PathLike[str], frames: Sequence[Tensor]) -> Tensor:
    """Stack frames (C, H, W) to (C, F, H, W) float32; pixels are scaled to [0, 1]."""
    shapes = {tuple(frame.shape) for frame in frames}
    if len(shapes) > 1:
        sizes = sorted(f"{width} x {height}" for _, height, width in shapes)
        raise VideoReadError(f"{path} has frames of several sizes: {', '.join(sizes)}")
    clip = torch.stack(list(frames), dim=1)
    return clip.float() / 255 if clip.dtype == torch.uint8 else clip

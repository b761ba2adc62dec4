"""Frames of a video, whatever holds them: a file, a folder of pictures or an array."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

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
        """The frames that it says it has."""
        ...

    def decodable(self) -> int:
        """How many of them decode, from the first."""
        ...

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """These frames (ascending, without repeats), (C, H, W) each; only the first of them where
        the others do not decode."""
        ...


def open_source(
    path: str | os.PathLike[str],
    size: int | tuple[int, int] | None = None,
    *,
    channels: int = 3,
    background: float = 0.0,
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Source:
    """What reads this path. Arguments and errors are those of ``read_video``."""
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
    """ValueError for what is out of range whatever the video."""
    if size is not None:
        sides(size)
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if not 0 <= background <= 1:
        raise ValueError(f"background must be in [0, 1], got {background}")
    check_range(value_range)


def check_range(value_range: tuple[float, float] | None) -> None:
    """ValueError unless it is (low, high) or None."""
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range must be (low, high) with low < high, got {value_range}")


def check_fps(fps: float | None) -> None:
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps must be positive, got {fps}")


def count_frames(
    path: str | os.PathLike[str], fps: float | None = None, *, channels: int = 3
) -> int:
    """Number of frames that a decoder shows, resampled to ``fps`` where that is given.

    The packets of the file are counted where one is one frame, else the file is decoded. A file
    that ends too soon counts as far as it decodes; damage inside a packet shows only when that is
    decoded (``check_video``). ``channels`` tells the axes of an array apart.

    Raises:
        FileNotFoundError: there is no such file or folder.
        VideoReadError: it is not a video.
        ValueError: ``fps`` or ``channels``.
    """
    check_fps(fps)
    count = len(open_source(path, channels=channels).timeline().frames(fps))
    if not count:
        raise VideoReadError(f"{path} is not a readable video: no frame of it decodes")
    return count


def video_fps(path: str | os.PathLike[str]) -> float:
    """Average frames per second, by the times at which the frames are shown.

    Raises:
        FileNotFoundError: there is no such file or folder.
        VideoReadError: it is not a video, or, as folders of pictures and arrays, has no times.
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
    """Frames ``start, start + frameskip, ...`` of a video.

    Frame k is the k-th one that a decoder shows which starts at the beginning, whatever the
    container says and wherever decoding starts here. Display matrices (of phones) and EXIF
    orientations are applied.

    Args:
        path: a video file that FFmpeg decodes; an animated .webp; a folder that directly holds the
            frames (png, jpg, bmp; frame2 comes before frame10); or an array, .npy or .npz (the only
            one in it, or the one named video, frames or latents). Arrays are (C, F, H, W) or
            (F, H, W, C), whichever axis has ``channels`` entries, (C, F, H, W) if both; or
            (F, H, W) for one channel. uint8 are pixels, floats are in ``value_range``.
        num_frames: how many; None for all that decode.
        frameskip: distance of two frames read (1: every frame).
        size: resize so that the frame covers ``(H, W)`` (an int: a square), then crop the centre.
        start: first frame.
        fps: resample in time first: frame j is then the one shown j / fps seconds after the first,
            and ``start`` and ``frameskip`` count these. Folders and arrays have no times and are
            taken as they are.
        channels: 1 (luma, as Pillow's "L"), 3 (RGB) or 4 (RGBA); of arrays what they have.
        background: the grey level in [0, 1] behind transparent pixels, with 1 and 3 channels.
        value_range: of floats in arrays. None: they are latents, read as they are; ``size`` must
            then be theirs.
    Returns:
        (C, F, H, W) float32, in [0, 1] unless it is latents.
    Raises:
        FileNotFoundError: there is no such file or folder.
        VideoReadError: it is not a video, it is too short for ``num_frames``, its frames differ in
            size; an array has other channels, another size or values than said.
        ValueError: an argument is out of range.
    """
    for name, value, low in (("frameskip", frameskip, 1), ("start", start, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
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
    """These frames, which may repeat (more frames a second than the file has)."""
    distinct = sorted(set(numbers))
    found = dict(zip(distinct, source.read(distinct)))
    frames = []
    for number in numbers:
        if number not in found:
            break
        frames.append(found[number])
    return frames


def stack(path: str | os.PathLike[str], frames: Sequence[Tensor]) -> Tensor:
    """(C, H, W) each to (C, F, H, W) float32, pixels in [0, 1]."""
    shapes = {tuple(frame.shape) for frame in frames}
    if len(shapes) > 1:
        sizes = sorted(f"{width} x {height}" for _, height, width in shapes)
        raise VideoReadError(f"{path} has frames of several sizes: {', '.join(sizes)}")
    clip = torch.stack(list(frames), dim=1)
    return clip.float() / 255 if clip.dtype == torch.uint8 else clip

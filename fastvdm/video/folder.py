"""A data set of random clips from the videos under a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvdm.video.conditions import read_captions, read_labels, read_vectors
from fastvdm.video.index import VideoReadError
from fastvdm.video.listing import identity, list_videos
from fastvdm.video.reader import (
    check_arguments,
    check_counts,
    check_fps,
    open_source,
    read_frames,
    stack,
)


class VideoFolder(Dataset):
    """Random clips from the videos under a folder.

    An item is a clip ``(C, F, H, W)`` in [0, 1], or with ``conditioning`` a pair (clip, condition).
    The position of the clip and the flip are drawn from torch's global generator; seed it to get
    the same clips again (a ``DataLoader`` seeds that of its workers). Earlier reads have no effect.

    Args:
        folder: searched recursively (``list_videos``).
        num_frames: frames per clip.
        size: sides of the clip in pixels: resize to cover, then crop the centre.
        frameskip: distance between two frames of the clip, in frames of the file or of ``fps``.
        fps: as in ``read_video``.
        channels: as in ``read_video``.
        background: as in ``read_video``.
        value_range: as in ``read_video``.
        conditioning: "captions": the condition is a string (``read_captions``); "classes": an int,
            the index in ``classes`` of the label (``read_labels``); "vectors": (D,) float32
            (``read_vectors``), where D is ``cond_dim``.
        flip: mirror half of the clips left to right (the paper does so for BAIR).
        short: for a video that is too short: "error", or "repeat" its last frame.

    Attributes:
        paths: the videos.
        names: their paths relative to the folder.
        identities: (name, bytes) of each; for a folder of frames the sum of the bytes and of the
            number of frames.
        conditions: the condition of each video; None without ``conditioning``.
        classes: the sorted labels; empty unless ``conditioning`` is "classes".

    Raises:
        ValueError: an argument is wrong or conditions are missing (raised at once); or a video is
            unreadable or too short (raised when an item is read; the error's ``video`` is its
            name). A video that stops decoding in the middle has the length that decodes.
        FileNotFoundError: there is no such folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_frames: int,
        size: int | tuple[int, int],
        *,
        frameskip: int = 1,
        fps: float | None = None,
        channels: int = 3,
        background: float = 0.0,
        value_range: tuple[float, float] | None = (0.0, 1.0),
        conditioning: str | None = None,
        flip: bool = False,
        short: str = "error",
    ) -> None:
        num_frames, frameskip = check_counts(num_frames=num_frames, frameskip=frameskip)
        if short not in ("error", "repeat"):
            raise ValueError(f'short must be "error" or "repeat", got {short!r}')
        if conditioning not in (None, "captions", "classes", "vectors"):
            raise ValueError(
                f'conditioning must be None, "captions", "classes" or "vectors", got '
                f"{conditioning!r}"
            )
        check_fps(fps)
        check_arguments(size, channels, background, value_range)
        self.paths = list_videos(folder)
        self.names = [path.relative_to(folder).as_posix() for path in self.paths]
        self.identities = [(name, identity(path)) for name, path in zip(self.names, self.paths)]
        self.num_frames, self.size, self.frameskip, self.fps = num_frames, size, frameskip, fps
        self.channels, self.background, self.value_range = channels, background, value_range
        self.flip, self.short = flip, short
        self.conditions: Sequence[Any] | None = None
        self.classes: tuple[str, ...] = ()
        self.cond_dim: int | None = None
        if conditioning == "captions":
            self.conditions = read_captions(self.paths, folder)
        elif conditioning == "classes":
            labels = read_labels(self.paths, folder)
            self.classes = tuple(sorted(set(labels)))
            place = {label: i for i, label in enumerate(self.classes)}
            self.conditions = [place[label] for label in labels]
        elif conditioning == "vectors":
            vectors = read_vectors(self.paths, folder)
            self.conditions, self.cond_dim = list(vectors), vectors.shape[1]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, Any]:
        clip = self._flipped(self._read(index, self.num_frames))
        return clip if self.conditions is None else (clip, self.conditions[index])

    def frame(self, index: int) -> Tensor:
        """One random frame (C, H, W) of a video, for joint image-video training."""
        return self._flipped(self._read(index, 1)[:, 0])

    def _read(self, index: int, num_frames: int) -> Tensor:
        try:
            return self._clip(self.paths[index], num_frames)
        except (VideoReadError, OSError) as error:
            error.video = self.names[index]  # type: ignore[union-attr]
            raise

    def _flipped(self, x: Tensor) -> Tensor:
        return x.flip(-1) if self.flip and torch.rand(()) < 0.5 else x

    def _clip(self, path: Path, num_frames: int) -> Tensor:
        source = open_source(
            path,
            self.size,
            channels=self.channels,
            background=self.background,
            value_range=self.value_range,
        )
        shown = source.timeline().frames(self.fps)
        numbers = self._draw(path, shown, num_frames)
        try:
            frames = read_frames(source, numbers)
            problem = VideoReadError(f"{path}: frames {numbers[0]} to {numbers[-1]} do not decode")
        except VideoReadError as error:
            frames, problem = [], error
        if len(frames) < len(numbers):
            # Fewer frames decode than the packets promised. The clip must not depend on what this
            # process has read before, or a resumed run would see other clips.
            good = source.decodable()
            left = [number for number in shown if number < good]
            if len(left) == len(shown) or not left:
                raise problem
            numbers = self._draw(path, left, num_frames)
            frames = read_frames(source, numbers)
            if len(frames) < len(numbers):
                raise problem
        return stack(path, frames + frames[-1:] * (num_frames - len(frames)))

    def _draw(self, path: Path, shown: Sequence[int], num_frames: int) -> Sequence[int]:
        """The frames of a clip among ``shown``; fewer than ``num_frames`` if the video is short."""
        length = len(shown)
        span = (num_frames - 1) * self.frameskip + 1
        if not length:
            raise VideoReadError(f"{path} is not a readable video: no frame of it decodes")
        if length < span and self.short == "error":
            rate = "" if self.fps is None else f" at {self.fps:g} fps"
            raise VideoReadError(
                f"{path} has {length} frames{rate}, a clip of {num_frames} at frameskip "
                f'{self.frameskip} needs {span} (short="repeat" would repeat its last frame)'
            )
        start = int(torch.randint(max(1, length - span + 1), ()))
        return shown[start : start + span : self.frameskip]

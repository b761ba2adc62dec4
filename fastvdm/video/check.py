"""Check whether videos can be read to their ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fastvdm.runtime.optional import require
from fastvdm.video.decode import FileSource, turn
from fastvdm.video.index import VideoReadError, decode_all, frame_index, opened
from fastvdm.video.listing import list_videos
from fastvdm.video.reader import open_source


class VideoReport(NamedTuple):
    """The result of ``check_video``.

    ``frames`` is the number of frames that decode. ``fps`` is None without times. ``width`` and
    ``height`` are in pixels after rotation by ``rotation`` degrees (counterclockwise), after which
    it is ``mirrored`` left to right. ``codec`` is the name of FFmpeg's decoder, or "webp",
    "frames", "array". ``problem`` is None if all is well.
    """

    path: Path
    frames: int
    fps: float | None
    width: int
    height: int
    rotation: int
    codec: str
    problem: str | None
    mirrored: bool = False


def check_video(
    path: str | os.PathLike[str],
    *,
    channels: int = 3,
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> VideoReport:
    """Decode a whole video and report on it. A defect of the video is reported, not raised.

    Args:
        path: as in ``read_video``.
        channels: required channels of arrays, as in ``read_video``.
        value_range: required range of arrays, as in ``read_video``.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: an argument is out of range.
    """
    path = Path(path)
    try:
        source = open_source(path, channels=channels, value_range=value_range)
        if isinstance(source, FileSource):
            return _check_file(path)
        line = source.timeline()
        count, shape = 0, (0, 0)
        problem: str | None = None
        for number in range(line.length):
            try:
                found = source.read([number])
            except VideoReadError as error:
                problem = str(error)
                break
            if not found:
                break
            shape = _shape(found[0])
            count += 1
        if count < line.length and problem is None:
            problem = f"decodes up to frame {count} of {line.length}"
        kind = "frames" if path.is_dir() else {".webp": "webp"}.get(path.suffix.lower(), "array")
        return VideoReport(path, count, line.fps, shape[1], shape[0], 0, kind, problem)
    except VideoReadError as unreadable:
        return VideoReport(path, 0, None, 0, 0, 0, "", str(unreadable))


def _shape(frame: Tensor) -> tuple[int, int]:
    return frame.shape[-2], frame.shape[-1]


class _Counted:
    """Counts the packets of a stream as they pass: all, and those that show no frame."""

    def __init__(self, packets: Iterator[Any]) -> None:
        self.packets, self.total, self.hidden = packets, 0, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        packet = next(self.packets)
        if packet.size:
            self.total += 1
            self.hidden += packet.is_discard
        return packet

    def drain(self) -> None:
        with suppress(require("av", "video").error.FFmpegError):
            for _ in self:
                pass


def _check_file(path: Path) -> VideoReport:
    fps = frame_index(path).line.fps
    frames, angle, mirrored, sizes = 0, 0, False, []
    with opened(path, threads=1) as (container, stream, decoder):
        decoder.options = {"err_detect": "crccheck+explode"}  # report errors, do not conceal them
        packets = _Counted(container.demux(stream))
        decoding = decode_all(packets, decoder)
        while True:
            try:
                frame = next(decoding)
            except StopIteration as stop:
                is_whole = stop.value
                break
            angle, mirrored = (angle, mirrored) if frames else turn(frame)
            size = (frame.width, frame.height)[:: -1 if angle % 180 else 1]
            sizes += [size] if size not in sizes else []
            frames += 1
        packets.drain()
        codec, expected = decoder.name, max(packets.total, stream.frames) - packets.hidden
        is_whole = is_whole and packets.total >= stream.frames
        index = frame_index(path)
        told = index.line.length if index.by_packet else frames
    problem = None
    if not frames:
        problem = f"{path} is not a readable video: no frame of it decodes"
    elif not is_whole:
        problem = f"decodes up to frame {frames} of {expected}"
    elif frames < told:
        problem = f"is damaged: {frames} of {told} frames decode"
    elif len(sizes) > 1:
        problem = f"has frames of several sizes: {', '.join(f'{w} x {h}' for w, h in sizes)}"
    width, height = sizes[0] if sizes else (0, 0)
    return VideoReport(path, frames, fps, width, height, angle, codec, problem, mirrored)


def check_folder(
    folder: str | os.PathLike[str],
    num_workers: int = 0,
    *,
    channels: int = 3,
    value_range: tuple[float, float] | None = (0.0, 1.0),
) -> Iterator[VideoReport]:
    """Report on each video under a folder, in the order of ``list_videos``.

    Args:
        folder: as in ``list_videos``.
        num_workers: number of threads that decode; 0 uses the calling thread.
        channels: as in ``check_video``.
        value_range: as in ``check_video``.

    Raises:
        FileNotFoundError: as in ``list_videos``.
        ValueError: as in ``list_videos`` and ``check_video``.
    """
    paths = list_videos(folder)

    def check(path: Path) -> VideoReport:
        return check_video(path, channels=channels, value_range=value_range)

    if num_workers == 0:
        yield from map(check, paths)
        return
    with ThreadPoolExecutor(num_workers) as pool:
        yield from pool.map(check, paths)

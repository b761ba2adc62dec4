"""Decode chosen frames of a video file, from the key frame before them or from the start."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from fastvdm.runtime.optional import require
from fastvdm.video.index import (
    Index,
    Timeline,
    VideoReadError,
    decode_all,
    decoded_index,
    frame_index,
    opened,
)

# A seek empties the decoder's pipeline, so closer frames are reached by decoding on.
_NEAR = 8

Finish = Callable[[np.ndarray], Tensor]


class FileSource:
    """A video file that FFmpeg reads. ``finish`` makes a tensor of a picture (H, W, 3 or 4)."""

    def __init__(self, path: str | os.PathLike[str], finish: Finish) -> None:
        require("av", "video")
        self.path, self.finish = path, finish

    def timeline(self) -> Timeline:
        return frame_index(self.path).line

    def decodable(self) -> int:
        """The number of frames from the start up to the first that does not decode."""
        told, found = frame_index(self.path).line.times, decoded_index(self.path).line
        if told is None or found.times is None:
            return found.length
        lost = (i for i, pair in enumerate(zip(told, found.times)) if pair[0] != pair[1])
        return next(lost, min(len(told), found.length))

    def read(self, numbers: Sequence[int]) -> list[Tensor]:
        """These frames (ascending, without repeats); if some fail, only those before the first
        failure.
        """
        index = frame_index(self.path)
        with opened(self.path) as opened_file:
            found = _by_seeking(opened_file, index, numbers, self._picture())
        return self._from_start(numbers) if found is None else found

    def _from_start(self, numbers: Sequence[int]) -> list[Tensor]:
        wanted, found, take = set(numbers), [], self._picture()
        times = frame_index(self.path).line.times
        with opened(self.path, threads=1) as (container, stream, decoder):
            for number, frame in enumerate(decode_all(container.demux(stream), decoder)):
                if times is not None and (number >= len(times) or frame.pts != times[number]):
                    break  # a frame was lost, so later frames have other numbers
                if number in wanted:
                    found.append(take(frame))
                    if len(found) == len(numbers):
                        break
        return found

    def _picture(self) -> Callable[[Any], Tensor]:
        convert = converter()

        def take(frame: Any) -> Tensor:
            try:
                return self.finish(picture(frame, convert))
            except VideoReadError as error:
                raise VideoReadError(f"{self.path}: {error}") from None

        return take


class _Run(NamedTuple):
    """Frames that are decoded together, from one key frame."""

    key: int
    pts: list[int]


def _runs(index: Index, numbers: Sequence[int]) -> list[_Run] | None:
    times = index.line.times
    if times is None or not index.keys:
        return None
    runs: list[_Run] = []
    last = 0
    for number in numbers:
        key = index.key(times[number])
        if key < 0:
            return None
        if runs and (key == runs[-1].key or number - last <= _NEAR):
            runs[-1].pts.append(times[number])
        else:
            runs.append(_Run(key, [times[number]]))
        last = number
    return runs


def _by_seeking(
    opened_file: Any, index: Index, numbers: Sequence[int], take: Callable[[Any], Tensor]
) -> list[Tensor] | None:
    """The frames; None unless exactly these frames came out intact."""
    runs = _runs(index, numbers)
    if runs is None:
        return None
    found: list[Tensor] = []
    for run in runs:
        for key in (run.key, run.key - 1):  # a frame marked as key frame may not be one
            part = _decode_run(opened_file, index, key, run.pts, take) if key >= 0 else None
            if part is not None:
                break
        else:
            return None
        found += part
    return found


def _decode_run(
    opened_file: Any, index: Index, key: int, pts: list[int], take: Callable[[Any], Tensor]
) -> list[Tensor] | None:
    av = require("av", "video")
    container, stream, decoder = opened_file
    unsent, left = set(pts), deque(pts)
    found: list[Tensor] = []

    def is_done(frames: list[Any]) -> bool:
        """Take the wanted frames; they come in the order in which they are shown."""
        for frame in frames:
            if left and frame.pts == left[0] and not frame.is_corrupt:
                left.popleft()
                found.append(take(frame))
            elif not left or frame.pts is None or frame.pts >= left[0]:
                return True
        return not left

    try:
        for packet in _packets(opened_file, index.keys[key], index.key_dts[key]):
            last = packet is None
            if packet is not None and index.skips:
                # Frames to which no other refers need not be decoded.
                decoder.skip_frame = "DEFAULT" if packet.pts in unsent else "NONREF"
            if packet is not None and index.by_packet:
                unsent.discard(packet.pts)
            if is_done(decoder.decode(packet)) or last:
                break
            if not unsent:  # the decoder has all wanted frames and needs no further packets
                is_done(decoder.decode(None))
                break
    except av.error.FFmpegError:
        try:
            is_done(decoder.decode(None))
        except av.error.FFmpegError:
            return None
    return None if left else found


def _packets(opened_file: Any, pts: int, dts: int) -> Iterator[Any]:
    """The packets from this key frame on, then None; nothing if seeking does not find it."""
    container, stream, decoder = opened_file
    # Some containers seek by pts, others by dts.
    for target in dict.fromkeys((pts, dts)):
        container.seek(target, stream=stream, backward=True)
        if decoder.is_open:
            decoder.flush_buffers()
        packets = container.demux(stream)
        for packet in packets:
            if packet.is_keyframe and packet.pts == pts:
                yield packet
                for later in packets:
                    if later.size:
                        yield later
                yield None
                return
            if packet.dts is not None and packet.dts > dts:
                break


# -- a frame as a picture -------------------------------------------------------------------------


def converter() -> Callable[..., Any]:
    """A function that converts frames of one video to another pixel format in one thread, because
    starting several takes longer than the conversion. (PyAV before 17 does not offer the choice.)
    """
    av = require("av", "video")
    convert = av.video.reformatter.VideoReformatter().reformat
    return partial(convert, threads=1) if int(av.__version__.split(".")[0]) >= 17 else convert


def picture(frame: Any, convert: Callable[..., Any]) -> np.ndarray:
    """(H, W, 3) uint8, or (H, W, 4) if the frame has alpha; rotated by its display matrix."""
    parts = frame.format.components
    has_alpha = frame.format.has_palette or any(c.is_alpha for c in parts)
    name = "rgba" if has_alpha else "rgb24"
    pixels = convert(frame, format=name).to_ndarray()
    transposed, flip_x, flip_y = display(frame)
    if transposed:
        pixels = pixels.transpose(1, 0, 2)
    if flip_x:
        pixels = pixels[:, ::-1]
    if flip_y:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def display(frame: Any) -> tuple[bool, bool, bool]:
    """Whether the display matrix transposes a frame, and then whether it mirrors along x and y.

    Raises:
        VideoReadError: it rotates by an angle that is not a multiple of 90 degrees.
    """
    matrix = next((d for d in frame.side_data if d.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return False, False, False
    # x' = a x + c y, y' = b x + d y, in 16.16 fixed point
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    small = max(map(abs, (a, b, c, d))) // 1000
    if abs(b) <= small and abs(c) <= small:
        return False, a < 0, d < 0
    if abs(a) <= small and abs(d) <= small:
        return True, c < 0, b < 0
    raise VideoReadError(f"its display matrix turns by {frame.rotation} degrees, no multiple of 90")


def turn(frame: Any) -> tuple[int, bool]:
    """Degrees counterclockwise by which a frame is rotated for display (0, 90, 180 or 270), and
    whether it is then mirrored left to right."""
    transposed, flip_x, flip_y = display(frame)
    mirrored = transposed ^ flip_x ^ flip_y
    if transposed:
        return 90 if flip_y else 270, mirrored
    return 180 if flip_y else 0, mirrored

"""Which frames a video file shows, and when: from its packets if possible, else by decoding.

Frame k is the k-th frame shown by a decoder that starts at the beginning of the file. Headers do
not tell which one that is (they count frames that an edit list hides), and neither do times (of a
variable rate).
"""

from __future__ import annotations

import math
import os
from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastvdm.runtime.optional import require


class VideoReadError(ValueError):
    """A file exists but cannot be decoded as a video, or has too few frames."""


class Timeline(NamedTuple):
    """When the frames of a video are shown: at ``times``, at a constant ``rate``, or unknown."""

    length: int
    times: Sequence[int] | None = None  # ascending, in ticks
    end: int = 0  # the end of the last frame
    tick: Fraction = Fraction(1)  # in seconds
    rate: float | None = None  # frames per second according to the file

    def frames(self, fps: float | None) -> Sequence[int]:
        """The frame shown at ``t0 + j / fps`` for j = 0, 1, ... to the end of the video.

        Raises:
            VideoReadError: the times are so far apart that there would be over 10 million frames.
        """
        if fps is None or not self.length or (self.times is None and self.rate is None):
            return range(self.length)
        times, end, tick = self.times, self.end, float(self.tick)
        if times is None:
            assert self.rate is not None
            times, end, tick = range(self.length), self.length, 1 / self.rate
        step, early = 1 / (tick * fps), self._early(times)
        length = end - times[0] - early
        if length / step > 1e7:
            raise VideoReadError(
                f"its times span {length * tick:.4g} seconds, beyond 10 million frames at {fps} fps"
            )
        at = times[0] + early + step * np.arange(max(1, math.ceil(length / step)))
        return (np.searchsorted(np.asarray(times), at, side="right") - 1).tolist()

    @staticmethod
    def _early(times: Sequence[int]) -> float:
        """By how many ticks a frame may count as shown before its time. It is half a tick, because
        files round, unless frames are evenly spaced (nothing was rounded) or a tick is a frame."""
        if isinstance(times, range) or len(times) < 2:
            return 1e-6
        return 0.5 if int(np.diff(np.asarray(times)).min()) > 1 else 1e-6

    @property
    def fps(self) -> float | None:
        """Average frames per second; None without times."""
        if self.times is None or not self.length:
            return self.rate
        return float(self.length / ((self.end - self.times[0]) * self.tick))


class Index(NamedTuple):
    """The frames that a file shows, and where decoding can start."""

    line: Timeline  # its times are the pts of the frames; None: decoded frames lack usable times
    keys: Sequence[int]  # pts of the key frames, ascending
    key_dts: Sequence[int]
    by_packet: bool  # each packet is one frame and has its pts
    skips: bool  # frames marked as non-reference are not referred to

    def key(self, pts: int) -> int:
        """The number of the last key frame shown at or before ``pts``, or -1."""
        return bisect_left(self.keys, pts + 1) - 1


# A packet is one frame if the container stores frames, not a stream that a parser has split, and if
# the codec has neither packets that show nothing nor frames in two packets.
_FRAME_CONTAINERS = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv"}
_FRAME_CODECS = {"h264", "hevc", "av1", "vp8", "vp9", "mjpeg", "png", "ffv1", "prores", "qtrle"}
# For these, decoders other than FFmpeg's own read the alpha channel, which webm stores separately.
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@contextmanager
def opened(path: str | os.PathLike[str], threads: int | None = None) -> Iterator[Any]:
    """The container, its first video stream and a decoder; FFmpeg's errors become VideoReadError.

    ``threads`` is torch's number by default, which is one in a worker of a DataLoader.
    """
    av = require("av", "video")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no video file at {path}")
    try:
        # Do not refuse a file because of tags in an old encoding. The path is absolute because
        # FFmpeg reads a name with a colon as a protocol.
        with av.open(str(path.absolute()), metadata_errors="replace") as container:
            cover = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & cover), None)
            if stream is None:
                raise VideoReadError(f"{path} has no video stream")
            decoder = stream.codec_context
            if decoder is None:
                raise VideoReadError(f"{path} has a codec that is not known here")
            name = decoder.name if stream.metadata.get("alpha_mode") == "1" else None
            if name in _ALPHA_DECODERS:
                decoder = av.CodecContext.create(_ALPHA_DECODERS[name], "r")
                decoder.extradata = stream.codec_context.extradata
            decoder.thread_count = torch.get_num_threads() if threads is None else threads
            decoder.thread_type = "AUTO" if decoder.thread_count > 1 else "NONE"
            yield container, stream, decoder
    except av.error.FFmpegError as error:
        raise VideoReadError(
            f"{path} is not a readable video: {error.strerror or error}"
        ) from error


def frame_index(path: str | os.PathLike[str]) -> Index:
    """The index of a file in its current state; cached until the file changes."""
    return _frame_index(*state(path))


def decoded_index(path: str | os.PathLike[str]) -> Index:
    """The index from decoding the whole file, up to the first failure."""
    return _decoded_index(*state(path))


def state(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """The cache key of a file: path, size, and a number that changes with the file. Size and time
    do not suffice: a file copied over another one may bring both along."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no video file at {path}")
    found = path.stat()
    changed = hash((found.st_mtime_ns, found.st_ctime_ns, found.st_ino))
    return str(path.absolute()), found.st_size, changed


@lru_cache(maxsize=1 << 16)  # the index of a file with a constant rate takes under a kilobyte
def _frame_index(path: str, size: int, changed: int) -> Index:
    with opened(path) as (container, stream, decoder):
        if container.format.name in _FRAME_CONTAINERS and decoder.codec.id in _codec_ids():
            index = _from_packets(container, stream)
            if index is not None:
                return index
    return _decoded_index(path, size, changed)


@lru_cache(maxsize=1)
def _codec_ids() -> frozenset[int]:
    av = require("av", "video")
    return frozenset(av.Codec(name, "r").id for name in _FRAME_CODECS)


def _from_packets(container: Any, stream: Any) -> Index | None:
    """The index by demuxing alone; None if the packets do not show which frames are shown."""
    av = require("av", "video")
    name = stream.codec_context.name
    shown, keys, first, last, skips = [], [], None, None, True
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            pts, dts = packet.pts, packet.dts
            if pts is None or packet.is_corrupt or _is_invisible(name, packet):
                return None
            if packet.is_keyframe:
                keys.append((pts, pts if dts is None else dts))
                first = pts if first is None else first
            if first is None or pts < first:
                return None  # a picture that needs a frame before the first one is not shown
            if name == "hevc" and skips:
                skips = not _has_layers(bytes(packet), stream.codec_context.extradata)
            if not packet.is_discard:
                shown.append(pts)
                if last is None or pts > last[0]:
                    last = (pts, packet.duration or 0)
    except av.error.FFmpegError:
        return None
    if last is None or len(set(shown)) != len(shown):
        return None
    end = last[0] + last[1]
    return _index(sorted(shown), end, stream, keys, by_packet=True, skips=skips)


def _has_layers(packet: bytes, extradata: bytes | None) -> bool:
    """Whether an HEVC packet belongs to a higher temporal layer, or is of an unknown form. With
    layers, a frame marked as non-reference may still be used by the layers above its own."""
    if not extradata or len(extradata) < 22 or extradata[0] != 1:
        return True
    width = (extradata[21] & 3) + 1  # bytes of the length before each unit
    at = 0
    while at + width + 2 <= len(packet):
        kind, layer = packet[at + width] >> 1 & 0x3F, packet[at + width + 1] & 7
        if kind < 32:  # a slice of a picture
            return layer > 1
        at += width + int.from_bytes(packet[at : at + width], "big")
    return True


def _is_invisible(codec: str, packet: Any) -> bool:
    """Whether a VP8 or VP9 packet shows no frame, or may hold one frame of several."""
    if codec in ("vp8", "libvpx"):
        return not bytes(packet)[0] & 0x10
    if codec in ("vp9", "libvpx-vp9"):
        data = bytes(packet)
        if data[-1] & 0xE0 == 0xC0:
            return False  # a superframe: hidden frames together with the shown one
        bits = data[0] << 8 | data[1] if len(data) > 1 else data[0] << 8
        at = 5 if bits >> 12 & 3 == 3 else 4  # profile 3 has a reserved bit
        existing, show = bits >> (15 - at) & 1, bits >> (13 - at) & 1
        return not existing and not show
    return False


def _index(
    pts: list[int],
    end: int,
    stream: Any,
    keys: list[tuple[int, int]],
    by_packet: bool,
    skips: bool,
) -> Index:
    if end <= pts[-1]:  # no duration: take that of the frame before, or the rate's
        rate = stream.average_rate or stream.guessed_rate or 25
        end = pts[-1] + (
            pts[-1] - pts[-2] if len(pts) > 1 else max(1, round(1 / rate / stream.time_base))
        )
    line = Timeline(len(pts), _compact(pts), end, stream.time_base)
    keys.sort()
    places = _compact([k[0] for k in keys]), _compact([k[1] for k in keys])
    return Index(line, *places, by_packet, skips)


def _compact(values: list[int]) -> Sequence[int]:
    """A range if the values form one, as in a file with a constant rate."""
    if len(values) > 1 and (step := values[1] - values[0]) > 0:
        even = range(values[0], values[-1] + 1, step)
        if len(even) == len(values) and all(a == b for a, b in zip(even, values)):
            return even
    return array("q", values)


@lru_cache(maxsize=1 << 16)
def _decoded_index(path: str, size: int, changed: int) -> Index:
    times: list[int | None] = []
    keys: list[tuple[int, int]] = []
    duration = 0
    with opened(path, threads=1) as (container, stream, decoder):
        # In a gif every frame is drawn over the one before.
        seekable = container.format.name != "gif"

        def packets() -> Iterator[Any]:
            for packet in container.demux(stream):
                if packet.is_keyframe and packet.pts is not None:
                    keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
                yield packet

        for frame in decode_all(packets(), decoder):
            times.append(frame.pts)
            duration = frame.duration or 0
        pts = [t for t in times if t is not None]
        if len(pts) < len(times) or not pts or any(b <= a for a, b in zip(pts, pts[1:])):
            rate = float(stream.average_rate or stream.guessed_rate or 0) or None
            return Index(Timeline(len(times), rate=rate), (), (), False, False)
        keys = keys if seekable else keys[:1]
        return _index(pts, pts[-1] + duration, stream, keys, by_packet=False, skips=False)


def decode_all(packets: Iterator[Any], decoder: Any) -> Generator[Any, None, bool]:
    """All frames in the order shown, up to the first failure; later frames do not count. Returns
    whether there was no failure. The decoder has one thread, so the result does not depend on the
    number of threads."""
    av = require("av", "video")
    packet, is_whole = None, True
    while True:
        try:
            packet = next((p for p in packets if p.size), None)
            frames = decoder.decode(packet)
        except av.error.EOFError:
            return is_whole
        except av.error.FFmpegError:
            # The decoder still holds earlier frames.
            packet, is_whole = None, False
            frames = decoder.decode(None)
        for frame in frames:
            if frame.is_corrupt:
                return False
            yield frame
        if packet is None:
            return is_whole

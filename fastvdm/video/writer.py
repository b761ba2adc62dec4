"""Write videos; a file appears complete or not at all."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from fractions import Fraction
from io import BufferedWriter, BytesIO, FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastvdm.runtime.optional import require
from fastvdm.video.reader import check_counts, check_range

# Encoders per container, in order of preference; the FFmpeg build decides which ones exist.
_ENCODERS = {
    ".mp4": ("libx264", "libopenh264", "mpeg4"),
    ".webm": ("libvpx-vp9", "libvpx"),
    ".gif": ("gif",),
}
OUTPUTS = (*_ENCODERS, ".webp", ".npy")


def check_output(path: str | os.PathLike[str], channels: int = 3, fps: float | None = None) -> None:
    """Check that ``write_video`` can write that many channels at that rate to such a file, before
    sampling.

    Raises:
        ValueError: the suffix is not in ``OUTPUTS``, or its files do not have that many channels or
            that rate.
        RuntimeError: this FFmpeg has no encoder for it.
        ImportError: PyAV or Pillow is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in OUTPUTS:
        raise ValueError(f"path must end in {', '.join(OUTPUTS)}, got {path.name!r}")
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if fps is not None:
        _check_fps(fps, suffix)
    if suffix == ".npy":
        return
    if suffix == ".webp":
        if channels not in (1, 3, 4):
            raise ValueError(f"a .webp has 1, 3 or 4 channels, got {channels}: write a .npy")
        require("PIL.Image", "video")
        return
    if channels not in (1, 3):
        others = ".webp or .npy" if channels == 4 else ".npy"
        raise ValueError(f"a {suffix} has 1 or 3 channels, got {channels}: write a {others}")
    _encoder(suffix)


def _encoder(suffix: str) -> str:
    av = require("av", "video")
    for name in _ENCODERS[suffix]:
        if name in av.codecs_available:
            return name
    raise RuntimeError(f"this PyAV has no encoder for {suffix}: {', '.join(_ENCODERS[suffix])}")


def write_video(
    path: str | os.PathLike[str],
    video: Tensor,
    fps: float = 8,
    *,
    quality: int = 18,
    value_range: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Write ``video`` to an mp4, webm, gif, webp or npy file (by its suffix), atomically.

    The file is written next to ``path`` and then renamed, so it appears complete or not at all.

    Args:
        path: the file.
        video: (C, F, H, W), float in ``value_range`` (values outside are clipped) or uint8. C is 1
            or 3, for .webp also 4. A .npy file takes any C and stores the values unchanged, as
            float32.
        fps: frames per second. GIF stores durations in hundredths of a second, .webp in
            thousandths.
        quality: constant rate factor of the codec for mp4 and webm; lower is better, 0 is best.
            .webp is lossless.
        value_range: the values of black and white; (-1, 1) for samples of ``fastvdm.diffusion``.

    Raises:
        ValueError: the shape, the suffix, ``fps``, ``quality`` or ``value_range`` is wrong, the
            video has NaN, or the encoder refuses it.
        OSError: the file cannot be written, e.g. on a full disk; nothing is left of it.
    """
    if not isinstance(video, Tensor):
        raise TypeError(f"expected a tensor (C, F, H, W), got {type(video).__name__}")
    path = Path(path)
    suffix = path.suffix.lower()
    check_output(path, video.shape[0] if video.ndim == 4 else 3, fps)
    check_range(value_range)
    if suffix in (".mp4", ".webm"):
        check_counts(least=0, quality=quality)
        if quality > 63:
            raise ValueError(f"quality must be at most 63, got {quality}")
    if video.ndim != 4 or 0 in video.shape:
        raise ValueError(f"expected a video (C, F, H, W), got {tuple(video.shape)}")
    video = video.detach().cpu()
    if video.dtype != torch.uint8:
        if not video.is_floating_point():
            raise ValueError(f"expected a float or uint8 video, got {video.dtype}")
        if not torch.isfinite(video).all():
            raise ValueError("the video has NaN or infinite values; nothing was written")
    if suffix == ".npy":
        array = video.float().numpy()
        _write(path, lambda file: np.save(file, array, allow_pickle=False))
        return
    frames = _to_uint8(video, value_range)
    if suffix == ".webp":
        _write(path, lambda file: _encode_webp(file, frames, fps))
    elif suffix == ".gif":
        _write(path, lambda file: _encode_gif(file, frames[..., :3], _rate(fps)))
    else:
        encoder = _encoder(suffix)
        _write(path, lambda file: _encode(file, frames, _rate(fps), suffix[1:], encoder, quality))


def _check_fps(fps: float, suffix: str) -> None:
    """Raise ValueError if files of this kind cannot have this rate."""
    if not 0 < fps < math.inf:
        raise ValueError(f"fps must be positive, got {fps}")
    most = 100 if suffix == ".gif" else 1000
    if suffix != ".npy" and not 0.01 <= fps <= most:
        raise ValueError(f"fps of a {suffix} must be in [0.01, {most}], got {fps}")


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


class _File(BufferedWriter):
    """Keeps the first error: PyAV may raise one of its own about it."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def _write(path: Path, encode: Callable[[BinaryIO], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=path.suffix, prefix=".writing-", dir=path.parent)
    try:
        # Encoders write through Python's file object, whose errors are exact; FFmpeg's own errors
        # would be lost when it closes the file.
        with _File(FileIO(handle, "wb")) as file:
            try:
                encode(file)
            except Exception:
                if file.error is not None:
                    raise file.error from None
                raise
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The umask. mkstemp makes private files, but the result should have the mode of open()."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_uint8(video: Tensor, value_range: tuple[float, float]) -> np.ndarray:
    """(C, F, H, W) → (F, H, W, 3 or 4) uint8."""
    if video.dtype != torch.uint8:
        low, high = value_range
        video = ((video.float() - low) / (high - low)).clamp(0, 1).mul(255).round()
        video = video.to(torch.uint8)
    if video.shape[0] == 1:
        video = video.expand(3, -1, -1, -1)
    return video.permute(1, 2, 3, 0).contiguous().numpy()


def _encode(
    file: BinaryIO, frames: np.ndarray, rate: Fraction, form: str, encoder: str, quality: int
) -> None:
    av = require("av", "video")
    _, height, width, _ = frames.shape
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(encoder, rate=rate)
        stream.width, stream.height = width, height
        # H.264 with subsampled colour needs even sides. Every player supports subsampled colour.
        odd = height % 2 or width % 2
        stream.pix_fmt = "yuv444p" if odd and encoder == "libx264" else "yuv420p"
        if encoder in ("libx264", "libvpx-vp9", "libvpx"):
            stream.options = {"crf": str(quality), "b": "0"}
        try:
            for pixels in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        except av.error.FFmpegError as error:
            raise ValueError(
                f"{encoder} cannot encode {width} x {height} pixels at {rate} fps: {error}"
            ) from error


def _encode_gif(file: BinaryIO, frames: np.ndarray, rate: Fraction) -> None:
    """Use one palette made from all frames; FFmpeg's default is a fixed one of 256 colours."""
    av = require("av", "video")
    count, height, width, _ = frames.shape
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / rate)
    split, make = graph.add("split"), graph.add("palettegen", "reserve_transparent=0")
    use, sink = graph.add("paletteuse", "dither=none"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(make, 1, 0)
    make.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts, frame.time_base = i, 1 / rate
        source.push(frame)
    source.push(None)
    with av.open(file, "w", format="gif") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for _ in range(count):
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode())


def _encode_webp(file: BinaryIO, frames: np.ndarray, fps: float) -> None:
    """Store every frame whole and lossless. (Pillow's own animations merge repeated frames.)"""
    _, height, width, channels = frames.shape
    ends = [round(1000 * (i + 1) / fps) for i in range(len(frames))]
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = _chunk(b"VP8X", bytes([0x12 if channels == 4 else 0x02, 0, 0, 0]) + canvas)
    body += _chunk(b"ANIM", bytes(6))  # no background, repeat for ever
    for pixels, start, end in zip(frames, [0, *ends], ends):
        lasting = max(1, end - start).to_bytes(3, "little")
        # At (0, 0), without blending with the frame before.
        head = bytes(6) + canvas + lasting + bytes([2])
        body += _chunk(b"ANMF", head + _webp_picture(pixels))
    file.write(_chunk(b"RIFF", b"WEBP" + body))


def _webp_picture(pixels: np.ndarray) -> bytes:
    """The chunks of a single picture, taken from a still .webp file of it."""
    still = BytesIO()
    image = require("PIL.Image", "video").fromarray(pixels)
    image.save(still, format="WEBP", lossless=True, exact=True)  # also keeps transparent colours
    content, at = still.getvalue(), 12
    while True:
        name, length = content[at : at + 4], int.from_bytes(content[at + 4 : at + 8], "little")
        if name == b"VP8L":
            return _chunk(name, content[at + 8 : at + 8 + length])
        at += 8 + length + length % 2


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + len(content).to_bytes(4, "little") + content + bytes(len(content) % 2)


def grid(videos: Tensor, fill: float = 0.0) -> Tensor:
    """Tile videos (N, C, F, H, W) into one (C, F, H', W'), row by row, nearly square.

    Tiles are separated by 2 pixels of ``fill``; unused places have that value too.

    Raises:
        ValueError: there is no video, or they are not five-dimensional.
    """
    if videos.ndim != 5 or 0 in videos.shape:
        raise ValueError(f"expected videos (N, C, F, H, W), got {tuple(videos.shape)}")
    count, channels, frames, height, width = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = 2
    shape = (channels, frames, rows * (height + gap) - gap, columns * (width + gap) - gap)
    sheet = videos.new_full(shape, fill)
    for i, video in enumerate(videos):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[..., top : top + height, left : left + width] = video
    return sheet

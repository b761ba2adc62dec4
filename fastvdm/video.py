"""Video files in and out (through PyAV), and a data set of clips with captions.

A video is a float tensor ``(C, F, H, W)`` in [0, 1] on this side; the networks work in [-1, 1]
(``2 * video - 1``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastvdm.runtime.optional import require

SUFFIXES = (".mp4", ".webm", ".gif", ".mkv", ".mov", ".avi")
# Per container, the encoders in order of preference; which ones exist depends on the FFmpeg build.
_ENCODERS = {
    ".mp4": ("libx264", "libopenh264", "mpeg4"),
    ".webm": ("libvpx-vp9", "libvpx"),
    ".gif": ("gif",),
}


class VideoReadError(ValueError):
    """A file that exists but cannot be decoded as a video, or has too few frames."""


def _open(path: str | os.PathLike[str]) -> tuple[Any, Any]:
    """The PyAV container and its first video stream."""
    av = require("av", "video")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no video file at {path}")
    try:
        container = av.open(str(path))
    except (av.error.FFmpegError, ValueError) as error:
        raise VideoReadError(f"{path} is not a readable video: {error}") from error
    if not container.streams.video:
        container.close()
        raise VideoReadError(f"{path} has no video stream")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    return container, stream


def count_frames(path: str | os.PathLike[str]) -> int:
    """Number of frames: what the header says, else the packets counted without decoding.

    Raises:
        FileNotFoundError: there is no such file.
        VideoReadError: it is not a video.
    """
    container, stream = _open(path)
    with container:
        if stream.frames > 0:
            return int(stream.frames)
        av = require("av", "video")
        try:
            return sum(1 for packet in container.demux(stream) if packet.size)
        except av.error.FFmpegError as error:
            raise VideoReadError(f"{path} is not a readable video: {error}") from error


def video_fps(path: str | os.PathLike[str]) -> float:
    """Average frames per second of a file (same errors as ``count_frames``)."""
    container, stream = _open(path)
    with container:
        return float(stream.average_rate or stream.base_rate or 25)


def _seek(container: Any, stream: Any, start: int) -> int | None:
    """Jump to the key frame before frame ``start``; returns the pts to wait for, None if no jump.

    A GIF has no key frames to jump to, and without a rate there is no way from index to time: those
    are decoded from the beginning. Frame ``i`` is the one at time ``i / average_rate``.
    """
    rate = stream.average_rate
    if start == 0 or not rate or not stream.time_base or container.format.name == "gif":
        return None
    target = (stream.start_time or 0) + int(round(start / rate / stream.time_base))
    container.seek(target, stream=stream, backward=True)
    return target - int(0.5 / rate / stream.time_base)


def read_video(
    path: str | os.PathLike[str],
    num_frames: int | None = None,
    frameskip: int = 1,
    size: int | tuple[int, int] | None = None,
    *,
    start: int = 0,
) -> Tensor:
    """Frames ``start, start + frameskip, ...`` of a video file.

    Args:
        path: mp4, webm, gif, or whatever else the FFmpeg inside PyAV decodes.
        num_frames: how many; None for all that there are.
        frameskip: distance of two frames read, in frames of the file (1: every frame).
        size: resize so that the frame covers ``(H, W)`` (an int: a square), then crop the centre.
        start: first frame.
    Returns:
        (C, F, H, W) float32 in [0, 1], C = 3.
    Raises:
        FileNotFoundError: there is no such file.
        VideoReadError: it is not a video, or it is too short for ``num_frames``.
        ValueError: an argument is out of range.
    """
    for name, value, low in (("frameskip", frameskip, 1), ("start", start, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    frames = _decode(path, num_frames, frameskip, size, start, seek=True)
    if start and len(frames) < (num_frames or 1):
        # In a file of variable rate, time and index disagree, and the end may come too soon.
        frames = _decode(path, num_frames, frameskip, size, start, seek=False)
    if not frames or (num_frames is not None and len(frames) < num_frames):
        raise VideoReadError(
            f"{path}: expected {num_frames or 'some'} frames from frame {start} at frameskip "
            f"{frameskip}, got {len(frames)}"
        )
    return torch.stack(frames, dim=1)


def _decode(
    path: str | os.PathLike[str],
    num_frames: int | None,
    frameskip: int,
    size: int | tuple[int, int] | None,
    start: int,
    seek: bool,
) -> list[Tensor]:
    """The frames (C, H, W) that there are, at most ``num_frames``."""
    av = require("av", "video")
    container, stream = _open(path)
    frames: list[Tensor] = []
    with container:
        try:
            first_pts = _seek(container, stream, start) if seek else None
            wait = start if first_pts is None else 0
            for frame in container.decode(stream):
                if first_pts is not None and frame.pts is not None and frame.pts < first_pts:
                    continue
                if wait:
                    wait -= 1
                    continue
                wait = frameskip - 1
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # (H, W, C)
                frames.append(_to_float(pixels, size))
                if len(frames) == num_frames:
                    break
        except av.error.FFmpegError as error:
            raise VideoReadError(f"{path} is not a readable video: {error}") from error
    return frames


def _to_float(pixels: Tensor, size: int | tuple[int, int] | None) -> Tensor:
    """(H, W, C) uint8 → (C, H', W') float in [0, 1]."""
    image = pixels.permute(2, 0, 1).float() / 255
    return image if size is None else resize_crop(image, size)


def resize_crop(x: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Resize ``(..., H, W)`` (bilinear, antialiased) to cover ``size``, then crop the centre."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive, got {size}")
    h, w = x.shape[-2:]
    scale = max(height / h, width / w)
    new = (max(height, round(h * scale)), max(width, round(w * scale)))
    if new != (h, w):
        flat = x.reshape(-1, 1, h, w)
        flat = F.interpolate(flat, size=new, mode="bilinear", antialias=True, align_corners=False)
        x = flat.clamp(0, 1).reshape(*x.shape[:-2], *new)
    top, left = (new[0] - height) // 2, (new[1] - width) // 2
    return x[..., top : top + height, left : left + width].contiguous()


def write_video(
    path: str | os.PathLike[str], video: Tensor, fps: float = 8, *, quality: int = 18
) -> None:
    """Write ``video`` to an mp4, webm or gif file (by its suffix), atomically.

    The file appears complete or not at all: it is written beside ``path`` and then renamed.

    Args:
        video: (C, F, H, W), C = 1 or 3; float in [0, 1] (values outside are clipped) or uint8.
        fps: frames per second. A GIF counts in hundredths of a second.
        quality: the codec's constant rate factor for mp4 and webm; lower is better, 0 is best.
    Raises:
        ValueError: the shape, the suffix, ``fps``, or a NaN in the video.
    """
    av = require("av", "video")
    path = Path(path)
    if path.suffix.lower() not in _ENCODERS:
        raise ValueError(f"path must end in {', '.join(_ENCODERS)}, got {path.name!r}")
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    frames = _to_uint8(video)
    suffix = path.suffix.lower()
    encoder = next((c for c in _ENCODERS[suffix] if c in av.codecs_available), None)
    if encoder is None:
        raise RuntimeError(f"this PyAV has no encoder for {suffix}: {', '.join(_ENCODERS[suffix])}")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(suffix=suffix, prefix=".writing-", dir=path.parent)
    os.close(handle)
    try:
        rate = Fraction(fps).limit_denominator(1001)
        if suffix == ".gif":
            _encode_gif(av, temporary, frames, rate)
        else:
            _encode(av, temporary, frames, rate, encoder, quality)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """mkstemp makes private files; the result should have the mode that open() would give it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_uint8(video: Tensor) -> np.ndarray:
    """(C, F, H, W) → (F, H, W, 3) uint8."""
    if video.ndim != 4 or video.shape[0] not in (1, 3) or 0 in video.shape:
        raise ValueError(f"expected a video (C, F, H, W) with C 1 or 3, got {tuple(video.shape)}")
    video = video.detach().cpu()
    if video.dtype != torch.uint8:
        if not video.is_floating_point():
            raise ValueError(f"expected a float or uint8 video, got {video.dtype}")
        if not torch.isfinite(video).all():
            raise ValueError("the video has NaN or infinite values; nothing was written")
        video = (video.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return video.expand(3, -1, -1, -1).permute(1, 2, 3, 0).contiguous().numpy()


def _encode(
    av: Any, path: str, frames: np.ndarray, rate: Fraction, encoder: str, quality: int
) -> None:
    _, height, width, _ = frames.shape
    with av.open(path, "w") as container:
        stream = container.add_stream(encoder, rate=rate)
        stream.width, stream.height = width, height
        # Subsampled colour needs even sides with H.264, and is what every player understands.
        odd = height % 2 or width % 2
        stream.pix_fmt = "yuv444p" if odd and encoder == "libx264" else "yuv420p"
        if encoder in ("libx264", "libvpx-vp9", "libvpx"):
            stream.options = {"crf": str(quality), "b": "0"}
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _encode_gif(av: Any, path: str, frames: np.ndarray, rate: Fraction) -> None:
    """One palette made from all frames; FFmpeg's own default is a fixed one of 256 colours."""
    count, height, width, _ = frames.shape
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format="rgb24", time_base=Fraction(1, 1) / rate
    )
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
        frame.pts, frame.time_base = i, Fraction(1, 1) / rate
        source.push(frame)
    source.push(None)
    with av.open(path, "w") as container:
        stream = container.add_stream("gif", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "pal8"
        for _ in range(count):
            container.mux(stream.encode(sink.pull()))
        container.mux(stream.encode())


def list_videos(folder: str | os.PathLike[str]) -> list[Path]:
    """All video files under ``folder``, sorted by path (hidden files are left out).

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no video in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    found = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
    if not found:
        raise ValueError(f"no video ({', '.join(SUFFIXES)}) under {folder}")
    return found


def read_captions(paths: Sequence[Path], folder: str | os.PathLike[str]) -> list[str]:
    """The caption of each file: ``folder/captions.json`` (a map from the path relative to
    ``folder``, or the bare file name, to the caption), else ``clip.txt`` beside ``clip.mp4``.

    Raises:
        ValueError: captions are missing (how many, and the first ones) or the JSON is no such map.
    """
    folder = Path(folder)
    table: dict[str, str] = {}
    index = folder / "captions.json"
    if index.is_file():
        try:
            table = json.loads(index.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{index} is not JSON: {error}") from error
        if not isinstance(table, dict) or not all(isinstance(c, str) for c in table.values()):
            raise ValueError(f'{index} must be one object {{"clip.mp4": "caption", ...}}')
    captions, missing = [], []
    for path in paths:
        text = table.get(path.relative_to(folder).as_posix(), table.get(path.name))
        sidecar = path.with_suffix(".txt")
        if text is None and sidecar.is_file():
            text = sidecar.read_text(encoding="utf-8")
        if text is None or not text.strip():
            missing.append(path.relative_to(folder).as_posix())
        else:
            captions.append(text.strip())
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(paths)} videos have no caption (a .txt beside the video, or "
            f"an entry in {index}): {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}"
        )
    return captions


class VideoFolder(Dataset):
    """Random clips of the videos under a folder.

    An item is a clip ``(C, F, H, W)`` in [0, 1]; with ``captions`` a pair (clip, caption). The
    place of the clip and the flip are drawn from torch's global generator: seed that one (a
    ``DataLoader`` does for its workers) to get the same clips again.

    Args:
        folder: searched recursively.
        num_frames: frames in a clip.
        size: sides of the clip in pixels: resize to cover, then centre crop.
        frameskip: distance of two frames of the clip, in frames of the file.
        captions: read sidecar captions (``read_captions``).
        channels: 3, or 1 for the mean of the colours.
        flip: mirror half of the clips left to right (the paper does so for BAIR).
        short: what to do with a file that is too short: "error", or "repeat" its last frame.
    Raises:
        ValueError, FileNotFoundError: at once for the folder, the arguments and missing captions;
            when an item is read for a file that is unreadable or too short.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        num_frames: int,
        size: int | tuple[int, int],
        *,
        frameskip: int = 1,
        channels: int = 3,
        captions: bool = False,
        flip: bool = False,
        short: str = "error",
    ) -> None:
        if num_frames < 1 or frameskip < 1:
            raise ValueError(
                f"num_frames and frameskip must be at least 1, got {num_frames} and {frameskip}"
            )
        if short not in ("error", "repeat"):
            raise ValueError(f'short must be "error" or "repeat", got {short!r}')
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.paths = list_videos(folder)
        self.captions = read_captions(self.paths, folder) if captions else None
        self.num_frames, self.size, self.frameskip = num_frames, size, frameskip
        self.channels, self.flip, self.short = channels, flip, short
        self._lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | tuple[Tensor, str]:
        clip = self._clip(index)
        if self.flip and torch.rand(()) < 0.5:
            clip = clip.flip(-1)
        return clip if self.captions is None else (clip, self.captions[index])

    def frame(self, index: int) -> Tensor:
        """One random frame (C, H, W) of a video, for joint image-video training."""
        length = self._length(index)
        start = int(torch.randint(length, ()))
        image = self._colours(read_video(self.paths[index], 1, 1, self.size, start=start))[:, 0]
        return image.flip(-1) if self.flip and torch.rand(()) < 0.5 else image

    def _colours(self, clip: Tensor) -> Tensor:
        return clip if self.channels == 3 else clip.mean(0, keepdim=True)

    def _length(self, index: int) -> int:
        if index not in self._lengths:
            self._lengths[index] = count_frames(self.paths[index])
        return self._lengths[index]

    def _clip(self, index: int) -> Tensor:
        path = self.paths[index]
        length = self._length(index)
        span = (self.num_frames - 1) * self.frameskip + 1
        wanted = self.num_frames
        if length < span:
            if self.short == "error":
                raise VideoReadError(
                    f"{path} has {length} frames, a clip of {self.num_frames} at frameskip "
                    f'{self.frameskip} needs {span} (short="repeat" would repeat its last frame)'
                )
            wanted = (length - 1) // self.frameskip + 1
        start = int(torch.randint(max(1, length - span + 1), ()))
        clip = self._colours(read_video(path, wanted, self.frameskip, self.size, start=start))
        missing = self.num_frames - wanted
        return torch.cat([clip, clip[:, -1:].expand(-1, missing, -1, -1)], 1) if missing else clip

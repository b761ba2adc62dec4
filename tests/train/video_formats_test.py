"""Every kind of video file, read at every place: the same frames as a decode from the start.

Each cell makes its own clip. Its upper half is the frame's number in eight bits, its lower half a
picture that moves, so that a frame decoded from wrong references would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from fastvdm import video  # noqa: E402
from fastvdm.video import decode  # noqa: E402
from fastvdm.video.index import frame_index  # noqa: E402

FRAMES, HEIGHT, WIDTH, RATE = 40, 64, 128, 30


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8."""
    noise = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    noise = np.kron(noise, np.ones((4, 4, 1), np.uint8))
    frame = noise[number % 30 :, 2 * number % 60 :][:height, :width].copy()
    for bit in range(8):
        block = slice(bit * width // 8, (bit + 1) * width // 8)
        frame[: height // 2, block] = 215 if number >> bit & 1 else 40
    return frame


def numbers_of(clip: torch.Tensor) -> list[int]:
    """The numbers that can be read off the frames of (C, F, H, W)."""
    _, _, height, width = clip.shape
    blocks = clip.mean(0)[:, height // 8 : 3 * height // 8].mean(1).reshape(-1, 8, width // 8)
    bits = blocks[..., width // 32 : width // 16].mean(-1) > 0.5
    return [sum(int(bit) << i for i, bit in enumerate(row)) for row in bits]


def encode(
    path: Path,
    codec: str,
    options: dict[str, str] | None = None,
    *,
    pixels: str = "yuv420p",
    frames: Iterable[int] = range(FRAMES),
    pts: Callable[[int], int] = int,
    container: dict[str, str] | None = None,
    edit: Callable = lambda stream: None,
) -> Path:
    """A clip of the pictures ``frames``, the i-th shown at ``pts(i)`` thirtieths of a second."""
    try:
        av.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV has no encoder {codec}")
    base = Fraction(1, RATE)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pixels
        stream.codec_context.time_base = base
        edit(stream)
        for i, number in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts, frame.time_base = pts(i), base
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sequential(path: Path) -> torch.Tensor:
    """(3, F, H, W) uint8: all that PyAV decodes, one frame after the other, in one thread."""
    frames = []
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        stream.thread_type = "NONE"
        try:
            for frame in file.decode(stream):
                frames.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
        except av.error.FFmpegError:
            pass
    return torch.stack(frames).permute(3, 0, 1, 2)


def check_every_place(path: Path, whole: torch.Tensor, skips: Iterable[int] = (1, 3, 9)) -> None:
    count = whole.shape[1]
    assert video.count_frames(path) == count
    for skip in skips:
        for start in range(count):
            wanted = range(start, count, skip)[:3]
            clip = video.read_video(path, len(wanted), skip, start=start)
            same = clip.mul(255).round().to(torch.uint8) == whole[:, list(wanted)]
            assert same.all(), (skip, start, numbers_of(clip))


X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-adapt=0:"
X265 = "keyint=12:min-keyint=12:scenecut=0:log-level=none:pools=1:"
VPX = {"g": "12", "deadline": "good", "cpu-used": "4", "b": "200k"}
H264 = ("libx264", {"x264-params": X264})
CODED = {
    "mp4-closed": (".mp4", "libx264", {"x264-params": X264}),
    "mp4-pyramid": (".mp4", "libx264", {"x264-params": X264 + "b-pyramid=normal:ref=4"}),
    "mp4-open": (".mp4", "libx264", {"x264-params": X264 + "open-gop=1"}),
    "mp4-open-pyramid": (".mp4", "libx264", {"x264-params": X264 + "open-gop=1:b-pyramid=normal"}),
    "mp4-intra-refresh": (".mp4", "libx264", {"x264-params": X264 + "intra-refresh=1"}),
    "mp4-interlaced": (".mp4", "libx264", {"x264-params": X264 + "tff=1"}),
    "mp4-intra-only": (".mp4", "libx264", {"x264-params": "keyint=1"}),
    "mp4-one-gop": (".mp4", "libx264", {"x264-params": "keyint=250:bframes=3:b-pyramid=normal"}),
    "m4v": (".m4v", *H264),
    "mov": (".mov", *H264),
    "mkv": (".mkv", *H264),
    "flv-h264": (".flv", *H264),
    "ts-h264": (".ts", *H264),
    "avi-h264": (".avi", *H264),
    "hevc-closed": (".mp4", "libx265", {"x265-params": X265 + "open-gop=0"}),
    "hevc-open": (".mp4", "libx265", {"x265-params": X265 + "open-gop=1:bframes=4"}),
    "hevc-open-mkv": (".mkv", "libx265", {"x265-params": X265 + "open-gop=1:bframes=4"}),
    "hevc-layers": (".mp4", "libx265", {"x265-params": X265 + "temporal-layers=3:bframes=4"}),
    "hevc-intra-refresh": (".mp4", "libx265", {"x265-params": X265 + "intra-refresh=1"}),
    "vp8": (".webm", "libvpx", VPX | {"auto-alt-ref": "0"}),
    "vp8-alt-ref": (".webm", "libvpx", VPX | {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9": (".webm", "libvpx-vp9", VPX | {"auto-alt-ref": "0"}),
    "vp9-alt-ref": (".webm", "libvpx-vp9", VPX | {"auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1": (".mp4", "libsvtav1", {"preset": "12", "g": "12"}),
    "av1-mkv": (".mkv", "libsvtav1", {"preset": "12", "g": "12"}),
    "avi-mpeg4": (".avi", "mpeg4", {"g": "12", "bf": "2"}),
    "3gp-mpeg4": (".3gp", "mpeg4", {"g": "12", "bf": "2"}),
    "mpg-mpeg1": (".mpg", "mpeg1video", {"g": "12", "bf": "2"}),
    "mpeg-mpeg2": (".mpeg", "mpeg2video", {"g": "12", "bf": "2"}),
    "ts-mpeg2": (".ts", "mpeg2video", {"g": "12", "bf": "2"}),
    "wmv": (".wmv", "wmv2", {"g": "12"}),
    "flv": (".flv", "flv", {"g": "12"}),
    "ogv": (".ogv", "libtheora", {"g": "12"}),
    "ffv1": (".mkv", "ffv1", {"g": "12"}),
}


@pytest.mark.parametrize("name", CODED)
def test_every_frame_of_every_codec(tmp_path, name):
    suffix, codec, options = CODED[name]
    path = encode(tmp_path / f"clip{suffix}", codec, options)
    whole = sequential(path)
    assert numbers_of(whole / 255) == list(range(FRAMES))
    check_every_place(path, whole)

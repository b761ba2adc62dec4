"""Videos that are no video files (pictures, arrays, webp), what is written, and folders of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

from fastvdm import video  # noqa: E402
from fastvdm.video import writer  # noqa: E402
from fastvdm.video.pixels import resize_picture  # noqa: E402


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_video(frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, C) uint8 to (C, F, H, W) in [0, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2) / 255


# -- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [(72, 128), (33, 47), (90, 31)], ids=["wide", "odd", "tall"])
@pytest.mark.parametrize("size", [(16, 16), (20, 31), (100, 140)], ids=["small", "odd", "large"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_resizing_is_pillows(source, size, mode):
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = noise(*source, channels)
    if mode == "RGBA":
        pixels[..., 3] |= 0x80  # where next to nothing is seen, roundings decide on the colour
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
    assert image.mode == mode
    scale = max(size[0] / source[0], size[1] / source[1])
    new = (max(size[0], round(source[0] * scale)), max(size[1], round(source[1] * scale)))
    top, left = (new[0] - size[0]) // 2, (new[1] - size[1]) // 2
    resized = image.resize(new[::-1], Image.Resampling.BILINEAR)
    expected = np.array(resized.crop((left, top, left + size[1], top + size[0])))
    ours = resize_picture(torch.from_numpy(pixels).permute(2, 0, 1), size)
    difference = ours.permute(1, 2, 0).int() - torch.from_numpy(expected).int().reshape(*size, -1)
    # Pillow rounds colours weighted by an alpha of at least one half to bytes, twice.
    limit = 1 if mode != "RGBA" else 4
    assert difference.abs().max() <= limit


def test_luma_is_pillows(tmp_path):
    frames = noise(3, 10, 14, 3)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    expected = np.stack([np.array(Image.fromarray(frame).convert("L")) for frame in frames])
    luma = video.read_video(tmp_path, channels=1)
    assert torch.equal(luma, as_video(expected[..., None]))


# -- folders of frames ----------------------------------------------------------------------------


def test_a_folder_of_frames(tmp_path):
    frames = noise(12, 10, 14, 3)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.{'png' if i % 2 else 'bmp'}")
    (tmp_path / ".frame0.png").write_text("hidden")
    (tmp_path / "notes.txt").write_text("x")
    assert video.count_frames(tmp_path) == 12
    assert torch.equal(video.read_video(tmp_path), as_video(frames))
    assert torch.equal(video.read_video(tmp_path, 3, 4, start=2), as_video(frames[2:11:4]))
    assert torch.equal(video.read_video(tmp_path, 3, fps=3), as_video(frames[:3]))
    with pytest.raises(video.VideoReadError, match="no rate"):
        video.video_fps(tmp_path)
    with pytest.raises(video.VideoReadError, match="expected 13 frames.*got 12"):
        video.read_video(tmp_path, 13)
    Image.fromarray(noise(10, 16, 3)).save(tmp_path / "frame7.png")
    with pytest.raises(video.VideoReadError, match="frame7.png has 16 x 10.*first.*14 x 10"):
        video.read_video(tmp_path, 3, start=6, size=8)
    assert video.read_video(tmp_path, 3, start=8).shape == (3, 3, 10, 14)
    (tmp_path / "frame9.png").write_bytes((tmp_path / "frame9.png").read_bytes()[:60])
    with pytest.raises(video.VideoReadError, match="frame9.png is not a readable picture"):
        video.read_video(tmp_path, 3, start=8)
    assert "frame7.png has 16 x 10" in video.check_video(tmp_path).problem
    with pytest.raises(video.VideoReadError, match="a folder without pictures"):
        (tmp_path / "none").mkdir()
        video.read_video(tmp_path / "none")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    from PIL import ImageOps

    for i in range(2):
        image = Image.fromarray(noise(16, 24, 3, seed=i))
        exif = image.getexif()
        exif[0x0112] = orientation
        image.save(tmp_path / f"{i}.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "1.jpg") as image:
        expected = np.array(ImageOps.exif_transpose(image))
    clip = video.read_video(tmp_path)
    assert clip.shape[2:] == ((24, 16) if orientation >= 5 else (16, 24))
    assert torch.equal(clip[:, 1], as_video(expected[None])[:, 0])


def test_pictures_of_all_modes(tmp_path):
    grey = noise(8, 8)
    sixteen = grey.astype(np.uint16) * 257
    pictures = {
        "grey": (Image.fromarray(grey), grey),
        "sixteen": (Image.fromarray(sixteen), grey),
        "palette": (Image.fromarray(grey).convert("P"), grey),
        "alpha": (Image.merge("LA", [Image.fromarray(grey), Image.fromarray(grey * 0)]), grey * 0),
    }
    for name, (image, expected) in pictures.items():
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "0.png")
        clip = video.read_video(tmp_path / name, channels=1)
        assert torch.equal(clip[0, 0], torch.from_numpy(expected) / 255), name


# -- arrays ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_arrays_of_pixels(tmp_path, kind):
    frames = noise(7, 10, 14, 3)
    path = tmp_path / f"clip.{kind}"

    def save(array: np.ndarray) -> None:
        np.save(path, array) if kind == "npy" else np.savez(path, frames=array, fps=8)

    expected = as_video(frames)
    for array in (frames, frames.transpose(3, 0, 1, 2)):
        save(array)
        assert torch.equal(video.read_video(path), expected)
        assert torch.equal(video.read_video(path, 2, 3, start=1), expected[:, 1:5:3])
        assert video.count_frames(path) == 7
        assert video.check_video(path).problem is None
    save(frames[..., 0])
    assert torch.equal(video.read_video(path, channels=1), expected[:1])
    with pytest.raises(video.VideoReadError, match="neither.*with 3 channels"):
        video.read_video(path)
    save((frames / 127.5 - 1).astype(np.float32))
    clip = video.read_video(path, value_range=(-1, 1))
    torch.testing.assert_close(clip, expected, atol=1e-6, rtol=0)
    with pytest.raises(video.VideoReadError, match=r"outside \[0.0, 1.0\] in frame 0"):
        video.read_video(path)
    small = video.read_video(path, size=8, value_range=(-1, 1))
    torch.testing.assert_close(small, video.resize_crop(expected, 8), atol=1e-6, rtol=0)
    save(frames.astype(np.int64))
    with pytest.raises(video.VideoReadError, match="int64"):
        video.read_video(path)


def test_latents(tmp_path):
    latents = np.random.default_rng(0).normal(0, 5, (4, 6, 8, 8)).astype(np.float16)
    path = tmp_path / "clip.npy"
    np.save(path, latents)
    read = {"channels": 4, "value_range": None}
    expected = torch.from_numpy(latents).float()
    assert torch.equal(video.read_video(path, **read), expected)
    assert torch.equal(video.read_video(path, 2, size=8, start=3, **read), expected[:, 3:5])
    with pytest.raises(video.VideoReadError, match="8 x 8, asked for 4 x 4: latents are not"):
        video.read_video(path, size=4, **read)
    data = video.VideoFolder(tmp_path, 3, 8, channels=4, value_range=None)
    assert data[0].shape == (4, 3, 8, 8) and data[0].abs().max() > 1
    latents[0, 2, 0, 0] = np.nan
    np.save(path, latents)
    with pytest.raises(video.VideoReadError, match="NaN or infinite values in frame 2"):
        video.read_video(path, **read)
    assert "in frame 2" in video.check_video(path, **read).problem
    np.save(path, noise(4, 6, 8, 8))
    with pytest.raises(video.VideoReadError, match="latents are floats"):
        video.read_video(path, **read)


def test_arrays_that_cannot_be_read(tmp_path):
    path = tmp_path / "clip.npz"
    np.savez(path, a=noise(2, 8, 8, 3), b=noise(2, 8, 8, 3))
    with pytest.raises(video.VideoReadError, match="must hold one array, or.*it has a, b"):
        video.read_video(path)
    np.savez(path, video=np.array([{"x": 1}], dtype=object))
    with pytest.raises(video.VideoReadError, match="not a readable array"):
        video.read_video(path)
    path.write_bytes(b"no zip")
    with pytest.raises(video.VideoReadError, match="not a readable array"):
        video.read_video(path)
    with pytest.raises(FileNotFoundError):
        video.read_video(tmp_path / "none.npy")


# -- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_is_lossless_and_keeps_repeated_frames(tmp_path, channels):
    frames = noise(3, 10, 14, channels)[[0, 0, 1, 2, 2, 2, 0]]
    path = tmp_path / "clip.webp"
    video.write_video(path, as_video(frames), fps=12.5)
    expected = as_video(frames).expand(max(channels, 3), -1, -1, -1)
    read = max(channels, 3)
    assert torch.equal(video.read_video(path, channels=read), expected)
    assert torch.equal(video.read_video(path, 2, 3, start=2, channels=read), expected[:, 2:6:3])
    assert video.count_frames(path) == 7 and video.video_fps(path) == pytest.approx(12.5)
    assert video.count_frames(path, fps=25) == 14
    report = video.check_video(path)
    assert report[1:] == (7, pytest.approx(12.5), 14, 10, 0, "webp", None, False)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(video.VideoReadError, match="not a readable picture"):
        video.count_frames(path)


@pytest.mark.parametrize("channels", [1, 3, 4, 9])
def test_npy_keeps_values(tmp_path, channels):
    latents = torch.randn(channels, 5, 6, 7, dtype=torch.float64) * 4
    path = tmp_path / "a" / "clip.npy"
    video.write_video(path, latents)
    assert np.load(path).dtype == np.float32
    back = video.read_video(path, channels=channels, value_range=None)
    assert torch.equal(back, latents.float())


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".webp"])
def test_value_range(tmp_path, suffix):
    levels = torch.tensor([-1.0, -0.5, 0.0, 1.0])[None, :, None, None].expand(3, -1, 16, 16)
    path = tmp_path / f"clip{suffix}"
    video.write_video(path, levels, value_range=(-1, 1))
    back = video.read_video(path).mean((0, 2, 3))
    torch.testing.assert_close(back, (levels[0, :, 0, 0] + 1) / 2, atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="value_range"):
        video.write_video(path, levels, value_range=(1, 1))


def test_what_can_be_written_is_known_before(tmp_path):
    for suffix in video.OUTPUTS:
        for channels in (1, 3):
            video.check_output(tmp_path / f"a{suffix}", channels)
    for suffix in (".mp4", ".webm", ".gif"):
        for check in (
            lambda path: video.check_output(path, 4),
            lambda path: video.write_video(path, torch.rand(4, 2, 16, 16)),
        ):
            with pytest.raises(ValueError, match=r"has 1 or 3 channels, got 4.*\.webp or \.npy"):
                check(tmp_path / f"a{suffix}")
    video.check_output("a.webp", 4)
    video.check_output("a.npy", 16)
    with pytest.raises(ValueError, match="1, 3 or 4 channels, got 5"):
        video.check_output("a.webp", 5)
    with pytest.raises(ValueError, match="must end in .mp4, .webm, .gif, .webp, .npy"):
        video.check_output("a.txt")
    assert not list(tmp_path.iterdir())


FULL = """
import resource, signal, sys
import torch
from fastvdm.video import write_video

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_video(sys.argv[1], torch.rand(3, 30, 64, 64))
except OSError as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize("suffix", video.OUTPUTS)
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path, suffix):
    pytest.importorskip("resource")
    path = tmp_path / "out" / f"clip{suffix}"
    done = subprocess.run(
        [sys.executable, "-c", FULL, path], capture_output=True, text=True, env=os.environ
    )
    assert done.stdout == "OSError\n", done.stderr
    assert not list(path.parent.iterdir())


def test_a_grid_of_videos():
    videos = torch.rand(5, 3, 2, 4, 6)
    sheet = video.grid(videos, fill=0.5)
    assert sheet.shape == (3, 2, 2 * 4 + 2, 3 * 6 + 4)
    assert torch.equal(sheet[..., :4, :6], videos[0])
    assert torch.equal(sheet[..., 6:, 8:14], videos[4])
    assert (sheet[..., 4:6, :] == 0.5).all() and (sheet[..., 6:, 14:] == 0.5).all()
    assert torch.equal(video.grid(videos[:1]), videos[0])
    with pytest.raises(ValueError, match=r"\(N, C, F, H, W\)"):
        video.grid(videos[0])


# -- folders of videos ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """cats/a.gif, cats/walk/ (frames), dogs/b.webp, dogs/c.npy, and what is no video."""
    clip = as_video(noise(6, 16, 16, 3))
    for name in ("cats/a.gif", "dogs/b.webp", "dogs/c.npy"):
        video.write_video(tmp_path / name, clip)
    (tmp_path / "cats" / "walk").mkdir()
    for i in range(5):
        Image.fromarray(noise(16, 16, 3)).save(tmp_path / "cats" / "walk" / f"{i}.png")
    (tmp_path / ".cache").mkdir()
    video.write_video(tmp_path / ".cache" / "x.gif", clip)
    Image.fromarray(noise(8, 8, 3)).save(tmp_path / "cover.png")
    (tmp_path / ".hidden.gif").write_text("x")
    return tmp_path


NAMES = ["cats/a.gif", "cats/walk", "dogs/b.webp", "dogs/c.npy"]


def test_what_is_a_video(folder):
    np.save(folder / "dogs" / "b.cond.npy", np.zeros(3))
    np.savez(folder / "vectors.npz", x=np.zeros(3))
    (folder / "labels.json").write_text("{}")
    data = video.VideoFolder(folder, 4, 8)
    assert data.names == NAMES
    assert [p.relative_to(folder).as_posix() for p in video.list_videos(folder)] == NAMES
    sizes = [(folder / name).stat().st_size for name in NAMES]
    frames = list((folder / "cats" / "walk").iterdir())
    sizes[1] = sum(p.stat().st_size for p in frames) + len(frames)
    assert data.identities == list(zip(NAMES, sizes))
    assert all(data[i].shape == (3, 4, 8, 8) and data.frame(i).shape == (3, 8, 8) for i in range(4))
    assert video.list_videos(folder / "cats" / "walk") == [folder / "cats" / "walk"]


def test_classes(folder):
    data = video.VideoFolder(folder, 4, 8, conditioning="classes")
    assert data.classes == ("cats", "dogs") and data.conditions == [0, 0, 1, 1]
    clip, label = data[3]
    assert clip.shape == (3, 4, 8, 8) and label == 1
    (folder / "labels.json").write_text(json.dumps({"dogs/c.npy": "wolf"}))
    with pytest.raises(ValueError, match=r"3 of 4 videos have no label.*a.gif, cats/walk, dogs/b"):
        video.VideoFolder(folder, 4, 8, conditioning="classes")
    (folder / "labels.json").write_text(json.dumps({n: n[-1] for n in NAMES}))
    data = video.VideoFolder(folder, 4, 8, conditioning="classes")
    assert data.classes == ("f", "k", "p", "y") and data.conditions == [0, 1, 2, 3]
    (folder / "labels.json").write_text("[]")
    with pytest.raises(ValueError, match="must be one object"):
        video.VideoFolder(folder, 4, 8, conditioning="classes")
    (folder / "labels.json").unlink()
    (folder / "cats" / "a.gif").rename(folder / "a.gif")
    with pytest.raises(ValueError, match=r"1 of 4 videos have no label.*: a.gif"):
        video.VideoFolder(folder, 4, 8, conditioning="classes")


def test_vectors(folder):
    with pytest.raises(ValueError, match=r"4 of 4 videos have no vector.*a.gif, cats/walk"):
        video.VideoFolder(folder, 4, 8, conditioning="vectors")
    np.savez(folder / "vectors.npz", **{name: np.full(3, i) for i, name in enumerate(NAMES)})
    np.save(folder / "cats" / "walk.cond.npy", np.full(3, 7.5))
    data = video.VideoFolder(folder, 4, 8, conditioning="vectors")
    assert data.cond_dim == 3 and data.classes == ()
    assert [v.tolist() for v in data.conditions] == [[i] * 3 for i in (0, 7.5, 2, 3)]
    assert data[1][1].dtype == torch.float32
    np.save(folder / "cats" / "walk.cond.npy", np.zeros(2))
    with pytest.raises(ValueError, match="cats/walk has 2 entries, that of .*a.gif 3"):
        video.VideoFolder(folder, 4, 8, conditioning="vectors")
    np.save(folder / "cats" / "walk.cond.npy", np.full(3, np.inf))
    with pytest.raises(ValueError, match="must be finite numbers"):
        video.VideoFolder(folder, 4, 8, conditioning="vectors")


def test_captions_of_folders_of_frames(folder):
    (folder / "captions.json").write_text(json.dumps({n: n for n in NAMES if n != "cats/walk"}))
    (folder / "cats" / "walk.txt").write_text("walking\n")
    data = video.VideoFolder(folder, 4, 8, conditioning="captions")
    assert data.conditions == ["cats/a.gif", "walking", "dogs/b.webp", "dogs/c.npy"]


def test_clips_at_a_rate_of_their_own(tmp_path):
    levels = torch.arange(24)[None, :, None, None].expand(3, -1, 16, 16) * 10
    video.write_video(tmp_path / "slow.webp", levels[:, :12].to(torch.uint8), fps=4)
    video.write_video(tmp_path / "fast.webp", levels.to(torch.uint8), fps=24)
    data = video.VideoFolder(tmp_path, 2, 16, fps=8, short="repeat")
    steps = [{round((c[0, 1] - c[0, 0]).mean().item() * 25.5) for c in (data[i] for _ in range(9))}
             for i in range(2)]  # fmt: skip
    assert steps == [{3}, {0, 1}]
    with pytest.raises(video.VideoReadError, match="fast.webp has 8 frames at 8 fps, a clip of 9"):
        video.VideoFolder(tmp_path, 9, 16, fps=8)[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0}, {"channels": 0}, {"background": 2}, {"value_range": (1, 0)}, {"size": 0},
        {"conditioning": "words"}, {"short": "x"}, {"num_frames": 0}, {"frameskip": 0},
    ],
)  # fmt: skip
def test_wrong_arguments(folder, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        video.VideoFolder(folder, **{"num_frames": 4, "size": 8, **wrong})


def test_importing_needs_neither_av_nor_pillow():
    code = "import sys, fastvdm.video; print({'av', 'PIL'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert writer.OUTPUTS == video.OUTPUTS

"""One folder with every kind of clip, trained on: each is drawn, only the broken ones are named."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("av", "accelerate", "PIL"):
    pytest.importorskip(_name)

import av  # noqa: E402
from PIL import Image  # noqa: E402
from video_formats_test import CODED, TURNS, cut, encode  # noqa: E402

from fastvdm.training import TrainConfig, Trainer  # noqa: E402
from fastvdm.training.log import read_log  # noqa: E402
from fastvdm.video import write_video  # noqa: E402

TINY = {"dim": 8, "dim_mults": [1], "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}


def turned(stream, *, angle: int, hflip: bool, vflip: bool) -> None:
    stream.set_display_rotation(angle, hflip=hflip, vflip=vflip)


def fill(folder: Path) -> set[str]:
    """The names of clips that cannot be read."""
    for name, (suffix, codec, options) in CODED.items():
        try:
            av.Codec(codec, "w")
        except av.codec.codec.UnknownCodecError:
            continue
        encode(folder / f"{name}{suffix}", codec, options, frames=range(16))
    suffix, codec, options = CODED["mp4-closed"]
    for i, (angle, hflip, vflip) in enumerate(TURNS):
        turn = functools.partial(turned, angle=-angle, hflip=hflip, vflip=vflip)
        encode(folder / f"turned-{i}.mp4", codec, options, frames=range(16), edit=turn)
    whole = encode(folder / "whole.mp4", codec, options)
    cut(whole, folder / "cut.mp4", 17)
    encode(folder / "late.mkv", codec, options, pts=lambda i: i + 900)
    encode(folder / "uneven.mp4", codec, options, pts=lambda i: i * i)
    (folder / "truncated.ts").write_bytes((folder / "ts-h264.ts").read_bytes()[:-4000])
    write_video(folder / "a.gif", torch.rand(3, 9, 20, 30), fps=20)
    write_video(folder / "rgba.webp", torch.rand(4, 9, 20, 30), fps=20)
    write_video(folder / "grey.mp4", torch.rand(1, 9, 20, 30), fps=30)
    np.save(folder / "array.npy", np.random.default_rng(0).random((3, 9, 20, 30), np.float32))
    np.savez(folder / "bytes.npz", np.zeros((9, 20, 30, 3), np.uint8))
    (folder / "pictures").mkdir()
    for i in range(12):
        Image.new("RGB", (30, 20), (20 * i, 0, 0)).save(folder / "pictures" / f"frame{i}.png")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.webm").write_text("no video")
    (folder / "no-index.mp4").write_bytes(whole.read_bytes()[:1000])
    (folder / "short").mkdir()
    Image.new("RGB", (30, 20)).save(folder / "short" / "0.png")
    np.save(folder / "nan.npy", np.full((3, 9, 20, 30), np.nan, np.float32))
    np.save(folder / "object.npy", np.array([{}]), allow_pickle=True)
    return {"empty.mp4", "text.webm", "no-index.mp4", "short", "nan.npy", "object.npy"}


@pytest.mark.parametrize("fps", [None, 12.0])
def test_a_folder_of_everything_is_trained_on(tmp_path, fps):
    folder = tmp_path / "clips"
    folder.mkdir()
    broken = fill(folder)
    values = {"output": str(tmp_path / "run"), "data": str(folder), "size": 16, "num_frames": 3}
    values |= {"fps": fps, "model": TINY, "device": "cpu", "batch_size": 8, "sample_every": 0}
    trainer = Trainer(TrainConfig.create(values | {"trackers": "none", "steps": 9, "log_every": 3}))
    names = set(trainer.samples.dataset.names)
    assert broken < names and len(names) > 50 and len(names) <= 9 * 8  # more than an epoch
    with pytest.warns(UserWarning, match="skipped"):
        trainer.run()
    assert len(read_log(tmp_path / "run" / "log.csv")) == 9
    with open(tmp_path / "run" / "bad-clips.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert sorted(row["video"] for row in rows) == sorted(broken), rows
    assert all(str(folder / row["video"]) in row["error"] for row in rows)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["fps"] == fps

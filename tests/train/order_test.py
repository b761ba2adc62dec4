"""The order of the data, bad clips, and data that change between a stop and a resumption."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

for _name in ("accelerate", "av"):
    pytest.importorskip(_name)

from fastvdm.training import OrderedSamples, Place, TrainConfig, Trainer, train  # noqa: E402
from fastvdm.training.log import read_log  # noqa: E402
from fastvdm.training.order import Batches, hold_out  # noqa: E402
from fastvdm.video import VideoFolder, VideoReadError, write_video  # noqa: E402

TINY = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}


class Named:
    """Items that say what they are: a value that is a hash of the name."""

    def __init__(self, names: str, bad: str = ""):
        self.identities = [(name, 1) for name in names]
        self.bad = bad

    def __len__(self):
        return len(self.identities)

    def __getitem__(self, index):
        name = self.identities[index][0]
        if name in self.bad:
            raise VideoReadError(f"{name}.mp4 is not a readable video")
        return torch.full((3, 1, 2, 2), (ord(name) % 32) / 32)


def names(samples: OrderedSamples, places) -> str:
    return "".join(samples.dataset.identities[samples.index(p)][0] for p in places)


def ordered(data) -> OrderedSamples:
    return OrderedSamples(data, 7, (3, 1, 2, 2))


def test_a_file_that_is_gone_leaves_the_order_of_the_others():
    whole, less = ordered(Named("abcdefgh")), ordered(Named("abdefgh"))
    for epoch in range(4):
        before = names(whole, [Place(epoch, i) for i in range(8)])
        after = names(less, [Place(epoch, i) for i in range(7)])
        assert after == before.replace("c", "") and sorted(before) == list("abcdefgh")


@pytest.mark.parametrize("drawn", range(9))
def test_a_place_is_found_again_in_other_data(drawn):
    """Every video that is in both and was not drawn comes once, in the old order; none twice."""
    whole = ordered(Named("abcdefgh"))
    place = whole.after(Place(2, 0), drawn)
    rest = names(whole, [Place(2, i) for i in range(drawn, 8)])
    with pytest.warns(UserWarning, match="2 gone or changed, 1 new"):
        other = ordered(Named("abdefhxyz"[:-2]))
        at = other.restore(whole.state(place))
    if drawn == 8:
        assert at.epoch == place.epoch == 3 and at.drawn == 0
    kept = [c for c in rest if c not in "cg"]
    if drawn < 8:
        if at.epoch == 2:
            now = names(other, [Place(2, i) for i in range(at.drawn, len(other))])
        else:
            now = ""
        assert [c for c in now if c != "x"] == kept
    same = ordered(Named("hgfedcba"))  # the order of the files in the folder is not that
    assert same.restore(whole.state(place)) == place
    assert names(same, [place]) == names(whole, [place])


def test_a_sample_depends_on_its_file_and_its_epoch_alone():
    class Random(Named):
        def __getitem__(self, index):
            return torch.rand(3, 1, 2, 2)

    def clip(data, name, epoch):
        samples = ordered(data)
        places = [Place(epoch, i) for i in range(len(data))]
        (place,) = [p for p in places if names(samples, [p]) == name]
        return samples[place].clip

    one, two = Random("abcdef"), Random("bcdexy")
    assert torch.equal(clip(one, "c", 3), clip(two, "c", 3))
    assert not torch.equal(clip(one, "c", 3), clip(one, "c", 4))
    assert not torch.equal(clip(one, "c", 3), clip(one, "d", 3))


def test_batches_of_two_processes_are_those_of_one_twice_as_large():
    samples = ordered(Named("abcde"))
    start = Place(0, 3)
    one = iter(Batches(samples, start, 4, 0, 1))
    pair = [iter(Batches(samples, start, 2, rank, 2)) for rank in range(2)]
    for _ in range(6):
        assert next(one) == next(pair[0]) + next(pair[1])


def test_a_data_set_without_identities_cannot_change():
    before = ordered(list(torch.rand(5, 3, 1, 2, 2))).state(Place(1, 2))
    assert ordered(list(torch.rand(5, 3, 1, 2, 2))).restore(before) == Place(1, 2)
    with pytest.raises(ValueError, match="with 5 videos, now 4"):
        ordered(list(torch.rand(4, 3, 1, 2, 2))).restore(before)


def test_held_out_by_name():
    data = Named("abcdefghijklmnopqrstuvwxyz")
    train_on, held = hold_out(data, 0.3, 0)
    kept, out = ({n for n, _ in part.identities} for part in (train_on, held))
    assert kept | out == set("abcdefghijklmnopqrstuvwxyz") and not kept & out and 2 < len(out) < 15
    more = hold_out(Named("abcdefghijklmnopqrstuvwxyz0123"), 0.3, 0)[1]
    assert {n for n, _ in more.identities} & set(kept | out) == out
    with pytest.raises(ValueError, match="leaves one side without any"):
        hold_out(Named("a"), 0.5, 0)


def test_a_bad_item_is_replaced_in_the_same_way_everywhere():
    data = Named("abcdefgh", bad="ch")
    first = [ordered(data)[Place(1, i)] for i in range(8)]
    again = ordered(data)
    assert all(torch.equal(again[Place(1, i)].clip, first[i].clip) for i in reversed(range(8)))
    assert sum(bool(s.bad) for s in first) == 2
    assert all("is not a readable video" in error for s in first for _, error in s.bad)
    with pytest.raises(VideoReadError, match="none of 2 videos can be read, the last: "):
        ordered(Named("ab", bad="ab"))[Place(0, 0)]
    strict = OrderedSamples(data, 7, (3, 1, 2, 2), bad_clips="error")
    with pytest.raises(VideoReadError):
        [strict[Place(0, i)] for i in range(8)]


# -- runs ------------------------------------------------------------------------------------------


def config(output: Path, data: Path, **changes) -> TrainConfig:
    values = {"output": str(output), "data": str(data), "num_frames": 2, "size": 8}
    values |= {"steps": 8, "batch_size": 2, "save_every": 4, "log_every": 2, "device": "cpu"}
    return TrainConfig.create(values | {"model": TINY, "lr": 1e-3, "keep": 9} | changes)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        write_video(folder / f"{i}.mp4", torch.rand(3, 5, 8, 8))
    return folder


def test_a_thousand_clips_of_which_fifty_are_broken(tmp_path):
    """The run ends, every broken file that was met is named once, and no other."""
    data = tmp_path / "data"
    write_video(data / "0000.mp4", torch.rand(3, 3, 8, 8))
    whole = (data / "0000.mp4").read_bytes()
    for i in range(1, 1000):
        content = whole if i % 20 else whole[: 40 + i % 7]
        (data / f"{i:04d}.mp4").write_bytes(content)
    broken = {f"{i:04d}.mp4" for i in range(20, 1000, 20)}
    (data / "0001.mp4").write_bytes(b"")
    broken.add("0001.mp4")
    assert len(broken) == 50
    c = config(tmp_path / "run", data, steps=40, batch_size=32, model=TINY | {"dim_mults": [1]})
    trainer = Trainer(c)
    with pytest.warns(UserWarning, match="skipped: .*not a readable video"):
        trainer.run()
    with open(tmp_path / "run" / "bad-clips.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    named = [row["video"] for row in rows]
    assert len(set(named)) == len(named) and set(named) == broken  # 1280 samples are an epoch
    assert trainer.skipped >= 50 and len(read_log(tmp_path / "run" / "log.csv")) == 40


def test_bad_clips_do_not_move_a_resumed_run(tmp_path, clips):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    (data / "broken.mp4").write_bytes(b"no video")
    quiet = pytest.warns(UserWarning, match="skipped")
    with quiet:
        train(config(tmp_path / "whole", data))
    with quiet:
        train(config(tmp_path / "run", data, steps=4))
    train(config(tmp_path / "run", data), resume=True)  # known from bad-clips.csv: not said again
    one, two = (read_log(tmp_path / n / "log.csv") for n in ("run", "whole"))
    assert [r["loss"] for r in one] == [r["loss"] for r in two] and len(one) == 8
    with pytest.raises(VideoReadError, match="broken.mp4 is not a readable video"):
        train(config(tmp_path / "strict", data, bad_clips="error"))


def test_a_run_resumes_after_a_file_was_removed_or_mended(tmp_path, clips):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    (data / "broken.mp4").write_bytes(b"no video")
    with pytest.warns(UserWarning, match="skipped"):
        train(config(tmp_path / "run", data, steps=4))
    for name, said in (
        ("removed", "1 gone or changed, 0 new"),
        ("mended", "1 gone or changed, 1 n"),
    ):
        run = tmp_path / name
        shutil.copytree(tmp_path / "run", run)
        if name == "removed":
            (data / "broken.mp4").unlink()
        else:
            shutil.copy(clips / "0.mp4", data / "broken.mp4")
        with pytest.warns(UserWarning, match=said):
            train(config(run, data), resume=True)
        assert [r["step"] for r in read_log(run / "log.csv")] == list(range(1, 9))


def test_a_run_is_resumed_from_another_directory(tmp_path, clips, monkeypatch):
    monkeypatch.chdir(clips.parent)
    train(config(tmp_path / "run", Path(clips.name), steps=2))
    monkeypatch.chdir(tmp_path)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["data"] == str(clips)
    train(TrainConfig.create(stored | {"steps": 3}), resume=True)


def test_a_run_that_failed_before_its_first_checkpoint_starts_over(tmp_path, clips):
    run = tmp_path / "run"

    def fail(trainer, row):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(config(run, clips, log_every=1), on_step=fail)
    assert (run / "config.json").is_file() and len(read_log(run / "log.csv")) == 1
    train(config(run, clips, steps=2, batch_size=1, lr=1e-4))
    assert json.loads((run / "config.json").read_text())["batch_size"] == 1
    assert [r["lr"] for r in read_log(run / "log.csv")] == [1e-4, 1e-4]
    with pytest.raises(FileExistsError, match="holds a run"):
        train(config(run, clips))


def test_images_of_other_videos_may_be_bad_too(tmp_path, clips):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    (data / "broken.mp4").write_bytes(b"no video")
    folder = VideoFolder(data, 2, 8)
    assert len(folder) == 7
    with pytest.warns(UserWarning, match="skipped"):
        train(config(tmp_path / "run", data, num_images=3))
    assert len(read_log(tmp_path / "run" / "log.csv")) == 8


def test_a_held_out_video_that_is_broken_ends_no_run(tmp_path, clips):
    data = tmp_path / "data"
    shutil.copytree(clips, data)
    names = [p.name for p in sorted(data.iterdir())]
    for share in (0.1, 0.2, 0.3, 0.4):
        try:
            held = hold_out(VideoFolder(data, 2, 8), share, 0)[1]
        except ValueError:
            continue
        break
    assert 0 < len(held) < len(names)
    for name, _ in held.identities:
        (data / name).write_bytes(b"no video")
    with pytest.warns(UserWarning, match="no video that is held out can be read"):
        train(config(tmp_path / "run", data, holdout=share, validate_every=2))
    assert len(read_log(tmp_path / "run" / "log.csv")) == 8

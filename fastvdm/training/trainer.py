"""Training that stops and resumes exactly.

Everything random is a function of the seed and of the place in the run: sample n of the data order
is drawn with a generator seeded by (seed, n), noise and dropout of step s by (seed, s, process). So
a run that was killed, at any point, continues from its last checkpoint with the same losses as a
run that was not; weights, averaged weights and optimizer come from the checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fastvdm.bundle import Bundle, atomic_directory, checkpoints, make_text, remove_unfinished
from fastvdm.diffusion.joint import JointDataset, append_images, images_from_batch, joint_loss
from fastvdm.runtime.optional import require
from fastvdm.training.config import TrainConfig
from fastvdm.training.log import TrainLog, write_text
from fastvdm.unet.checkpoint import read_source
from fastvdm.video import VideoFolder

_ORDER, _SAMPLE, _STEP, _INIT = range(4)  # streams of random numbers that must not meet


def stream_seed(seed: int, *place: int) -> int:
    """A 63-bit seed for one place in the run; different places give unrelated streams."""
    state = np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator, ``random`` and ``numpy.random`` seeded inside the block only."""
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


class OrderedSamples(Dataset):
    """Sample n = 0, 1, 2, ... of an endless run over ``dataset``: a new permutation each epoch.

    Item n is the same whenever and in whatever process it is read. Clips are checked here, so that
    a bad one is an error before it reaches the network.
    """

    def __init__(self, dataset: Any, seed: int, shape: tuple[int, int, int, int]) -> None:
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        self.dataset, self.seed, self.shape = dataset, seed, shape
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def __getitem__(self, n: int) -> tuple[Tensor, Any]:
        epoch, place = divmod(n, len(self.dataset))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, _ORDER, epoch))
            self._order = torch.randperm(len(self.dataset), generator=generator)
            self._epoch = epoch
        index = int(self._order[place])
        with _seeded(stream_seed(self.seed, _SAMPLE, n)):
            item = self.dataset[index]
        clip, captions = item if isinstance(item, (tuple, list)) else (item, None)
        self._check(index, clip)
        return clip, captions

    def _check(self, index: int, clip: Any) -> None:
        if not isinstance(clip, Tensor) or not clip.is_floating_point():
            kind = getattr(clip, "dtype", type(clip).__name__)
            raise TypeError(f"sample {index}: expected a float tensor, got {kind}")
        if tuple(clip.shape) != self.shape:
            raise ValueError(f"sample {index}: expected {self.shape}, got {tuple(clip.shape)}")
        if not torch.isfinite(clip).all():
            raise ValueError(f"sample {index} has NaN or infinite values")
        if clip.min() < -1e-3 or clip.max() > 1 + 1e-3:
            raise ValueError(
                f"sample {index}: expected values in [0, 1], got [{clip.min()}, {clip.max()}]"
            )


def _collate(items: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any] | None]:
    clips = torch.stack([clip for clip, _ in items])
    captions = [caption for _, caption in items]
    return clips, None if captions[0] is None else captions


class _Batches:
    """Sampler of the micro-batches of one process from ``start`` (in micro-batches) on."""

    def __init__(self, start: int, batch: int, rank: int, world: int) -> None:
        self.start, self.batch, self.rank, self.world = start, batch, rank, world

    def __iter__(self) -> Iterator[list[int]]:
        micro = self.start
        while True:
            first = (micro * self.world + self.rank) * self.batch
            yield list(range(first, first + self.batch))
            micro += 1


class Learner(nn.Module):
    """What is trained: the network and the text pooling. ``forward`` is the loss of a batch, so
    that wrappers for distributed training see one call."""

    def __init__(self, bundle: Bundle, config: TrainConfig) -> None:
        super().__init__()
        self.unet, self.text = bundle.unet, bundle.text
        self.config, self.schedule = config, bundle.schedule

    def forward(self, video: Tensor, captions: list[Any] | None) -> Tensor:
        """video (B, C, F[+ K], H, W) in [0, 1]; captions: B of them, or B lists of 1 + K."""
        c = self.config
        if c.num_images and c.image_source == "batch":
            video = append_images(video, images_from_batch(video, c.num_images))
        cond, image_cond = self._cond(captions)
        return joint_loss(
            self.unet,
            2 * video - 1,
            c.num_images,
            cond=cond,
            image_weight=c.image_weight,
            image_time=c.image_time,
            image_cond=image_cond,
            schedule=self.schedule,
            prediction=c.prediction,
            loss_space=c.loss_space,
            loss_type=c.loss_type,
            cond_drop_prob=c.cond_drop_prob,
        )

    def _cond(self, captions: list[Any] | None) -> tuple[Tensor | None, Any]:
        """cond (B, D), and that of the image frames (B, K, D) or the name of the option."""
        option = self.config.image_cond
        if self.text is None or captions is None:
            return None, "shared"
        videos = [c if isinstance(c, str) else c[0] for c in captions]
        if option != "own" or not self.config.num_images:
            return self.text(videos), "shared" if option == "own" else option
        images = [c for row in captions for c in row[1:]]
        both = self.text([*videos, *images])
        return both[: len(videos)], both[len(videos) :].unflatten(0, (len(videos), -1))


class Averaged:
    """Exponential moving average of the parameters, in fp32 and of the whole of ``modules``.

    decay_n = min(decay, (1 + n)/(10 + n)) with ``warmup``: a short run is not an average of noise.
    """

    def __init__(self, modules: list[nn.Module], decay: float, warmup: bool) -> None:
        self.decay, self.warmup = decay, warmup
        self.source = [p for m in modules for p in m.parameters()]
        self.copies = [p.detach().clone().float() for p in self.source]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self.copies, [p.float() for p in self.source], 1 - decay)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """The modules hold the averaged values inside the block."""
        kept = [p.detach().clone() for p in self.source]
        self._copy(self.copies)
        try:
            yield
        finally:
            self._copy(kept)

    @torch.no_grad()
    def _copy(self, values: list[Tensor]) -> None:
        for p, value in zip(self.source, values):
            p.copy_(value)

    def load_current(self) -> None:
        """Take what the modules hold now as the average."""
        self.copies = [p.detach().clone().float() for p in self.source]


def build(config: TrainConfig) -> Bundle:
    """A new network, and text conditioner, of the configuration; weights follow its seed."""
    from fastvdm.unet import UNet3D

    with _seeded(stream_seed(config.seed, _INIT)):
        network, settings = config.network(), config.settings()
        text = None
        if settings.text_encoder is not None:
            text = make_text(settings, network.cond_dim)
            network = replace(network, cond_dim=text.out_dim)
        elif network.cond_dim is not None:
            raise ValueError("a network with cond_dim needs captions: set text_encoder")
        unet = UNet3D(**vars(network))
    return Bundle(unet, settings, text)


class Trainer:
    """One training run in one output folder.

    ``output`` holds ``config.json``, ``log.csv`` and ``checkpoints/step-N`` with ``model/`` and
    ``ema/`` (each readable by ``UNet3D.from_pretrained`` and ``Bundle.load``) and ``state.pt``
    (optimizer and step; tensors and plain types only, read with ``weights_only=True``).

    Args:
        config: everything that decides the result.
        dataset: clips (C, F, H, W) in [0, 1] or (clip, caption) by index; ``config.folder`` is read
            when not given. Any randomness in it must come from ``torch``, ``random`` or ``numpy``.
        resume: continue the run that is in ``output``. Without it, a folder with a run is an error.
        progress: show a progress bar.
        on_step: called with (trainer, row) after each logged step.
    Raises:
        ImportError: the extra ``train`` is missing.
        FileExistsError: ``output`` holds a run and ``resume`` is not set.
        ValueError: bad data, or a configuration that is not the one of the run to resume.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        dataset: Any = None,
        resume: bool = False,
        progress: bool = False,
        on_step: Callable[[Trainer, dict[str, Any]], None] | None = None,
    ) -> None:
        accelerate = require("accelerate", "train")
        self.config, self.progress, self.on_step = config, progress, on_step
        self.output = Path(config.output)
        self.accelerator = accelerate.Accelerator(
            mixed_precision=config.mixed_precision, cpu=config.device == "cpu"
        )
        rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.rank, self.is_main = rank, self.accelerator.is_main_process
        found = checkpoints(self.output)
        if not resume and ((self.output / "config.json").exists() or found):
            raise FileExistsError(f"{self.output} holds a run: resume it or choose another output")
        if resume and (self.output / "config.json").exists():
            config.check_resumable(json.loads((self.output / "config.json").read_text()))
        # Everything that can be wrong with the input is found before anything is written.
        data = VideoFolder(**config.folder_arguments()) if dataset is None else dataset
        if config.num_images and config.image_source == "dataset":
            data = JointDataset(data, config.num_images)
        self.samples = OrderedSamples(data, config.seed, config.sample_shape())
        captioned = self.samples[0][1] is not None
        if captioned != (config.text_encoder is not None):
            raise ValueError(
                f"text_encoder={config.text_encoder!r}, but the data "
                + ("have captions" if captioned else "have no captions")
            )
        self.bundle = build(config).to(self.accelerator.device)
        learner = Learner(self.bundle, config)
        parameters = [p for p in learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        trained = [m for m in (self.bundle.unet, self.bundle.text) if m is not None]
        self.averaged = Averaged(trained, config.ema_decay, config.ema_warmup)
        self.step = 0
        if found:
            self._load(found[-1])
        if config.compile:
            self.bundle.unet.compile()
        self.learner = self.accelerator.prepare(learner)
        self._stop = False

    # -- checkpoints ----------------------------------------------------------------------------

    def save(self) -> Path:
        """Write the checkpoint of the current step, complete or not at all, and drop old ones."""
        target = self.output / "checkpoints" / f"step-{self.step:08d}"
        if self.is_main and not target.exists():
            with atomic_directory(target) as folder:
                self.bundle.save(folder / "model")
                with self.averaged.swapped():
                    self.bundle.save(folder / "ema")
                state = {"step": self.step, "optimizer": self.optimizer.state_dict()}
                torch.save(state | self._identity(), folder / "state.pt")
            remove_unfinished(target.parent)
            for old in checkpoints(self.output)[: -self.config.keep]:
                # A folder that is being deleted must not look like a checkpoint.
                doomed = old.with_name(f".{old.name}-old")
                old.rename(doomed)
            remove_unfinished(target.parent)
        self.accelerator.wait_for_everyone()
        return target

    def _load(self, folder: Path) -> None:
        state = read_source(folder / "state.pt")
        for name, now in self._identity().items():
            if state[name] != now:
                raise ValueError(
                    f"{folder} was trained with {name} {state[name]}, now {now}: the order of the "
                    "data would not be the same"
                )
        self.bundle.load_weights(folder / "ema")
        self.averaged.load_current()
        self.bundle.load_weights(folder / "model")
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def _identity(self) -> dict[str, int]:
        """What the order of the data depends on besides the configuration."""
        return {"videos": len(self.samples.dataset), "processes": self.world}

    # -- the loop -------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to ``config.steps``; returns the last checkpoint.

        Raises:
            FloatingPointError: a loss is not finite; the last checkpoint is from before it.
        """
        c = self.config
        self.accelerator.wait_for_everyone()  # every process has looked whether a run is there
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_unfinished(self.output / "checkpoints")
            write_text(self.output / "config.json", json.dumps(asdict(c), indent=2))
        log = TrainLog(self.output / c.log, self.step) if self.is_main else None
        batches = iter(
            DataLoader(
                self.samples,
                batch_sampler=_Batches(
                    self.step * c.accumulate, c.batch_size, self.rank, self.world
                ),
                collate_fn=_collate,
                num_workers=c.num_workers,
                pin_memory=self.accelerator.device.type == "cuda",
                prefetch_factor=2 if c.num_workers else None,
            )
        )
        self.learner.train()
        rows: list[dict[str, Any]] = []
        bar = self._bar()
        with self._stopping(), bar:
            started = time.perf_counter()
            while self.step < c.steps and not self._stop:
                rows.append(self._step(batches))
                bar.update(1)
                save = self.step % c.save_every == 0
                if save or self.step % c.log_every == 0:
                    self._write(log, rows, started, bar)
                    started = time.perf_counter()
                if save:
                    self.save()
            self._write(log, rows, started, bar)
            self.save()
        return checkpoints(self.output)[-1]

    def _write(self, log: TrainLog | None, rows: list[Any], started: float, bar: Any) -> None:
        """Read, check and log the rows since the last time, and empty the list."""
        if not rows:
            return
        done = self._read(rows, started)
        bar.set_postfix(loss=f"{done[-1]['loss']:.4f}")
        if log is not None:
            log.write(done)
        for row in done:
            if self.on_step is not None:
                self.on_step(self, row)
        rows.clear()

    def _step(self, batches: Iterator[Any]) -> dict[str, Any]:
        c, accelerator = self.config, self.accelerator
        lr = c.lr * min(1.0, (self.step + 1) / max(1, c.warmup_steps))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=accelerator.device)
        for micro in range(c.accumulate):
            video, captions = next(batches)
            video = video.to(accelerator.device, non_blocking=True)
            torch.manual_seed(stream_seed(c.seed, _STEP, self.step, micro, self.rank))
            last = micro == c.accumulate - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.learner):
                loss = self.learner(video, captions) / c.accumulate
                accelerator.backward(loss)
            total += loss.detach()
        limit = c.grad_clip if c.grad_clip > 0 else float("inf")
        norm = accelerator.clip_grad_norm_(self.learner.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.averaged.update(self.step)
        return {"step": self.step, "loss": total, "grad_norm": norm, "lr": lr}

    def _read(self, rows: list[dict[str, Any]], started: float) -> list[dict[str, Any]]:
        """The losses of the last steps as numbers: one synchronisation for all of them."""
        values = torch.stack([torch.stack([r["loss"], r["grad_norm"].float()]) for r in rows])
        values = self.accelerator.reduce(values, "mean").double().cpu()
        seconds = (time.perf_counter() - started) / len(rows)
        out = []
        for row, (loss, norm) in zip(rows, values.tolist()):
            if not np.isfinite(loss) or not np.isfinite(norm):
                kept = checkpoints(self.output)
                raise FloatingPointError(
                    f"step {row['step']}: loss {loss}, gradient norm {norm}; the last checkpoint, "
                    f"from before it, is {kept[-1] if kept else 'none'}"
                )
            out.append(row | {"loss": loss, "grad_norm": norm, "seconds": round(seconds, 4)})
        return out

    def _bar(self) -> Any:
        tqdm = require("tqdm", "train")
        shown = self.progress and self.is_main
        return tqdm.tqdm(total=self.config.steps, initial=self.step, disable=not shown, unit="step")

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the current step, with a checkpoint."""
        if self.world > 1 or threading.current_thread() is not threading.main_thread():
            yield  # the processes would stop at different steps
            return

        def stop(*_: Any) -> None:
            self._stop = True

        before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def train(config: TrainConfig, **options: Any) -> Path:
    """``Trainer(config, **options).run()``: train, and return the last checkpoint."""
    return Trainer(config, **options).run()

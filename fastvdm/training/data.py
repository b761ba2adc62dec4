"""The videos of a run: for training and held out, with their conditions."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from fastvdm.diffusion.joint import JointDataset
from fastvdm.training.config import TrainConfig
from fastvdm.training.order import Batches, OrderedSamples, Place, Told, View, collate, hold_out
from fastvdm.training.stopping import leave_signals_to_the_trainer
from fastvdm.video import VideoFolder, VideoReadError, video_fps


class Data:
    """The data of a run. One clip of each set is read at once, because its condition decides the
    width of the network's.

    Args:
        config: the configuration.
        dataset: as given to ``Trainer``; None reads the folder of the configuration.
        validation: as given to ``Trainer``; None reads the folder of the configuration.
        classes: the class names of the run to resume; their numbers must not change, whatever the
            folders contain now.

    Attributes:
        samples: the training clips, in their order.
        held: the held-out clips in their order, or None.
        classes: the class names; () without classes.
        cond_dim: width of the condition vectors; None without vectors.
        fps: frame rate of the videos if the configuration does not resample them.

    Raises:
        ValueError: no video can be read, or the conditions do not fit.
        TypeError: a clip or condition has the wrong type.
        OSError: no video can be read.
    """

    def __init__(
        self, config: TrainConfig, dataset: Any, validation: Any, classes: tuple[str, ...]
    ) -> None:
        self.config = c = config
        if dataset is None:
            dataset = VideoFolder(**c.folder_arguments())
        if validation is None and c.validation:
            validation = VideoFolder(**c.folder_arguments(c.validation))
        paths = getattr(dataset, "paths", None)
        self.fps = 8.0 if c.fps or not paths else _first_rate(paths)
        self.classes = classes or tuple(getattr(dataset, "classes", None) or ())
        if self.classes:
            dataset = View(dataset, classes=self.classes)
            validation = validation and View(validation, classes=self.classes)
        if c.holdout:
            dataset, validation = hold_out(dataset, c.holdout, c.seed)
        self.samples = self._ordered(dataset)
        self.held = None if validation is None else self._ordered(validation)
        if c.holdout and self.held is not None and not _has_any(self.held):
            warnings.warn("no video that is held out can be read: nothing to look at", stacklevel=2)
            self.held = None
        self.cond_dim = self._check_conditions()

    def _ordered(self, data: Any) -> OrderedSamples:
        c = self.config
        joint = c.num_images and c.image_source == "dataset"
        return OrderedSamples(
            JointDataset(data, c.num_images) if joint else data,
            c.seed,
            c.sample_shape(),
            bounded=c.value_range is not None,
            bad_clips=c.bad_clips,
        )

    def _check_conditions(self) -> int | None:
        """The width of the condition vectors; None for other conditions."""
        first = _first_condition(self.samples)
        captioned, encoder = isinstance(first, str), self.config.text_encoder
        if captioned != (encoder is not None):
            have = "have captions" if captioned else "have no captions"
            raise ValueError(f"text_encoder={encoder!r}, but the data {have}")
        if isinstance(first, int) and not self.classes:
            raise ValueError("the data have class numbers, but no classes that name them")
        dim = self.config.network().cond_dim
        if first is None and dim is not None:
            raise ValueError(
                f"a network with cond_dim={dim} needs conditions: captions and a text_encoder, "
                "classes or vectors (conditioning)"
            )
        if self.held is not None:
            other = _first_condition(self.held)
            if _named(other) != _named(first):
                raise ValueError(
                    f"the held-out videos come with {_named(other)}, the others with "
                    f"{_named(first)}"
                )
        return len(first) if isinstance(first, torch.Tensor) else None

    @contextlib.contextmanager
    def batches(self, start: Place, rank: int, world: int, device: str) -> Iterator[Iterator[Any]]:
        """Yield (videos, conditions, errors) from ``start`` on; the workers end with the block."""
        c = self.config
        workers = c.num_workers
        if workers is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(8, (os.cpu_count() or 1) // local) if device == "cuda" else 0
        loader = iter(
            DataLoader(
                Told(self.samples),
                batch_sampler=Batches(self.samples, start, c.batch_size, rank, world),
                collate_fn=collate,
                num_workers=workers,
                pin_memory=device == "cuda",
                prefetch_factor=2 if workers else None,
                worker_init_fn=leave_signals_to_the_trainer,
            )
        )
        try:
            yield loader
        finally:
            # Workers ignore the signal with which the interpreter would end them, and an error
            # keeps the loader alive.
            if workers:
                loader._shutdown_workers()  # type: ignore[attr-defined]


def next_batch(batches: Iterator[Any]) -> Any:
    """The next item of ``Data.batches``.

    Raises:
        ValueError: reading a clip raised it, or a worker was killed.
        TypeError: reading a clip raised it.
        OSError: reading a clip raised it.
    """
    try:
        found = next(batches)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ChildProcessError(
            f"a process that reads videos was killed; was there enough memory? {error}"
        ) from None
    if isinstance(found, Exception):
        raise found
    return found


def _has_any(samples: OrderedSamples) -> bool:
    """Whether any clip can be read."""
    try:
        samples[Place(0, 0)]
    except (VideoReadError, OSError):
        return False
    return True


def _first_condition(samples: OrderedSamples) -> Any:
    condition = samples[Place(0, 0)].condition
    return condition[0] if isinstance(condition, list) else condition


def _named(condition: Any) -> str:
    if isinstance(condition, torch.Tensor):
        return f"vectors of {len(condition)} numbers"
    return {str: "captions", int: "classes"}.get(type(condition), "no condition")


def _first_rate(paths: list[Path]) -> float:
    """Frame rate of the first readable video; samples are written at this rate."""
    for path in paths[:8]:
        try:
            return video_fps(path)
        except (ValueError, OSError):
            continue
    return 8.0

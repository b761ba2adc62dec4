"""The order of the clips: an endless order that is the same in every process and after every stop,
even if files were added or removed in between.

A video is identified by its name and its size in bytes, so a repaired file counts as new. In every
epoch the videos are sorted by a hash of that, of the seed and of the epoch; removing a video does
not change the order of the others. The place in a run consists of the epoch, the number of clips
drawn from it, and the hash of the last one.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastvdm.video import VideoReadError

ORDER, SAMPLE, STEP, INIT, OTHER, HELD, LOOK = range(7)  # separate streams of random numbers
_TRIES = 64  # number of successive draws that may be bad


def stream_seed(seed: int, *place: int) -> int:
    """A 63-bit seed for one place in the run. Different places get unrelated streams."""
    state = np.random.SeedSequence((seed, *place)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator, ``random`` and ``numpy.random`` inside the block only."""
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


def identities(dataset: Any, sizes: bool = True) -> np.ndarray:
    """(N,) uint64: a hash of the name (and size) of each item, or its index if the data set does
    not name its items."""
    named = getattr(dataset, "identities", None)
    if named is None:
        return np.arange(len(dataset), dtype=np.uint64)
    words = (f"{name}\0{size if sizes else ''}" for name, size in named)
    text = (w.encode(errors="surrogateescape") for w in words)  # file names may be any bytes
    digests = b"".join(hashlib.blake2b(t, digest_size=8).digest() for t in text)
    return np.frombuffer(digests, dtype=np.uint64)


def _mix(values: np.ndarray, seed: int) -> np.ndarray:
    """A bijection on 64-bit numbers, one per seed (the finaliser of splitmix64)."""
    x = values ^ np.uint64(seed)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Place(NamedTuple):
    """A place in the endless order: sample ``drawn`` of ``epoch`` comes next."""

    epoch: int
    drawn: int


@dataclass
class Sample:
    """A clip (C, F, H, W), its condition(s), and (video, error) of bad clips drawn before it."""

    clip: Tensor
    condition: Any
    bad: list[tuple[str, str]] = field(default_factory=list)


class OrderedSamples(Dataset):
    """The samples of an endless run over ``dataset``, by ``Place``, in a new order each epoch.

    An item is the same whenever and in whichever process it is read. Clips are checked here, so
    that wrong values are an error before they reach the network. A file that cannot be read is
    replaced by another one of the whole data set, drawn from the stream of the same place.

    Args:
        dataset: items (C, F, H, W), or (that, condition). For files it has ``identities``, a list
            of (name, size).
        seed: the seed of the run.
        shape: required shape of a clip.
        bounded: whether values must be in [0, 1].
        bad_clips: "skip" or "error".
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        shape: tuple[int, int, int, int],
        *,
        bounded: bool = True,
        bad_clips: str = "skip",
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("the data set is empty")
        self.dataset, self.seed, self.shape = dataset, seed, shape
        self.bounded, self.bad_clips = bounded, bad_clips
        self.keys = identities(dataset)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Samples per epoch."""
        return len(self.keys)

    def ranks(self, epoch: int) -> np.ndarray:
        """(N,) the keys by which the videos are sorted in an epoch."""
        return _mix(self.keys, stream_seed(self.seed, ORDER, epoch))

    def index(self, place: Place) -> int:
        """The index of the item at a place."""
        if place.epoch != self._epoch:
            self._order = np.argsort(self.ranks(place.epoch), kind="stable")
            self._epoch = place.epoch
        return int(self._order[place.drawn])

    def __getitem__(self, place: Place) -> Sample:
        index = self.index(place)
        where = (self.seed, SAMPLE, place.epoch, int(self.keys[index]))
        bad: list[tuple[str, str]] = []
        for attempt, chosen in enumerate(self._candidates(index, where)):
            try:
                with seeded(stream_seed(*where, attempt)):
                    item = self.dataset[chosen]
            except (VideoReadError, OSError) as error:
                if self.bad_clips == "error":
                    raise
                words = getattr(error, "video", f"item {chosen}"), " ".join(str(error).split())
                bad.append(tuple(w.encode(errors="backslashreplace").decode() for w in words))  # type: ignore[arg-type]
                continue
            clip, condition = item if isinstance(item, tuple | list) else (item, None)
            self._check(chosen, clip)
            return Sample(clip, _condition(condition), bad)
        count = len(self.keys)
        which = f"none of {count} videos" if len(bad) == count else f"not one of {len(bad)} videos"
        raise VideoReadError(f"{which} can be read, the last: {bad[-1][1]}")

    def _candidates(self, index: int, where: tuple[int, ...]) -> Iterator[int]:
        """The item itself, then other items, none twice; all items if the data set is small."""
        yield index
        count = len(self.keys)
        generator = torch.Generator().manual_seed(stream_seed(*where, _TRIES))
        drawn = {index}
        while len(drawn) < min(count, _TRIES):
            other = int(torch.randint(count, (), generator=generator))
            if other not in drawn:
                drawn.add(other)
                yield other

    def _check(self, index: int, clip: Any) -> None:
        if not isinstance(clip, Tensor) or not clip.is_floating_point():
            kind = getattr(clip, "dtype", type(clip).__name__)
            raise TypeError(f"sample {index}: expected a float tensor, got {kind}")
        if tuple(clip.shape) != self.shape:
            raise ValueError(f"sample {index}: expected {self.shape}, got {tuple(clip.shape)}")
        if not torch.isfinite(clip).all():
            raise ValueError(f"sample {index} has NaN or infinite values")
        if self.bounded and (clip.min() < -1e-3 or clip.max() > 1 + 1e-3):
            raise ValueError(
                f"sample {index}: expected values in [0, 1], got [{clip.min()}, {clip.max()}]: "
                "scale them, or say that they are latents (value_range=None)"
            )

    # -- the place, before and after a stop ----------------------------------------------------

    def after(self, place: Place, count: int) -> Place:
        """The place ``count`` samples later."""
        further, drawn = divmod(place.drawn + count, len(self.keys))
        return Place(place.epoch + further, drawn)

    def state(self, place: Place) -> dict[str, Any]:
        """The state for ``restore``, in plain types and tensors."""
        ranks = np.sort(self.ranks(place.epoch))
        last = int(ranks[place.drawn - 1]) if place.drawn else 0
        keys = torch.from_numpy(np.sort(self.keys).view(np.int64).copy())
        return {"epoch": place.epoch, "drawn": place.drawn, "last": str(last), "videos": keys}

    def restore(self, state: dict[str, Any]) -> Place:
        """The place of a ``state`` in the current data.

        Raises:
            ValueError: the data set does not name its items, and their number has changed.
        """
        before, now = state["videos"].numpy().view(np.uint64), np.sort(self.keys)
        if np.array_equal(before, now):
            return Place(state["epoch"], state["drawn"])
        if getattr(self.dataset, "identities", None) is None:
            raise ValueError(
                f"the run was trained with {len(before)} videos, now {len(now)}: the order of the "
                "data would not be the same (a data set with identities can change)"
            )
        gone, new = (len(np.setdiff1d(*pair)) for pair in ((before, now), (now, before)))
        warnings.warn(
            f"the videos are not those of the checkpoint: {gone} gone or changed, {new} new. The "
            "others keep their order",
            stacklevel=2,
        )
        drawn = 0
        if state["drawn"]:
            drawn = int((self.ranks(state["epoch"]) <= np.uint64(int(state["last"]))).sum())
        return self.after(Place(state["epoch"], 0), drawn)


class Batches:
    """Sampler of the micro-batches of one process, from ``start`` on, without an end."""

    def __init__(
        self, samples: OrderedSamples, start: Place, batch: int, rank: int, world: int
    ) -> None:
        self.samples, self.start, self.batch = samples, start, batch
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[list[Place]]:
        first = self.samples.after(self.start, self.rank * self.batch)
        while True:
            yield [self.samples.after(first, i) for i in range(self.batch)]
            first = self.samples.after(first, self.batch * self.world)


class View(Dataset):
    """A data set, or some of its items, with its attributes.

    Args:
        dataset: the data set.
        indices: the items; None means all.
        classes: class names; their positions are the class numbers, instead of those of the data
            set.

    Raises:
        ValueError: the data set has a class that is not among ``classes``.
    """

    def __init__(
        self,
        dataset: Any,
        indices: Sequence[int] | None = None,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.dataset = dataset
        self.indices = range(len(dataset)) if indices is None else indices
        own = getattr(dataset, "classes", None)
        self.classes = tuple(own or ()) if classes is None else tuple(classes)
        unknown = sorted(set(own or ()) - set(self.classes))
        if unknown:
            raise ValueError(
                f"the videos have a class {unknown[0]!r}, but the network knows only "
                f"{', '.join(self.classes)}"
            )
        self._number = [self.classes.index(name) for name in own or ()]
        named, known = (getattr(dataset, name, None) for name in ("identities", "conditions"))
        self.identities = None if named is None else [named[i] for i in self.indices]
        self.conditions = None if known is None else [known[i] for i in self.indices]
        if self.conditions is not None and self._number:
            self.conditions = [self._number[c] for c in self.conditions]
        if hasattr(dataset, "frame"):
            self.frame = self._frame

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[self.indices[index]]
        if not self._number:
            return item
        clip, number = item
        return clip, self._number[_condition(number)]

    def _frame(self, index: int) -> Tensor:
        return self.dataset.frame(self.indices[index])


def hold_out(dataset: Any, share: float, seed: int) -> tuple[Any, Any]:
    """(training, held out). The names of the videos decide, so new videos move no others.

    Raises:
        ValueError: one of the two would be empty.
    """
    place = _mix(identities(dataset, sizes=False), stream_seed(seed, HELD))
    held = place.astype(np.float64) / 2.0**64 < share
    if held.all() or not held.any():
        raise ValueError(f"holdout={share} of {len(held)} videos leaves one side without any")
    return tuple(View(dataset, np.flatnonzero(side).tolist()) for side in (~held, held))  # type: ignore[return-value]


def _condition(value: Any) -> Any:
    """Convert a caption, class number, vector, or a list of them, to plain Python and torch types.

    Raises:
        TypeError: it is anything else.
    """
    if isinstance(value, list | tuple):
        return [_condition(v) for v in value]
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor) and value.ndim == 1:
        return value.float()
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
        return int(value)
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    what = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    raise TypeError(f"a condition is a caption, the number of a class or a vector, got {what}")


class Told(Dataset):
    """The samples, with errors returned instead of raised: raised in a worker, an error would carry
    the worker's traceback."""

    def __init__(self, samples: OrderedSamples) -> None:
        self.samples = samples

    def __getitem__(self, place: Place) -> Sample | Exception:
        try:
            return self.samples[place]
        except (ValueError, TypeError, OSError) as error:
            return error


def collate(samples: list[Any]) -> Any:
    """(B, C, F, H, W), the conditions or None, the errors of skipped clips; or an error."""
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    conditions = [s.condition for s in samples]
    bad = [error for s in samples for error in s.bad]
    none = conditions[0] is None
    return torch.stack([s.clip for s in samples]), None if none else conditions, bad

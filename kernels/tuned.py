"""Configurations measured on a GPU, which take precedence over the analytic ones.

``bench/tune.py`` writes ``configs/<gpu>.json``. For each kernel and the arguments on which its
configuration depends, it contains what was faster there than the analytic choice::

    {"guidance": {"what='seed', dtype=float32, factor=1": {"config": {"block": .., "num_warps": ..},
        "ms": .., "analytic": {..}, "analytic_ms": .., "job": .., "date": .., "torch": .., ..}}}

Only ``config`` is read. A file is read when the first kernel is launched on that GPU, and never
under the interpreter.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from fastvdm.runtime.device import current_gpu

FOLDER = Path(__file__).parent / "configs"

P = ParamSpec("P")
C = TypeVar("C")


@dataclass(frozen=True)
class Choice:
    """A request for a configuration: the kernel, the arguments, and the analytic answer."""

    kernel: str
    key: str  # ``given`` as text, as in the file
    given: dict[str, Any]
    analytic: Any


_chooser: ContextVar[Callable[[Choice], Any] | None] = ContextVar("chooser", default=None)


@contextmanager
def choosing(choose: Callable[[Choice], Any]) -> Iterator[None]:
    """Within the block, in this thread only, ``choose`` answers instead of the files."""
    token = _chooser.set(choose)
    try:
        yield
    finally:
        _chooser.reset(token)


def path_of(gpu: str) -> Path:
    """The file of a GPU, by its CUDA name."""
    return FOLDER / f"{gpu.replace(' ', '_').replace('/', '_')}.json"


@functools.cache
def table(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """kernel → key → entry, from one file; empty if the file does not exist.

    Raises:
        ValueError: the file is malformed; the message names it.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    levels = [found, *found.values()] if isinstance(found, dict) else [found]
    if not all(isinstance(level, dict) for level in levels):
        raise ValueError(f"{path} is not a table of kernel, arguments, entry")
    return found


class Tuned(Generic[P, C]):
    """Decorator of a ``pick_config``. It returns what was measured for the same arguments on this
    GPU, or else the result of the function, which remains available as ``analytic``.

    ``classes`` maps arguments to the value that represents them in the file, e.g. a power of two
    for a number of pixels; other arguments represent themselves.
    """

    def __init__(
        self, kernel: str, analytic: Callable[P, C], classes: dict[str, Callable[[Any], Any]]
    ) -> None:
        self.kernel, self.analytic, self._classes = kernel, analytic, classes
        self._signature = inspect.signature(analytic)
        # Launches must not bind arguments again.
        self._measured: Callable[Concatenate[str, P], C] = functools.cache(self._look_up)
        functools.update_wrapper(self, analytic)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        choose = _chooser.get()
        if choose is not None:
            return choose(self.choice(*args, **kwargs))
        gpu = current_gpu()
        if gpu is None:
            return self.analytic(*args, **kwargs)
        return self._measured(gpu.name, *args, **kwargs)

    def choice(self, *args: P.args, **kwargs: P.kwargs) -> Choice:
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = {n: self._classes.get(n, lambda v: v)(v) for n, v in bound.arguments.items()}
        key = ", ".join(f"{name}={value!r}" for name, value in given.items())
        return Choice(self.kernel, key.replace("torch.", ""), given, self.analytic(*args, **kwargs))

    def _look_up(self, gpu: str, *args: P.args, **kwargs: P.kwargs) -> C:
        choice, path = self.choice(*args, **kwargs), path_of(gpu)
        entry = table(path).get(self.kernel, {}).get(choice.key)
        if entry is None:
            return choice.analytic
        try:
            config = dict(entry["config"])
            odd = [f for f, v in config.items() if not (v is None or isinstance(v, int))]
            if odd:
                raise TypeError(f"{odd[0]} is {config[odd[0]]!r}, not a number")
            return type(choice.analytic)(**config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}, {self.kernel}, {choice.key}: no {type(choice.analytic).__name__} "
                f"({type(error).__name__}: {error})"
            ) from error


def tuned(kernel: str, **classes: Callable[[Any], Any]) -> Callable[[Callable[P, C]], Tuned[P, C]]:
    """``@tuned("kernel")``; see ``Tuned``."""
    return lambda analytic: Tuned(kernel, analytic, classes)

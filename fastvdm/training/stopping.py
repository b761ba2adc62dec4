"""Signals: what they ask for, and how all processes act on them at the same step."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

GO_ON, SAVE, STOP = range(3)


class Requests:
    """SIGTERM and Ctrl-C ask to stop, SIGUSR1 asks to save; a second Ctrl-C raises at once.

    With several processes, ``agreed`` is a small sum over all of them on the CPU. It returns the
    result of the previous call, so that no process waits. All must call it equally often, and all
    get the same answer.
    """

    def __init__(self, world: int) -> None:
        self.name: str | None = None  # the signal that asked to stop, if it arrived here
        self._asked, self._kept = GO_ON, GO_ON
        self._before: dict[int, Any] = {}
        self._group = dist.new_group(backend="gloo") if world > 1 else None
        self._pending: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> Requests:
        self.name, self._asked, self._kept, self._pending = None, GO_ON, GO_ON, None
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in _MEANING}
        return self

    def __exit__(self, *error: object) -> None:
        if self._pending is not None and error[0] is None:
            self._pending[0].wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "Ctrl-C":
            raise KeyboardInterrupt
        asked = _MEANING[signal.Signals(number)]
        if asked == STOP:
            self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        self._asked = max(self._asked, asked)

    def agreed(self) -> int:
        """The strongest request of any process: GO_ON, SAVE or STOP. A SAVE is returned once."""
        asked, self._kept = max(self._exchange(), self._kept), GO_ON
        return asked

    def must_stop(self) -> bool:
        """Like ``agreed``, for the middle of other work: a SAVE stays for the next ``agreed``."""
        asked = self._exchange()
        self._kept = max(self._kept, asked)
        return asked == STOP

    def _exchange(self) -> int:
        asked = self._asked
        if asked == SAVE:
            self._asked = GO_ON
        if self._group is None:
            return asked
        before, value = self._pending, torch.tensor([asked])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = (work, value)
        if before is None:
            return GO_ON
        before[0].wait()
        return int(before[1])

    def any(self, here: bool) -> bool:
        """Whether ``here`` is true on any process; all wait for the answer."""
        if self._group is None:
            return here
        value = torch.tensor([int(here)])
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self._group)
        return bool(value.item())


_MEANING = {signal.SIGTERM: STOP, signal.SIGINT: STOP}
if hasattr(signal, "SIGUSR1"):
    _MEANING[signal.SIGUSR1] = SAVE


def leave_signals_to_the_trainer(_: int) -> None:
    """For workers that read videos: a scheduler signals all processes of a job, and the death of a
    worker would end the run before it is saved. The trainer ends workers without a signal."""
    for number in _MEANING:
        signal.signal(number, signal.SIG_IGN)

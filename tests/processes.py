"""Workers in several processes over gloo, each a rank of one group. The processes are reused from
one test to the next, because imports took most of the time of a small test."""

from __future__ import annotations

import os
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection, wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds until a test that hangs is ended and fails, and that a rank waits in a collective for the
# others: no machine is so busy.
DEADLINE, WAIT = 1800, 900
LEFT = "left"  # what a worker returns that does not wait for the others


class Ranks:
    """As many processes as the largest world so far."""

    def __init__(self) -> None:
        self._processes: list[mp.Process] = []
        self._pipes: list[Connection] = []

    def run(self, worker, world: int, tmp_path, *args) -> None:
        """Run ``worker(rank, world, *args)`` in ``world`` processes; an error in one ends all."""
        context = mp.get_context("spawn")
        while len(self._processes) < world:
            ours, theirs = context.Pipe()
            self._processes.append(context.Process(target=_serve, args=(theirs,), daemon=True))
            self._processes[-1].start()
            self._pipes.append(ours)
        waiting = self._pipes[:world]
        for rank, pipe in enumerate(waiting):
            pipe.send((worker, rank, world, str(tmp_path / "store"), args))
        end = time.monotonic() + DEADLINE
        while waiting:
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            errors = [e for pipe in ready if (e := _answer(pipe)) is not None]
            if errors or not ready:
                self.stop()
                raise AssertionError(errors[0] if errors else f"{worker.__name__} hangs")
            waiting = [pipe for pipe in waiting if pipe not in ready]

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        self.__init__()


def _answer(pipe: Connection) -> str | None:
    try:
        return pipe.recv()
    except EOFError:
        return "a rank died"


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    while True:
        worker, rank, world, store, args = pipe.recv()
        try:
            _enter(worker, rank, world, store, args)
            pipe.send(None)
        except BaseException:
            pipe.send(f"rank {rank}: {traceback.format_exc()}")


def _enter(worker, rank: int, world: int, store: str, args: tuple) -> None:
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=WAIT),
    )  # fmt: skip
    try:
        if worker(rank, world, *args) != LEFT:
            dist.barrier()  # a rank that is done closes its connections
    finally:
        dist.destroy_process_group()

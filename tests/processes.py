"""Workers in several processes over gloo, each a rank of one group."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds until a test that hangs is ended and fails, and that a rank waits in a collective for the
# others: no machine is so busy.
DEADLINE, WAIT = 1800, 900
LEFT = "left"  # what a worker returns that does not wait for the others


def spawn(worker, world: int, tmp_path, *args) -> None:
    """Run ``worker(rank, world, *args)`` in ``world`` processes; an error in one ends all."""
    arguments = (worker, world, str(tmp_path / "store"), args)
    context = mp.spawn(_enter, arguments, nprocs=world, join=False)
    end = time.monotonic() + DEADLINE
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{worker.__name__} hangs")


def _enter(rank: int, worker, world: int, store: str, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=WAIT),
    )  # fmt: skip
    try:
        if worker(rank, world, *args) != LEFT:
            dist.barrier()  # a rank that is done closes its connections
    finally:
        dist.destroy_process_group()

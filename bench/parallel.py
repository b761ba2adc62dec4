"""One video over several processes: time, bytes sent against the formula, error to one process.

    python bench/parallel.py [--world 1 2 4]

It runs ``frame_parallel`` over gloo with one thread per process. The bytes are counted in the
collectives; the formula is that of docs/distributed.md. More processes than cores cannot be faster;
then only the column with the sent bytes is of interest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from fastvdm import UNet3D
from fastvdm.layers.attention import Attention
from fastvdm.parallel import count_communication, frame_parallel, gather_frames, shard_frames
from fastvdm.testing import max_error


def formula(model: UNet3D, run) -> float:
    """2 (P-1)/P times the bytes of every input of a temporal attention, as one rank holds it."""
    sizes: list[int] = []
    hooks = [
        m.register_forward_pre_hook(
            lambda m, args: sizes.append(args[0].numel() * args[0].element_size())
        )
        for m in model.modules()
        if isinstance(m, Attention) and m.core == "time"
    ]
    run()
    for hook in hooks:
        hook.remove()
    world = dist.get_world_size()
    return 2 * (world - 1) / world * sum(sizes)


def worker(rank: int, world: int, store: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(minutes=5),
    )  # fmt: skip
    torch.manual_seed(0)
    model = UNet3D(args.dim, dim_mults=(1, 2, 4), norm=args.norm).eval()
    x = torch.randn(1, 3, args.frames, args.size, args.size)
    step = torch.tensor([500])
    mesh = init_device_mesh("cpu", (world,))
    with torch.no_grad():
        whole = model(x, step)
        frame_parallel(model, mesh)
        local = shard_frames(x, mesh)
        with count_communication(model) as sent:
            part = model(local, step)
        error = max_error(gather_frames(part, mesh), whole)
        expected = formula(model, lambda: model(local, step))
        times = []
        for _ in range(args.rounds):
            dist.barrier()
            start = time.perf_counter()
            model(local, step)
            dist.barrier()
            times.append(time.perf_counter() - start)
    if rank == 0:
        print(
            f"{world:>9}{1e3 * statistics.median(times):>10.0f}{sent[0].bytes / 1e6:>11.3f}"
            f"{expected / 1e6:>12.3f}{sent[0].collectives:>13}{error:>10.1e}",
            flush=True,
        )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--norm", choices=["group", "rms"], default="group")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    heads = ("processes", 9), ("ms", 10), ("MB sent", 11), ("formula", 12), ("collectives", 13)
    print("".join(f"{name:>{width}}" for name, width in (*heads, ("error", 10))))
    for world in args.world:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(worker, (world, str(Path(folder) / "store"), args), nprocs=world)


if __name__ == "__main__":
    main()

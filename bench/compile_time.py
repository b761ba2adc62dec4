"""How long torch.compile takes before the first result, whole network or unit by unit.

    python bench/compile_time.py

Each way runs in its own process with an empty inductor cache. It reports wall and CPU time of the
first call (CPU time includes inductor's workers and is reliable on a busy machine), then the time
of a call once compiled, interleaved with the eager network.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

WAYS = ("whole", "units")


def cpu_seconds() -> float:
    return sum(
        sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )


def measure(way: str, dim: int, frames: int, size: int) -> dict[str, float]:
    """Seconds of the first call and the ratio of eager to compiled afterwards."""
    import torch

    from fastvdm import UNet3D
    from fastvdm.unet.blocks import Unit

    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64  # units with the same shape share one graph
    # Compile in this process: a worker's time is counted only after it has ended.
    torch._inductor.config.compile_threads = 1
    eager, model = UNet3D(dim, dim_mults=(1, 2, 4)).eval(), UNet3D(dim, dim_mults=(1, 2, 4)).eval()
    model.load_state_dict(eager.state_dict())
    run = model
    if way == "whole":
        run = torch.compile(model, fullgraph=True)
    else:
        for unit in model.modules():
            if isinstance(unit, Unit):
                unit.compile(fullgraph=True)
    x, step = torch.randn(1, 3, frames, size, size), torch.tensor([0.5])
    with torch.no_grad():
        want = eager(x, step)
        wall, cpu = time.perf_counter(), cpu_seconds()
        out = run(x, step)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        torch.testing.assert_close(out, want, rtol=1e-3, atol=1e-4)
        ratios = []
        for _ in range(15):
            times = []
            for fn in (eager, run):
                start = time.perf_counter()
                fn(x, step)
                times.append(time.perf_counter() - start)
            ratios.append(times[0] / times[1])
    return {"wall": wall, "cpu": cpu, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--way", choices=WAYS, help="measure here, in this process")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.dim, args.frames, args.size)))
        return
    print(f"{'way':<8}{'wall s':>8}{'CPU s':>8}{'eager / compiled':>18}", flush=True)
    for way in WAYS:
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--way", way, "--dim", str(args.dim)]
            command += ["--frames", str(args.frames), "--size", str(args.size)]
            done = subprocess.run(
                command,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        r = json.loads(done.stdout.splitlines()[-1])
        print(f"{way:<8}{r['wall']:>8.1f}{r['cpu']:>8.1f}{r['ratio']:>18.2f}", flush=True)


if __name__ == "__main__":
    main()

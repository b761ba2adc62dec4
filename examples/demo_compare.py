"""The demo's second part: the same weights in both networks; outputs, gradients and times."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastvdm import UNet3D as Unet3D

Row = dict[str, Any]  # what, dim, size, error, limit, peer and ours in seconds


def sync(result: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turns so that both see the same machine. All have run before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def compare(peer: Any, size: int, device: str, console: Console) -> list[Row]:
    """Forward and training step of a small network, forward of the README's, as a table too.

    Raises:
        SystemExit: outputs or gradients differ by more than rounding.
    """
    rows = compare_at(peer, 32, size, device, rounds=3, training=True)
    rows += compare_at(peer, 64, 64, device, rounds=2)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for column in ("peer", "fastvdm", "speed-up", "difference"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['what']}, dim {row['dim']}, 16x{row['size']}x{row['size']}",
            f"{1e3 * row['peer']:.0f} ms",
            f"{1e3 * row['ours']:.0f} ms",
            f"{row['peer'] / row['ours']:.2f}x",
            f"{row['error']:.1e}",
        )
    console.print(table)
    for row in rows:
        if not row["error"] < row["limit"]:
            raise SystemExit(f"parity is off: {row['error']:.2e} in {row['what']}")
    return rows


def compare_at(
    peer: Any, dim: int, size: int, device: str, *, rounds: int, training: bool = False
) -> list[Row]:
    torch.manual_seed(0)
    theirs = peer.Unet3D(dim=dim, dim_mults=(1, 2, 4, 8)).to(device).eval()
    ours = Unet3D.from_unet3d(theirs).eval()
    x = torch.randn(1, 3, 16, size, size, device=device)
    t = torch.randint(0, 1000, (1,), device=device)
    with torch.no_grad():
        a, b = theirs(x, t), ours(x, t)
        seconds = interleaved(
            {"peer": lambda: sync(theirs(x, t)), "ours": lambda: sync(ours(x, t))}, rounds
        )
    error = ((a - b).abs().max() / a.abs().max()).item()
    shape = {"dim": dim, "size": size}
    rows = [shape | {"what": "forward", "error": error, "limit": 1e-5} | seconds]
    if training:
        rows.append(shape | compare_training(theirs, ours, x, t))
    return rows


def compare_training(theirs: Any, ours: Any, x: Tensor, t: Tensor) -> Row:
    """Forward and backward; the largest difference over all parameter gradients, in our names."""

    def step(net: Any) -> Any:
        net.zero_grad(set_to_none=True)
        net(x, t).square().mean().backward()
        return sync(x)

    step(theirs)
    step(ours)
    # The peer's gradients, renamed as a checkpoint would be: a copy whose weights are gradients.
    carrier = copy.deepcopy(theirs)
    for p, q in zip(carrier.parameters(), theirs.parameters()):
        if q.grad is not None:  # the rotary frequencies have none
            p.data = q.grad.clone()
    expected = dict(Unet3D.from_unet3d(carrier, check=False).named_parameters())
    error = 0.0
    for name, p in ours.named_parameters():
        if p.grad is not None:
            scale = expected[name].abs().max().clamp_min(1e-12)
            error = max(error, ((p.grad - expected[name]).abs().max() / scale).item())
    seconds = interleaved({"peer": lambda: step(theirs), "ours": lambda: step(ours)}, 2)
    return {"what": "training step", "error": error, "limit": 1e-4, **seconds}

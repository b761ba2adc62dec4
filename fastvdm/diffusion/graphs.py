"""Sampling steps as CUDA graphs: recorded once, replayed for every row of the plan.

At batch 1 a step is bound by the launches of its thousand kernels; a graph makes one of them. The
buffers that a graph reads stay where they are, so a row is copied into them, and the place in the
noise stream is a number on the device beside the seeds. Rows differ in kind (whether they draw
noise, whether they differentiate): each kind has a graph of its own, and a kind with few rows, such
as the last step, which has no noise, runs as it is.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastvdm.layers.plain import hangs_on
from fastvdm.unet.network import FactorizedUNet

Outputs = tuple[Tensor, Tensor]  # x_tilde, z_next
# Records a step: (replay, the outputs that every replay overwrites).
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

FEWEST_ROWS = 4  # a recording costs the time of three steps
# Where nobody asked: a recording pays where the host is well behind the device, and it may not be.
FEWEST_ROWS_UNASKED = 16
# Values of the first level. UNet3D(64) at 16 x 64 x 64 has 2^22 a video: of eight the roof is 4 ms
# (bench/static.py), about what a host takes for its launches.
SMALL = 1 << 25
_CAPTURING = threading.Lock()  # torch captures one graph at a time


def why_not(device: torch.device, generator: torch.Generator | None, downsample: Any) -> str | None:
    """What a graph cannot hold: no CUDA device, noise from a generator, or a downsampling of the
    caller's; None where it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, the videos are on {device}"
    if generator is not None:
        return "cannot replay a torch.Generator, whose state is on the host: give seed"
    if callable(downsample):
        return (
            "does not record a downsample function of the caller, which may wait for the device "
            "or change between calls: 'average' and 'bilinear' are recorded"
        )
    return None


def decide(
    asked: bool | Literal["auto"], model: Any, shape: Sequence[int], reason: str | None
) -> bool:
    """Whether steps are recorded, where ``reason`` says why they cannot be.

    "auto" records a network that is all ours and on which nothing hangs, as of others nobody knows
    whether they wait for the device or keep state; and a small batch, of ``shape`` as the network
    sees it: a large one keeps the device busy, and a graph's memory is its own. NOT MEASURED.

    Raises:
        ValueError: ``asked`` is True and there is a reason, or it is none of the three.
    """
    if asked is True and reason is not None:
        raise ValueError(f"cuda_graph=True {reason}")
    if asked in (True, False):
        return bool(asked)
    if asked != "auto":
        raise ValueError(f"cuda_graph must be True, False or 'auto', got {asked!r}")
    if reason is not None or not isinstance(model, FactorizedUNet) or model.shards is not None:
        return False
    small = prod(shape) // shape[1] * model.stem_width <= SMALL
    return small and not _has_any_global_hook() and all(map(_ours, model.modules()))


def _ours(module: nn.Module) -> bool:
    """A module of torch's or of this package, called as it is written."""
    known = type(module).__module__.split(".")[0] in ("torch", "fastvdm")
    return known and not hangs_on(module) and module._compiled_call_impl is None


def capture_cuda(step: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """``step`` recorded as a CUDA graph on the current device.

    Raises:
        RuntimeError: something in the step waits for the device, or allocates outside of it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled and workspaces made outside of the recording
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads go on allocating.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = step()
    except RuntimeError as error:
        raise RuntimeError(
            "the sampling step cannot be recorded as a CUDA graph; a model that waits for the "
            "device (.item(), .cpu(), boolean masks) or depends on data is the usual reason: "
            "torch.cuda.set_sync_debug_mode('error') finds the line"
        ) from error
    return graph.replay, outputs


class DeviceNoise:
    """Seeds with their place in the stream, (B, 2) int64 on the device."""

    def __init__(self, seeds: Tensor) -> None:
        self.rng = torch.stack((seeds, torch.zeros_like(seeds)), dim=1)

    def draw(self, like: Tensor) -> dict[str, Any]:
        return {"rng": self.rng}


class _Graph:
    """One kind of step: its static inputs, the recording, and what that writes."""

    def __init__(self, advance: Callable[..., Outputs], z: Tensor, row: Any, noise: Any) -> None:
        self.z = z.clone()
        # Only what this kind reads is copied at each step.
        self._names = ("time", "guide", "after") if row.guided else ("time", "direct")
        self.row = row._replace(**{n: getattr(row, n).clone() for n in self._names})
        self._step = lambda: advance(self.z, self.row, noise)

    def record(self, capture: Capture) -> None:
        self._replay, self._outputs = capture(self._step)

    def run(self, z: Tensor, row: Any) -> Outputs:
        self.z.copy_(z)
        for name in self._names:
            getattr(self.row, name).copy_(getattr(row, name))
        self._replay()
        return self._outputs


class StepGraphs:
    """Advances a run by graphs where a kind of row has enough rows, else by ``advance`` itself.

    Args:
        advance: ``advance(z, row, noise) -> (x_tilde, z_next)``, a function of tensors only.
        seeds: (B,) int64 on the device.
        rows: all rows (of the sampler's plan) that will be run, in any order.
        count: draws made so far; a row that draws moves it on.
        asked: by the caller, to whom it is an error where a step cannot be recorded; else that is
            a warning, and the steps run as they are.
        capture: what records; the tests give one that calls again.
    """

    def __init__(
        self,
        advance: Callable[..., Outputs],
        seeds: Tensor,
        rows: Iterable[Any],
        count: int = 0,
        capture: Capture | None = None,
        asked: bool = True,
    ) -> None:
        self._advance, self._capture = advance, capture or capture_cuda
        self._noise, self._count, self._asked = DeviceNoise(seeds), count, asked
        kinds = Counter((row.noisy, row.guided) for row in rows)
        fewest = FEWEST_ROWS if asked else FEWEST_ROWS_UNASKED
        self._recorded = {kind for kind, n in kinds.items() if n >= fewest}
        self._graphs: dict[tuple[bool, bool], _Graph] = {}

    def __call__(self, z: Tensor, row: Any) -> Outputs:
        """(x_tilde, z_next), which the next call of the same kind overwrites."""
        if row.noisy:
            self._noise.rng[:, 1].fill_(self._count)  # a kernel's argument: no wait
            self._count += 1
        kind = (row.noisy, row.guided)
        if kind not in self._recorded:
            return self._advance(z, row, self._noise)
        if kind not in self._graphs:
            if not _CAPTURING.acquire(blocking=self._asked):  # another thread records: next time
                return self._advance(z, row, self._noise)
            graph = _Graph(self._advance, z, row, self._noise)
            try:
                with torch.cuda.device_of(z):
                    graph.record(self._capture)
            except RuntimeError as error:
                if self._asked:
                    raise
                warnings.warn(f"sampling without CUDA graphs: {error}", stacklevel=4)
                self._recorded.clear()
                return self._advance(z, row, self._noise)
            finally:
                _CAPTURING.release()
            self._graphs[kind] = graph
        return self._graphs[kind].run(z, row)

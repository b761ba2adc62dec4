"""Sampling steps as CUDA graphs: recorded once, replayed for every row of the plan.

At batch 1 a step is bound by its launches, 200 to 350 in the network alone; a graph makes them one
launch. A graph reads buffers at fixed addresses, so each row is copied into them; the position in
the noise stream is a number on the device next to the seeds. Rows differ in kind (whether they draw
noise, whether they differentiate), and each kind has its own graph. A kind with few rows is run
without one, e.g. the last step, which has no noise.
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
# Records a step. Returns a replay function and the outputs that every replay overwrites.
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]

FEWEST_ROWS = 4  # a recording costs the time of three steps
# The bound if the caller did not ask: a recording pays only if the host is the bottleneck.
FEWEST_ROWS_UNASKED = 16
# Number of values at the first level. UNet3D(64) at 16 x 64 x 64 has 2^22 per video. The roofline
# time of eight such videos is 4 ms (bench/static.py), about what the host needs for the launches.
SMALL = 1 << 25
_CAPTURING = threading.Lock()  # torch captures one graph at a time


def why_not(device: torch.device, generator: torch.Generator | None, downsample: Any) -> str | None:
    """Why a graph cannot record the run, or None: no CUDA device, noise from a generator, or a
    caller's downsampling."""
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
    """Whether steps are recorded. ``reason`` says why they cannot be, or is None.

    "auto" records small batches of a network that consists of modules of torch and fastvdm without
    hooks. Other modules may synchronise with the device or keep state. Large batches keep the
    device busy without a graph, and a graph needs memory of its own. ``shape`` is the batch as the
    network sees it. NOT MEASURED.

    Raises:
        ValueError: ``asked`` is True and there is a reason, or ``asked`` is another value.
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
    """Whether a module is of torch or fastvdm and its ``forward`` is called unchanged."""
    known = type(module).__module__.split(".")[0] in ("torch", "fastvdm")
    return known and not hangs_on(module) and module._compiled_call_impl is None


def capture_cuda(step: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """Record ``step`` as a CUDA graph on the current device.

    Raises:
        RuntimeError: the step synchronises with the device or allocates outside the graph's pool.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compile kernels and allocate workspaces before the recording
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may keep allocating.
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
    """Seeds with their position in the noise stream, (B, 2) int64 on the device."""

    def __init__(self, seeds: Tensor) -> None:
        self.rng = torch.stack((seeds, torch.zeros_like(seeds)), dim=1)

    def draw(self, like: Tensor) -> dict[str, Any]:
        return {"rng": self.rng}


class _Graph:
    """One kind of step: its static inputs, its recording and its outputs."""

    def __init__(self, advance: Callable[..., Outputs], z: Tensor, row: Any, noise: Any) -> None:
        self.z = z.clone()
        # Each step copies only what this kind reads.
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
    """Run steps as graphs if their kind has enough rows, otherwise by calling ``advance``.

    Args:
        advance: ``advance(z, row, noise) -> (x_tilde, z_next)``, a function of tensors only.
        seeds: (B,) int64 on the device.
        rows: all rows of the sampler's plan that will be run, in any order.
        count: number of draws so far; a row that draws increments it.
        capture: the function that records; the tests pass one that calls the step again.
        asked: whether the caller asked for graphs. If so, a step that cannot be recorded is an
            error; otherwise it is a warning, and the steps run without graphs.
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
        """Return (x_tilde, z_next); the next call of the same kind overwrites them."""
        if row.noisy:
            self._noise.rng[:, 1].fill_(self._count)  # a kernel argument: no synchronisation
            self._count += 1
        kind = (row.noisy, row.guided)
        if kind not in self._recorded:
            return self._advance(z, row, self._noise)
        if kind not in self._graphs:
            if not _CAPTURING.acquire(blocking=self._asked):  # another thread is recording
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

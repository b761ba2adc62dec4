"""Contests between providers: parity first, then interleaved rounds in one process.

A single timing depends on the state of the machine. So all providers of a case run once per round,
one after the other, and the reported ratio is the median over rounds of the ratio to the baseline
in the same round. A provider with a wrong result is not timed.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvdm.ops._cost import Cost
from fastvdm.runtime.extension import emulated
from fastvdm.testing import max_error

Outputs = Tensor | Sequence[Tensor]
RECOMPILE_LIMIT = 256  # for the peer: with dynamo's default, half of it silently runs eagerly
# Sizes for measuring the limits: side of a product, images, channels, bytes of a copy.
SIZES = {"cuda": (8192, 256, 256, 2**30), "cpu": (2048, 16, 256, 2**29)}
FLUSH = 256 * 2**20  # bytes, more than any L2 cache


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Disable TF32, which cuDNN's fp32 convolutions use by default, ours do not, and a reference
    should not. Outside of this context, timed code runs with torch's defaults."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [s.allow_tf32 for s in switches]
    try:
        for s in switches:
            s.allow_tf32 = False
        yield
    finally:
        for s, was in zip(switches, before):
            s.allow_tf32 = was


class Unavailable(RuntimeError):
    """A provider cannot run here; its rows are skipped with this reason."""


@dataclass(frozen=True)
class Provider:
    """One way to compute the case.

    ``build()`` makes weights, casts and compiles, and returns ``run``. ``run()`` computes the
    result; only it is timed. ``build`` raises ``Unavailable`` if it cannot run here.
    """

    build: Callable[[], Callable[[], Outputs]]
    tolerance: float  # max |out - reference| / max |reference|, over every output
    dtype: torch.dtype = torch.float32  # in which its floor is counted
    info: dict[str, Any] = field(default_factory=dict)  # anything worth recording, e.g. graphs


@dataclass(frozen=True)
class Contest:
    """The providers of one case and their reference. The first provider is the baseline."""

    reference: Callable[[], Outputs]  # fp64, or the baseline in fp32 if fp64 takes too long
    providers: Mapping[str, Provider]
    cost: Callable[[torch.dtype], Any] | None = None  # dtype -> Cost, or a list: one per part
    device: str = "cpu"
    hide_host: bool = True  # on a GPU True times the device alone (ops), False what the user sees


@dataclass
class Result:
    """The result of one provider: seconds per round, or why there are none."""

    times: list[float] = field(default_factory=list)
    error: float | None = None
    skipped: str | None = None
    failed: str | None = None
    peak_bytes: int | None = None
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def run_contest(
    contest: Contest,
    *,
    names: Sequence[str] | None = None,
    budget: float = 10.0,
    min_rounds: int = 3,
    max_rounds: int = 30,
) -> dict[str, Result]:
    """Check and time the providers ``names`` (default: all). ``budget``: seconds of timing."""
    wanted = [n for n in contest.providers if names is None or n in names]
    results = {n: Result(info=contest.providers[n].info) for n in wanted}
    torch._dynamo.reset()  # earlier cases would make the shapes of this one dynamic
    runs: dict[str, Callable[[], Outputs]] = {}
    with exact_fp32():
        reference = _tensors(contest.reference())
        for name in wanted:
            run = _admit(contest.providers[name], reference, results[name])
            if run is not None:
                runs[name] = run
    del reference
    gc.collect()
    for name, run in runs.items():
        results[name].peak_bytes = _peak_bytes(run, contest.device)
    estimate = _round(contest, runs)
    rounds = max(min_rounds, min(max_rounds, int(budget / max(sum(estimate.values()), 1e-9))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, seconds in _round(contest, runs).items():
                results[name].times.append(seconds)
    finally:
        gc.enable()
    return results


def _admit(
    provider: Provider, reference: list[Tensor], result: Result
) -> Callable[[], Outputs] | None:
    """Build one provider and compare its first result with the reference."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run = provider.build()
            out = _tensors(run())
        except (Unavailable, ImportError) as error:
            result.skipped = str(error)
            return None
        except Exception as error:  # of this provider; the others still race
            result.failed = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            return None
    fallbacks = [str(w.message) for w in caught if "uses the torch reference" in str(w.message)]
    if fallbacks:
        result.info["fallbacks"] = fallbacks
    shapes = [tuple(t.shape) for t in out], [tuple(t.shape) for t in reference]
    if shapes[0] != shapes[1]:
        result.failed = f"shapes {shapes[0]}, expected {shapes[1]}"
        return None
    result.error = max((max_error(o, r.to(o.device)) for o, r in zip(out, reference)), default=0.0)
    if not result.error <= provider.tolerance:
        result.failed = f"max error {result.error:.3g} > tolerance {provider.tolerance:.3g}"
        return None
    return run


def _tensors(out: Outputs) -> list[Tensor]:
    return [t.detach() for t in ([out] if isinstance(out, Tensor) else out)]


def _round(contest: Contest, runs: Mapping[str, Callable[[], Outputs]]) -> dict[str, float]:
    """Seconds of one call of each provider."""
    if contest.device.startswith("cuda"):
        return _cuda_round(contest, runs)
    seconds = {}
    for name, run in runs.items():
        start = time.perf_counter()
        out = run()
        seconds[name] = time.perf_counter() - start
        del out
    return seconds


def _cuda_round(contest: Contest, runs: Mapping[str, Callable[[], Outputs]]) -> dict[str, float]:
    flush = _flush_buffer(contest.device)
    seconds = {}
    for name, run in runs.items():
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        flush.zero_()  # remove data of the last call from the L2 cache
        if contest.hide_host:
            torch.cuda._sleep(4_000_000)  # about 2 ms in which the host queues the launches
        start.record()
        out = run()
        end.record()
        torch.cuda.synchronize()
        seconds[name] = start.elapsed_time(end) / 1e3
        del out
    return seconds


@functools.cache
def _flush_buffer(device: str) -> Tensor:
    return torch.empty(FLUSH, dtype=torch.int8, device=device)


def _peak_bytes(run: Callable[[], Outputs], device: str) -> int | None:
    """Memory of one call above what was held before; None if the system does not report it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed before would hide what is allocated now
        before = _status("VmRSS")
        with open("/proc/self/clear_refs", "w") as f:
            f.write("5")  # reset the peak
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, LookupError, AttributeError):
        return None


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        for line in f:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise LookupError(key)


# Used by the builds of providers.


def compiled(fn: Callable[..., Any], info: dict[str, Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile(fn)`` without a limit on graphs; its first call records the graph count.

    Shapes are static, which is best for timing."""
    if not torch.cuda.is_available() and not _has_compiler():
        raise Unavailable("torch.compile needs a C++ compiler on a CPU")
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 8 * RECOMPILE_LIMIT
    inner = torch.compile(fn, **({"dynamic": False} | options))
    counters = torch._dynamo.utils.counters

    def call(*args: Any, **kwargs: Any) -> Any:
        if "graphs" in info:
            return inner(*args, **kwargs)
        before = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        start = time.perf_counter()
        out = inner(*args, **kwargs)
        info["compile_s"] = round(time.perf_counter() - start, 1)
        info["graphs"] = counters["stats"]["unique_graphs"] - before[0]
        info["graph_breaks"] = sum(counters["graph_break"].values()) - before[1]
        return out

    return call


@functools.cache
def _has_compiler() -> bool:
    import shutil

    return any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++"))


def need_kernel(op: str, device: str) -> None:
    """Raise ``Unavailable`` if ``op`` has no kernel on ``device``, where the reference would only
    race against itself."""
    from fastvdm.runtime import dispatch

    backend = "triton" if device.startswith("cuda") else "cpu"
    if reason := dispatch.explain(op)[backend]:
        raise Unavailable(f"{backend}: {reason}")


def grads_of(fn: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor):
    """A ``run`` that returns the gradients of ``fn(*inputs)``: forward and backward together."""
    leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    wanted = [t for t in leaves if isinstance(t, Tensor)]

    def run() -> tuple[Tensor, ...]:
        y = fn(*leaves)
        return torch.autograd.grad(y, wanted, dy.to(y.dtype))

    return run


def runner(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor | None], dy: Tensor | None = None
) -> Callable[[], Outputs]:
    """A ``run`` of ``fn(*inputs)``, or with ``dy`` of its gradients."""
    if dy is not None:
        return grads_of(fn, inputs, dy)

    def run() -> Tensor:
        with torch.no_grad():
            return fn(*inputs)

    return run


def cost_of(cost: Callable[..., Cost], *args: Any, train: bool, **options: Any) -> Cost:
    """The cost of the forward, or of forward and backward, by an op's cost function."""
    ways = (False, True) if train else (False,)
    return Cost(*map(sum, zip(*(cost(*args, backward=way, **options) for way in ways))))


# The limits of this machine.


@functools.cache
def limits(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(FLOP/s of a large product in ``dtype``, bytes/s of a large copy), measured here. For an
    emulated dtype it is the product in fp32, because its own takes minutes."""
    if emulated(torch.device(device), dtype):
        dtype = torch.float32
    return _product_rate(device, dtype), _copy_rate(device)


@functools.cache
def _product_rate(device: str, dtype: torch.dtype) -> float:
    """The better of a square matrix product and a 3x3 convolution. On CPUs these are two libraries;
    on an EPYC the product reaches 0.14 of the 0.18 TFLOP/s that the convolution nearly reaches."""
    n, images, c, _ = SIZES[device.split(":")[0]]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matrix = 2 * n**3 / _best(lambda: a @ b, device)
    x = torch.randn(images, c, 32, 32, device=device, dtype=dtype)
    w = torch.randn(c, c, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    flops = 2 * 9 * c * c * images * 32 * 32
    return max(matrix, flops / _best(lambda: F.conv2d(x, w, padding=1), device))


@functools.cache
def _copy_rate(device: str) -> float:
    size = SIZES[device.split(":")[0]][-1]
    a = torch.zeros(size, dtype=torch.int8, device=device)
    b = torch.zeros_like(a)
    return 2 * size / _best(lambda: b.copy_(a), device)


def _best(run: Callable[[], Tensor], device: str, rounds: int = 5) -> float:
    contest = Contest(run, {}, device=device, hide_host=False)
    return min(_round(contest, {"x": run})["x"] for _ in range(rounds + 1))


def summary(contest: Contest, results: Mapping[str, Result], name: str) -> dict[str, Any]:
    """The figures beside a provider's times: ratio, rates, % of the floor, error, memory."""
    provider, result = contest.providers[name], results[name]
    info: dict[str, Any] = {
        "provider": name,
        "dtype": str(provider.dtype).removeprefix("torch."),
        "median_ms": 1e3 * result.median,
        "max_error": result.error,
        "rounds": len(result.times),
    }
    base = next((r for n in contest.providers if (r := results.get(n)) and r.times), None)
    if base is not None:
        info["baseline"] = next(n for n, r in results.items() if r is base)
        info["ratio"] = statistics.median(b / t for b, t in zip(base.times, result.times))
    if result.peak_bytes is not None:
        info["peak_mib"] = result.peak_bytes / 2**20
    if contest.cost is not None:
        found = contest.cost(provider.dtype)
        costs = found if isinstance(found, list) else [found]
        flops, bandwidth = limits(contest.device, provider.dtype)
        floor = sum(max(c.flops / flops, c.bytes / bandwidth) for c in costs)
        info["gflops"] = sum(c.flops for c in costs) / result.median / 1e9
        info["gbs"] = sum(c.bytes for c in costs) / result.median / 1e9
        info["floor_ms"] = 1e3 * floor
        info["floor_pct"] = 100 * floor / result.median
    return info | result.info


class ReplayClock:
    """Passes durations measured elsewhere to pytest-benchmark through its ``timer`` option.

    pytest-benchmark times one test after the other. The rounds here are interleaved, so
    ``run_contest`` measures them and each provider's test replays its own.
    """

    __name__ = "interleaved"

    def __init__(self) -> None:
        self.now = 0.0
        self._pending: list[float] = []

    def load(self, times: Sequence[float]) -> None:
        self._pending = list(reversed(times))

    def advance(self) -> None:
        self.now += self._pending.pop()

    def __call__(self) -> float:
        return self.now


CLOCK = ReplayClock()

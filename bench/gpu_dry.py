"""A simulated GPU: every line of ``make gpu`` runs on a CPU before it runs on a device.

``start()`` makes this process see an H200. Tensors asked for on "cuda" are on the CPU. Triton's
kernels are interpreted or, if FASTVDM_EMULATE names an architecture, compiled for it and emulated
(tests/ptxemu). ``torch.cuda`` answers like a device, with a clock that advances by minutes at each
look. A CUDA graph is a list of operators that is run again. ``torch.compile`` returns the function
unchanged, and all shapes of bench/calls.py are tiny. The figures mean nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

EMULATED = int(os.environ.get("FASTVDM_EMULATE", "0"))
if not EMULATED:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.bfloat16 = torch.float32  # the interpreter truncates bf16 and takes minutes for it


def _here(value: Any) -> Any:
    """ "cpu" for "cuda"; other values unchanged."""
    if isinstance(value, str | torch.device) and str(value).startswith("cuda"):
        return "cpu" if isinstance(value, str) else torch.device("cpu")
    return value


class _OnCpu(TorchFunctionMode):
    """Calls every function of torch with the CPU if it is given the GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        given = {k: _here(v) for k, v in (kwargs or {}).items()}
        return func(*(_here(a) for a in args), **given)


def _on_cpu(thread: threading.Thread, run: Any = threading.Thread.run) -> None:
    with _OnCpu():  # a mode belongs to one thread
        run(thread)


class Event:
    """An event with a simulated clock."""

    now = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        Event.now += 1e5  # so large that there are as few rounds as possible
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


class Stream:
    def wait_stream(self, other: Stream) -> None: ...


class _Recorded(TorchDispatchMode):
    def __init__(self, calls: list) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class CUDAGraph:
    """The operators of a step; a replay runs them on the same tensors."""

    def __init__(self) -> None:
        self.calls: list = []

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.calls:
                if func.is_view:
                    continue
                new = func(*args, **kwargs)
                if func._schema.is_mutable:
                    continue
                for old, made in zip(*(_tensors(t) for t in (out, new))):
                    old.detach().copy_(made)


def _tensors(out: Any) -> list[torch.Tensor]:
    found = out if isinstance(out, tuple | list) else [out]
    return [t for t in found if isinstance(t, torch.Tensor) and t.numel()]


@contextlib.contextmanager
def _graph(graph: CUDAGraph, stream: Stream | None = None, **_: Any) -> Iterator[None]:
    with _Recorded(graph.calls):
        yield


_PROPERTIES = types.SimpleNamespace(
    major=9, minor=0, name="made up", multi_processor_count=132, total_memory=2**37
)

_ANSWERS: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "device": lambda *_: contextlib.nullcontext(),
    "device_of": lambda *_: contextlib.nullcontext(),
    "get_device_name": lambda *_: _PROPERTIES.name,
    "get_device_capability": lambda *_: (9, 0),
    "get_device_properties": lambda *_: _PROPERTIES,
    "synchronize": lambda *_: None,
    "empty_cache": lambda: None,
    "manual_seed_all": lambda *_: None,
    "memory_allocated": lambda *_: 0,
    "max_memory_allocated": lambda *_: 2**20,
    "reset_peak_memory_stats": lambda *_: None,
    "_sleep": lambda *_: None,
    "stream": lambda *_: contextlib.nullcontext(),
    "current_stream": lambda *_: Stream(),
    "graph": _graph,
    "Event": Event,
    "Stream": Stream,
    "CUDAGraph": CUDAGraph,
}


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, _here(device))


_PROGRAMS = {
    "ptxas-next": "echo 'Cuda compilation tools, release 13.5, V13.5.0'",
    "compute-sanitizer": 'while [ "${1#--}" != "$1" ]; do shift 2; done; exec "$@"',
}


def start(out: Path) -> None:
    """Simulate the GPU for the rest of the process. ``out`` gets programs of a GPU machine."""
    programs = out / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    for name, line in _PROGRAMS.items():
        part = programs / f".{name}.{os.getpid()}"
        part.write_text(f"#!/bin/sh\n{line}\n")
        part.chmod(0o755)
        part.replace(programs / name)
    os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before its interpreter could be chosen")
    for name, answer in _ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch.compile = lambda fn, **_: fn  # type: ignore[assignment]
    torch.Generator = _Generator  # type: ignore[misc]
    autocast = torch.autocast
    torch.autocast = lambda kind, *a, **k: autocast(_here(kind), *a, **k)  # type: ignore[misc,assignment]
    _OnCpu().__enter__()
    threading.Thread.run = _on_cpu  # type: ignore[method-assign]
    _our_own()


TINY_PRESET = dict(
    dim=8, dim_mults=(1, 2), image_size=4, attn_resolutions=(2,), attn_dim_head=8, num_blocks=1,
    resnet_groups=4, emb_dim=16,
)  # fmt: skip


def _flex_attention(q, k, v, score_mod=None):
    """FlexAttention has no backward on a CPU."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if score_mod is not None:
        places = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
        scores = score_mod(scores, *places)
    return scores.softmax(-1) @ v


_held = contextlib.ExitStack()
_CUDA: Any = types.SimpleNamespace(type="cuda")  # a torch.device would become a CPU


def _our_own() -> None:
    """Patch the parts of fastvdm and the benchmarks that ask for a tensor's device or size."""
    import calls
    import guidance_bench
    import harness
    import interpreter
    import unet_bench
    from torch.nn.attention import flex_attention as flex

    from fastvdm import UNet3D
    from fastvdm.diffusion import graphs, setup
    from fastvdm.ops import _call, space_conv
    from fastvdm.runtime import dispatch

    flex.flex_attention = _flex_attention
    preset = UNet3D.from_preset
    UNet3D.from_preset = lambda name: preset(name, **TINY_PRESET)  # type: ignore[method-assign]
    why_not = graphs.why_not
    setup.why_not = lambda device, *rest: why_not(_CUDA, *rest)
    _call._AUTO["cpu"] = "triton"
    if EMULATED:
        from ptxemu import emulate

        _held.enter_context(emulate(EMULATED, check=False))
    else:
        dispatch._DEVICES["triton"] = ("cuda", "cpu")
        space_conv.INTERPRETED = False  # otherwise it refuses bf16, which is fp32 here
        interpreter.hasten()
    for name, s in calls.SHAPES.items():
        calls.SHAPES[name] = replace(
            s, frames=2, height=4, width=8, channels=16, heads=2, head_dim=16, groups=4
        )
    calls.GPU_BATCH = 2
    calls.SHAPES["l0"] = replace(calls.SHAPES["l0"], frames=6)  # five frames are given
    for nets in (unet_bench.CASES, unet_bench.LARGE):
        for name, net in nets.items():
            nets[name] = replace(net, dim=8, dim_mults=(1, 2), frames=2, size=4, gpu_batch=1)
    guidance_bench.NET |= dict(
        dim=8, dim_mults=(1, 2), resnet_groups=2, attn_heads=2, attn_dim_head=16
    )
    harness.SIZES["cuda"] = (64, 1, 16, 2**10)
    harness.FLUSH = 2**10
    contest = harness.run_contest
    harness.run_contest = lambda made, names=None, **_: contest(made, names=names, min_rounds=1)
    import tune  # after harness is patched

    tune.THREADS = 1  # the interpreter supports one thread

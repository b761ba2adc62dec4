"""Which implementations an op has, and why one of them does not take a call.

Each op states this once, in a generator beside the op that yields (implementation, why not) in
order of preference. It is plain Python on dtypes and sizes, so ``torch.compile`` traces through it.
``select`` (``fastvdm.ops._call``) takes the first implementation that can; ``explain``, ``fastvdm
info``, tests and benchmarks read the generator too.

    @implementations("norm_act", "norm_act_fwd", "norm_act_bwd")
    def _(x, kind, channels):
        yield "cpu", FP64 if x.dtype == torch.float64 else None
        yield "triton", None

"cpu" and "triton" are our kernels. They are skipped on other devices and if another backend is
forced. Other names are the op's own: "library" is torch's kernels behind our op, "torch" one call
of torch's own, "parts" a composition of other ops. "reference" always comes last, unnamed.

A reason means a fallback, which warns, or raises under FASTVDM_STRICT=1. The exceptions:

                 backend "auto"       backend forced by name
    ByDesign     skipped silently     skipped silently: the next one belongs to that backend too
    ByDefault    skipped silently     a fallback
    ByName       skipped silently     takes the call
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvdm.runtime import extension
from fastvdm.runtime.device import INTERPRETED, facts

KERNELS = ("cpu", "triton")
_DEVICES = {"triton": ("cuda", "cpu") if INTERPRETED else ("cuda",), "cpu": ("cpu",)}


class FallbackError(RuntimeError):
    """A kernel exists for this device but is not installed or cannot take the call, and
    FASTVDM_STRICT=1."""


class ByDesign(str):
    """A reason that is a choice: the next implementation is meant for such calls, e.g. oneDNN for a
    1x1 convolution, or other ops for a block that exceeds the registers."""


class ByDefault(ByDesign):
    """A choice only if the backend is not forced by name, e.g. fp64 on a CPU. A caller who forces
    it is told that it cannot take the call."""


class ByName(ByDesign):
    """A reason to use an implementation only if a backend is forced by name: a kernel for its own
    backend, a composition for any."""


Implementations = Iterator[tuple[str, str | None]]  # (name, why not), yielded by a generator
NO_KERNEL = ByDesign("no kernel for this op")
FP64 = ByDefault("fp64 has no kernel")
# The tiles are for the shared memory and matrix instructions from Ampere on: compiled for sm_75,
# some exceed its 64 KiB or spill 36 KB.
OLDEST = 80
NO_TRITON = 'triton is not installed: pip install "triton>=3.6"'


@dataclass(frozen=True)
class _Op:
    implementations: Callable[..., Implementations]
    off: dict[str, str | None]  # backend -> why it is off, None if it can be used
    examples: Callable[[torch.device], dict[str, tuple]]


OPS: dict[str, _Op] = {}


def implementations(
    op: str,
    *launchers: str,
    backends: tuple[str, ...] = KERNELS,
    examples: Callable[[torch.device], dict[str, tuple]],
) -> Callable[[Callable[..., Implementations]], Callable[..., Implementations]]:
    """Decorate the generator of the implementations of ``op``; see the head of this file.

    Args:
        op: name of the op.
        launchers: what each of ``backends`` must have, e.g. "norm_act_fwd". The C++ backend is off
            if its extension lacks one.
        backends: the backends that have kernels for the op.
        examples: for ``fastvdm info``: kind of call -> arguments of the generator.
    """

    def announce(generator: Callable[..., Implementations]) -> Callable[..., Implementations]:
        off: dict[str, str | None] = dict.fromkeys(KERNELS, NO_KERNEL)
        if "triton" in backends:
            off["triton"] = NO_TRITON if importlib.util.find_spec("triton") is None else None
        if "cpu" in backends:
            absent = [n for n in launchers if not extension.has_launcher(f"{n}_cpu")]
            off["cpu"] = extension.reason_off() or (extension.lacks(absent[0]) if absent else None)
        OPS[op] = _Op(generator, off, examples)
        return generator

    return announce


def off_on(op: str, backend: str, device: torch.device) -> str | None:
    """Why no call of ``op`` on ``device`` can run on ``backend``; None if some can."""
    off = OPS[op].off[backend]
    if off is None and device.type not in _DEVICES[backend]:
        hint = " without TRITON_INTERPRET=1" if backend == "triton" else ""
        return f"{backend} does not run on {device.type}{hint}"
    if off is None and backend == "triton" and not INTERPRETED:
        return unsuited(device) or no_launch()
    return off


def _lacking() -> str | None:
    """What is missing to compile the C code of Triton's first launch (triton/runtime/build.py of
    Triton 3.6)."""
    named = os.environ.get("CC")
    if named is not None and shutil.which(named) is None:
        return f"CC={named} is no program"
    if named is None and not (shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler: gcc, clang or what CC names"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_paths(scheme=scheme)["include"]
    more = (os.environ.get(name, "").split(":") for name in ("CPATH", "C_INCLUDE_PATH"))
    if not any(os.path.isfile(os.path.join(d, "Python.h")) for d in (include, *sum(more, []))):
        return f"no Python.h in {include} (Debian's package python3-dev)"
    return None


@functools.cache
def _probe() -> str | None:
    lacking = _lacking() if sys.platform == "linux" else None  # other platforms build differently
    home = os.path.join(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, "cache"))
    if lacking is None or next(cache.glob("*/*_utils*.so"), None):
        return None
    return f"Triton cannot launch: {lacking}"


def no_launch() -> str | None:
    """Why Triton cannot launch kernels on a GPU here, or None. Its first launch compiles C against
    Python.h unless its cache has the result. This checks the same places, once, without importing
    or launching anything."""
    return _probe()


def unsuited(device: torch.device) -> str | None:
    """Why our Triton kernels do not run on this GPU, or None."""
    if torch.version.hip is not None:  # its devices are of type "cuda" too
        return "the Triton kernels are for NVIDIA GPUs, and this torch is built for ROCm"
    if not torch.cuda.is_initialized():  # the device is made up
        return None
    found = facts(device)
    if not found.is_gpu or found.capability >= OLDEST:
        return None
    return f"the Triton kernels need sm_{OLDEST} or later, {found.name} is sm_{found.capability}"


# Dynamo calls these while tracing, but does not trace into them.
_traced_over: Any
for _traced_over in (no_launch, unsuited):
    # torch.compiler.assume_constant_result imports dynamo.
    _traced_over._dynamo_marked_constant = True


def explain(op: str, *call: Any) -> dict[str, str | None]:
    """Map each implementation to the reason why it does not take this call (None if it can), in
    order of preference, followed by kernels that the op lacks. Without a call: our kernels, and why
    they are off."""
    entry = OPS[op]
    off = dict(entry.off)
    if off["triton"] is None and not INTERPRETED and torch.cuda.is_available():
        torch.cuda.init()
        off["triton"] = unsuited(torch.device("cuda")) or no_launch()
    if not call:
        return off
    return {name: off.get(name) or why for name, why in entry.implementations(*call)} | {
        name: NO_KERNEL for name in KERNELS if off[name] is NO_KERNEL
    }


def registered_ops() -> tuple[str, ...]:
    return tuple(OPS)

"""Which implementations an op has, and why one of them does not take a call.

An op says so once: a generator yields, in order of preference, (implementation, why not), and
stands beside the op, in plain Python on dtypes and sizes, so that ``torch.compile`` traces through
it. ``select`` (``fastvdm.ops._call``) takes the first that can; ``explain``, ``fastvdm info``,
tests and benchmarks read it too.

    @implementations("norm_act", "norm_act_fwd", "norm_act_bwd")
    def _(x, kind, channels):
        yield "cpu", FP64 if x.dtype == torch.float64 else None
        yield "triton", None

"cpu" and "triton" are our kernels; they are passed over on other devices and where another backend
is asked for. Any other name is the op's own: "library", torch's kernels behind our op; "torch", one
call of torch's own; "parts", a composition of other ops. "reference" needs no mention: it is last.

A reason is a fallback, which warns or, under FASTVDM_STRICT=1, raises; but for these:

                 by default               the backend asked for by name
    ByDesign     passed over in silence   the same: what comes after is that backend's way, too
    ByDefault    passed over in silence   a fallback
    ByName       passed over in silence   it takes the call
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
from fastvdm.runtime.device import INTERPRETED

KERNELS = ("cpu", "triton")
_DEVICES = {"triton": ("cuda", "cpu") if INTERPRETED else ("cuda",), "cpu": ("cpu",)}


class FallbackError(RuntimeError):
    """A kernel exists for this device but is not installed or cannot take the call, and
    FASTVDM_STRICT=1."""


class ByDesign(str):
    """A reason that is a choice: what comes after is the implementation of such calls, as oneDNN is
    of a 1x1 convolution and other ops are of a block that exceeds the registers."""


class ByDefault(ByDesign):
    """A choice only as long as nobody asks for the backend by name, as of fp64 on a CPU: who does
    is told that it cannot."""


class ByName(ByDesign):
    """A reason to take this implementation only where a backend is asked for by name: a kernel
    where that is its own, a composition for any."""


Implementations = Iterator[tuple[str, str | None]]  # what a generator yields: (name, why not)
NO_KERNEL = ByDesign("no kernel for this op")
FP64 = ByDefault("fp64 has no kernel")
NO_TRITON = 'triton is not installed: pip install "triton>=3.6"'


@dataclass(frozen=True)
class _Op:
    implementations: Callable[..., Implementations]
    off: dict[str, str | None]  # backend -> why it is off, None when it can be used
    examples: Callable[[torch.device], dict[str, tuple]]


OPS: dict[str, _Op] = {}


def implementations(
    op: str,
    *launchers: str,
    backends: tuple[str, ...] = KERNELS,
    examples: Callable[[torch.device], dict[str, tuple]],
) -> Callable[[Callable[..., Implementations]], Callable[..., Implementations]]:
    """Decorates the generator of ``op``'s implementations, see the head of this file.

    Args:
        launchers: what each of ``backends`` must have, e.g. "norm_act_fwd"; without one in the C++
            extension it is off.
        examples: what ``fastvdm info`` shows: kind of call -> arguments of the generator.
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
    """Why no call of ``op`` on ``device`` can run on ``backend``; None when some can."""
    off = OPS[op].off[backend]
    if off is None and device.type not in _DEVICES[backend]:
        hint = " without TRITON_INTERPRET=1" if backend == "triton" else ""
        return f"{backend} does not run on {device.type}{hint}"
    if off is None and backend == "triton" and not INTERPRETED:
        return no_launch()
    return off


def _lacking() -> str | None:
    """What the C of Triton's first launch lacks here, by triton/runtime/build.py of Triton 3.6."""
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
    lacking = _lacking() if sys.platform == "linux" else None  # Triton is built otherwise elsewhere
    home = os.path.join(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton")
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, "cache"))
    if lacking is None or next(cache.glob("*/*_utils*.so"), None):
        return None
    return f"Triton cannot launch: {lacking}"


def no_launch() -> str | None:
    """Why Triton cannot launch kernels on a GPU here, or None. At its first launch it compiles C
    against Python.h, unless its cache holds the result. Looked for in the same places, once, and
    without importing or launching anything."""
    return _probe()


# Dynamo calls it while it traces, and traces nothing of it.
_traced_over: Any = no_launch
_traced_over._dynamo_marked_constant = True  # torch.compiler.assume_constant_result imports dynamo


def explain(op: str, *call: Any) -> dict[str, str | None]:
    """Implementation -> why it does not take this call (None: it can), in order of preference; then
    our kernels that the op has not. Without a call: our kernels, and why they are off."""
    entry = OPS[op]
    off = dict(entry.off)
    if off["triton"] is None and not INTERPRETED and torch.cuda.is_available():
        off["triton"] = no_launch()
    if not call:
        return off
    return {name: off.get(name) or why for name, why in entry.implementations(*call)} | {
        name: NO_KERNEL for name in KERNELS if off[name] is NO_KERNEL
    }


def registered_ops() -> tuple[str, ...]:
    return tuple(OPS)

"""Which implementation takes an op call, and why the others do not.

An op says so once: a generator yields, in order of preference, (implementation, why not), and
stands beside the op, in plain Python on dtypes and sizes, so that ``torch.compile`` traces through
it. ``select`` takes the first that can; ``explain``, ``fastvdm info``, tests and benchmarks read it
too.

    @implementations("norm_act", "norm_act_fwd", "norm_act_bwd")
    def _(x, kind, channels):
        yield "cpu", ByDesign("fp64 runs on the torch reference") if x.dtype == ... else None
        yield "triton", None

"cpu" and "triton" are our kernels; they are passed over on other devices and where another backend
is asked for. Any other name is the op's own: "library", torch's kernels behind our op; "torch", one
call of torch's own; "parts", a composition of other ops. "reference" needs no mention: it is last.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastvdm.runtime import config, extension
from fastvdm.runtime.device import INTERPRETED

KERNELS = ("cpu", "triton")
# The Triton interpreter is a test device: only ever chosen by name.
_AUTO = {"cuda": "triton", "cpu": "cpu"}
_DEVICES = {"triton": ("cuda", "cpu") if INTERPRETED else ("cuda",), "cpu": ("cpu",)}


class FallbackError(RuntimeError):
    """A kernel exists for this device but is not installed or cannot take the call, and
    FASTVDM_STRICT=1."""


class ByDesign(str):
    """A reason that is a choice: what comes after is the implementation of such calls (fp64 on a
    CPU). Neither a warning nor, in strict mode, an error, unless the backend was asked for by name
    and the reference is all that comes after."""


class ByName(ByDesign):
    """A reason to take this implementation only where a backend is asked for by name: a kernel
    where that is its own, a composition for any."""


Implementations = Iterator[tuple[str, str | None]]
NO_KERNEL = ByDesign("no kernel for this op")
NO_TRITON = 'triton is not installed: pip install "triton>=3.6"'


@dataclass(frozen=True)
class _Op:
    implementations: Callable[..., Implementations]
    off: dict[str, str | None]  # backend -> why it is off, None when it can be used
    examples: Callable[[torch.device], dict[str, tuple]]


_OPS: dict[str, _Op] = {}
_warned: set[str] = set()


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
        _OPS[op] = _Op(generator, off, examples)
        return generator

    return announce


def backend_in_force() -> str:
    """The configured backend, "auto" or a name; "reference" inside forward-mode autograd and the
    transforms of ``torch.func`` (vmap, grad, vjp, jvp, ...), whatever was configured.

    The kernels have neither tangents nor rules for batches, and would lose the former in silence;
    plain torch has both. As with ``ByDesign`` this is no fallback: no warning, no error in strict
    mode.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    # Dynamo folds it into a constant, behind a guard.
    if torch._C._functorch.get_dynamic_layer_stack_depth():
        return "reference"
    return config.active.backend


def off_on(op: str, backend: str, device: torch.device) -> str | None:
    """Why no call of ``op`` on ``device`` can run on ``backend``; None when some can."""
    off = _OPS[op].off[backend]
    if off is None and device.type not in _DEVICES[backend]:
        hint = " without TRITON_INTERPRET=1" if backend == "triton" else ""
        return f"{backend} does not run on {device.type}{hint}"
    if off is None and backend == "triton" and not INTERPRETED:
        return no_launch()
    return off


def choose(op: str, device: torch.device, call: tuple) -> tuple[str, tuple | None]:
    """(implementation, what was lost): the latter None, or (backend, why it is off, why it refuses)
    of a kernel that should have taken the call."""
    forced = backend_in_force()
    if forced == "reference":
        return forced, None
    kernel = _AUTO.get(device.type) if forced == "auto" else forced
    entry = _OPS[op]
    lost: tuple | None = None
    meant: tuple | None = None
    for name, why_not in entry.implementations(*call):
        by_name = forced != "auto" and isinstance(why_not, ByName)
        if name not in KERNELS:
            if why_not is None or by_name:
                return name, lost
        elif name == kernel:
            if why_not is None or by_name:
                off = entry.off[name] if name == device.type else off_on(op, name, device)
                if off is None:
                    return name, None
                lost = name, off, None
            elif not isinstance(why_not, ByDesign):
                lost = name, off_on(op, name, device), why_not
            elif forced != "auto":
                meant = name, off_on(op, name, device), why_not
    if lost is None and forced != "auto":
        lost = meant or (forced, NO_KERNEL, None)
    return "reference", lost


def select(op: str, device: torch.device, *call: Any) -> str:
    """The implementation of this call of ``op``, whose generator takes ``call``.

    Raises:
        FallbackError: a kernel is missing or refuses the call, and FASTVDM_STRICT=1.
    """
    name, lost = choose(op, device, call)
    if lost is not None:
        _fallback(op, *lost)
    return name


def _fallback(op: str, backend: str, off: str | None, reason: str | None) -> None:
    if config.active.strict:
        raise FallbackError(f"{op} fell back to the reference: {off or f'{backend}: {reason}'}")
    if off is not None:  # of every op, so it is said once
        _warn(f"fastvdm runs on its torch reference: {off} ({_MEANT})")
    else:
        _warn(f"fastvdm.{op} uses the torch reference: {backend}: {reason}")


_MEANT = "if that is meant: FASTVDM_BACKEND=reference"


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=5)


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


# Dynamo calls these while it traces, and traces nothing of them.
_traced_over: tuple[Any, ...] = (_warn, no_launch)
for _f in _traced_over:
    _f._dynamo_marked_constant = True  # torch.compiler.assume_constant_result imports dynamo


def explain(op: str, *call: Any) -> dict[str, str | None]:
    """Implementation -> why it does not take this call (None: it can), in order of preference; then
    our kernels that the op has not. Without a call: our kernels, and why they are off."""
    entry = _OPS[op]
    off = dict(entry.off)
    if off["triton"] is None and not INTERPRETED and torch.cuda.is_available():
        off["triton"] = no_launch()
    if not call:
        return off
    return {name: off.get(name) or why for name, why in entry.implementations(*call)} | {
        name: NO_KERNEL for name in KERNELS if off[name] is NO_KERNEL
    }


def examples(op: str, device: torch.device) -> dict[str, str]:
    """Kind of call -> the implementation that takes it on ``device``."""
    return {kind: choose(op, device, call)[0] for kind, call in _OPS[op].examples(device).items()}


def registered_ops() -> tuple[str, ...]:
    return tuple(_OPS)


@functools.cache
def _of_extension(name: str) -> Any:
    return getattr(torch.ops.fastvdm_C, f"{name}_cpu").default


def launcher(stem: str, name: str, backend: str) -> Any:
    """A backend's launcher, in the file ``stem``: ``norm_act_fwd`` of Triton, in C++ registered as
    ``norm_act_fwd_cpu``. Only called inside opaque op bodies."""
    if backend == "cpu":
        return _of_extension(name)
    if backend == "library":
        return getattr(importlib.import_module(f"fastvdm.kernels.{stem}_library"), name)
    launch = getattr(importlib.import_module(f"fastvdm.kernels.{stem}"), name)
    return launch if INTERPRETED else _on_device(launch)


def _on_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """On the device of its tensors: a Triton launch goes to the current one."""

    def call(*args: Any) -> Any:
        with torch.cuda.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
            return launch(*args)

    return call


def autocast_on(device: str) -> bool:
    """Whether autocast is on for this type of device; devices such as meta have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a matrix op on ``x`` runs in: autocast's where it is on, else ``x``'s own.

    As torch's autocast does, fp64 is left alone.
    """
    device, dtype = x.device.type, x.dtype
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype

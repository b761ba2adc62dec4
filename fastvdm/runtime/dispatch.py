"""Which backend takes an op call, and why the others do not.

An op registers its launchers once (``register``). Its public function asks ``select`` for a backend
name, in plain Python on shapes and dtypes so that ``torch.compile`` traces through it; the custom
op's opaque body asks ``launchers`` for the namespace that holds the kernels.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastvdm.runtime import extension
from fastvdm.runtime.config import get_config

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The Triton interpreter is a test device: only ever chosen by name.
_AUTO = {"cuda": "triton", "cpu": "cpu"}
_DEVICES = {"triton": ("cuda", "cpu") if INTERPRET else ("cuda",), "cpu": ("cpu",)}


class FallbackError(RuntimeError):
    """A kernel exists for this device but is not installed or cannot take the call, and
    FASTVDM_STRICT=1."""


class ByDesign(str):
    """A reason from ``unsupported`` that is a choice: the reference is the implementation of such
    calls on that device (fp64 on a CPU). Neither a warning nor, in strict mode, an error, unless
    the backend was asked for by name."""


@dataclass(frozen=True)
class _Op:
    stem: str
    unsupported: Callable[..., str | None]
    off: dict[str, str | None]  # backend -> why it is off, None when it can be used


NO_KERNEL = ByDesign("no kernel for this op")
NO_TRITON = 'triton is not installed: pip install "triton>=3.6"'

_OPS: dict[str, _Op] = {}
_warned: set[str] = set()


def register(
    op: str,
    stem: str,
    names: tuple[str, ...],
    unsupported: Callable[..., str | None],
    backends: tuple[str, ...] = ("triton", "cpu"),
) -> None:
    """Announce op ``op``, whose launchers ``names`` live in the file ``stem`` of each backend.

    ``unsupported(backend, *args, **kwargs)`` is the op's own predicate: why the backend cannot
    take this call, or None.
    """
    off: dict[str, str | None] = {}
    for backend in ("triton", "cpu"):
        if backend not in backends:
            off[backend] = NO_KERNEL
        elif backend == "triton":
            off[backend] = NO_TRITON if importlib.util.find_spec("triton") is None else None
        else:
            absent = [n for n in names if not extension.has_launcher(f"{n}_{backend}")]
            off[backend] = extension.reason_off() or (
                extension.lacks(absent[0]) if absent else None
            )
    _OPS[op] = _Op(stem, unsupported, off)


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
    return get_config().backend


def wanted(device: torch.device) -> str:
    """The backend that calls on ``device`` ask for: "triton", "cpu" or "reference"."""
    forced = backend_in_force()
    return _AUTO.get(device.type, "reference") if forced == "auto" else forced


def off_on(op: str, backend: str, device: torch.device) -> str | None:
    """Why no call of ``op`` on ``device`` can run on ``backend``; None when some can."""
    off = _OPS[op].off[backend]
    if off is None and device.type not in _DEVICES[backend]:
        hint = " without TRITON_INTERPRET=1" if backend == "triton" else ""
        return f"{backend} does not run on {device.type}{hint}"
    if off is None and backend == "triton" and not INTERPRET:
        return no_launch()
    return off


def select(op: str, device: torch.device, *args: Any, **kwargs: Any) -> str:
    """The backend for this call: "triton", "cpu" or "reference".

    Raises:
        FallbackError: the kernel is missing or refuses the call, and FASTVDM_STRICT=1.
    """
    backend = wanted(device)
    if backend == "reference":
        return backend
    off = off_on(op, backend, device)
    # Asked of a backend that is off, too: what it leaves to the reference by design is no loss.
    reason = off
    if not isinstance(off, ByDesign):
        reason = _OPS[op].unsupported(backend, *args, **kwargs)
    if off is None and reason is None:
        return backend
    if not isinstance(reason, ByDesign) or get_config().backend == backend:
        _fallback(op, backend, off, reason)
    return "reference"


def missing_extension(op: str) -> None:
    """For a call that the C++ kernels would take, and that ``select`` does not see: a fallback."""
    _fallback(op, "cpu", extension.reason_off() or extension.lacks(op), None)


def _fallback(op: str, backend: str, off: str | None, reason: str | None) -> None:
    if get_config().strict:
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


def explain(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Per backend, why it cannot take this call (None: it can). Without args: why it is off."""
    entry = _OPS[op]
    out = {}
    for backend, off in entry.off.items():
        if off is None and backend == "triton" and not INTERPRET and torch.cuda.is_available():
            off = no_launch()
        out[backend] = off
        if off is None and (args or kwargs):
            out[backend] = entry.unsupported(backend, *args, **kwargs)
    return out


def registered_ops() -> tuple[str, ...]:
    return tuple(_OPS)


class _Extension:
    """The C++ launchers, named as in ``kernels/``: ``x_fwd`` → ``x_fwd_cpu``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.fastvdm_C, f"{name}_cpu")


_EXTENSION = _Extension()


class _OnDevice:
    """Triton launchers, on the device of their tensors: a launch goes to the current one."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        launch = getattr(self._module, name)

        def call(*args: Any) -> Any:
            with torch.cuda.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
                return launch(*args)

        return call


def launchers(stem: str, backend: str) -> Any:
    """The namespace that holds a backend's launchers. Only called inside opaque op bodies."""
    if backend == "triton":
        module = importlib.import_module(f"fastvdm.kernels.{stem}")
        return module if INTERPRET else _OnDevice(module)
    return _EXTENSION


def autocast_on(device: str) -> bool:
    """Whether autocast is on for this type of device; devices such as meta have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a matrix op on ``x`` runs in: autocast's where it is on, else ``x``'s own.

    As torch's autocast does, fp64 is left alone.
    """
    if x.dtype != torch.float64 and autocast_on(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype

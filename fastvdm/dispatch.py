"""Which backend takes an op call, and why the others do not.

An op registers its launchers once (``register``). Its public function asks ``select`` for a backend
name, in plain Python on shapes and dtypes so that ``torch.compile`` traces through it; the custom
op's opaque body asks ``launchers`` for the namespace that holds the kernels.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from fastvdm import _ext
from fastvdm.config import get_config

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"

# In order of preference. The Triton interpreter is a test device: only ever chosen by name.
_AUTO = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
_DEVICES = {
    "triton": ("cuda", "cpu") if INTERPRET else ("cuda",),
    "cpu": ("cpu",),
    "cuda": ("cuda",),
}


class FallbackError(RuntimeError):
    """A kernel exists for this device but cannot take the call, and FASTVDM_STRICT=1."""


class ByDesign(str):
    """A reason from ``unsupported`` that is a choice: the reference is the implementation of such
    calls on that device (fp64 on a CPU). Neither a warning nor, in strict mode, an error, unless
    the backend was asked for by name."""


@dataclass(frozen=True)
class _Op:
    stem: str
    unsupported: Callable[..., str | None]
    off: dict[str, str | None]  # backend -> why it is off, None when it can be used


_OPS: dict[str, _Op] = {}
_warned: set[tuple[str, str]] = set()


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
    for backend in ("triton", "cpu", "cuda"):
        if backend not in backends:
            off[backend] = "no kernel for this op"
        elif backend == "triton":
            missing = importlib.util.find_spec("triton") is None
            off[backend] = "triton is not installed" if missing else None
        else:
            reason = _ext.reason_off()
            absent = [n for n in names if not _ext.has_launcher(f"{n}_{backend}")]
            off[backend] = reason or (f"the extension lacks {absent[0]}" if absent else None)
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


def _candidates(device: torch.device) -> tuple[str, ...]:
    forced = backend_in_force()
    if forced == "auto":
        return _AUTO.get(device.type, ())
    return () if forced == "reference" else (forced,)


def select(op: str, device: torch.device, *args: Any, **kwargs: Any) -> str:
    """The backend for this call: "triton", "cpu", "cuda" or "reference".

    Raises:
        FallbackError: a kernel is there but refuses the call, and FASTVDM_STRICT=1.
    """
    entry = _OPS[op]
    refusal = None
    for backend in _candidates(device):
        off = entry.off[backend]
        if off is None and device.type not in _DEVICES[backend]:
            off = f"no {device.type} device (the interpreter needs TRITON_INTERPRET=1)"
        if off is not None:
            # A backend asked for by name and missing is a fallback; a merely absent one is not.
            refusal = refusal or (off if get_config().backend == backend else None)
            continue
        reason = entry.unsupported(backend, *args, **kwargs)
        if reason is None:
            return backend
        if isinstance(reason, ByDesign) and get_config().backend != backend:
            continue
        refusal = refusal or f"{backend}: {reason}"
    if refusal is not None:
        _fallback(op, refusal)
    return "reference"


def _fallback(op: str, reason: str) -> None:
    if get_config().strict:
        raise FallbackError(f"{op} fell back to the reference: {reason}")
    if not torch.compiler.is_compiling() and (op, reason) not in _warned:
        _warned.add((op, reason))
        warnings.warn(f"fastvdm.{op} uses the torch reference: {reason}", stacklevel=4)


def explain(op: str, *args: Any, **kwargs: Any) -> dict[str, str | None]:
    """Per backend, why it cannot take this call (None: it can). Without args: why it is off."""
    entry = _OPS[op]
    out = {}
    for backend, off in entry.off.items():
        out[backend] = off
        if off is None and (args or kwargs):
            out[backend] = entry.unsupported(backend, *args, **kwargs)
    return out


def registered_ops() -> tuple[str, ...]:
    return tuple(_OPS)


class _Extension:
    """The C++ launchers of one backend, named as in ``kernels/``: ``x_fwd`` → ``x_fwd_cpu``."""

    def __init__(self, backend: str) -> None:
        self._suffix = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.ops.fastvdm_C, f"{name}_{self._suffix}")


_EXTENSIONS = {"cpu": _Extension("cpu"), "cuda": _Extension("cuda")}


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
    return _EXTENSIONS[backend]


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

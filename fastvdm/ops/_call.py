"""One call of an op: check the tensors, choose an implementation, run it.

Every public op consists of these three steps. ``_op`` and ``dispatch`` hold what they look up.

    check_tensors(x, ("scale", scale, (b, c)))
    which = select("norm_act", x.device, x, kind, channels)
    return run(norm_act_fwd, x, scale, ..., which)
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _dispatch_tls_is_dispatch_key_included,
    _is_tracing,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import get_dynamic_layer_stack_depth as transforms
from torch._ops import OpOverload

from fastvdm.runtime import config
from fastvdm.runtime.device import INTERPRETED
from fastvdm.runtime.dispatch import (
    KERNELS,
    OPS,
    ByDefault,
    ByDesign,
    ByName,
    FallbackError,
    off_on,
)

# --- check ---------------------------------------------------------------------------------------

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_NEVER_NONE = ("weight", "coef", "model_out", "estimate")


def check_tensors(
    x: Tensor,
    *wanted: tuple[str, Tensor | None, tuple[int, ...]],
    beside: str = "x",
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    same: tuple[str, ...] = (),
) -> None:
    """Check each (name, tensor or None, shape): its shape, the device of ``x``, one of ``dtypes``.
    Those named in ``same`` must have the dtype of ``x``; autocast may mix all dtypes but fp64.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit, or it is not a tensor.
    """
    device, dtype = x.device, x.dtype
    usual = dtype if dtype in dtypes else None
    for name, t, shape in wanted:
        if t is None and not name.endswith(_NEVER_NONE):
            continue
        if not isinstance(t, Tensor) or t.shape != shape:
            raise wrong_form(name, t, str(shape))
        if t.device != device:
            raise ValueError(f"{name} must be on {device} like {beside}, got {t.device}")
        if t.dtype is usual:
            continue
        if t.dtype not in dtypes:
            raise TypeError(f"{name} must be {listed(dtypes)}, got {t.dtype}")
        if t.dtype != dtype and name in same and not mix(t, x):
            raise TypeError(f"{name} must be {dtype} like {beside}, got {t.dtype}")


def wrong_form(name: str, t: Any, form: str) -> Exception:
    """The error for a ``t`` that lacks the ``form``, or is no tensor."""
    if isinstance(t, Tensor):
        return ValueError(f"{name} must be {form}, got {tuple(t.shape)}")
    return TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def listed(dtypes: tuple[torch.dtype, ...]) -> str:
    """Name the dtypes, e.g. "fp32, bf16 or fp64"."""
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    short |= {torch.float64: "fp64", torch.int32: "int32", torch.int64: "int64", torch.bool: "bool"}
    short |= {torch.uint8: "uint8"}
    *most, last = (short[d] for d in dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def mix(a: Tensor, b: Tensor) -> bool:
    """Whether autocast converts both to one dtype."""
    return torch.float64 not in (a.dtype, b.dtype) and autocast_on(a.device.type)


def autocast_on(device: str) -> bool:
    """Whether autocast is on for this type of device. Some types, such as meta, have none. Asking
    torch takes a microsecond in every op, so "cpu" and "cuda" are not asked about."""
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix op on ``x`` runs: autocast's if it is on, else that of ``x``.

    fp64 is left alone, as in torch's autocast.
    """
    dtype = x.dtype
    # Avoid ``device.type``, which makes a string.
    device = "cuda" if x.is_cuda else "cpu" if x.is_cpu else x.device.type
    if dtype == torch.float64 or not autocast_on(device):
        return dtype
    return torch.get_autocast_dtype(device)


def cast(dtype: torch.dtype, *tensors: Tensor | None) -> list:
    """``tensors`` in ``dtype``, as autocast converts the inputs of its own ops. ``to`` would take a
    microsecond to find that there is nothing to convert."""
    found: list = [*tensors]
    for i, t in enumerate(tensors):
        if t is not None and t.dtype != dtype:
            found[i] = t.to(dtype)
    return found


# --- choose --------------------------------------------------------------------------------------

# Triton's interpreter is for tests only, so it must be chosen by name.
_AUTO = {"cuda": "triton", "cpu": "cpu"}
_WORDS = {"library": "torch's library", "torch": "torch's own", "parts": "its parts"}


def backend_in_force() -> str:
    """The configured backend, "auto" or a name. Inside forward-mode autograd and the transforms of
    ``torch.func`` (vmap, grad, vjp, jvp, ...) it is always "reference".

    The kernels have no tangents and no batching rules, and would silently drop tangents; plain
    torch has both. As with ``ByDesign`` this is not a fallback: it gives no warning, and no error
    in strict mode.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        return "reference"
    # Dynamo folds this into a constant with a guard.
    if transforms():
        return "reference"
    return config.active.backend


def choose(op: str, device: torch.device, call: tuple) -> tuple[str, tuple | None]:
    """(implementation, lost). ``lost`` is None, or describes the kernel that should have taken the
    call: (backend, why it is off, why it refuses)."""
    backend = backend_in_force()
    if backend == "reference":
        return backend, None
    forced, kind = backend != "auto", device.type
    kernel = backend if forced else _AUTO.get(kind)
    entry = OPS[op]
    lost: tuple | None = None
    for name, why_not in entry.implementations(*call):
        can = why_not is None or (forced and isinstance(why_not, ByName))
        if name not in KERNELS:
            if can:
                return name, lost
        elif name == kernel:
            if can:
                off = entry.off[name] if name == kind else off_on(op, name, device)
                if off is None:
                    return name, None
                lost = name, off, None
            elif not isinstance(why_not, ByDesign) or (forced and isinstance(why_not, ByDefault)):
                lost = name, off_on(op, name, device), why_not
    if lost is None and forced:
        lost = backend, off_on(op, backend, device), "no kernel for this call"
    return "reference", lost


def select(op: str, device: torch.device, *call: Any) -> str:
    """Choose the implementation of this call of ``op``; its generator takes ``call``.

    Raises:
        FallbackError: a kernel is missing or refuses the call, and FASTVDM_STRICT=1.
    """
    name, lost = choose(op, device, call)
    if lost is not None:
        _fallback(op, name, *lost)
    return name


def examples(op: str, device: torch.device) -> dict[str, str]:
    """Map each kind of call to the implementation that takes it on ``device``."""
    return {kind: choose(op, device, call)[0] for kind, call in OPS[op].examples(device).items()}


def _fallback(op: str, name: str, backend: str, off: str | None, reason: str | None) -> None:
    instead = _WORDS.get(name, "the torch reference")
    if config.active.strict:
        raise FallbackError(f"{op} fell back to {instead}: {off or f'{backend}: {reason}'}")
    if off is not None:  # it affects every op, so warn only once
        _warn(f"fastvdm runs on plain torch: {off} ({_MEANT})")
    else:
        _warn(f"fastvdm.{op} uses {instead}: {backend}: {reason}")


_MEANT = "if that is meant: FASTVDM_BACKEND=reference"
_warned: set[str] = set()


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=5)


# Dynamo calls this while tracing, but does not trace into it.
_traced_over: Any = _warn
_traced_over._dynamo_marked_constant = True  # torch.compiler.assume_constant_result imports dynamo

# --- run -----------------------------------------------------------------------------------------

BODIES: dict[str, Callable[..., Any]] = {}  # op name -> its body
NODES: dict[
    str, Callable[..., Any]
] = {}  # op name -> the function that adds it to autograd's graph
TENSORS: dict[str, tuple[int, ...]] = {}  # op name -> positions of its tensors
DENSE: dict[str, tuple[int, ...]] = {}  # op name -> positions of tensors that must be contiguous
_VMAP = torch._C._dispatch_key_parse("VmapMode")
_PLAIN = {Tensor, torch.nn.Parameter, type(None), int, float, bool, str}


def run(op: OpOverload, *args: Any) -> Any:
    """Run ``op(*args)`` with all arguments given; make tensors contiguous unless strides are
    allowed. The dispatcher is bypassed if nobody listens to it.

    An op in Python passes through the dispatcher three times per call, with all its arguments: to
    autograd, to the body, to the launcher. That is a third of an eager call of a small network, and
    at batch 1 a GPU waits for it. The operators inside the body, including the launcher, still go
    through the dispatcher. Two listeners would miss the op itself, because there is no public way
    to detect them: a kernel that somebody registers for ``fastvdm::`` and an
    ``ExecutionTraceObserver``.
    """
    given, name = list(args), op._opname
    for i in DENSE[name]:
        t = given[i]
        if t is not None:
            given[i] = t.contiguous()
    if torch.compiler.is_compiling() or observed(name, given):
        return op(*given)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
        return NODES[name](*given)
    return BODIES[name](*given)


def observed(name: str, args: Sequence[Any]) -> bool:
    """Whether the dispatcher would do more with this call than run it, because of a mode, a
    transform, a profiler, a tracer, a subclass of Tensor, or a lazily negated view in ``args``."""
    if (
        _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or transforms()
        or _dispatch_tls_is_dispatch_key_included(_VMAP)  # is_grads_batched
        or _profiler_enabled()
        or _is_tracing()
        or not _PLAIN.issuperset(map(type, args))
    ):
        return True
    for i in TENSORS[name]:
        t = args[i]
        if t is not None and t.is_neg():
            return True
    return False


def gathered(args: Sequence[Any], value: tuple[int, Any] | None) -> Sequence[Any]:
    """``args`` with the fields of the NamedTuple ``value`` (position, class) gathered into one."""
    if value is None:
        return args
    at, kind = value
    end = at + len(kind._fields)
    return *args[:at], kind(*args[at:end]), *args[end:]


def body_of(stem: str, name: str, value: tuple[int, Any] | None = None) -> Callable[..., Any]:
    """The body of most ops: call the launcher of the backend named by the last argument. A Python
    launcher gets the NamedTuple ``value`` (position, class); a C++ launcher gets its fields."""
    of_extension: Any = None

    def launch(*args: Any) -> Any:
        nonlocal of_extension
        if args[-1] != "cpu":
            return launcher(stem, name, args[-1])(*gathered(args[:-1], value))
        if of_extension is None:
            of_extension = launcher(stem, name, "cpu")
        return of_extension(*args[:-1])

    return launch


@functools.cache
def _of_extension(name: str) -> Any:
    return getattr(torch.ops.fastvdm_C, f"{name}_cpu").default._op  # saves a Python frame


@functools.cache
def _kernels(file: str) -> Any:
    return importlib.import_module(f"fastvdm.kernels.{file}")


def launcher(stem: str, name: str, backend: str) -> Any:
    """The launcher of a backend for the op file ``stem``, e.g. ``norm_act_fwd`` of Triton, or
    ``norm_act_fwd_cpu`` registered by C++. It is called only inside opaque op bodies."""
    if backend == "cpu":
        return _of_extension(name)
    if backend == "library":
        return getattr(_kernels(f"{stem}_library"), name)
    launch = getattr(_kernels(stem), name)
    return launch if INTERPRETED else _on_device(launch)


def _on_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Launch on the device of the tensors: a Triton launch goes to the current device."""

    def call(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        if device.index == torch.cuda.current_device():  # entering a context takes 3 us
            return launch(*args)
        with torch.cuda.device(device):
            return launch(*args)

    return call

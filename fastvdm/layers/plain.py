"""Decides which submodules a fused op may replace.

A fused op reads the parameters of several modules and calls none of them, so it would bypass hooks
and replacements. If a module has any, its owner calls it like any module, on one tensor, and runs
the rest of the fused op around it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Weights = tuple[Tensor, Tensor | None]


def hangs_on(module: nn.Module) -> bool:
    """Whether this module has a hook, or a ``forward`` set on the instance, as offloading does.
    Global hooks are not considered."""
    own = module.__dict__
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    )


def weights_of(module: nn.Module, kind: type[nn.Module]) -> Weights | None:
    """The weight and bias of ``module`` if calling it does exactly what ``kind`` does with them,
    otherwise None.

    The conditions: its class is exactly ``kind`` (adapters and parametrizations replace it); no
    hook is on it or on all modules; ``forward`` is not replaced on the instance (as offloading
    does); its parameters are plain tensors (a quantised or distributed one is a subclass that
    supports only torch's own ops).
    """
    if type(module) is not kind or hangs_on(module) or _has_any_global_hook():
        return None
    # A module's __getattr__ costs more than all checks here.
    own, parameters = module.__dict__, module.__dict__["_parameters"]
    # A replica of DataParallel has its parameters as plain attributes.
    weight = own["weight"] if "weight" in own else parameters.get("weight")
    bias = own["bias"] if "bias" in own else parameters.get("bias")
    if weight is None or own["_buffers"]:
        return None
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        return None
    if bias is not None and type(bias) is not nn.Parameter and is_traceable_wrapper_subclass(bias):
        return None
    return weight, bias

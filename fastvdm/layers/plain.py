"""Which submodules a fused op may stand for.

A fused op reads the parameters of several modules and calls none of them, so whatever hangs on a
module would be bypassed. Where anything does, its owner calls it, as any other module, on one
tensor, and does the rest of the fused op around it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Weights = tuple[Tensor, Tensor | None]


def hangs_on(module: nn.Module) -> bool:
    """Whether something wants to know of this very module's calls: a hook, or a ``forward`` of its
    own, as offloading gives it. Hooks on all modules are not asked for."""
    own = module.__dict__
    return bool(
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    )


def weights_of(module: nn.Module, kind: type[nn.Module]) -> Weights | None:
    """The weight and bias of ``module`` where a call of it is what ``kind`` does with them, and no
    more; else None.

    It is of that very class (adapters and parametrizations put another in its place), no hook is on
    it or on all modules, ``forward`` is not replaced on the instance (as offloading does), and its
    parameters are plain tensors (a quantised or a distributed one is a subclass that knows only
    torch's own ops).
    """
    if type(module) is not kind or hangs_on(module) or _has_any_global_hook():
        return None
    # __getattr__ of a module costs more than all that is asked here
    own, parameters = module.__dict__, module.__dict__["_parameters"]
    # a replica has plain attributes
    weight = own["weight"] if "weight" in own else parameters.get("weight")
    bias = own["bias"] if "bias" in own else parameters.get("bias")
    if weight is None or own["_buffers"]:
        return None
    if type(weight) is not nn.Parameter and is_traceable_wrapper_subclass(weight):
        return None
    if bias is not None and type(bias) is not nn.Parameter and is_traceable_wrapper_subclass(bias):
        return None
    return weight, bias

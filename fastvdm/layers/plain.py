"""Which submodules a fused op may stand for.

A fused op reads the parameters of several modules and calls none of them, so whatever hangs on a
module would be bypassed. Where anything does, its owner calls it, as any other module, on one
tensor, and does the rest of the fused op around it.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is what ``kind`` does with its parameters, and no more.

    It is of that very class (adapters and parametrizations put another in its place), no hook is on
    it or on all modules, ``forward`` is not replaced on the instance (as offloading does), and its
    parameters are plain tensors (a quantised or a distributed one is a subclass that knows only
    torch's own ops).
    """
    own = module.__dict__  # __getattr__ of a module costs more than all that is asked here
    if (
        type(module) is not kind
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_pre_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
        or _has_any_global_hook()
    ):
        return False
    for p in own["_parameters"].values():
        if type(p) is not nn.Parameter and p is not None and is_traceable_wrapper_subclass(p):
            return False
    return True

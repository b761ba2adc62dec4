"""Which submodules a fused op may stand for.

A fused op reads the parameters of several modules and calls none of them, so whatever hangs on a
module would be bypassed. Where anything does, its owner calls it, as any other module, on one
tensor, and does the rest of the fused op around it.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` is what ``kind`` does with its parameters, and no more.

    It is of that very class (adapters and parametrizations put another in its place), no hook is on
    it or on all modules, ``forward`` is not replaced on the instance (as offloading does), and its
    parameters are plain tensors (a quantised or a distributed one is a subclass that knows only
    torch's own ops).
    """
    if type(module) is not kind or _has_any_global_hook():
        return False
    own = module.__dict__
    if "forward" in own or any(own[name] for name in _HOOKS):
        return False
    return all(
        type(p) is nn.Parameter or p is None or not is_traceable_wrapper_subclass(p)
        for p in own["_parameters"].values()
    )

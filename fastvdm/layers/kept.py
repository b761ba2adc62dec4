"""Constant tables, made once instead of in each forward, where they take a dozen tiny launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

# Never emptied: a captured CUDA graph reads a table at its address.
_TABLES: dict[tuple, Tensor] = {}
_MOST = 1024
# Events of tables whose stream may not have computed them yet.
_PENDING: dict[tuple, torch.cuda.Event] = {}


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a function that makes a table. The table must depend only on the arguments, one of
    which is a device with its index. It is shared and must not be written to."""

    @functools.wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if watched():
            return make(*args, **kwargs)
        key = (make.__qualname__, *args, *kwargs.items())
        found = _TABLES.get(key)
        if found is not None and (key not in _PENDING or _arrives(key, found)):
            return found
        with torch.inference_mode(False), torch.no_grad():
            made = make(*args, **kwargs)
        if found is None and len(_TABLES) < _MOST and _lasts(key, made):
            _TABLES[key] = made
        return made

    return table


def watched() -> bool:
    """Whether tensors made here now are not those of eager calls: they belong to a compiler, a
    transform or a fake mode."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.get_dynamic_layer_stack_depth() > 0
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def _lasts(key: tuple, table: Tensor) -> bool:
    """Whether a table may be kept. One made in a graph capture has no values until the graph runs.
    For others an event marks its place in the stream."""
    if table.device.type != "cuda":
        return True
    if torch.cuda.is_current_stream_capturing():
        return False
    _PENDING[key] = torch.cuda.current_stream(table.device).record_event()
    return True


def _arrives(key: tuple, table: Tensor) -> bool:
    """Whether the current stream may read a table. It waits for the table's event if necessary."""
    if torch.cuda.is_current_stream_capturing():
        return False
    event = _PENDING.get(key)
    if event is not None and event.query():
        _PENDING.pop(key, None)
    elif event is not None:
        torch.cuda.current_stream(table.device).wait_event(event)
    return True

"""Tables of constants, made once and not at each forward, where they are a dozen tiny launches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

# Never emptied: a CUDA graph reads a table where it was when it was captured.
_TABLES: dict[tuple, Tensor] = {}
_MOST = 1024


def kept(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorates what makes a table, which must depend on its arguments alone, a device among them.
    The table is shared, and must not be written to."""

    @functools.wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if _passing():
            return make(*args, **kwargs)
        key = (make.__qualname__, *args, *kwargs.items())
        found = _TABLES.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = make(*args, **kwargs)
            if len(_TABLES) < _MOST and _lasts(found):
                _TABLES[key] = found
        return found

    return table


def _passing() -> bool:
    """Whether tensors made or met here are not those of eager calls: a compiler's, a transform's, a
    fake's."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.get_dynamic_layer_stack_depth() > 0
    )


def _lasts(table: Tensor) -> bool:
    """Whether it will be there for the next call, whichever stream that is on."""
    if table.device.type != "cuda":
        return True
    if torch.cuda.is_current_stream_capturing():  # its values come when the graph is run
        return False
    torch.cuda.current_stream(table.device).synchronize()
    return True

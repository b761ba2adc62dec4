"""How an op becomes a ``torch.library`` op: schema, opaque body, fake, autograd.

``torch.library.custom_op`` does the same and more on every call: it reads the schema back from C++
to fill in defaults and looks for outputs that alias inputs. Here the defaults are read once, and
``opcheck`` looks for aliases in the tests. So a call costs about half: 0.15 ms instead of 0.37
where a gradient is wanted, 0.07 instead of 0.10 elsewhere (norm_act on a CPU core of 2020, torch
2.13). An eager network is a hundred of them, and on a GPU a small batch waits for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

NAMESPACE = "fastvdm"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}  # of every op that was defined, by its name


def define(body: Callable[..., Any]) -> OpOverload:
    """The op ``fastvdm::<name of body>``: mutates nothing, returns nothing that aliases an input.
    ``body``, which neither the compiler nor autograd looks into, runs it on every device."""
    name = body.__name__
    schema = torch.library.infer_schema(body, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    # torch.compiler.disable would import dynamo here, which takes longer than all of fastvdm.
    _LIBRARY.impl(name, torch._disable_dynamo(body), "CompositeExplicitAutograd")
    BODIES[name] = body
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def fake(op: OpOverload) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates the function that makes the op's outputs without data."""
    return torch.library.register_fake(op, lib=_LIBRARY)


def autograd(
    op: OpOverload,
    backward: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None] | None = None,
) -> None:
    """Gives ``op`` its gradient, as ``torch.library.register_autograd`` does: ``backward(ctx,
    *grads)`` returns one gradient or None per argument, ``setup_context(ctx, inputs, output)``
    saves what it needs."""
    # The dispatcher takes off trailing arguments that equal their default.
    defaults = tuple(a.default_value for a in op._schema.arguments)

    def forward(ctx: Any, *inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out = op(*inputs)
        if setup_context is not None:
            setup_context(ctx, inputs, out)
        return out

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # A profile shows this name with Backward behind it.
    node: Any = type(op._opname + "_", (torch.autograd.Function,), methods)

    def run(*args: Any) -> Any:
        args += defaults[len(args) :]
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return node.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    _LIBRARY.impl(op._opname, run, "Autograd")


def no_double_backward(op: OpOverload) -> None:
    """Makes the gradient of the backward op ``op`` an error that says what to do."""
    name = op._opname.removesuffix("_bwd")

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{name} has no double backward; for higher-order gradients run it under "
            "fastvdm.use_backend('reference')"
        )

    autograd(op, refuse)

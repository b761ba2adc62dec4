"""What the ops count as in ``torch.utils.flop_counter.FlopCounterMode``.

An op is opaque to the counter, and one without a formula counts as nothing, in silence. As torch's
own formulas do, ours count the multiplications and additions of matrix products, convolutions and
attention, two for each pair, and nothing elementwise: norms and the ends of a guided step are 0.
The numbers are those of the ops' cost functions: what the call needs, however a kernel gets there,
so that a Winograd convolution counts as a direct one. In a backward the products of the gradients
that are wanted; of what a kernel makes again only the scores of a softmax attention (as torch's
flash attention counts them) and the small products of a frame's context.
"""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from fastvdm.runtime import extension


class Cost(NamedTuple):
    """Floating-point operations and the least bytes moved to and from memory: what an op must at
    least do, the numerator of every "% of the limit" in the benchmarks."""

    flops: int
    bytes: int


Formula = Callable[..., "Cost | int"]
FORMULAS: dict[str, Formula] = {}  # by the qualified name of an op
_COUNTER = "torch.utils.flop_counter"


def flops(*ops: OpOverload) -> Callable[[Formula], Formula]:
    """Decorates the formula of ``ops`` and of the C++ launchers of their names: it is called with
    the op's arguments by name, shapes in the place of tensors, and returns a Cost or a number."""

    def announce(formula: Formula) -> Formula:
        for op in ops:
            _announce(op._schema.name, formula)
            launcher = f"{op._opname}_cpu"
            if extension.has_launcher(launcher):
                _announce(f"fastvdm_C::{launcher}", formula)
        return formula

    return announce


def flops_of_launcher(name: str) -> Callable[[Formula], Formula]:
    """As ``flops``, for a C++ launcher ``fastvdm_C::<name>`` that is no op's; where it is there."""

    def announce(formula: Formula) -> Formula:
        if extension.has_launcher(name):
            _announce(f"fastvdm_C::{name}", formula)
        return formula

    return announce


def _announce(name: str, formula: Formula) -> None:
    FORMULAS[name] = formula
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER], name)


def _register(counter: ModuleType, name: str) -> None:
    namespace, opname = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), opname)
    names, formula = [a.name for a in packet.default._schema.arguments], FORMULAS[name]

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        found = formula(**dict(zip(names, args)), **kwargs)
        return found.flops if isinstance(found, Cost) else found

    counter.register_flop_formula(packet)(count)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the formulas once somebody imports the counter: importing it here would bring
    Triton, and longer than all of fastvdm takes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                for op in FORMULAS:
                    _register(module, op)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())

"""FLOPs of the ops for ``torch.utils.flop_counter.FlopCounterMode``.

An op is opaque to the counter, and the counter silently counts an op without a formula as zero.
Like torch's own formulas, these count two operations per multiply-add of matrix products,
convolutions and attention, and nothing elementwise: norms and the ends of a guided step are 0. The
numbers come from the ops' cost functions: what a call needs, whatever a kernel does, so a Winograd
convolution counts as a direct one. A backward counts the products of the gradients that are needed.
Of what a kernel recomputes it counts only the scores of softmax attention (as torch's flash
attention does) and the small products of a frame's context.
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
    """Floating-point operations and the fewest bytes to and from memory that an op needs. They are
    the numerator of every "% of the limit" in the benchmarks."""

    flops: int
    bytes: int


Formula = Callable[..., "Cost | int"]
FORMULAS: dict[str, Formula] = {}  # qualified name of an op -> its formula
_COUNTER = "torch.utils.flop_counter"


def flops(*ops: OpOverload) -> Callable[[Formula], Formula]:
    """Decorate the formula of ``ops`` and of the C++ launchers with the same names. It is called
    with the op's arguments by name, shapes in place of tensors, and returns a Cost or a number."""

    def announce(formula: Formula) -> Formula:
        for op in ops:
            _announce(op._schema.name, formula)
            launcher = f"{op._opname}_cpu"
            if extension.has_launcher(launcher):
                _announce(f"fastvdm_C::{launcher}", formula)
        return formula

    return announce


def flops_of_launcher(name: str) -> Callable[[Formula], Formula]:
    """Like ``flops``, for a C++ launcher ``fastvdm_C::<name>`` without an op, if it exists."""

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
    """Registers the formulas when the counter is imported. Importing it here would import Triton
    and take longer than all of fastvdm."""

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

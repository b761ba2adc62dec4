"""A shipped configuration of a Triton kernel, as ``bench/aot.py`` compiles it without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class AotCase:
    """One kernel in one shipped configuration.

    Args:
        name: unique, of the form "<kernel>/<what sets it apart>".
        kernel: the ``@triton.jit`` function.
        signature: Triton type of each argument that is not a constexpr, by name: "*bf16", "i32",
            "fp32", "tensordesc<bf16[1,64]>" ...
        constexprs: value of each constexpr, by name (None arguments too).
        divisible: names of the arguments that are multiples of 16; every pointer is one of itself.
        num_warps, num_stages, maxnreg: launch options.
        uses_dot: a matrix instruction must be in the PTX.
        uses_tma: cp.async.bulk.tensor must be in the PTX from sm_90 on.
        archs: where it ships; all three by default.
        rare: of no size that bench/cases.py names; ``--common`` leaves it out.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: Sequence[str] = ()
    num_warps: int = 4
    num_stages: int = 2
    maxnreg: int | None = None
    uses_dot: bool = False
    uses_tma: bool = False
    archs: Sequence[int] = field(default=ARCHS)
    rare: bool = False

"""What an op must at least do: the numerator of every "% of the limit" in the benchmarks."""

from __future__ import annotations

from typing import NamedTuple


class Cost(NamedTuple):
    """Floating-point operations and the least bytes moved to and from memory."""

    flops: int
    bytes: int

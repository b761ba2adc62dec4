"""95 % intervals over independent clips."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from paper import measure
from paper.measure import Mean


def mean_of(values: Tensor) -> Mean:
    """Of one number a clip; of a share near 0 or 1 by Wilson's formula, else by the normal one."""
    values = values.double()
    n, mean = len(values), values.mean().item()
    if bool(((values == 0) | (values == 1)).all()):
        half = 1.96 * math.sqrt(mean * (1 - mean) / n + 0.98**2 / n**2) / (1 + 1.96**2 / n)
    else:
        half = 1.96 * values.std().item() / math.sqrt(n)
    return Mean(mean, half)


def bootstrap(function: Callable[[Tensor], float], count: int, draws: int = 100) -> Mean:
    """``function`` of all clips, and the spread of it over clips drawn again; it takes indices."""
    generator = torch.Generator().manual_seed(0)
    again = [function(torch.randint(count, (count,), generator=generator)) for _ in range(draws)]
    return Mean(function(torch.arange(count)), 1.96 * torch.tensor(again).double().std().item())


def ratio(above: Tensor, below: Tensor) -> Mean:
    """Ratio of the means of two numbers a clip."""
    return bootstrap(lambda i: (above[i].mean() / below[i].mean()).item(), len(above))


def frechet(true: Tensor, drawn: Tensor) -> Mean:
    return bootstrap(lambda i: measure.frechet(true, drawn[i]), len(drawn))

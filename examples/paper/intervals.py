"""95 % intervals over independent clips."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from paper import measure
from paper.common import Table
from paper.measure import Mean, Score


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


GAINS = {"glyph": 1, "position": 1, "background": -1, "colour": -1, "error": -1}


def gains_table(title: str, pairs: Sequence[tuple[str, Any, Any]]) -> Table:
    """What guidance gains clip by clip, from (label, without, with) with the scores of each."""
    rows, beyond = [], []
    for label, without, guided in pairs:
        for name, sign in GAINS.items():
            gains = [
                mean_of(sign * (torch.tensor(x) - torch.tensor(y)))
                for x, y in zip(guided[name], without[name])
            ]
            beyond += [gain.value > gain.half for gain in gains]
            rows.append([name, label, *map(str, gains)])
    return Table(
        title,
        ["", "calls", *(f"window {k + 1}" for k in range(len(gains)))],
        rows,
        "Glyph, position: by how much more are right; colours and error: by how much less is "
        "wrong. ± is a 95 % interval of the difference, clip by clip (the same clips and noise): "
        f"**{sum(beyond)} of {len(beyond)} are beyond it.**",
    )


def joined(scores: Sequence[Score]) -> Score:
    """The clips of several networks as one set."""
    return {k: [sum(parts, []) for parts in zip(*(s[k] for s in scores))] for k in GAINS}

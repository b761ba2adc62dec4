"""The loss of both networks against the clock, as an SVG inside the page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from demo_train import smooth

Curve = tuple[Sequence[float], Sequence[float]]  # seconds, losses
COLOURS = {"peer": "var(--warm)", "fastvdm": "var(--accent)"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 58, 14, 40, 52


def ticks(high: float, count: int, smallest: float) -> list[float]:
    """From 0 to ``high`` in at most ``count`` steps of 1, 2 or 5 times a power of ten."""
    step = smallest
    factors = itertools.cycle((2.0, 2.5, 2.0))
    while high / step > count:
        step *= next(factors)
    return [i * step for i in range(int(high / step + 1e-6) + 1)]


def levels(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between both."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]


def curves(sides: dict[str, Curve]) -> str:
    """Running means over the seconds that each network has run; the loss on a log scale."""
    means = {name: (list(x), smooth(list(y))) for name, (x, y) in sides.items()}
    end = max(x[-1] for x, _ in means.values())
    every = [v for _, y in means.values() for v in y]
    low, high = min(every) / 1.1, max(every) * 1.1

    def across(second: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * second / end

    def down(loss: float) -> float:
        share = math.log(high / loss) / math.log(high / low)
        return TOP + (HEIGHT - TOP - BOTTOM) * share

    rows = []
    for v in levels(low, high):
        rows.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(v):.1f}" y2="{down(v):.1f}" '
            f'stroke="var(--line)"/><text x="{LEFT - 8}" y="{down(v) + 5:.1f}" '
            f'text-anchor="end">{v:g}</text>'
        )
    for v in ticks(end, 6, 1.0):
        rows.append(
            f'<text x="{across(v):.1f}" y="{HEIGHT - 30}" text-anchor="middle">{v:g}</text>'
        )
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    rows.append(f'<text x="{middle}" y="{HEIGHT - 7}" text-anchor="middle">seconds</text>')
    for i, (name, (x, y)) in enumerate(means.items()):
        points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(x, y))
        colour, at = COLOURS[name], LEFT + 150 * i
        rows.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5" '
            f'stroke-linejoin="round"/><line x1="{at}" x2="{at + 24}" y1="16" '
            f'y2="16" stroke="{colour}" stroke-width="4"/>'
            f'<text x="{at + 32}" y="21" class="key">{name}</text>'
        )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss against seconds">'
        + "".join(rows)
        + "</svg>"
    )

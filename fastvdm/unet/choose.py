"""Choose one of several networks in a checkpoint or a module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

_AVERAGED = {"ema", "averaged", "average", "avg", "swa"}


class Place(Protocol):
    """Where a network was found: its dotted path ("" for the source itself)."""

    @property
    def path(self) -> str: ...

    @property
    def is_averaged(self) -> bool: ...


P = TypeVar("P", bound=Place)


def says_averaged(path: str) -> bool:
    """The innermost such word decides (ema_pytorch has ema.online_model and ema.ema_model)."""
    words = [w for w in re.findall(r"[a-z]+", path.lower()) if w in {*_AVERAGED, "online"}]
    return bool(words) and words[-1] != "online"


def listed(places: Sequence[Place]) -> str:
    return ", ".join(repr(place.path) for place in places)


def choose(found: list[P], *, prefix: str | None, ema: bool | None) -> list[P]:
    """The networks that the arguments select; more than one if the arguments do not decide.

    Args:
        found: all networks.
        prefix: the dotted path of the network or a part of it.
        ema: True selects the averaged weights; False the others, if there are both; None the
            averaged ones, if there are any.

    Raises:
        ValueError: there is nothing under that prefix, or there are no averaged weights.
    """
    if prefix is not None:
        asked = prefix.rstrip(".")
        kept = [p for p in found if p.path == asked]
        kept = kept or [p for p in found if asked and f".{asked}." in f".{p.path}."]
        if not kept:
            raise ValueError(f"no network under {prefix!r}; there is one under {listed(found)}")
        found = kept
    averaged = [p for p in found if p.is_averaged]
    if ema and not averaged:
        raise ValueError(f"no averaged weights found; there is a network under {listed(found)}")
    if averaged and ema is not False:
        return averaged
    return [p for p in found if not p.is_averaged] or found

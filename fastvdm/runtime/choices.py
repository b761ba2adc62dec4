"""Arguments that are one of several words: the words stand in the ``Literal`` of the signature."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``, or of a union of some, None first; () of any other type."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) not in (Union, types.UnionType):
        return ()
    parts = sorted(get_args(kind), key=lambda part: part is not type(None))
    return sum(((None,) if part is type(None) else choices_of(part) for part in parts), ())


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError for a value that is none of ``choices_of(kind)``."""
    choices = choices_of(kind)
    # Compared one by one: a tensor or an array has no truth.
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")

"""Arguments that take one of several words, given by the ``Literal`` in the signature."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin


def choices_of(kind: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``, or None and those of an optional one; () for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    if get_origin(kind) not in (Union, types.UnionType):
        return ()
    words, none = [p for p in get_args(kind) if p is not type(None)], type(None) in get_args(kind)
    if len(words) > 1 or not choices_of(words[0]):
        return ()
    return (None,) * none + choices_of(words[0])


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError if the value is not in ``choices_of(kind)``."""
    choices = choices_of(kind)
    # Check the type first: comparing a tensor or an array gives no truth value.
    if not isinstance(value, str | None) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")

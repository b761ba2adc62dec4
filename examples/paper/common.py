"""Shared by all parts of the tables: a table as data, and results kept between runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Table(NamedTuple):
    """One table of the report; its cells are strings or numbers."""

    title: str
    head: list[str]
    rows: list[list[Any]]
    note: str = ""


def cached(out: Path, name: str, make: Callable[[], Any]) -> Any:
    """The result of ``make()`` (JSON-able), stored as ``out/name.json`` for the next run."""
    path = out / f"{name}.json"
    if path.exists():
        return json.loads(path.read_text())
    value = make()
    out.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)
    return value

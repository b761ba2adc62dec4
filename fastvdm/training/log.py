"""The log of a training run: a row per step, csv or jsonl, truncated when a run resumes."""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

COLUMNS = ("step", "loss", "grad_norm", "lr", "seconds")


def write_text(path: Path, text: str) -> None:
    """Replace a file by one rename; also remove what a killed process left of an attempt."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}-*"):
        leftover.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_log(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a log. An incomplete last line, left by a killed process, is dropped."""
    path = Path(path)
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in whole]
    else:
        rows = list(csv.DictReader(whole))
    return [{k: float(v) for k, v in row.items()} | {"step": int(row["step"])} for row in rows]


class TrainLog:
    """Appends rows to ``path``. Existing rows after step ``start`` are dropped: their steps are
    repeated.

    Raises:
        ValueError: the name ends neither in .csv nor in .jsonl.
    """

    def __init__(self, path: Path, start: int) -> None:
        if path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"the log must be .csv or .jsonl, got {path.name!r}")
        self.path = path
        rows = read_log(path) if path.exists() else []
        header = "" if path.suffix == ".jsonl" else ",".join(COLUMNS) + "\n"
        write_text(path, header + self._lines([r for r in rows if r["step"] <= start]))

    def _lines(self, rows: list[dict[str, Any]]) -> str:
        if self.path.suffix == ".jsonl":
            return "".join(json.dumps({k: row[k] for k in COLUMNS}) + "\n" for row in rows)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([row[k] for k in COLUMNS] for row in rows)
        return text.getvalue()

    def write(self, rows: list[dict[str, Any]]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._lines(rows))

"""Runs the suite, including its slow cells, and prints the matrix op x check.

    python tests/ops/matrix.py [-k norm_act] [-n 2]

Arguments go to pytest. Its conftest.py chooses Triton's interpreter if there is no GPU, so nothing
of the suite may be imported before pytest runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

Outcomes = dict[tuple[str, str, str], set[str]]  # row, check, backend


class Recorder:
    def __init__(self) -> None:
        self.outcomes: Outcomes = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and "[" in report.nodeid:
            name, check, lane, *_ = report.nodeid.partition("[")[2].rstrip("]").split("-")
            key = name, check, lane.partition("_")[0]
            self.outcomes.setdefault(key, set()).add(report.outcome)


def matrix(outcomes: Outcomes) -> str:
    """Each row and check: on which backends it passed, or why it has no test."""
    from suite_test import BACKENDS, CHECKS, ROWS, reason

    lines: list[str] = []
    notes: dict[str, str] = {}
    for name in ROWS:
        lines.append(f"\n{name}")
        for check in CHECKS:
            words = []
            for backend in BACKENDS:
                if (why := reason(name, check, backend)) is not None:
                    words.append(notes.setdefault(why, f"[{len(notes) + 1}]"))
                else:
                    seen = outcomes.get((name, check, backend), {"not run"})
                    words.append(backend if seen == {"passed"} else f"{backend}: {sorted(seen)}")
            lines.append(f"  {check:16} {' '.join(dict.fromkeys(words))}")
    return "\n".join([*lines, "", *(f"{n} {why}" for why, n in notes.items())])


if __name__ == "__main__":
    recorder = Recorder()
    suite = Path(__file__).with_name("suite_test.py")
    status = pytest.main(["-q", str(suite), *sys.argv[1:]], plugins=[recorder])
    print(matrix(recorder.outcomes))
    sys.exit(status)

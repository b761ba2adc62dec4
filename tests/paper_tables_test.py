"""``make paper-tables`` in seconds: it runs to the end and writes its report."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "paper_tables.py"


def run(*args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"FASTVDM_STRICT": "0", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)


def test_quick(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("tqdm")
    done = run("--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "paper_tables.md").read_text()
    assert "mean nothing" in report and report.count("| reconstruction") == 5
    for name in ("extension", "joint", "guidance"):
        assert (tmp_path / f"paper_tables_{name}.png").stat().st_size > 0


def test_quick_does_not_overwrite_the_report():
    pytest.importorskip("sklearn")
    done = run("--quick")
    assert done.returncode == 2 and "--out" in done.stderr

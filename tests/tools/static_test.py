"""What is counted without a GPU stays below its bounds (bench/static.json)."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from static import KNOWN, Count, Whole, worse

pytest.importorskip("triton")
STATIC = Path(__file__).resolve().parents[2] / "bench" / "static.py"


@pytest.mark.parametrize("part", ["--kernels", "--networks"])
def test_no_count_has_risen(part):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(STATIC), part], capture_output=True, text=True, env=env
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


def test_what_is_worse():
    count = Count(200.0, "cycles", 4, 128, 0, 16)
    known = {"a": dataclasses.asdict(count)}
    replace = dataclasses.replace
    assert worse(known, {"a": replace(count, count=209.0, barriers=9)}) == []
    assert worse(known, {"a": replace(count, count=211.0)}) == ["a: count 211.0, was 200.0"]
    assert worse(known, {"a": replace(count, spills=4)}) == ["a: spills 4, was 0"]
    assert worse(known, {"a": replace(count, warps=12)}) == ["a: warps 12, was 16"]
    assert worse(known, {"b": count}) == ["b: no bound"]


def test_the_bounds_are_the_goals():
    """What no change may lose again."""
    known = json.loads(KNOWN.read_text())
    networks = {n: v for n, v in known.items() if "launches" in v}
    assert set(next(iter(networks.values()))) == {f.name for f in dataclasses.fields(Whole)}
    for name, most in (("UNet3D(64)", 225), ("ucf101", 380)):
        assert networks[f"{name}, batch 1"]["launches"] <= most

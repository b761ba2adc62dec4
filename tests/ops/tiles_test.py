"""The tile products of the AMX path, alone: see tests/ops/tiles_test.cpp. The whole path runs in
``make emulate-bf16``."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
pytestmark = pytest.mark.skipif(
    COMPILER is None or platform.machine() != "x86_64", reason="needs g++ on x86-64"
)


def build(out: Path, *flags: str) -> Path:
    include = [f"-I{ROOT / 'csrc' / 'cpu'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    macros = ["-DFASTVDM_ISA=amx", "-DFASTVDM_BF16=1", "-DFASTVDM_TILES=1"]
    source = str(ROOT / "tests" / "ops" / "tiles_test.cpp")
    command = [str(COMPILER), "-std=c++20", "-O2", *macros, *flags, *include, source, "-o"]
    subprocess.run([*command, str(out)], check=True, timeout=1800)
    return out


def test_emulated(tmp_path):
    program = build(tmp_path / "emulated", "-DFASTVDM_EMULATE_TILES=1")
    assert subprocess.run([program], capture_output=True, text=True).stdout == "equal\n"


def test_on_the_registers(tmp_path):
    """Compiled everywhere, and the tile product is in it; run where the CPU has it."""
    program = build(tmp_path / "amx", *AVX512)
    if (objdump := shutil.which("objdump")) is not None:
        listing = subprocess.run([objdump, "-d", program], capture_output=True, text=True).stdout
        assert listing.count("tdpbf16ps") == 9  # 4 + 2 + 2 + 1 of the four block shapes
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("no AMX here: compiled, not run")
    assert subprocess.run([program], capture_output=True, text=True).stdout == "equal\n"

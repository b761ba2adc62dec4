"""The compiled engine: its build, and the structures that it shares with Python."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import numpy as np

from .program import fields

SOURCES = Path(__file__).parent / "engine"
BUILD = Path(__file__).resolve().parents[2] / "build"
# Products and sums are rounded as PTX says, so none may be contracted.
FLAGS = ("-O2", "-ffp-contract=off", "-fno-math-errno", "-std=c++20", "-shared", "-fPIC")

STATISTICS = np.dtype(fields("<u8", "issued lanes masked sectors waves bytes conflict_free"))
REPORT = np.dtype(fields("<i4", "kind pc pc2 cta warp lane") + fields("<u8", "address info count"))
ALLOCATION = np.dtype(fields("<u8", "base size") + fields("<u4", "grain first_view num_views pad"))


class Launch(ctypes.Structure):
    """As in engine/layout.h."""

    _fields_ = (
        fields(ctypes.c_void_p, "code operands constants parameters allocations views")
        + fields(ctypes.c_void_p, "statistics reports touched ctas")
        + fields(ctypes.c_int64, "num_ctas")
        + fields(ctypes.c_int32, "num_instructions arena_bytes num_registers num_allocations")
        + fields(ctypes.c_int32, "num_warps shared_bytes max_reports num_reports")
        + fields(ctypes.c_int32 * 3, "grid")
        + fields(ctypes.c_int32, "seed check local_bytes")
    )


def _processor() -> str:
    """What -march=native means here."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith("flags")), platform.machine())


@functools.cache
def library() -> ctypes.CDLL:
    """Built once for each version of the sources and each kind of processor.

    Raises:
        RuntimeError: there is no C++ compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise RuntimeError("the emulator needs a C++20 compiler: g++, clang++ or what CXX names")
    flags = (*FLAGS, "-march=native")
    said = b"".join(p.read_bytes() for p in sorted(SOURCES.iterdir()))
    tag = sha256(said + " ".join([compiler, *flags, _processor()]).encode()).hexdigest()[:16]
    target = BUILD / f"ptxemu-{tag}.so"
    if not target.exists():
        BUILD.mkdir(exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        command = [compiler, *flags, str(SOURCES / "engine.cpp"), "-o", str(part)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{run.stderr[-2000:]}")
        part.replace(target)
    lib = ctypes.CDLL(str(target))
    lib.emu_operation.restype = ctypes.c_char_p
    if lib.emu_launch_bytes() != ctypes.sizeof(Launch):
        raise RuntimeError("engine/layout.h and engine.py disagree on Launch")
    return lib


@functools.cache
def operations() -> dict[str, int]:
    """The engine's operations by name."""
    lib, found = library(), {}
    while (name := lib.emu_operation(len(found))) is not None:
        found[name.decode()] = len(found)
    return found

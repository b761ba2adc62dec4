"""Arguments for ``setup()`` that build ``fastvdm/_C``: libtorch stable ABI, one object per ISA.

``csrc/cpu/*_kernel.cpp`` hold the vector code. Each is compiled once for every instruction set of
the machine's family, with its own ``-m`` flags and ``FASTVDM_ISA`` as its namespace; which of them
runs is decided at run time (``csrc/cpu/isa.cpp``). Every other source is compiled once, for the
baseline of the platform, so that the library loads on any CPU. No ``-march=native`` anywhere.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

# Torch 2.11: the oldest whose stable ABI has all that register.cpp calls.
TARGET_VERSION = "0x020B000000000000"
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-maybe-uninitialized",  # GCC 12 reports its own AVX-512 header
]
ISA_FLAGS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mtune=haswell"],
    "avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx2",
        "-mfma",
        "-mf16c",
        "-mprefer-vector-width=512",
        "-mtune=skylake-avx512",
    ],
}
ISA_FLAGS["amx"] = ISA_FLAGS["avx512"]  # tiles.h writes the tile instructions in assembly
ISA_MACROS = {"amx": [("FASTVDM_TILES", "1")]}

# For tests on a machine without AMX (make emulate-amx): the same kernels on AVX2, tile instructions
# in plain C++.
EMULATE_AMX = os.environ.get("FASTVDM_EMULATE_AMX", "0") == "1"
if EMULATE_AMX:
    ISA_FLAGS["amx"] = ISA_FLAGS["avx2"]
    ISA_MACROS["amx"].append(("FASTVDM_EMULATE_AMX", "1"))

SANITIZE = os.environ.get("FASTVDM_SANITIZE", "")  # "address,undefined"; see .ci/variant.py
if SANITIZE:
    # -O1: the stacks stay readable, and three instruction sets compile in a minute.
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    FLAGS += ["-fno-sanitize-recover=all"]


def isas() -> list[str]:
    """The instruction sets that this platform's compiler can build for."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return list(ISA_FLAGS) if x86 else ["portable"]


class BuildPerISA(build_ext):
    """``build_ext`` that compiles the kernels once per instruction set, the rest once, and all of
    it in parallel: the launchers' time is torch's headers."""

    def build_extension(self, ext: Extension) -> None:
        def compile(work: tuple[str | None, str]) -> list[str]:
            isa, source = work
            own = [("FASTVDM_ISA", isa), *ISA_MACROS.get(isa, [])] if isa else ext.define_macros
            return self.compiler.compile(
                [source],
                output_dir=os.path.join(self.build_temp, isa or "base"),
                macros=own,
                include_dirs=[] if isa else ext.include_dirs,
                extra_postargs=[*FLAGS, *(ISA_FLAGS[isa] if isa else [])],
                depends=ext.depends,
            )

        kernels = [s for s in ext.sources if s.endswith("_kernel.cpp")]
        rest = [s for s in ext.sources if s not in kernels]
        ext.depends = [*ext.depends, *kernels]
        variant = bool(SANITIZE) or EMULATE_AMX  # whose flags no time stamp shows
        if not (self.force or variant) and not newer_group(
            [*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name), "newer"
        ):
            return super().build_extension(ext)  # which finds it up to date and says so
        work = [(None, s) for s in rest] + [(isa, s) for isa in isas() for s in kernels]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is in the compiler's processes
            objects = [o for found in pool.map(compile, work) for o in found]
        ext.sources, ext.extra_objects = [], [*ext.extra_objects, *objects]
        super().build_extension(ext)


def build_arguments(sources: list[str], required: bool) -> dict[str, Any]:
    """The keyword arguments of ``setup()``.

    Args:
        sources: the C++ files under ``csrc/``, relative to the repository root.
        required: whether a failed compile is an error or leaves a package without the extension.
    """
    root = Path(torch.__file__).parent
    here = Path(__file__).parent
    macros = [
        ("TORCH_TARGET_VERSION", TARGET_VERSION),
        ("FASTVDM_X86", "1" if len(isas()) > 1 else "0"),
        ("FASTVDM_EMULATE_AMX", "1" if EMULATE_AMX else "0"),
    ]
    extension = Extension(
        "fastvdm._C",
        sources=sources,
        depends=[__file__, *(str(p) for p in sorted(here.glob("**/*.h")))],
        include_dirs=[str(root / "include")],
        library_dirs=[str(root / "lib")],
        libraries=["torch_cpu"],
        define_macros=macros,
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=True,
        optional=not required,
    )
    if sys.platform == "linux":
        extension.extra_link_args = ["-Wl,--no-undefined", "-Wl,--as-needed"]
        if SANITIZE:
            extension.extra_link_args.append(f"-fsanitize={SANITIZE}")
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildPerISA},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }

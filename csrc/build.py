"""Arguments for ``setup()`` that build ``fastvdm/_C``: libtorch stable ABI, one object per ISA.

``csrc/cpu/**/*_kernel.cpp`` contain the vector code. Each is compiled once for every instruction
set of the machine's family (for those that multiply bf16 only if it has such products), with its
own ``-m`` flags and ``FASTVDM_ISA`` as its namespace. Which of them runs is decided at run time
(``csrc/cpu/common/isa.h``). Every other source is compiled once, for the baseline of the platform,
so that the library loads on any CPU. ``-march=native`` is never used.

Only headers and libtorch_cpu of torch are needed, of any version from 2.11 on. torch is located,
not imported. It is not a build requirement, which would download gigabytes into every isolated
build.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, SetupError
from setuptools.modified import newer_group

# Torch 2.11 is the oldest version whose stable ABI has all that register.cpp calls.
OLDEST_TORCH = (2, 11)
TARGET_VERSION = "0x020B000000000000"

# Advice for the user; fastvdm/runtime/extension.py gives the same at run time.
WITH_KERNELS = (
    'pip install "torch>=2.11" "setuptools>=77" && '
    "FASTVDM_BUILD_CPP=1 pip install --no-build-isolation ."
)
REMEDY = f"""\
To install with the C++ kernels, given a C++20 compiler (uv: the same with `uv pip`):
    {WITH_KERNELS}
To install without them, 2 to 3 times slower on a CPU (bf16: up to 4.6):
    FASTVDM_BUILD_CPP=0 pip install ."""
FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wno-maybe-uninitialized",  # GCC 12 reports its own AVX-512 headers
    "-Wno-uninitialized",
]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISA_FLAGS = {
    # x86 without AVX2 is older than 2013: there half the compile time is worth 5 % of speed.
    "portable": ["-O1"] if X86 else [],
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
# Kernels that multiply bf16, or store much of it (norm_act), get these instruction sets too.
# tiles.h writes the tile instructions in assembly.
BF16 = (
    "temporal_block", "linear_attention_block", "space_conv_kernel", "space_conv_direct", "norm_act"
)  # fmt: skip
ISA_FLAGS["avx512_bf16"] = ISA_FLAGS["amx"] = [*ISA_FLAGS["avx512"], "-mavx512bf16", "-mavx512vnni"]
ISA_MACROS = {
    "avx512_bf16": [("FASTVDM_BF16", "1")],
    "amx": [("FASTVDM_BF16", "1"), ("FASTVDM_TILES", "1")],
}

# For tests on a machine without them (make emulate-bf16): the same kernels on AVX2, with bf16 and
# tile instructions in plain C++.
EMULATE_BF16 = os.environ.get("FASTVDM_EMULATE_BF16", "0") == "1"
if EMULATE_BF16:
    ISA_FLAGS["avx512_bf16"] = ISA_FLAGS["amx"] = ISA_FLAGS["avx2"]
    ISA_MACROS["amx"].append(("FASTVDM_EMULATE_TILES", "1"))

SANITIZE = os.environ.get("FASTVDM_SANITIZE", "")  # "address,undefined"; see .ci/variant.py
if SANITIZE:
    # -O1: stacks stay readable, and three instruction sets compile in a minute.
    FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", f"-fsanitize={SANITIZE}"]
    FLAGS += ["-fno-sanitize-recover=all"]


def isas(kernel: str) -> list[str]:
    """The instruction sets for which a file of kernels is compiled on this platform."""
    if not X86:
        return ["portable"]
    products = Path(kernel).name.startswith(BF16)
    return [isa for isa in ISA_FLAGS if isa not in ISA_MACROS or products]


def compiler() -> str | None:
    """The C++ compiler that setuptools will call, or None. If this machine lacks the one with which
    Python was built, any other is used."""
    configured = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    found = shutil.which(shlex.split(configured)[0])
    if found is None and "CXX" not in os.environ:
        found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
        if found is not None:
            os.environ["CXX"] = found
    return found


def _torches() -> Iterator[Path]:
    """The folders of all torch installations found: of this interpreter, of the same one outside
    pip's build isolation (through PYTHONPATH, which -E ignores), and of interpreters on PATH."""
    if (spec := importlib.util.find_spec("torch")) and spec.origin:
        yield Path(spec.origin).parent
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
    on_path = (shutil.which("python3", path=folder) for folder in os.get_exec_path())
    for python in dict.fromkeys(filter(None, (sys.executable, *on_path))):
        try:
            done = subprocess.run(
                [python, "-E", "-c", ask], capture_output=True, text=True, cwd="/"
            )
        except OSError:  # on PATH, but not executable on this machine
            continue
        if origin := done.stdout.strip():
            yield Path(origin).parent


def find_torch() -> Path:
    """The folder of the first torch that is new enough.

    Raises:
        SetupError: there is none; the message has what was found and what to type.
    """
    old = {}
    for folder in _torches():
        version = folder / "version.py"
        text = version.read_text() if version.is_file() else ""
        if found := re.search(r"""^__version__ = ['"]((\d+)\.(\d+)[^'"]*)""", text, re.MULTILINE):
            if (int(found[2]), int(found[3])) >= OLDEST_TORCH:
                return folder
            old[f"{found[1]} in {folder}"] = None
    seen = f"only {', '.join(old)}" if old else "none"
    raise SetupError(
        f"the C++ kernels of fastvdm need torch >= 2.11; found {seen}.\n"
        f"(An isolated build sees that of its environment, not of another.)\n{REMEDY}"
    )


class BuildPerISA(build_ext):
    """``build_ext`` that compiles the kernels once per instruction set and the rest once, all in
    parallel: the launchers take long because of torch's headers."""

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
        variant = bool(SANITIZE) or EMULATE_BF16  # time stamps do not show a change of flags
        if not (self.force or variant) and not newer_group(
            [*ext.sources, *ext.depends], self.get_ext_fullpath(ext.name), "newer"
        ):
            return super().build_extension(ext)  # it reports that the extension is up to date
        if cache := shutil.which("ccache"):
            for name in ("compiler_so", "compiler_so_cxx"):
                command = getattr(self.compiler, name, [])
                if command and Path(command[0]).name != "ccache":
                    setattr(self.compiler, name, [cache, *command])
        torch = find_torch()
        print(f"compiling for the stable ABI of the torch in {torch}", flush=True)
        ext.include_dirs, ext.library_dirs = [str(torch / "include")], [str(torch / "lib")]
        # The slowest files first, so that none runs alone at the end.
        work = [(isa, s) for s in kernels for isa in isas(s)] + [(None, s) for s in rest]
        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is in other processes
                try:
                    objects = [o for found in pool.map(compile, work) for o in found]
                except BaseException:
                    pool.shutdown(cancel_futures=True)  # otherwise an error waits for the others
                    raise
            ext.sources, ext.extra_objects = [], [*ext.extra_objects, *objects]
            super().build_extension(ext)
        except (CCompilerError, ExecError) as error:
            why = textwrap.shorten(str(error), 200)  # the compiler has printed its own message
            raise SetupError(f"the C++ kernels did not compile: {why}\n{REMEDY}") from error


def build_arguments(sources: list[str]) -> dict[str, Any]:
    """The keyword arguments of ``setup()`` for C++ files under ``csrc/``, relative to the
    repository root. torch is located only when the extension is built."""
    here = Path(__file__).parent
    macros = [
        ("TORCH_TARGET_VERSION", TARGET_VERSION),
        ("FASTVDM_X86", "1" if X86 else "0"),
        ("FASTVDM_EMULATE_BF16", "1" if EMULATE_BF16 else "0"),
    ]
    extension = Extension(
        "fastvdm._C",
        sources=sources,
        depends=[__file__, *(str(p) for p in sorted(here.glob("**/*.h")))],
        libraries=["torch_cpu"],
        define_macros=macros,
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=True,
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

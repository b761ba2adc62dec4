"""The tests of the C++ ops on a build of their own: ``make sanitize``, ``make emulate-bf16``.

The variant is a copy of the package with its own extension under ``build/<variant>``; the build in
``fastvdm/`` is not touched. ``sanitize`` instruments it with the address and undefined-behaviour
sanitizers: a report aborts the run, so the exit status is 0 only if there was none and the tests
passed. ``bf16`` replaces the instructions that multiply bf16, in vectors and on tiles, by plain C++
on top of AVX2, so that a machine without them runs those paths' own code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKS = "address,undefined"
TESTS = {
    "sanitize": (
        "suite_test.py",
        "extension_test.py",
        "fixed_point_test.py",
        "linear_attention_test.py",
        "linear_attention_block_test.py",
        "guidance_test.py",
        "fuzz_test.py",
    ),
    "bf16": (
        "suite_test.py",
        "extension_test.py",
        "fixed_point_test.py",
        "linear_attention_block_test.py",
        "fuzz_test.py",
    ),
}
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def _runtime(name: str) -> str:
    """The path of a library of the compiler's."""
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    path = done.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler} has no {name}: install its sanitizer libraries")
    return os.path.realpath(path)


def _environment(variant: str) -> tuple[dict[str, str], dict[str, str]]:
    """(while building, while testing)"""
    if variant == "bf16":
        return {"FASTVDM_EMULATE_BF16": "1"}, {}
    # libstdc++ beside it: the runtime looks for __cxa_throw before Python has loaded any C++.
    preload = [_runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    return {"FASTVDM_SANITIZE": CHECKS}, {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=1",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "FASTVDM_OUTPUT_POOL_MB": "0",  # the pool would hand out what lies behind an output
    }


def run(variant: str, extra: list[str]) -> int:
    """Build, then run the tests on that build."""
    build = ROOT / "build" / variant
    lib = build / "lib"
    building, testing = _environment(variant)
    environment = os.environ | {"FASTVDM_BUILD_CPP": "1"} | building
    where = ["--build-lib", str(lib), "--build-temp", str(build / "temp")]
    for step in (["build_py", "--build-lib", str(lib)], ["build_ext", *where]):
        subprocess.run(
            [sys.executable, "setup.py", "-q", *step], cwd=ROOT, env=environment, check=True
        )
    environment |= testing | {"FASTVDM_STRICT": "1"}
    # Run from the copy, so that it is the package that `import fastvdm` finds.
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    options += ["-c", str(ROOT / "pyproject.toml")]
    options += ["-k", "not triton"]  # of the suite the C++ lanes
    options += [*(str(ROOT / "tests" / "ops" / t) for t in TESTS[variant]), *extra]
    found = "from fastvdm.runtime import extension as e; print('extension:', e.__file__)"
    found += "; assert not e.reason_off()"
    if variant == "bf16":
        found += "; print('path:', e.set_cpu_isa('avx512_bf16'), e.set_cpu_isa('amx'))"
    check = subprocess.run([sys.executable, "-c", found], cwd=lib, env=environment)
    if check.returncode:
        return check.returncode
    return subprocess.run(
        [sys.executable, "-c", PYTEST, *options], cwd=lib, env=environment
    ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variant", choices=sorted(TESTS))
    args, extra = parser.parse_known_args()
    status = run(args.variant, extra)
    print(f"{args.variant}:", "FAILED" if status else "no findings")
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())

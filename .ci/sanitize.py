"""The tests of the C++ ops under the address and undefined-behaviour sanitizers: ``make sanitize``.

They need a build of their own: a copy of the package with an instrumented extension under
``build/sanitize``; the build in ``fastvdm/`` is not touched. A report aborts the run, so the exit
status is 0 only if there was none and the tests passed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "sanitize"
CHECKS = "address,undefined"
TESTS = ("cpu_test.py", "linear_attention_projected_test.py", "guidance_test.py", "fuzz_test.py")
PYTEST = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"


def _runtime(name: str) -> str:
    """The path of a library of the compiler's."""
    compiler = os.environ.get("CXX", "g++")
    done = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True)
    path = done.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler} has no {name}: install its sanitizer libraries")
    return os.path.realpath(path)


def sanitizers(extra: list[str]) -> int:
    """Build, then run the tests on that build with the runtime loaded first."""
    lib = BUILD / "lib"
    environment = os.environ | {"FASTVDM_SANITIZE": CHECKS, "FASTVDM_BUILD_CPP": "1"}
    where = ["--build-lib", str(lib), "--build-temp", str(BUILD / "temp")]
    for step in (["build_py", "--build-lib", str(lib)], ["build_ext", *where]):
        subprocess.run(
            [sys.executable, "setup.py", "-q", *step], cwd=ROOT, env=environment, check=True
        )
    # libstdc++ beside it: the runtime looks for __cxa_throw before Python has loaded any C++.
    preload = [_runtime(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment |= {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=1",  # Python leaks by design
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    # Run from the copy, so that it is the package that `import fastvdm` finds.
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    options += [
        "-c",
        str(ROOT / "pyproject.toml"),
        *(str(ROOT / "tests" / t) for t in TESTS),
        *extra,
    ]
    found = "import fastvdm._ext as e; print('extension:', e.__file__); assert not e.reason_off()"
    check = subprocess.run([sys.executable, "-c", found], cwd=lib, env=environment)
    if check.returncode:
        return check.returncode
    return subprocess.run(
        [sys.executable, "-c", PYTEST, *options], cwd=lib, env=environment
    ).returncode


def main() -> int:
    status = sanitizers(sys.argv[1:])
    print("sanitize:", "FAILED" if status else "no findings")
    return int(bool(status))


if __name__ == "__main__":
    sys.exit(main())

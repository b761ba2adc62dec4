"""Runs the checks of the repository, all of them even if one fails, and ends with a plain table.

``make test`` calls it: info, lint, types and the tests that are not marked slow; ``make test-all``
adds these (``--all``). Other arguments go to pytest, which then runs alone: ``make test ARGS="-k
norm_act"``, ``make test ARGS=tests/ops``. The exit status is 0 if all passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (sys.executable, "-m")
CPP = ("csrc/**/*.cpp", "csrc/**/*.h", "tests/**/*.cpp", "tests/**/*.h")


Step = tuple[str, list[str], dict[str, str]]


def program(name: str) -> str:
    """A tool beside this Python, which may not be on PATH; else the one that is."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or name


def files(*patterns: str) -> list[str]:
    """Relative to the root, in order."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in ROOT.glob(pattern))


def steps(only: str | None, everything: bool, extra: list[str]) -> list[Step]:
    """(name, command, environment) in the order they run; lint first, as it fails fastest."""
    lint = [
        ("ruff check", [*PYTHON, "ruff", "check", "."], {}),
        ("ruff format", [*PYTHON, "ruff", "format", "--check", "."], {}),
        ("mypy", [*PYTHON, "mypy"], {}),
        ("clang-format", [program("clang-format"), "--dry-run", "--Werror", *files(*CPP)], {}),
    ]
    if only == "lint":
        return lint
    workers = str(min(4, os.cpu_count() or 1))
    # loadfile: the tests of one file share their compiled functions. The longest files come first
    # (tests/conftest.py), where xdist would begin with those of many tests.
    pytest = [*PYTHON, "pytest", "-q", "-n", workers, "--dist", "loadfile"]
    pytest += ["--no-loadscope-reorder", "--durations=15"]
    pytest += [] if everything else ["-m", "not slow"]
    tests: list[Step] = [("pytest", [*pytest, *extra], {})]
    # Each Triton kernel as compiled for an H100, its PTX executed on the CPU (tests/ptxemu).
    emulated = [*PYTHON, "pytest", "-q", "-n", workers, "--dist", "worksteal", "-m", "not slow"]
    emulated += ["--durations=5", "tests/ptxemu", "tests/ops/suite_test.py"]
    tests += [] if extra else [("emulated sm_90", emulated, {"FASTVDM_EMULATE": "90"})]
    info: list[Step] = [("fastvdm info", [*PYTHON, "fastvdm.info"], {})]
    return tests if extra else info + lint + tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["lint"])
    parser.add_argument("--all", action="store_true", help="the tests marked slow, too")
    args, extra = parser.parse_known_args()
    # One thread per worker: the workers are the parallelism.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    rows = []
    for name, command, more in steps(args.only, args.all, extra):
        print(f"\n== {name}", flush=True)
        start = time.monotonic()
        status = subprocess.run(command, cwd=ROOT, env=environment | more).returncode
        rows.append((name, status, time.monotonic() - start))
    print("\n== summary")
    for name, status, seconds in rows:
        print(f"{name:<14} {'ok' if status == 0 else f'FAILED ({status})':<12} {seconds:7.1f} s")
    failed = [name for name, status, _ in rows if status != 0]
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

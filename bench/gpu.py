"""make gpu OUT=dir: everything a machine with a GPU can tell, in one command and nine minutes.

Uses the Python it is started with (torch >= 2.11, Triton, pytest) and no network. In turn: build
and info, parity on the device, tuning (bench/tune.py; what it finds stays in kernels/configs/),
benchmarks, the page. Every step has a share of the time and what is left over goes to the next; a
step that fails or runs out does not stop the rest, and the exit status is 0 only if all passed. The
peer takes part where ``.peer/`` is there (``make peer`` on a machine with a network, then copied
along). Files left in ``OUT``: log.txt, tests.xml, <gpu>.json, bench.json, RESULTS.md, RESULTS.svg.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TOTAL = 530.0  # seconds for everything


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    seconds: float  # at most; what earlier steps saved is added
    environment: dict[str, str]


def steps(out: Path, quick: bool) -> list[Step]:
    """What runs, in order. ``quick`` is for trying the command out on a machine without a GPU,
    where there is nothing to tune."""
    workers = str(min(8, os.cpu_count() or 1))
    pytest = [PYTHON, "-m", "pytest", "-q"]
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "-e", "."]
    # No cell of the suite is slow on a GPU.
    parity = [*pytest, "tests", "-m", "not slow", "-n", workers, "--dist", "loadfile"]
    parity += ["--durations=10"]
    bench = [*pytest, "bench", f"--benchmark-json={out / 'bench.json'}"]
    if quick:
        parity += ["-k", "peer"]
        bench += ["-k", "small and not compiled", "--budget=1"]
    else:
        # Compiling backward passes would take the whole time.
        bench += ["--full", "--budget=2", "-k", "not (train and compiled) and not small"]
    tune = [PYTHON, "bench/tune.py", "--out", str(out), "--budget=100"]
    page = [PYTHON, "bench/waterfall.py", str(out / "bench.json")]
    return [
        Step("build", [PYTHON, *install], 45, {}),
        Step("info", [PYTHON, "-m", "fastvdm.info"], 15, {}),
        Step("parity", [*parity, f"--junitxml={out / 'tests.xml'}"], 140, {}),
        *([] if quick else [Step("tuning", tune, 120, {})]),
        Step("benchmarks", bench, 190, {}),
        Step("page", [*page, "--out", str(out / "RESULTS.md")], 20, {}),
    ]


def run(step: Step, limit: float, log: Path) -> int:
    """The exit status; 124 where the time ran out. Output goes to the screen and to ``log``."""
    # An interrupt, so that pytest still writes what it has.
    command = ["timeout", "--signal=INT", "--kill-after=30", f"{limit:.0f}", *step.command]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | step.environment
    with log.open("a", encoding="utf-8") as sink:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            sink.write(line)
        return process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a try-out without a GPU")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    log.unlink(missing_ok=True)
    if not args.quick:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device here (make bench runs on a CPU)")
            return 1
    start = time.monotonic()
    rows, planned = [], 0.0
    for step in steps(out, args.quick):
        planned += step.seconds
        spent = time.monotonic() - start
        limit = max(10.0, min(planned, TOTAL) - spent)
        print(f"\n== {step.name} (at most {limit:.0f} s)", flush=True)
        status = run(step, limit, log)
        rows.append((step.name, status, time.monotonic() - start - spent))
    lines = ["", "== summary"]
    for name, status, seconds in rows:
        verdict = {0: "ok", 124: "out of time"}.get(status, f"FAILED ({status})")
        lines.append(f"{name:<12} {verdict:<14} {seconds:6.1f} s")
    print("\n".join(lines))
    with log.open("a", encoding="utf-8") as sink:
        sink.write("\n".join(lines) + "\n")
    return 0 if all(status == 0 for _, status, _ in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Tuning: what ``make gpu-tune`` does (gpu_tune.py), on a machine with a GPU.

A job is a call of the networks, or by name (calls.py). The ``pick_config`` functions that it calls
(``fastvdm.kernels.tuned``) return neighbours of their analytic configuration (tune_cases.py). Each
neighbour is compiled, compared with the result of the analytic one, and timed against it in
interleaved rounds. One that is more than 3 % faster goes into kernels/configs/<gpu>.json and
DIR/<gpu>.json, at once, so that nothing is lost if the time runs out. A combination of kernel and
arguments is tuned at the first job that asks for it. The content of the file is not used here: the
baseline is always the analytic configuration.
"""

from __future__ import annotations

import copy
import datetime
import itertools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton
from calls import Call, Run
from harness import Contest, Outputs, Provider, run_contest
from tune_cases import candidates

from fastvdm.kernels import tuned
from fastvdm.kernels.tuned import Choice, choosing

ROOT = Path(__file__).resolve().parents[1]
GAIN = 1.03  # required ratio of times
# Candidates sum in another order, and an online softmax rounds p and ds at other points.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
THREADS = min(16, os.cpu_count() or 1)
BATCH = 8  # jobs whose kernels are compiled together; all their inputs are in memory

At = tuple[str, str]  # kernel and key of a choice
Answers = Mapping[At, Any]


@dataclass(frozen=True)
class Task:
    """One choice of a job, and candidates for it; ``rejected``: those that cannot run, and why."""

    job: Call
    run: Run
    choice: Choice
    configs: list[Any]
    rejected: dict[str, str] = field(default_factory=dict)

    @property
    def at(self) -> At:
        return self.choice.kernel, self.choice.key


@dataclass(frozen=True)
class Found:
    """The outcome of one choice: the best configuration (the analytic one if none was faster by
    ``GAIN``), seconds of the job's whole call with it and with the analytic one, the number timed,
    and those that were wrong or did not run, with reasons."""

    job: str
    choice: Choice
    best: Any
    seconds: float
    analytic_seconds: float
    timed: int
    rejected: dict[str, str]


@dataclass
class Report:
    """Jobs for which there was no time; jobs that raised, with their errors."""

    missed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def answering(run: Run, answers: Answers) -> Run:
    """``run`` with these configurations, and analytic ones for all other choices."""

    def answered() -> Outputs:
        with choosing(lambda c: answers.get((c.kernel, c.key), c.analytic)):
            return run()

    return answered


def prepare(job: Call, device: str) -> tuple[Run, list[Choice]]:
    """The job's call and its choices, each once, in order. Runs it with analytic answers."""
    found: dict[At, Choice] = {}
    with choosing(lambda c: c.analytic):
        run = job.build(device)
    with choosing(lambda c: found.setdefault((c.kernel, c.key), c).analytic):
        run()
    return run, list(found.values())


def in_threads(calls: Mapping[Any, Callable[[], Any]], deadline: float) -> dict[Any, Any]:
    """Results by name, or the exception if the call raised; calls that were not ready by
    ``deadline`` (of the monotonic clock) are missing. Threads suffice, because the compiler
    releases Python's lock."""
    pool = ThreadPoolExecutor(THREADS)
    futures = {name: pool.submit(call) for name, call in calls.items()}
    wait(futures.values(), timeout=max(0.0, deadline - time.monotonic()))
    pool.shutdown(wait=False, cancel_futures=True)
    done = {name: f for name, f in futures.items() if f.done() and not f.cancelled()}
    return {name: f.exception() or f.result() for name, f in done.items()}


def tasks_of(
    batch: Sequence[Call], answers: Answers, report: Report, device: str, deadline: float
) -> list[Task]:
    """A task for each choice that has no answer yet, from the first job that asks for it."""
    calls = {job: lambda job=job: prepare(job, device) for job in batch}
    prepared = in_threads(calls, deadline)
    tasks: dict[At, Task] = {}
    for job in batch:
        result = prepared.get(job)
        if result is None:
            report.missed.append(job.name)
        elif isinstance(result, Exception):
            report.failed[job.name] = _line(result)
        else:
            for choice in result[1]:
                task = Task(job, result[0], choice, candidates(choice))
                if task.at not in answers:
                    tasks.setdefault(task.at, task)
    return list(tasks.values())


def compiled(tasks: Sequence[Task], answers: Answers, deadline: float) -> list[Task]:
    """The tasks with the candidates that compile and run, after a first call of each."""

    def first_call(task: Task, config: Any) -> Callable[[], None]:
        run = answering(task.run, {**answers, task.at: config})

        def call() -> None:  # discard the result: all candidates' results would be gigabytes
            run()

        return call

    calls = {(t.at, config): first_call(t, config) for t in tasks for config in t.configs}
    results = in_threads(calls, deadline)
    ready = []
    for task in tasks:
        mine = {c: results[task.at, c] for c in task.configs if (task.at, c) in results}
        bad = {str(c): _line(r) for c, r in mine.items() if isinstance(r, Exception)}
        sound = [c for c in mine if str(c) not in bad]
        ready.append(replace(task, configs=sound, rejected=bad))
    return ready


def race(task: Task, answers: Answers, device: str) -> Found:
    """Compare the candidates with the result of the analytic configuration and time them in turns.
    ``answers`` are for the other choices of the same call.

    Raises:
        RuntimeError: the analytic configuration itself has no time.
    """
    every = {str(c): c for c in (task.choice.analytic, *task.configs)}
    base = str(task.choice.analytic)
    runs = {name: answering(task.run, {**answers, task.at: c}) for name, c in every.items()}
    tolerance = TOLERANCE[task.job.dtype]
    contest = Contest(
        reference=runs[base],
        providers={name: Provider(lambda run=run: run, tolerance) for name, run in runs.items()},
        device=device,
    )
    results = run_contest(contest, budget=0.5, min_rounds=15, max_rounds=40)
    times = {name: r.times for name, r in results.items() if r.times}
    if base not in times:
        raise RuntimeError(f"{task.choice.kernel}, analytic: {results[base].failed}")
    gains = {n: statistics.median(b / t for b, t in zip(times[base], times[n])) for n in times}
    best = max(gains, key=lambda name: gains[name])
    if gains[best] <= GAIN:
        best = base
    return Found(
        job=task.job.name,
        choice=task.choice,
        best=every[best],
        seconds=results[best].median,
        analytic_seconds=results[base].median,
        timed=len(times) - 1,
        rejected=task.rejected | {n: r.failed for n, r in results.items() if r.failed},
    )


def tune(
    todo: Iterable[Call], keep: Callable[[Found], None], *, device: str, budget: float,
    answers: dict[At, Any] | None = None,
) -> Report:  # fmt: skip
    """Tune every choice of every job until ``budget`` seconds are over (it waits for a kernel that
    is then being compiled). ``keep`` takes each outcome as it comes. ``answers`` has earlier
    results, and gets new ones."""
    deadline = time.monotonic() + budget
    report, answers = Report(), {} if answers is None else answers
    remaining = iter(todo)
    while batch := list(itertools.islice(remaining, BATCH)):
        if time.monotonic() >= deadline:
            report.missed += [job.name for job in (*batch, *remaining)]
            break
        tasks = tasks_of(batch, answers, report, device, deadline)
        for task in compiled(tasks, answers, deadline):
            if time.monotonic() >= deadline:
                report.missed.append(task.job.name)
                continue
            try:
                found = race(task, answers, device)
            except Exception as error:  # of this task; the others go on
                report.failed[task.job.name] = _line(error)
                continue
            answers[task.at] = found.best
            keep(found)
    return report


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


# The file.


def versions() -> dict[str, str | None]:
    """The origin of an entry: date, versions and commit (None outside a checkout)."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or None,
    }


def record(table: dict[str, Any], found: Found, origin: Mapping[str, Any]) -> None:
    """Enter the outcome; if the analytic configuration is best, the table gets no entry."""
    choice = found.choice
    entries = table.setdefault(choice.kernel, {})
    entries.pop(choice.key, None)
    if found.best != choice.analytic:
        entries[choice.key] = {
            "config": _fields(found.best),
            "ms": round(1e3 * found.seconds, 5),
            "analytic": _fields(choice.analytic),
            "analytic_ms": round(1e3 * found.analytic_seconds, 5),
            "job": found.job,
            **origin,
        }


def _fields(config: Any) -> dict[str, Any]:
    return config._asdict() if isinstance(config, tuple) else asdict(config)


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write the file atomically, so that readers and interrupted runs never see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)


def keeper(gpu: str, out: Path, say: Callable[[str], None] = print) -> Callable[[Found], None]:
    """A function that writes each outcome at once, to the GPU's file and a copy in ``out``."""
    path = tuned.path_of(gpu)
    table, origin = copy.deepcopy(tuned.table(path)), versions()

    def keep(found: Found) -> None:
        record(table, found, origin)
        for target in (path, out / path.name):
            write(target, table)
        gain = found.analytic_seconds / found.seconds
        best = "analytic" if found.best == found.choice.analytic else f"{gain:.2f}x {found.best}"
        say(f"{found.job}: {found.choice.kernel}({found.choice.key}), {found.timed} timed: {best}")
        for config, why in found.rejected.items():
            say(f"  REJECTED {config}: {why}")

    return keep

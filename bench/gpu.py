"""make gpu-check, gpu-measure, gpu-tune: what only a machine with a GPU can show, in stages.

    python bench/gpu.py check --out DIR [--seconds 230] [--only PREFIX] [--dry-run]

It uses the Python that runs it (torch >= 2.11, Triton, pytest) and no network; it uses the peer if
``.peer/`` exists, and compiled kernels that ``make gpu-pack`` left. A stage is a list of items
(gpu_check.py, gpu_measure.py, gpu_tune.py), the most important first. They run in worker processes
(gpu_worker.py): an item that raises, crashes or hangs costs only itself. Items for which there was
no time are named. DIR gets ``<stage>.jsonl``, a record per item as it ends; ``<stage>.md``, the
table; ``<stage>-<worker>.log``, the output. The exit status is 0 if no item that ran failed.
``--dry-run`` runs the same lines on a machine without a GPU (gpu_dry.py).
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_pack import PACK, ROOT, unpack
from gpu_worker import Context, Item, load

DRY = 3600.0  # longest time of a stage, in seconds, if an interpreter replaces the device
START = 90.0  # seconds in which a worker must import all it needs
BAD = ("failed", "crashed", "hung")
VERDICTS = ("ok", *BAD, "skipped", "left out")
SHOWN = 40  # lines of each list in the printed table


@dataclass(frozen=True)
class Stage:
    module: str
    seconds: float  # longest time on the device
    workers: int  # processes that share the device


STAGES = {
    "check": Stage("gpu_check", 230.0, 6),
    "measure": Stage("gpu_measure", 290.0, 1),
    "tune": Stage("gpu_tune", 230.0, 1),
}


class Worker:
    """A process that runs items of ``module``. A caller that finds it dead starts a new one."""

    def __init__(
        self, module: str, context: Context, environment: tuple[tuple[str, str], ...], log: Path
    ) -> None:
        self.environment, self.log = environment, log
        command = [sys.executable, "-u", str(ROOT / "bench" / "gpu_worker.py"), module]
        command += [str(context.out), *(["--dry-run"] if context.dry else [])]
        with log.open("a") as sink:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env={"OMP_NUM_THREADS": "2"} | os.environ | dict(environment),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sink, start_new_session=True,
            )  # fmt: skip
        self._rest = b""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        self.ready = False

    def wait_until_ready(self, seconds: float) -> str | None:
        """Why it is not ready, or None."""
        answer = self._answer(time.monotonic() + seconds)
        self.ready = answer is not None and "ready" in answer
        if self.ready:
            return None
        return "it took too long" if answer is None else answer["why"]

    def ask(self, item: Item, without: tuple[str, ...], seconds: float) -> dict[str, Any]:
        """The record of the item; made here if the worker died before it could send one."""
        said, deadline, start = "", time.monotonic() + seconds, time.monotonic()
        request = json.dumps({"item": item.name, "without": without}) + "\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(request.encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer reports how the worker ended
        while True:
            answer = self._answer(deadline)
            if answer is not None and "note" in answer:
                said = answer["note"]
                continue
            if answer is None:
                self.kill()
                answer = {"verdict": "hung", "why": f"killed after {seconds:.0f} s"}
            elif answer.get("verdict") == "crashed":
                self.kill()
            answer.setdefault("seconds", round(time.monotonic() - start, 3))
            return answer | ({"part": said} if said and answer["verdict"] in BAD else {})

    def _answer(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or a report that the worker died; None after the deadline."""
        while b"\n" not in self._rest:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                return None
            chunk = os.read(self.process.stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
            if not chunk:
                return {"verdict": "crashed", "why": self._end()}
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def _end(self) -> str:
        status = self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        tail = self.log.read_text(errors="replace").strip().splitlines()[-3:]
        return f"{how}: {' | '.join(tail)[-500:]}"

    def kill(self) -> None:
        """Kill the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.ready = False


class Run:
    """Runs items on workers until none are left or the time is up; ``keep`` takes each record."""

    def __init__(
        self, module: str, context: Context, keep: Callable[[dict[str, Any]], None], *,
        workers: int, seconds: float, log: str,
    ) -> None:  # fmt: skip
        self.module, self.context, self.keep, self.log = module, context, keep, log
        self.workers, self.deadline = workers, time.monotonic() + seconds
        self._lock = threading.Lock()
        self._alive: dict[int, Worker] = {}

    def run(self, items: Iterable[Item]) -> None:
        try:
            for alone, group in itertools.groupby(items, key=lambda item: item.alone):
                queue = deque((item, ()) for item in group)
                count = 1 if alone else min(self.workers, len(queue))
                threads = [
                    threading.Thread(target=self._serve, args=(slot, queue))
                    for slot in range(count)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                for item, _ in queue:  # all slots gave up
                    self._record(item, {"verdict": "left out", "why": "no worker starts"})
        finally:
            for worker in self._alive.values():
                worker.kill()

    def _serve(self, slot: int, queue: deque[tuple[Item, tuple[str, ...]]]) -> None:
        failures = 0
        while failures < 2:
            with self._lock:
                if not queue:
                    return
                item, without = queue.popleft()
            left = self.deadline - time.monotonic()
            if left < 1.0:
                self._record(item, {"verdict": "left out", "why": "no time"})
                continue
            worker = self._alive.get(slot)
            if worker is None or not worker.ready or worker.environment != item.environment:
                why = self._start(slot, item, min(START, left))
                if why is not None:
                    failures += 1
                    self._record(item, {"verdict": "crashed", "why": f"no worker: {why}"})
                    continue
                worker = self._alive[slot]
            left = max(0.1, self.deadline - time.monotonic())
            limit = item.limit * (10 if self.context.dry else 1)  # an interpreter is slow
            record = worker.ask(item, without, min(limit, left))
            failures = 0
            if record["verdict"] == "hung" and left < limit:
                record |= {"verdict": "left out", "why": f"no time to end: {record['why']}"}
            self._record(item, record | ({"without": without} if without else {}))
            part = record.get("part", "")
            if record["verdict"] in ("crashed", "hung") and part and part not in without:
                with self._lock:  # its other parts may work
                    queue.appendleft((item, (*without, part)))

    def _start(self, slot: int, item: Item, seconds: float) -> str | None:
        if slot in self._alive:
            self._alive[slot].kill()
        log = self.context.out / f"{self.log}-{slot}.log"
        worker = self._alive[slot] = Worker(self.module, self.context, item.environment, log)
        return worker.wait_until_ready(seconds)

    def _record(self, item: Item, record: dict[str, Any]) -> None:
        with self._lock:
            self.keep({"item": item.name} | record)


def table(stage: str, records: Sequence[dict[str, Any]], seconds: float, shown: int) -> str:
    """The results of a stage, as Markdown."""
    kinds = dict.fromkeys(r["item"].split("/")[0] for r in records)
    lines = [f"# {stage}: {len(records)} items in {seconds:.0f} s", ""]
    lines += [f"| kind | {' | '.join(VERDICTS)} | s |", "|---" + "|--:" * (len(VERDICTS) + 1) + "|"]
    for kind in (*kinds, "all"):
        mine = [r for r in records if kind in ("all", r["item"].split("/")[0])]
        count = Counter(r["verdict"] for r in mine)
        spent = sum(r.get("seconds", 0.0) for r in mine)
        cells = (kind, *(str(count[v] or "") for v in VERDICTS), f"{spent:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    for verdict in (*BAD, "skipped", "left out"):
        mine = [r for r in records if r["verdict"] == verdict]
        if not mine:
            continue
        lines += ["", f"## {verdict}: {len(mine)}", ""]
        for r in mine[:shown]:
            part = f" ({r['part']})" if r.get("part") else ""
            lines.append(f"- `{r['item']}`{part}: {' '.join(r.get('why', '').split())[:300]}")
        if len(mine) > shown:
            lines.append(f"- and {len(mine) - shown} more")
    return "\n".join(lines) + "\n"


def run(
    stage: str,
    module: str,
    context: Context,
    *,
    workers: int,
    seconds: float,
    only: Sequence[str] = ("",),
) -> int:
    """Run a stage and write its files; return the exit status."""
    start, records = time.monotonic(), list[dict[str, Any]]()
    items = [i for i in load(module, context).values() if i.name.startswith(tuple(only))]
    if not items:
        raise ValueError(f"no item of {stage} starts with any of {only}")
    print(f"== {stage}: {len(items)} items, at most {seconds:.0f} s", flush=True)
    for old in context.out.glob(f"{stage}-[0-9].log"):
        old.unlink()
    with (context.out / f"{stage}.jsonl").open("w", encoding="utf-8") as sink:

        def keep(record: dict[str, Any]) -> None:
            records.append(record)
            sink.write(json.dumps(record) + "\n")
            sink.flush()
            if record["verdict"] not in ("ok", "left out") or "say" in record:
                said = record.get("say") or record.get("why", "")
                print(f"{record['verdict']:<8} {record['item']}: {said[:200]}", flush=True)

        spent = time.monotonic() - start
        Run(module, context, keep, workers=workers, seconds=seconds - spent, log=stage).run(items)
    seconds = time.monotonic() - start
    found = importlib.import_module(module)
    more = found.summary(context, records) if hasattr(found, "summary") else ""
    for shown, write in ((10**6, (context.out / f"{stage}.md").write_text), (SHOWN, print)):
        write(table(stage, records, seconds, shown) + more)
    return 1 if any(r["verdict"] in BAD for r in records) else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, help="of the stage, at most")
    parser.add_argument("--workers", type=int, help="processes that share the device")
    parser.add_argument("--only", nargs="*", default=("",), help="items whose name starts so")
    parser.add_argument("--dry-run", action="store_true", help="on a device that is made up")
    args = parser.parse_args(argv)
    stage, context = STAGES[args.stage], Context(args.out.resolve(), args.dry_run)
    context.out.mkdir(parents=True, exist_ok=True)
    seconds = DRY if context.dry else stage.seconds
    # The packages need not be installed; an editable install would need its build system.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.getenv("PYTHONPATH")]))
    sys.path[:0] = [str(ROOT / p) for p in (".", "bench", "tests", "tests/ops")]
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            print("no CUDA device here (make bench runs on a CPU; DRY=1 tries the stages out)")
            return 1
        print(unpack(PACK), flush=True)
    return run(
        args.stage, stage.module, context, seconds=args.seconds or seconds, only=args.only,
        workers=args.workers or (1 if args.dry_run else min(stage.workers, os.cpu_count() or 1)),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

"""The paper's claims at a small scale: ``make paper-tables``, 85-110 minutes on two cores.

It uses clips with a known distribution, their exact denoiser, and small 3D U-Nets trained until
they know what frames share, for the paper's Tables 4, 5 and 6, prediction, interpolation and the
cascade. Networks and rows are files in a cache folder, so an interrupted run continues. The reports
go to bench/results: paper_tables_exact.md and paper_tables.md. ``--fast`` runs only the part with
the exact denoiser, 13 minutes. ``--quick`` runs everything in about a minute, with networks that
have learned nothing.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import torch
from paper import exact_tables, report
from paper.tables import FULL, QUICK, Place, jobs, networks
from paper.train import train
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def train_one(place: Place, name: str) -> None:
    torch.set_num_threads(1)
    train(place.recipe(name), place.cache / "networks")


def run_one(place: Place, number: int) -> None:
    jobs(place.budget)[number](place)


def run_all(place: Place, processes: int, only: str = "") -> None:
    """Train every network, and run every row as soon as its networks exist."""
    rows = [(i, job) for i, job in enumerate(jobs(place.budget)) if job.name.startswith(only)]
    needed = {name for _, job in rows for name in job.needs}
    names = [n for n in networks(place.budget) if n in needed or n.startswith(only)]
    progress = tqdm(total=len(names) + len(rows))
    if processes <= 1:
        for name in names:
            train_one(place, name)
            progress.update()
        for i, _ in rows:
            run_one(place, i)
            progress.update()
        return
    # spawn: a forked child would inherit locks of torch's threads that nobody releases.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(train_one, place, name): name for name in names}
        trained: set[str] = set()
        while rows or waiting:
            ready = [i for i, job in rows if trained.issuperset(job.needs)]
            rows = [row for row in rows if row[0] not in ready]
            waiting |= {pool.submit(run_one, place, i): "" for i in ready}
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                trained.add(waiting.pop(future))
                progress.update()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a minute; the numbers mean nothing")
    parser.add_argument("--out", type=Path, help="folder of the report (default: bench/results)")
    parser.add_argument("--cache", type=Path, help="of networks and rows (default: out/paper)")
    parser.add_argument("--processes", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--only", help="run networks and rows whose names start so; no report")
    parser.add_argument("--fast", action="store_true", help="only the part without training")
    parser.add_argument("--render", action="store_true", help="run nothing: what the cache has")
    args = parser.parse_args(argv)
    if args.quick and args.out is None:
        parser.error("--quick needs --out: it would overwrite the real report")
    out = args.out or ROOT / "bench" / "results"
    cache = args.cache or (args.out / "cache" if args.quick else ROOT / "out" / "paper")
    place = Place(cache, QUICK if args.quick else FULL)
    torch.set_num_threads(1)
    if args.fast or not (args.only or args.render):
        budget = exact_tables.QUICK if args.quick else exact_tables.FULL
        exact = exact_tables.tables(cache, budget, args.processes)
        print(f"wrote {report.write_exact(out, exact, args.quick)}")
    if args.fast:
        return 0
    if not args.render:
        run_all(place, args.processes, args.only or "")
    if not args.only:
        print(f"wrote {report.write(place, out, args.quick)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

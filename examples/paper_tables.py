"""The paper's claims in the small: ``make paper-tables``, 60-90 minutes on two cores.

Clips whose law is known, the exact denoiser of them, and small 3D U-Nets trained until they know
what frames share; then the paper's Tables 4, 5 and 6, prediction, interpolation and the cascade.
Networks and rows are files in a cache folder: a run that was interrupted goes on where it was.
The reports go to bench/results, paper_tables_exact.md and paper_tables.md. ``--fast`` is the part
with the exact denoiser alone, ten minutes; ``--quick`` runs everything in about a minute, with
networks that have learned nothing.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    """First every network, then every row that is not there yet; the longest first."""
    names = [n for n in networks(place.budget) if n.startswith(only)]
    rows = [i for i, j in enumerate(jobs(place.budget)) if j.name.startswith(only)]
    for function, arguments in ((train_one, names), (run_one, rows)):
        if processes <= 1:
            for argument in tqdm(arguments):
                function(place, argument)
            continue
        # spawn: a forked child inherits the threads of torch as locks that nobody opens
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            waiting = [pool.submit(function, place, a) for a in arguments]
            for done in tqdm(as_completed(waiting), total=len(waiting)):
                done.result()


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

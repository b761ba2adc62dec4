"""The tables that need no training: samplers and guidance with the exact denoiser.

What is wrong here is wrong in the sampler, not in a network. Every row is a job of its own, stored
as a small file, so that an interrupted run continues; about 13 minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvdm.diffusion import Ancestral, Langevin, extend, sample
from paper import data, imperfect, limits, measure
from paper.common import Table, cached
from paper.exact import Exact
from paper.intervals import frechet, gains_table, mean_of
from paper.measure import Mean
from paper.train import HeldOut, Recipe

OVERLAP, LENGTH = 3, 32  # of the extension
RATIO = data.FRAMES / OVERLAP  # F/n of its windows, but for the last
AUTO = "w_r = auto (2 F/n)"
Result = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    clips: int = 128
    few: int = 24  # network calls of a window
    many: int = 96
    calls: tuple[int, ...] = (12, 24, 48, 96)  # of the sampler table
    held_out: int = 2048
    pixels: int = 64  # videos of 64 x 64 independent pixels, in the Gaussian tables


FULL = Budget()
QUICK = Budget(clips=4, few=2, many=4, calls=(2, 4), held_out=8, pixels=4)


# --- Extension ------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One way of extending. ``calls`` is a field of ``Budget``; Langevin has half the steps."""

    label: str
    condition: Result
    calls: str = "few"
    langevin: bool = False


def _rows() -> list[Row]:
    replacement = ("replacement", dict(method="replacement"))
    posterior = ("replacement, posterior", dict(method="replacement", replacement="posterior"))
    one = ("w_r = 1", dict(guidance_weight=1.0))
    third = (f"w_r = {RATIO:.2g} (F/n)", dict(guidance_weight=RATIO))
    auto = (AUTO, dict(guidance_weight="auto"))
    free = ("w_r = auto, no limit", dict(guidance_weight="auto", guidance_limit="none"))
    rows = [Row(*r) for r in (replacement, posterior, one, third, auto, free)]
    rows += [Row(*r, langevin=True) for r in (replacement, third, auto)]
    rows += [Row(*r, "many") for r in (replacement, one, auto)]
    rows += [Row(*r, "many", True) for r in (replacement, auto)]
    more = (f"w_r = {3 * RATIO:.2g} (3 F/n)", dict(guidance_weight=3 * RATIO))
    return [*rows, Row(*more), Row(*third, "many"), Row(*more, "many")]


ROWS = _rows()
# Rows of replacement and of auto that differ in nothing else.
PAIRS = [
    (i, j)
    for i, a in enumerate(ROWS)
    for j, b in enumerate(ROWS)
    if (a.label, b.label) == ("replacement", AUTO) and a[2:] == b[2:]
]


def steps(calls: int, langevin: bool) -> Result:
    """Options of ``sample``; the corrector calls once more a step, but for the last."""
    if not langevin:
        return dict(num_steps=calls)
    return dict(num_steps=max(1, calls // 2), corrector=Langevin(0.1))


def continuation_scores(video: Tensor, truth: data.Batch) -> Result:
    """Of continuations (B, 3, F, 16, 16), for every window a list with a number for each clip."""
    parts = measure.windows(data.FRAMES, video.shape[2], data.FRAMES - OVERLAP)
    true = data.continued(truth, video.shape[2])
    out: Result = measure.score(video, truth, parts)
    jump, true_jump = (v.diff(dim=2).square().mean((1, 3, 4)) for v in (video, true))
    at = [p.start - 1 for p in parts]
    out["seam"] = [(jump[:, i] / true_jump[:, i].mean()).tolist() for i in at]
    out["frechet"] = frechet(
        measure.true_attributes(), measure.attributes(video, (0, video.shape[2] - 1))
    )
    return out


def extension(budget: Budget, number: int, seed: int = 0) -> Result:
    """Row ``number``: 8 true frames continued to 32. Rows -1 and -2 are true clips."""
    if number < 0:
        other = data.draw(budget.clips, LENGTH, torch.Generator().manual_seed(20 - number))
        return continuation_scores(other.video, other)
    row = ROWS[number]
    given = data.draw(budget.clips, data.FRAMES, torch.Generator().manual_seed(20))
    video = extend(
        Exact(),
        given.video,
        LENGTH,
        window=data.FRAMES,
        overlap=OVERLAP,
        seed=seed,
        **steps(getattr(budget, row.calls), row.langevin),
        **row.condition,
    )
    return continuation_scores(video, given)


def extension_tables(budget: Budget, results: dict[int, Result]) -> list[Table]:
    """One table of what is right in the first and the last window, one of the glyph by window."""
    order = sorted(range(len(ROWS)), key=lambda i: (ROWS[i].calls != "few", ROWS[i].langevin))
    numbers = [*order, -1, -2]

    def label(i: int) -> list[str]:
        if i < 0:
            return ["true clips" if i == -1 else "other true clips", ""]
        calls = getattr(budget, ROWS[i].calls)
        return [ROWS[i].label + ", Langevin" * ROWS[i].langevin, str(calls)]

    count = len(results[0]["glyph"])
    rows = [label(i) + [of(m) for m in results[i]["glyph"]] for i in numbers]
    glyphs = Table(
        "Extension with the exact denoiser: the right glyph, window by window",
        ["", "calls", *(f"window {k + 1}" for k in range(count))],
        rows,
        f"{budget.clips} clips; {data.FRAMES} true frames, continued to {LENGTH} in windows of "
        f"{data.FRAMES} that overlap by {OVERLAP}. Share of the new frames of a window that show "
        "the glyph given; chance is 0.1. ± is a 95 % interval over clips.",
    )
    names = ("background", "colour", "position", "error", "seam")
    rows = []
    for i in numbers:
        r = results[i]
        pairs = [f"{of(r[n][0])}; {of(r[n][-1])}" for n in names]
        rows.append(label(i) + pairs + [cell(r["frechet"])])
    head = ["background colours", "glyph colour", "position", "error", "seam", "Fréchet distance"]
    rest = Table(
        "The same clips: first window; last window",
        ["", "calls", *head],
        rows,
        "Colours: squared error over that between two random clips. Position: share of frames with "
        "the glyph where it must be. Error: square distance to the true continuation, over that of "
        "a random clip. Seam: square change from the frame before to the first of the window, over "
        "the true one there. Fréchet: between colours and glyph of the first and the last frame "
        f"and those of {measure.TRUE_CLIPS} true clips; the rows of true clips are its floor.",
    )
    return [glyphs, rest]


def cell(mean: Sequence[float]) -> str:
    return str(Mean(*mean))


def of(values: Sequence[float]) -> str:
    """Of one number a clip."""
    return str(mean_of(torch.tensor(values)))


def ahead(budget: Budget, results: dict[int, Result]) -> Table:
    pairs = []
    for replacement, auto in PAIRS:
        label = f"{getattr(budget, ROWS[auto].calls)}{', Langevin' * ROWS[auto].langevin}"
        pairs.append((label, results[replacement], results[auto]))
    return gains_table("The same clips: what auto gains over replacement, by window", pairs)


# --- Samplers without a condition -----------------------------------------------------------------

SAMPLERS = [("ancestral", g, False) for g in (0.0, 0.1, 0.3, 1.0)]
SAMPLERS += [("Langevin", 0.0, True), ("Langevin", 0.3, True)]


def sampler(budget: Budget, number: int, calls: int) -> Result:
    """Clips drawn without any condition, by one of ``SAMPLERS``, or (-1, -2) true ones."""
    if number < 0:
        video = data.draw(
            budget.clips, data.FRAMES, torch.Generator().manual_seed(20 - number)
        ).video
    else:
        _, gamma, langevin = SAMPLERS[number]
        shape = (budget.clips, 3, data.FRAMES, data.SIZE, data.SIZE)
        options = steps(calls, langevin)
        video = sample(Exact(), shape, sampler=Ancestral(gamma), seed=number, **options)
    got = data.read(video)
    one = (got.glyph == got.glyph[:, :1]).all(1) & (got.residual.mean(1) < 1e-3)
    colours = got.colours.mean(1).flatten(1)  # (B, 9)
    centre, sd = (torch.tensor(p).repeat_interleave(3) for p in (data.MEAN, data.SD))
    return {
        "whole": mean_of(one),
        "spread": mean_of(((colours - centre) / sd).square().mean(1)),
        "residual": mean_of(got.residual.mean(1)),
        "frechet": frechet(
            measure.true_attributes(), measure.attributes(video, (0, data.FRAMES - 1))
        ),
    }


def sampler_table(budget: Budget, results: dict[tuple[int, int], Result]) -> Table:
    rows = []
    for (number, calls), r in results.items():
        name = "true clips" if number < 0 else "{}, gamma {:g}".format(*SAMPLERS[number][:2])
        values = [cell(r[n]) for n in ("whole", "spread", "frechet")]
        rows.append([name, str(calls) if number >= 0 else "", *values])
    return Table(
        "Samplers with the exact denoiser, no condition",
        ["", "calls", "whole clips", "spread of colours", "Fréchet distance"],
        rows,
        f"{budget.clips} clips. Whole: the same glyph in all frames and nothing else in it "
        "(residual below 1e-3). Spread: variance of the colours about their true mean, over the "
        "true one. Fréchet: as in the extension, of the first and the last of 8 frames.",
    )


# --- Held-out losses ------------------------------------------------------------------------------

BARS = [("all frames together", 8, False), ("every frame on its own", 1, False)]
BARS += [("all frames together, glyph told", 8, True)]


def bar(budget: Budget, number: int) -> Result:
    _, frames, by_class = BARS[number]
    clips = HeldOut(Recipe("held out"), budget.held_out)
    return {"loss": clips.mean(clips.loss(Exact(frames, "v"), by_class))}


def bar_table(budget: Budget, results: dict[int, Result]) -> Table:
    rows = []
    for i, (name, _, _) in enumerate(BARS):
        loss = results[i]["loss"]
        rows.append([name, "{:.4f} ± {:.4f}".format(*loss)])
    return Table(
        "Held-out loss of perfect denoisers",
        ["denoiser", "loss in v"],
        rows,
        f"{budget.held_out} clips, the same times and noise for all. A network above the second "
        "row has learned nothing that frames share, and guidance has nothing to work with.",
    )


# --- Limits of the weights, and the corrector -----------------------------------------------------


def still(budget: Budget, number: int) -> Result:
    return limits.still_row(budget.pixels, number)


def clips(budget: Budget, number: int) -> Result:
    return limits.clips_row(max(2, budget.clips // 4), number)


def corrector(budget: Budget, number: int) -> Result:
    return limits.corrector_row(max(2, budget.pixels // 2), number)


def weight(budget: Budget, number: int) -> Result:
    return limits.weight_row(max(2, budget.pixels // 2), number)


# --- Denoisers that know a part -------------------------------------------------------------------


def by_class(budget: Budget, scale: float) -> Result:
    return imperfect.by_class(budget.clips, budget.few, scale)


def alone(budget: Budget, part: float, guided: bool) -> Result:
    return imperfect.alone(max(2, budget.clips // 4), budget.few, part, guided)


# --- All of them ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """``run(budget, *args)``, kept as ``name``."""

    name: str
    run: Callable[..., Result]
    args: tuple

    def __call__(self, out: Path, budget: Budget) -> Result:
        torch.set_num_threads(1)  # the same numbers however many processes there are
        return cached(out / "exact", self.name, lambda: self.run(budget, *self.args))


def jobs(budget: Budget) -> dict[str, list[Job]]:
    """All rows by table, the longest table first."""
    many = sorted(range(-2, len(ROWS)), key=lambda i: i < 0 or ROWS[i].calls == "few")
    runs = [(i, calls) for i in range(len(SAMPLERS)) for calls in budget.calls]
    return {
        "extension": [Job(f"extension-{i}", extension, (i,)) for i in many],
        "sampler": [Job("sampler-{}-{}".format(*a), sampler, a) for a in [*runs, (-1, 0), (-2, 0)]],
        "still": [Job(f"still-{i}", still, (i,)) for i in range(len(limits.STILL))],
        "clips": [Job(f"clips-{i}", clips, (i,)) for i in range(len(limits.CLIPS))],
        "corrector": [Job(f"corrector-{i}", corrector, (i,)) for i in range(len(limits.CORRECTOR))],
        "weight": [Job(f"weight-{i}", weight, (i,)) for i in range(len(limits.CORRELATIONS))],
        "class": [Job(f"class-{x:g}", by_class, (x,)) for x in imperfect.SCALES],
        "alone": [Job("alone-{:g}-{}".format(*a), alone, a) for a in imperfect.ALONE],
        "bar": [Job(f"bar-{i}", bar, (i,)) for i in range(len(BARS))],
    }


def tables(out: Path, budget: Budget = FULL, processes: int = 2) -> list[Table]:
    """All tables; what ``out`` has from an earlier run is not done again."""
    todo = jobs(budget)
    flat = [job for table in todo.values() for job in table]
    if processes > 1:
        # spawn: a forked child inherits the threads of torch as locks that nobody opens
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            done = list(pool.map(_call, flat, [out] * len(flat), [budget] * len(flat)))
    else:
        done = [job(out, budget) for job in flat]
    results = dict(zip([job.name for job in flat], done))

    def of(table: str) -> list[Result]:
        return [results[job.name] for job in todo[table]]

    by_row = {job.args[0]: r for job, r in zip(todo["extension"], of("extension"))}
    by_run = {job.args: r for job, r in zip(todo["sampler"], of("sampler"))}
    return [
        bar_table(budget, dict(enumerate(of("bar")))),
        *extension_tables(budget, by_row),
        ahead(budget, by_row),
        sampler_table(budget, by_run),
        imperfect.class_table(budget.clips, budget.few, of("class")),
        imperfect.alone_table(budget.few, of("alone")),
        limits.corrector_table(max(2, budget.pixels // 2), of("corrector")),
        limits.weight_table(max(2, budget.pixels // 2), of("weight")),
        limits.still_table(budget.pixels, of("still")),
        limits.clips_table(of("clips")),
    ]


def _call(job: Job, out: Path, budget: Budget) -> Result:
    result = job(out, budget)
    print(job.name, "done", flush=True)
    return result

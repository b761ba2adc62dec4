"""The report: tables from the cached rows, curves, and clips side by side."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastvdm
from paper import data, measure, tables
from paper.common import Table
from paper.intervals import gains_table, joined
from paper.measure import Mean, interval
from paper.pictures import Result, Results, write_curves, write_pictures
from paper.tables import Place, Row


def core_minutes(place: Place) -> tuple[float, float]:
    """Process time of all networks, and of all rows."""
    files = [place.cache / "networks" / f"{n}.pt" for n in tables.networks(place.budget)]
    training = sum(torch.load(f, weights_only=True)["numbers"][1] for f in files)
    r = Results(place)
    rows = [r.one(job.name) for job in tables.jobs(place.budget) if r.has(job.name)]
    return training / 60, sum(row.get("seconds", [0])[0] for row in rows) / 60


def markdown(table: Table) -> str:
    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(table.head) + " |", "|" + "---|" * len(table.head)]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in table.rows]
    parts = [f"### {table.title}", "\n".join(lines)] + [table.note] * bool(table.note)
    return "\n\n".join(parts)


def of(results: Sequence[Result], get: Callable[[Result], float]) -> Mean | str:
    return interval([get(r) for r in results]) if results else "-"


def mean(clips: Sequence[Any]) -> float:
    """Of scores by clip, or by part and clip."""
    return torch.tensor(clips).mean().item()


# --- The tables -----------------------------------------------------------------------------------


def networks_tables(r: Results) -> list[Table]:
    names = ["best denoiser of single frames (the bar)", "perfect denoiser"]
    names += [f"network, seed {seed}" for seed in r.seeds]
    runs = [r.one(f"held-out-exact-{frames}") for frames in (1, 8)]
    runs += [r.one(f"held-out-main-{seed}") for seed in r.seeds]
    rows, by_level = [], []
    for name, run in zip(names, runs):
        minutes = f"{run['cpu'] / 60:.1f}" if "cpu" in run else "-"
        numbers = [f"{run[k]:.4f}" for k in KINDS]
        rows.append([name, run.get("steps", "-"), minutes, *numbers])
        by_level.append([name, *(f"{x:.4f}" for x in run["levels"])])

    def below(kind: str) -> str:
        return f"{sum(run[kind] < runs[0][kind] for run in runs[2:])} of {len(runs) - 2}"

    ends = [f"{x:g}" for x in tables.LEVELS[1:-1]]
    spans = [f"< {ends[0]}", *(f"{a} to {b}" for a, b in zip(ends, ends[1:])), f"> {ends[-1]}"]
    return [
        Table(
            "Networks: held-out v-loss",
            ["", "steps", "core-minutes", *KINDS.values()],
            rows,
            f"{runs[-1]['parameters']:,} parameters, batch 8. A network above the bar may know "
            f"nothing that frames share. **{below('loss')} networks are below it over all levels, "
            f"{below('noisy')} below log-SNR 0**, where there is more noise than signal: there "
            "other frames tell most, and there guidance decides what is drawn. Mixed frames: the "
            "same levels, each frame from another clip, so that frames share nothing; a network "
            "that used nothing else would lose nothing. In x: mean square error of x_hat, all "
            "levels; v divides it by sigma^2, so that sharp edges at little noise count most.",
        ),
        Table("The same by log-SNR", ["", *spans], by_level),
    ]


KINDS = {
    "loss": "all levels",
    "by_class": "by class",
    "noisy": "log-SNR < 0",
    "mixed": "mixed frames",
    "x": "in x",
}


def calls(r: Results, row: Row) -> str:
    count = r.place.budget.calls
    return f"{count // 2} + {count // 2}" if row.langevin else str(count)


FEATURES = ("background at both ends", "and of the glyph", "first window", "last 8 frames")


def features(place: Place, video: torch.Tensor) -> list[torch.Tensor]:
    """Of long clips, those that ``FEATURES`` names."""
    ends, pictures = measure.ends(video), tables.pictures(place)
    parts = [pictures.features(video[:, :, part]) for part in (tables.FIRST, tables.LAST)]
    return [ends[:, :12], ends, *parts]


def floor(place: Place, true: list[torch.Tensor], count: int) -> list[Mean]:
    """Fréchet distances of true clips: fewer are further away."""
    found = []
    for i in range(4):
        clips = data.draw(count, tables.LENGTH, tables.generator(33, i)).video
        found.append([measure.frechet(*pair) for pair in zip(true, features(place, clips))])
    return [interval(values) for values in zip(*found)]


def extension_tables(r: Results) -> list[Table]:
    persist, distances = [], []
    place = r.place
    long = data.draw(place.budget.true_clips, tables.LENGTH, tables.generator(32, 0)).video
    true = features(place, long)
    for row in tables.ROWS:
        runs = r.over_seeds(f"extension-{row.name}")
        shown = [("background", w) for w in (0, 2, -1)] + [("colour", 0), ("colour", -1)]
        shown += [("glyph", 0), ("glyph", -1), ("position", 0), ("position", -1)]
        cells = [of(runs, lambda x, k=k, w=w: mean(x[k][w])) for k, w in shown]
        cells.append(of(runs, lambda x: x["seam"]))
        persist.append([row.label, calls(r, row), *cells])
        kept = {k: [torch.tensor(x[k]) for x in runs if k in x] for k in ("ends", "first", "last")}
        drawn = [torch.cat(kept[k]) if kept[k] else None for k in ("ends", "ends", "first", "last")]
        if drawn[0] is not None:
            drawn[0] = drawn[0][:, :12]
        both = [measure.jackknife(x, y) if y is not None else "-" for x, y in zip(true, drawn)]
        shown_clips = place.budget.clips * len(runs)
        distances.append([row.label, calls(r, row), shown_clips, *both])
    size = place.budget.clips * len(r.seeds)
    distances.append(["true clips (the floor)", "-", size, *floor(place, true, size)])
    last_window = str(
        len(measure.windows(data.FRAMES, tables.LENGTH, data.FRAMES - tables.OVERLAP))
    )
    head = ["", "calls", "background, window 1", "3", last_window]
    for name in ("glyph colour", "right glyph", "right place"):
        head += [f"{name}, window 1", last_window]
    head.append("seam")
    return [
        Table(
            f"Table 6: extension from {data.FRAMES} to {tables.LENGTH} frames, what persists",
            head,
            persist,
            f"{place.budget.clips} clips with each of {len(r.seeds)} networks, windows of 8 frames "
            f"with {tables.OVERLAP} known; the last has 4. Squared errors of colours relative to "
            "those between two random clips (a glyph that is not there at all: 6.6); chance of the "
            "glyph is 0.1; true clips have 0, 0, 1, 1 and seam 1. Intervals over networks. At "
            "which loss a denoiser keeps the glyph from window to window: [How much a denoiser "
            "must know](paper_tables_exact.md).",
        ),
        *extension_gains(r),
        Table(
            "Table 6: the same clips, Fréchet distances",
            ["", "calls", "clips", *FEATURES],
            distances,
            f"To {place.budget.true_clips} true clips; fewer clips are further away. Colours of "
            "the first and the last frame; 16 components of the pixels of 8 frames, 3 of them true "
            "in the first window. Intervals by jackknife over clips.",
        ),
    ]


def extension_gains(r: Results) -> list[Table]:
    """Empty until the rows of one network are there."""
    pairs = []
    for langevin in (False, True):
        rows = [Row(weight, langevin) for weight in (None, "auto")]
        seeds = [s for s in r.seeds if all(r.has(f"extension-{x.name}-{s}") for x in rows)]
        if seeds:
            scores = [joined([r.one(f"extension-{x.name}-{s}") for s in seeds]) for x in rows]
            pairs.append((calls(r, rows[0]), *scores))
    title = "Table 6: the same clips, what auto gains over replacement, by window"
    return [gains_table(title, pairs)] if pairs else []


def limit_table(r: Results) -> Table:
    rows = []
    for row in tables.LIMITS:
        runs = r.over_seeds(f"limit-{row.name}")
        names = ("background", "colour", "glyph")
        cells = [of(runs, lambda x, k=k: mean(x[k])) for k in names]
        limit = "off" if row.limit == "none" else "on"
        rows.append([f"{row.weight:g}", limit, calls(r, row), *cells])
    return Table(
        "Large weights, with and without the limit: one window, 3 of 8 frames known",
        ["w_r", "limit", "calls", "background", "glyph colour", "right glyph"],
        rows,
        f"{r.place.budget.clips} clips with each network.",
    )


def conditional_tables(r: Results) -> list[Table]:
    rows = []
    for row in tables.PREDICTION:
        runs = r.over_seeds(f"prediction-{row.name}")
        names = ("background", "colour", "glyph")
        rows.append([row.label, *(of(runs, lambda x, k=k: mean(x[k])) for k in names)])
    first = Table(
        "Prediction of 7 frames from 1",
        ["", "background", "glyph colour", "right glyph"],
        rows,
        f"{r.place.budget.calls} calls.",
    )
    rows = []
    for row, overlap in tables.INTERPOLATION:
        runs = r.over_seeds(f"interpolation-{row.name}-{overlap}")
        names = ("background", "colour", "glyph", "position", "jump", "median")
        rows.append([row.label, overlap, *(of(runs, lambda x, k=k: mean(x[k])) for k in names)])
    head = ["", "overlap", "background", "glyph colour", "right glyph", "right place"]
    return [
        first,
        Table(
            f"Interpolation by {tables.FACTOR}",
            [*head, "largest change", "median change"],
            rows,
            "Change from frame to frame over that of the true clip, at the place where it is "
            "largest: a jump where windows meet would be there.",
        ),
    ]


def cascade_table(r: Results) -> Table:
    rows = []
    for weight, overlap in tables.CASCADE:
        runs = r.over_seeds(f"cascade-{weight}-{overlap}")
        names = ("residual", "background", "colour", "glyph", "seam")
        cells = [of(runs, lambda x, k=k: x[k]) for k in names]
        rows.append([weight, overlap, *cells])
    head = ["low_res_weight", "overlap", "residual / signal", "background", "glyph colour"]
    return Table(
        "Cascade of Fig. 2: 8 frames of 8 x 8, then 32 of 16 x 16",
        [*head, "same glyph", "seam"],
        rows,
        "The second network knows nothing of low resolution. Colours: variance over the frames of "
        "a clip relative to that between clips. Same glyph: share of frames with the commonest "
        "glyph of their clip. 0.25 is w_r = 1 of Eq. 8 as it stands.",
    )


def joint_table(r: Results) -> Table:
    rows = []
    base = [r.one(f"joint-0-{seed}") for seed in r.seeds]
    for images in tables.IMAGES:
        runs = [r.one(f"joint-{images}-{seed}") for seed in r.seeds]
        names = ("videos", "frames", "first", "pictures")
        cells: list[Any] = [of(runs, lambda x, k=k: x[k]) for k in names]
        for k in ("videos", "frames"):
            less = [a[k] - b[k] for a, b in zip(runs, base)]
            cells.append(interval(less) if images else "-")
        rows.append([images, *cells])
    head = ["images", "loss of videos", "loss of single frames", "Fréchet, first frames"]
    return Table(
        "Table 4: joint training",
        [*head, "Fréchet, 8 frames", "videos, change", "single frames, change"],
        rows,
        f"{r.place.budget.joint_steps} steps of batch 2; the same clips, levels and noise whatever "
        "the images. Held-out v-losses; changes are paired by seed.",
    )


def scale_table(r: Results) -> Table:
    rows = []
    for scale in tables.SCALES:
        runs = r.over_seeds(f"scale-{scale:g}")
        features = [x for run in runs for x in run["features"]]
        true = tables.pictures(r.place).true
        distance = measure.jackknife(true, torch.tensor(features)) if features else "-"
        rows.append([f"{scale:g}", of(runs, lambda x: x["glyph"]), distance])
    nets = [r.one(f"held-out-{n}") for n in ("exact-8", *(f"main-{s}" for s in r.seeds))]
    exact, *gains = (1 - net["by_class"] / net["loss"] for net in nets)
    shares = r.over_seeds("share")
    low, high = (of(shares, lambda x, i=i: x["share"][i]) for i in (0, 1))
    cosines = (of(shares, lambda x, i=i: x["cosine"][i]) for i in (0, 1))
    ends = tables.LEVELS[1:3]
    return Table(
        "Table 5: classifier-free guidance by glyph",
        ["scale (1 + w of Eq. 6)", "right glyph", "Fréchet, 8 frames"],
        rows,
        f"{r.place.budget.clips} clips with each network, {r.place.budget.calls} steps; Fréchet of "
        f"the clips of all networks. Scales are large because the networks have learned little of "
        f"the class: it lowers their held-out loss by {sum(gains) / len(gains):.1%}, that of the "
        f"perfect denoiser by {exact:.1%}. Along the perfect denoiser's change by the class theirs "
        f"has {low} of its length below log-SNR {ends[0]:g} and {high} up to {ends[1]:g} (cosines "
        f"{' and '.join(map(str, cosines))}). A perfect denoiser that has learned a share s draws "
        "the right glyph in half of the clips where scale times s is about a third ([Table 5 with "
        "the exact denoiser](paper_tables_exact.md)).",
    )


def trained_tables(place: Place) -> list[Table]:
    r = Results(place)
    return [
        *networks_tables(r),
        *extension_tables(r),
        limit_table(r),
        *conditional_tables(r),
        cascade_table(r),
        joint_table(r),
        scale_table(r),
    ]


# --- The files ------------------------------------------------------------------------------------

HEAD = """# The paper's claims in the small

`make paper-tables` on {machine}, torch {torch}, fastvdm {version}. {quick}Coloured glyphs bounce
over colour gradients, 8 frames of 16 x 16 (`examples/paper/data.py`): glyph, colours and motion
persist for ever, so the true continuation of a clip is known and is read off in closed form. All
± are 95 % intervals; over networks they are Student's, of {seeds} networks. Training
took {training:.0f} core-minutes and sampling {rows:.0f} (process time). The same with the perfect
denoiser, which shows what the method can do: [exact](paper_tables_exact.md).{missing}
"""


EXACT = """# The paper's claims with the exact denoiser

`make paper-tables ARGS=--fast` on {machine}, torch {torch}, fastvdm {version}. {quick}The clips of
[the trained networks](paper_tables.md), whose E[x | z] is known in closed form
(`examples/paper/exact.py`): what is wrong here is wrong in the sampler, not in a network. All ± are
95 % intervals over clips.
"""


def write_exact(out: Path, exact: list[Table], quick: bool) -> Path:
    """The part that needs no training."""
    return _write(out / "paper_tables_exact.md", EXACT, list(map(markdown, exact)), quick)


def write(place: Place, out: Path, quick: bool) -> Path:
    """The part with trained networks, and its pictures."""
    out.mkdir(parents=True, exist_ok=True)
    training, rows = core_minutes(place)
    jobs = tables.jobs(place.budget)
    left = sum(not Results(place).has(job.name) for job in jobs)
    missing = f"\n**Written before the end: {left} of {len(jobs)} rows are missing.**" * bool(left)
    write_pictures(place, out)
    write_curves(place, out)
    parts = list(map(markdown, trained_tables(place)))
    pictures = "![true, replacement, w_r = 1, auto](paper_tables_extension.gif)"
    parts += ["Columns: true clips, replacement, w_r = 1, auto (seed 0).", pictures]
    parts += ["![every eighth frame](paper_tables_extension.png)"]
    parts += ["The cascade: the coarse stage, and the fine one with w = auto (seed 0)."]
    parts += ["![coarse, fine](paper_tables_cascade.gif)"]
    scales = ", ".join(f"{x:g}" for x in tables.SCALES)
    parts += [f"Glyphs 0 to 3 asked for, at scale {scales}: the middle frame (seed 0)."]
    parts += ["![glyphs by scale](paper_tables_scale.png)"]
    parts += ["![held-out loss](paper_tables_curves.png)"]
    seeds = place.budget.seeds
    numbers = dict(seeds=seeds, training=training, rows=rows, missing=missing)
    return _write(out / "paper_tables.md", HEAD, parts, quick, **numbers)


def _write(path: Path, head: str, parts: list[str], quick: bool, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = head.format(
        machine=f"{platform.machine()} {platform.system()}",
        torch=torch.__version__,
        version=fastvdm.__version__,
        quick="**--quick: these numbers mean nothing.** " if quick else "",
        **values,
    )
    partial = path.with_suffix(".part")
    partial.write_text("\n\n".join([text, *parts]) + "\n")
    partial.replace(path)
    return path

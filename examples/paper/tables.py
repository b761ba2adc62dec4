"""The jobs of the trained part: every row of every table, one small file each in the cache.

A job is a function of the ``Place`` and of JSON-able arguments; it draws clips with one network and
returns numbers. Jobs know nothing of each other, so they run in any order and in any number of
processes, and a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvdm.diffusion import Condition, Langevin, cascade, extend, interpolate_frames, sample
from fastvdm.diffusion.downsample import average_downsample
from paper import data, measure
from paper.common import cached
from paper.exact import Exact
from paper.train import SCHEDULE, HeldOut, Recipe, train

OVERLAP, LENGTH = 3, 32  # of the extension
FIRST = slice(data.FRAMES - OVERLAP, 2 * data.FRAMES - OVERLAP)  # its first window
LAST = slice(LENGTH - data.FRAMES, LENGTH)
FACTOR = 4  # of interpolation and of the cascade
IMAGES = (0, 4, 8)
LEVELS = (-20.0, -3.0, -1.5, 0.0, 1.5, 3.0, 5.1)  # ends of parts of the log-SNR
SCALES = (0.0, 1.0, 3.0, 6.0, 12.0, 24.0, 48.0)


@dataclass(frozen=True)
class Budget:
    """How much of everything."""

    seeds: int = 3
    steps: int = 5000  # of training
    joint_steps: int = 400
    base_steps: int = 600
    clips: int = 32  # drawn for each row and network
    held_out: int = 256
    calls: int = 24  # of the network, for each window
    true_clips: int = 1024  # that Fréchet distances are to


FULL = Budget()
QUICK = Budget(1, 2, 2, 2, 4, 16, 2, 40)  # 16: clips at all levels


@dataclass(frozen=True)
class Place:
    """Where the files are, and how much is done."""

    cache: Path
    budget: Budget

    def recipe(self, name: str) -> Recipe:
        """Of "main-SEED", "base" or "joint-IMAGES-SEED"."""
        kind, *numbers = name.split("-")
        b = self.budget
        steps = {"main": b.steps, "base": b.base_steps, "joint": b.joint_steps}[kind]
        every = 100 if steps >= 100 else steps
        common: dict[str, Any] = dict(steps=steps, every=every)
        if kind == "main":
            return Recipe(name, int(numbers[0]), **common)
        if kind == "base":
            return Recipe(name, coarse=True, conditional=False, **common)
        images, seed = (int(n) for n in numbers)
        return Recipe(name, seed, batch=2, num_images=images, conditional=False, **common)

    def net(self, name: str) -> nn.Module:
        return _net(self, name)


@lru_cache(maxsize=4)
def _net(place: Place, name: str) -> nn.Module:
    return train(place.recipe(name), place.cache / "networks").average


def generator(kind: int, seed: int) -> torch.Generator:
    """A stream of its own for each use and seed; training uses those below a million."""
    return torch.Generator().manual_seed(1_000_000 * kind + seed)


class Row(NamedTuple):
    """One way of conditioning. The weight None is replacement."""

    weight: float | str | None
    langevin: bool = False  # half the steps, as each calls the network twice
    limit: str = "stable"

    @property
    def name(self) -> str:
        number = isinstance(self.weight, float)
        parts = [
            "replacement" if self.weight is None else f"w{self.weight:.3g}" if number else "auto"
        ]
        parts += ["langevin"] * self.langevin + ["free"] * (self.limit == "none")
        return "-".join(parts)

    @property
    def label(self) -> str:
        if self.weight is None:
            return "replacement"
        text = "w_r = auto" if self.weight == "auto" else f"w_r = {self.weight:.2g}"
        return text + " (F/n)" * (self.weight == RATIO) + " (3 F/n)" * (self.weight == 3 * RATIO)

    def options(self, place: Place) -> dict[str, Any]:
        """Of ``sample`` and of everything that calls it."""
        out: dict[str, Any] = dict(prediction="v", schedule=SCHEDULE)
        calls = place.budget.calls
        out["num_steps"] = calls // 2 if self.langevin else calls
        if self.langevin:
            out["corrector"] = Langevin(0.1)
        return out | self.condition()

    def condition(self) -> dict[str, Any]:
        if self.weight is None:
            return dict(method="replacement")
        return dict(guidance_weight=self.weight, guidance_limit=self.limit)


def no_class(count: int) -> Tensor:
    return torch.zeros(count, 10)


# --- What the networks have learned ---------------------------------------------------------------


def held_out(place: Place, name: str) -> dict[str, Any]:
    """Losses of a network, or of the exact denoiser of 1 or 8 frames ("exact-1", "exact-8")."""
    clips = HeldOut(Recipe("held out"), place.budget.held_out)
    out: dict[str, Any] = {}
    if name.startswith("exact"):
        model: Any = Exact(int(name.split("-")[1]), "v")
    else:
        job = train(place.recipe(name), place.cache / "networks")
        model = job.average
        out = {"steps": job.step, "cpu": job.cpu, "wall": job.wall, "curve": job.curve}
        out["parameters"] = sum(p.numel() for p in job.net.parameters())
    loss, level = clips.loss(model), SCHEDULE.log_snr(clips.t)
    out |= {"loss": loss.mean().item(), "noisy": loss[level < 0].mean().item()}
    out["x"] = (loss * torch.sigmoid(-level)).mean().item()  # sigma^2, of x_hat itself
    ends = zip(LEVELS, LEVELS[1:])
    out["levels"] = [loss[(level >= a) & (level < b)].mean().item() for a, b in ends]
    out["by_class"] = clips.loss(model, True).mean().item()
    # Each frame from another clip: nothing is shared, and a network that relies on it does worse.
    frames = clips.video.unbind(2)
    clips.video = torch.stack([x.roll(i, 0) for i, x in enumerate(frames)], dim=2)
    out["mixed"] = clips.loss(model)[level < 0].mean().item()
    return out


# --- Table 6: extension ---------------------------------------------------------------------------

RATIO = data.FRAMES / OVERLAP  # F/n
ROWS = [Row(w) for w in (None, 1.0, RATIO, "auto", 3 * RATIO)]
ROWS += [Row(w, langevin=True) for w in (None, "auto")]
# One window is enough to see what is unstable.
LIMITS = [Row(w, limit=x) for w in (20.0, 50.0) for x in ("none", "stable")]


def extension(place: Place, row: Row, seed: int, length: int = LENGTH) -> dict[str, Any]:
    """8 true frames, continued."""
    count = place.budget.clips
    given = data.draw(count, data.FRAMES, generator(20, seed))
    video = extend(
        place.net(f"main-{seed}"),
        given.video,
        length,
        window=data.FRAMES,
        overlap=OVERLAP,
        cond=no_class(count),
        seed=seed,
        **row.options(place),
    )
    keep(place, f"extension-{length}-{row.name}-{seed}", video)
    parts = measure.windows(data.FRAMES, length, data.FRAMES - OVERLAP)
    out: dict[str, Any] = measure.score(video, given, parts)
    out["seam"] = measure.seam(video, [part.start for part in parts])
    if length >= 2 * data.FRAMES:
        out["ends"] = measure.ends(video).tolist()
        for name, part in (("first", FIRST), ("last", LAST)):
            out[name] = pictures(place).features(video[:, :, part]).tolist()
    return out


def keep(place: Place, name: str, video: Tensor, count: int = 4) -> None:
    """The first clips, for the pictures of the report."""
    folder = place.cache / "clips"
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(((video[:count].clamp(-1, 1) + 1) * 127.5).round().byte(), folder / f"{name}.pt")


@lru_cache(maxsize=2)
def pictures(place: Place) -> measure.Pictures:
    return measure.Pictures(data.draw(place.budget.true_clips, data.FRAMES, generator(30, 0)).video)


# --- Prediction, interpolation and the cascade ----------------------------------------------------


def prediction(place: Place, row: Row, seed: int) -> dict[str, Any]:
    """7 frames after 1: where the glyph goes is not known, the rest is."""
    count = place.budget.clips
    truth = data.draw(count, data.FRAMES, generator(21, seed))
    condition = Condition(truth.video[:, :, :1], **row.condition())
    options = {k: v for k, v in row.options(place).items() if k not in row.condition()}
    video = sample(
        place.net(f"main-{seed}"),
        truth.video.shape,
        cond=no_class(count),
        condition=condition,
        seed=seed,
        **options,
    )
    return measure.score(video, truth, [slice(1, data.FRAMES)])


def interpolation(place: Place, row: Row, seed: int, overlap: int) -> dict[str, Any]:
    """Every fourth frame of 29 is given."""
    count, length = place.budget.clips // 2, 4 * data.FRAMES - 3
    truth = data.draw(count, length, generator(22, seed))
    video = interpolate_frames(
        place.net(f"main-{seed}"),
        truth.video[:, :, ::FACTOR],
        FACTOR,
        window=data.FRAMES,
        overlap=overlap,
        cond=no_class(count),
        seed=seed,
        **row.options(place),
    )
    drawn = [slice(i + 1, i + FACTOR) for i in range(0, length - 1, FACTOR)]
    out: dict[str, Any] = measure.score(video, truth, drawn)
    jumps = (change(video) / change(truth.video)).sort().values
    return out | {"jump": jumps[-1].item(), "median": jumps[len(jumps) // 2].item()}


def change(video: Tensor) -> Tensor:
    """(F - 1,) mean square change from frame to frame."""
    return (video[:, :, 1:] - video[:, :, :-1]).square().mean(dim=(0, 1, 3, 4))


def two_stages(place: Place, weight: float | str, seed: int, overlap: int) -> dict[str, Any]:
    """8 frames of 8 x 8 at every fourth frame, then 32 of 16 x 16."""
    count, b = place.budget.clips // 2, place.budget
    options: dict[str, Any] = dict(prediction="v", schedule=SCHEDULE, num_steps=b.calls)
    low, fine = cascade(
        place.net("base"),
        place.net(f"main-{seed}"),
        (count, 3, data.FRAMES, data.SIZE // 2, data.SIZE // 2),
        (data.SIZE, data.SIZE),
        window=data.FRAMES,
        overlap=overlap,
        frameskip=FACTOR,
        seed=seed,
        base_options=options,
        cond=no_class(count),
        low_res_weight=weight,
        **options,
    )
    keep(place, f"cascade-{weight}-{overlap}-{seed}", fine)
    keep(place, f"cascade-low-{seed}", low)
    got = data.read(fine)
    spread = got.colours.var(dim=1).mean((0, 2))  # over the frames of a clip
    small = average_downsample(fine[:, :, ::FACTOR], tuple(low.shape[3:]))
    starts = list(range(data.FRAMES, fine.shape[2], data.FRAMES - overlap))
    return {
        "residual": ((small - low).square().mean() / low.var()).item(),
        "background": (spread[:2].mean() / data.SD[0] ** 2).item(),
        "colour": (spread[2] / data.SD[2] ** 2).item(),
        "glyph": (got.glyph == got.glyph.mode(1, keepdim=True).values).float().mean().item(),
        "seam": measure.seam(fine, starts),
    }


# --- Tables 4 and 5 -------------------------------------------------------------------------------


def joint(place: Place, images: int, seed: int) -> dict[str, Any]:
    """Held-out losses of a network trained with image frames, and its first frames."""
    net, b = place.net(f"joint-{images}-{seed}"), place.budget
    recipe = Recipe("held out")
    videos = HeldOut(recipe, b.held_out).loss(net, None).mean().item()
    frames = HeldOut(recipe, 4 * b.held_out, 1).loss(net, None).mean().item()
    drawn = sample(
        net,
        (b.clips, 3, data.FRAMES, data.SIZE, data.SIZE),
        prediction="v",
        schedule=SCHEDULE,
        num_steps=b.calls,
        seed=seed,
    )
    first = measure.Pictures(data.draw(b.true_clips, 1, generator(31, 0)).video)
    return {
        "videos": videos,
        "frames": frames,
        "first": first.distance(drawn[:, :, :1]),
        "pictures": pictures(place).distance(drawn),
    }


def by_class(place: Place, scale: float, seed: int) -> dict[str, Any]:
    """Clips of each glyph in turn, with classifier-free guidance."""
    count = place.budget.clips
    glyph = torch.arange(count) % 10
    video = sample(
        place.net(f"main-{seed}"),
        (count, 3, data.FRAMES, data.SIZE, data.SIZE),
        prediction="v",
        schedule=SCHEDULE,
        num_steps=place.budget.calls,
        cond=data.one_hot(glyph),
        guidance_scale=scale,
        seed=seed,
    )
    keep(place, f"scale-{scale:g}-{seed}", video)
    right = (data.read(video).glyph == glyph[:, None]).float().mean().item()
    return {"glyph": right, "features": pictures(place).features(video).tolist()}


def share(place: Place, seed: int) -> dict[str, Any]:
    """How much of what the class tells a network has learned: the change of v_hat by the class
    along that of the exact denoiser, over the latter, and the cosine between them. By log-SNR, at
    the two lowest parts of ``LEVELS``; above them the frames show the glyph."""
    clips = HeldOut(Recipe("held out"), place.budget.held_out)
    level, exact, net = SCHEDULE.log_snr(clips.t), Exact(prediction="v"), place.net(f"main-{seed}")
    alpha = torch.sigmoid(level).sqrt()[:, None, None, None, None]
    z = alpha * clips.video + (1 - alpha**2).sqrt() * clips.noise
    shares, cosines = [], []
    for low, high in zip(LEVELS, LEVELS[1:3]):
        at = (level >= low) & (level < high)
        given = (z[at], level[at])
        with torch.no_grad():
            a, b = (
                (m(*given, cond=clips.cond[at]) - m(*given, cond=0 * clips.cond[at])).flatten()
                for m in (exact, net)
            )
        shares.append((a @ b / (a @ a)).item())
        cosines.append((a @ b / (a.norm() * b.norm())).item())
    return {"share": shares, "cosine": cosines}


# --- All of them ----------------------------------------------------------------------------------


class Job(NamedTuple):
    """``run(place, *args)``, kept in the cache as ``name``; needs these networks first."""

    name: str
    run: Callable[..., dict[str, Any]]
    args: tuple
    needs: tuple[str, ...] = ()

    def __call__(self, place: Place) -> dict[str, Any]:
        torch.set_num_threads(1)  # one thread a process: the same numbers however many there are
        return cached(place.cache / "rows", self.name, lambda: self._timed(place))

    def _timed(self, place: Place) -> dict[str, Any]:
        cpu, wall = time.process_time(), time.perf_counter()
        out = self.run(place, *self.args)
        return out | {"seconds": (time.process_time() - cpu, time.perf_counter() - wall)}


def networks(budget: Budget) -> list[str]:
    """In the order in which they are trained: the longest first."""
    seeds = range(budget.seeds)
    images = (f"joint-{k}-{s}" for s in seeds for k in IMAGES)
    return [*(f"main-{s}" for s in seeds), "base", *images]


def jobs(budget: Budget) -> list[Job]:
    seeds = range(budget.seeds)
    one = 2 * data.FRAMES - OVERLAP  # frames of a clip with one new window
    out = [Job(f"held-out-{n}", held_out, (n,)) for n in ("exact-1", "exact-8")]
    for s in seeds:
        main = (f"main-{s}",)
        out.append(Job(f"held-out-main-{s}", held_out, main, main))
        out += [Job(f"extension-{r.name}-{s}", extension, (r, s), main) for r in ROWS]
        out += [Job(f"scale-{x:g}-{s}", by_class, (x, s), main) for x in SCALES]
        out.append(Job(f"share-{s}", share, (s,), main))
        out += [Job(f"limit-{r.name}-{s}", extension, (r, s, one), main) for r in LIMITS]
        out += [Job(f"prediction-{r.name}-{s}", prediction, (r, s), main) for r in PREDICTION]
        for r, o in INTERPOLATION:
            out.append(Job(f"interpolation-{r.name}-{o}-{s}", interpolation, (r, s, o), main))
        for w, o in CASCADE:
            out.append(Job(f"cascade-{w}-{o}-{s}", two_stages, (w, s, o), (*main, "base")))
        out += [Job(f"joint-{k}-{s}", joint, (k, s), (f"joint-{k}-{s}",)) for k in IMAGES]
    return out


PREDICTION = [Row(w) for w in (None, 1.0, "auto")]
INTERPOLATION = [(Row(None), 1), (Row("auto"), 1), (Row("auto"), 4)]
# The last is Eq. 8 with w_r = 1.
CASCADE: list[tuple[float | str, int]] = [("auto", 1), ("auto", 3), (0.25, 1)]

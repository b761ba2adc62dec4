"""Where a weight is too large, and when the corrector pays: closed forms, seconds per row.

There are two denoisers: the exact one of the clips, and that of Gaussian videos, which is a matrix
over frames; their true conditional distribution is known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvdm.diffusion import (
    Condition,
    Langevin,
    alpha_of,
    average_downsample,
    extend,
    interpolate_frames,
    sample,
    sigma_of,
    upscale,
)
from fastvdm.metrics import frechet_distance
from paper import data
from paper.common import Table
from paper.exact import Exact
from paper.intervals import mean_of, ratio

FRAMES = 16  # of the Gaussian videos that stand still
SD = 0.5
FEW, MANY = 24, 128  # steps
CALLS = (24, 48, 96, 192, 384)


@dataclass(frozen=True)
class Gaussian:
    """E[x | z] of videos N(0, cov) over frames, every pixel for itself; ``model(z, log_snr)``."""

    cov: Tensor  # (F, F)
    time_input = "logsnr"
    settings = {"prediction": "x"}

    def __call__(self, z: Tensor, log_snr: Tensor) -> Tensor:
        level = log_snr[0].double()
        alpha, sigma = alpha_of(level), sigma_of(level)
        eye = torch.eye(len(self.cov), dtype=torch.float64)
        gain = torch.linalg.solve(alpha**2 * self.cov + sigma**2 * eye, alpha * self.cov).T
        return torch.einsum("fg,bcghw->bcfhw", gain.to(z), z)


def still(frames: int) -> Gaussian:
    return Gaussian(torch.full((frames, frames), SD**2, dtype=torch.float64))


def still_video(pixels: int, frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    one = SD * torch.randn(1, 1, 1, pixels, pixels, generator=generator)
    return one.clamp(-1, 1).repeat(1, 1, frames, 1, 1)


class Call(NamedTuple):
    """``run(size, steps, options)`` → a number; ``before`` are the options that do harm."""

    label: str
    before: str  # w_r, as it is usually written
    options: dict[str, Any]
    run: Callable[..., float]


def _error(video: Tensor, true: Tensor) -> float:
    return (video - true).square().mean().sqrt().item()


def _sample(known: int) -> Callable[..., float]:
    def run(pixels: int, steps: int, options: dict[str, Any]) -> float:
        true = still_video(pixels, FRAMES)
        condition = Condition(true[:, :, :known], **options)
        drawn = sample(still(FRAMES), true.shape, condition=condition, num_steps=steps, seed=1)
        return _error(drawn[:, :, known:], true[:, :, known:])

    return run


def _extend(length: int, new: int) -> Callable[..., float]:
    """Error of the last ``new`` frames."""

    def run(pixels: int, steps: int, options: dict[str, Any]) -> float:
        true = still_video(pixels, length)
        options = dict(window=FRAMES, num_steps=steps, seed=1) | options
        drawn = extend(still(FRAMES), true[:, :, :1], length, **options)
        return _error(drawn[:, :, -new:], true[:, :, -new:])

    return run


def _interpolate(pixels: int, steps: int, options: dict[str, Any]) -> float:
    true = still_video(pixels, 5)
    options = dict(window=FRAMES, num_steps=steps, seed=1) | options
    drawn = interpolate_frames(still(FRAMES), true, 4, **options)
    return _error(drawn, true[:, :, :1].expand_as(drawn))


def _upscale(factor: int) -> Callable[..., float]:
    """Deviation of what the low resolution leaves, over its own."""

    def run(pixels: int, steps: int, options: dict[str, Any]) -> float:
        # as many low-resolution pixels for any factor
        true = still_video(pixels * factor // 2, 9)
        low = average_downsample(true, (pixels // 2, pixels // 2))
        options = dict(window=9, num_steps=steps, seed=1) | options
        size = (true.shape[3], true.shape[4])
        drawn = upscale(still(9), low, size, **options)
        return _error(average_downsample(drawn, (pixels // 2, pixels // 2)), low) / low.std().item()

    return run


def _frames(w: float) -> dict[str, Any]:
    return dict(guidance_weight=w, guidance_limit="none")


def _low(w: float, factor: int) -> dict[str, Any]:
    # w_r of Eq. 8 itself; ours is in units of the squared norm of D
    return dict(low_res_weight=w / factor**2, guidance_limit="none")


STILL = [
    Call("sample, 1 of 16 frames known", "50", _frames(50.0), _sample(1)),
    Call("sample, 5 known", "20", _frames(20.0), _sample(5)),
    Call("sample, 5 known", "50", _frames(50.0), _sample(5)),
    Call("sample, 8 known", "9", _frames(9.0), _sample(8)),
    Call("extend 1 to 31 frames, overlap 1", "50", _frames(50.0), _extend(31, 30)),
    Call("extend 1 to 24: the last 8 frames", "50", _frames(50.0), _extend(24, 8)),
    Call("interpolate_frames 5 to 17", "50", _frames(50.0), _interpolate),
    Call("upscale 2x, residual", "1", _low(1.0, 2), _upscale(2)),
    Call("upscale 2x, residual", "50", _low(50.0, 2), _upscale(2)),
    Call("upscale 4x, residual", "1", _low(1.0, 4), _upscale(4)),
]


def still_row(pixels: int, number: int) -> dict[str, Any]:
    """Errors of one call with the harmful options and with the defaults, few and many steps."""
    call = STILL[number]
    out = {}
    for name, options in (("before", call.options), ("after", {})):
        out[name] = [call.run(pixels, steps, options) for steps in (FEW, MANY)]
    return out


def still_table(pixels: int, results: list[dict[str, Any]]) -> Table:
    rows = []
    for call, r in zip(STILL, results):
        (b_few, b_many), (a_few, a_many) = r["before"], r["after"]
        numbers = [f"{x:.4f}" for x in (b_few, a_few, b_many, a_many)]
        rows.append([call.label, f"w_r = {call.before}", *numbers])
    return Table(
        "A weight that is too large, and the defaults: videos that stand still",
        ["call", "without limit", f"{FEW} steps", "defaults", f"{MANY} steps", "defaults"],
        rows,
        f"Exact denoiser of {FRAMES}-frame (upscale: 9) Gaussian videos that stand still, "
        f"deviation {SD}, {pixels}² independent pixels. Root mean square error of the drawn "
        "frames: about 1 is noise at ±1. Residual: of the low resolution, over its own deviation.",
    )


# --- The same with the clips ----------------------------------------------------------------------


def _known_clips(known: int) -> Callable[..., Tensor]:
    def run(true: data.Batch, steps: int, options: dict[str, Any]) -> Tensor:
        condition = Condition(true.video[:, :, :known], **options)
        shape = (len(true.video), 3, data.FRAMES, data.SIZE, data.SIZE)
        return sample(Exact(), shape, condition=condition, num_steps=steps, seed=1)

    return run


def _last_window(true: data.Batch, steps: int, options: dict[str, Any]) -> Tensor:
    given, options = true.video[:, :, :8], dict(window=8, overlap=3, seed=1) | options
    return extend(Exact(), given, 14, num_steps=steps, **options)


def _between(true: data.Batch, steps: int, options: dict[str, Any]) -> Tensor:
    options = dict(window=data.FRAMES, overlap=1, seed=1) | options
    return interpolate_frames(Exact(), true.video[:, :, ::3], 3, num_steps=steps, **options)


def _larger(factor: int) -> Callable[..., Tensor]:
    def run(true: data.Batch, steps: int, options: dict[str, Any]) -> Tensor:
        low = average_downsample(true.video, (data.SIZE // factor,) * 2)
        options = dict(window=data.FRAMES, seed=1) | options
        return upscale(Exact(), low, (data.SIZE,) * 2, num_steps=steps, **options)

    return run


class Clips(NamedTuple):
    """A call with true clips of ``length`` frames; ``counted`` are the frames that it draws."""

    label: str
    before: str
    options: dict[str, Any]
    run: Callable[..., Tensor]
    length: int
    counted: list[int]


CLIPS = [
    Clips("3 of 8 known", "20", _frames(20.0), _known_clips(3), 8, list(range(3, 8))),
    Clips("3 of 8 known", "50", _frames(50.0), _known_clips(3), 8, list(range(3, 8))),
    Clips("extend 8 to 14: the last frame", "20", _frames(20.0), _last_window, 14, [13]),
    Clips(
        "interpolate_frames 5 to 13", "20", _frames(20.0), _between, 13,
        [i for i in range(13) if i % 3],
    ),
    Clips("upscale 2x", "1", _low(1.0, 2), _larger(2), 8, list(range(8))),
    Clips("upscale 4x", "1", _low(1.0, 4), _larger(4), 8, list(range(8))),
]  # fmt: skip


def clips_row(clips: int, number: int) -> dict[str, Any]:
    """For both options, by clip: whether most frames have the right glyph, and square errors."""
    call = CLIPS[number]
    true = data.draw(clips, call.length, torch.Generator().manual_seed(23))
    out: dict[str, Any] = {}
    for name, options in (("before", call.options), ("after", {})):
        video = call.run(true, FEW, options)[:, :, call.counted]
        got = data.read(video).glyph.mode(dim=1).values
        goal = true.video[:, :, call.counted]
        out[name] = {
            "glyph": (got == true.glyph).tolist(),
            "error": (video - goal).square().mean((1, 2, 3, 4)).tolist(),
            "random": (goal - goal.roll(1, 0)).square().mean((1, 2, 3, 4)).tolist(),
        }
    return out


def clips_table(results: list[dict[str, Any]]) -> Table:
    rows = []
    for call, r in zip(CLIPS, results):
        row = [call.label, f"w_r = {call.before}"]
        for name in ("before", "after"):
            error, random = (torch.tensor(r[name][n]) for n in ("error", "random"))
            row.append(str(ratio(error, random)))
            row.append(str(mean_of(torch.tensor(r[name]["glyph"]))))
        rows.append(row)
    head = ["call", "without limit", "error", "right glyph", "defaults: error", "right glyph"]
    return Table(
        "A weight that is too large, and the defaults: the clips",
        head,
        rows,
        f"{len(results[0]['after']['glyph'])} clips, exact denoiser, {FEW} steps. Error: square "
        "distance of the drawn frames to the true ones, over that of a random clip; ± is a 95 % "
        "interval over clips.",
    )


# --- When the corrector pays ----------------------------------------------------------------------

CORRECTOR = [("replacement", dict(method="replacement"))]
CORRECTOR += [(f"w_r = {w:g}", dict(guidance_weight=w)) for w in (1.0, 2.0)]
CORRECTOR += [("w_r = auto", dict(guidance_weight="auto"))]


def corrector_row(pixels: int, number: int) -> dict[str, Any]:
    """Distances of [ancestral, Langevin] for each number of calls; 3 of 8 frames known."""
    out = []
    for calls in CALLS:
        pair = (dict(num_steps=calls), dict(num_steps=calls // 2, corrector=Langevin(0.1)))
        out.append([distance(pixels, 0.9, 3, CORRECTOR[number][1], **kind) for kind in pair])
    return {"distance": out}


def distance(
    pixels: int, correlation: float, known: int, condition: dict[str, Any], **options: Any
) -> float:
    """Squared Wasserstein distance between the drawn and the true law of 8 frames of which some
    are known, over the variance of those drawn."""
    i = torch.arange(8, dtype=torch.float64)
    cov = correlation ** (i[:, None] - i).abs()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 1, 8, 4 * pixels, pixels, generator=generator)
    true = torch.einsum("fg,bcghw->bcfhw", torch.linalg.cholesky(cov).float(), noise)
    gain = torch.linalg.solve(cov[:known, :known], cov[:known, known:])
    spread = (cov[known:, known:] - cov[known:, :known] @ gain).trace()
    with warnings.catch_warnings():  # that a weight was lowered, which is what is measured
        warnings.simplefilter("ignore")
        drawn = sample(
            Gaussian(cov),
            true.shape,
            condition=Condition(true[:, :, :known], **condition),
            clip=None,
            seed=1,
            **options,
        )
    flat = drawn.double().transpose(0, 2).flatten(1)
    return (frechet_distance(flat.mean(1), torch.cov(flat), torch.zeros(8), cov) / spread).item()


def corrector_table(pixels: int, results: list[dict[str, Any]]) -> Table:
    rows = []
    for (name, _), r in zip(CORRECTOR, results):
        cells = [f"{a:.4f}; {b:.4f}" for a, b in r["distance"]]
        rows.append([name, *cells])
    return Table(
        "When the corrector pays: Gaussian videos, 3 of 8 frames known",
        ["ancestral; Langevin", *(f"{c} calls" for c in CALLS)],
        rows,
        "Correlation 0.9 from frame to frame, exact denoiser. Squared Wasserstein distance of the "
        "law of all frames from the true one, over the conditional variance of the frames drawn; "
        f"{16 * pixels**2:,} samples. The Langevin corrector has half the steps.",
    )


# --- How much weight ------------------------------------------------------------------------------

CORRELATIONS = (0.5, 0.7, 0.9, 0.97, 0.99, 0.999)


def weight_row(pixels: int, number: int) -> dict[str, Any]:
    """Distances of replacement, w_r = 1, F/n and auto, with 1 and with 3 of 8 frames known."""
    out = []
    for known in (1, 3):
        weights: tuple[Any, ...] = (1.0, 8 / known, "auto", 24 / known)
        conditions = [dict(method="replacement"), *(dict(guidance_weight=w) for w in weights)]
        rho = CORRELATIONS[number]
        out.append([distance(pixels, rho, known, c, num_steps=MANY) for c in conditions])
    return {"distance": out}


def weight_table(pixels: int, results: list[dict[str, Any]]) -> Table:
    rows = []
    for rho, r in zip(CORRELATIONS, results):
        columns = zip(*r["distance"])
        rows.append([f"{rho:g}", *("; ".join(f"{x:.4f}" for x in pair) for pair in columns)])
    return Table(
        "How much weight: Gaussian videos, 1 of 8 frames known; 3 known",
        ["correlation", "replacement", "w_r = 1", "F/n", "auto (2 F/n)", "3 F/n"],
        rows,
        f"Of one frame with the next. The same distance, {MANY} ancestral steps. More than F/n "
        "carries the known frames too far, the more so the less the others resemble them; what it "
        "is good for is in the tables of extension, where what a window loses is lost for good.",
    )

"""The perfect denoiser of the clips of ``paper.data``: E[x | z] in closed form, and its gradient.

A clip is a mixture of 10 digits x 832 motions; given both, it is linear in nine Gaussian numbers,
three colours of three channels (that a colour coefficient outside [-1, 1] is drawn again, 0.13 %,
is neglected). So the posterior of a noisy clip needs, for every digit and motion, the inner
products of z with three pictures, a 2 x 2 solve that the channels share, and a softmax. A sampler
with it shows what the method does where the network has learned all there is to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastvdm.diffusion import CosineSchedule, Prediction, alpha_of, convert, sigma_of
from paper.data import FRAMES, MEAN, PLACES, ROOM, SD, SIZE, Tables, draw, positions


def motions(frames: int) -> tuple[Tensor, Tensor]:
    """(M, F) places, as one number each, and (M,) fp64 probabilities of all motions of a clip."""
    walks = [torch.arange(2 * r) for r in ROOM]
    stands = [torch.arange(r + 1) for r in ROOM]
    paths, weights = [], []
    for moves in ((True, True), (False, True), (True, False)):
        axes = [walks[i] if moves[i] else stands[i] for i in (0, 1)]
        phase = torch.cartesian_prod(*axes)
        at = positions(torch.tensor(moves).expand(len(phase), 2), phase, frames)
        paths.append(at[..., 0] * (ROOM[1] + 1) + at[..., 1])
        weights.append(torch.full((len(phase),), 1 / (3 * len(phase)), dtype=torch.float64))
    path, index = torch.unique(torch.cat(paths), dim=0, return_inverse=True)
    return path, torch.zeros(len(path)).double().index_add(0, index, torch.cat(weights))


def one_hot(digit: Tensor) -> Tensor:
    """(B,) → (B, 10)."""
    return torch.nn.functional.one_hot(digit, 10).float()


class Exact:
    """``model(z, log_snr)`` or ``model(z, log_snr, cond=one_hot)``: (B, 3, F, 16, 16) → the same.

    Args:
        frames: of a clip. A z with several times as many is taken apart and every part denoised on
            its own: ``Exact(1)`` is the best that can be done with each frame alone.
        prediction: what is returned, "x" or "v" (for a loss).
        chunk: clips of one pass; the temporaries of a small one stay in the cache.

    ``cond`` (B, 10) holds the relative probabilities of the digits; a row of zeros is no condition.
    Gradients flow to z, once. Computes in the dtype of z.

    Raises:
        ValueError: a z or cond of another shape.
    """

    time_input = "logsnr"

    def __init__(self, frames: int = FRAMES, prediction: Prediction = "x", chunk: int = 16) -> None:
        self.frames, self.chunk = frames, chunk
        self.settings = {"prediction": prediction}  # where ``sample`` looks
        path, weight = motions(frames)
        self.log_prior = weight.log()
        rows = path + PLACES * torch.arange(frames)  # (M, F): row of the table of frame and place
        self.bags = rows.contiguous()
        # the same backwards: for each row of the table the motions that pass through it
        order = rows.flatten().argsort(stable=True)
        self.through = order // frames
        count = torch.bincount(rows.flatten(), minlength=frames * PLACES)
        self.offsets = count.cumsum(0) - count
        tables = Tables(torch.float64)
        area = tables.area.unflatten(0, (10, PLACES))[:, path].sum(-1)  # (10, M)
        gram = tables.gram.unflatten(0, (10, PLACES))[:, path].sum(2)  # (10, M, 2, 2)
        parts = (gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1], area)
        self.grams = torch.stack(parts).transpose(1, 2).contiguous()  # (4, M, 10)
        inside = tables.inside.reshape(SIZE * SIZE, 2, 10, PLACES)
        self.inside = inside.permute(3, 1, 2, 0).reshape(-1, SIZE * SIZE)  # (120 * 20, 256)
        self.ends = tables.ends.T.contiguous()  # (2, 256)

    def __call__(self, z: Tensor, log_snr: Tensor, cond: Tensor | None = None) -> Tensor:
        if z.ndim != 5 or z.shape[1] != 3 or z.shape[3:] != (SIZE, SIZE):
            raise ValueError(f"z must be (B, 3, F, {SIZE}, {SIZE}), got {tuple(z.shape)}")
        if z.shape[2] % self.frames:
            raise ValueError(f"z must have a multiple of {self.frames} frames, got {z.shape[2]}")
        if cond is not None and cond.shape != (len(z), 10):
            raise ValueError(f"cond must be ({len(z)}, 10), got {tuple(cond.shape)}")
        b, f = len(z), self.frames
        parts = z.unflatten(2, (-1, f)).transpose(1, 2).flatten(0, 1)  # (B * parts, 3, F, 16, 16)
        count = len(parts) // b
        level = log_snr.repeat_interleave(count)
        log_digit = torch.zeros(1, 10)
        if cond is not None:
            log_digit = torch.where(cond.sum(1, keepdim=True) > 0, cond, 1.0).log()
            log_digit = log_digit.repeat_interleave(count, dim=0)
        x: Tensor = _Posterior.apply(parts, level, log_digit, self)
        x = x.unflatten(0, (b, count)).transpose(1, 2).flatten(2, 3)
        return convert(x, z, log_snr, source="x", target=self.settings["prediction"])


class _Posterior(torch.autograd.Function):
    """E[x | z], one chunk of clips after the other.

    Its Jacobian is the posterior covariance times alpha/sigma^2, hence symmetric: backward is
    another walk through the mixture, with the probabilities and colours of forward.
    """

    @staticmethod
    def forward(ctx, z, log_snr, log_digit, exact):
        chunks, kept, saved = [], [], ctx.needs_input_grad[0]
        for i in range(0, len(z), exact.chunk):
            part = slice(i, i + exact.chunk)
            chunk = _Chunk(exact, z[part], log_snr[part])
            digits = log_digit if len(log_digit) == 1 else log_digit[part]
            chunks.append(chunk.posterior(z[part], digits))
            if saved:
                kept.append(chunk)
        ctx.kept = kept
        return torch.cat(chunks)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        parts = grad.split([chunk.batch for chunk in ctx.kept])
        out = torch.cat([chunk.covariance(part) for chunk, part in zip(ctx.kept, parts)])
        return out, None, None, None


class _Chunk:
    """The mixture for some noisy clips. Inside, tensors are (M, 10, 3, B): motion, digit, channel
    and clip, so that what belongs to one place of a frame lies together."""

    def __init__(self, exact: Exact, z: Tensor, log_snr: Tensor) -> None:
        self.exact, self.batch, self.dtype = exact, len(z), z.dtype
        self.inside, self.ends = exact.inside.to(z), exact.ends.to(z)
        level = log_snr.double()
        if bool((level == level[0]).all()):
            level = level[:1]  # as in sampling: one table for all clips
        snr = level.exp()
        self.gain = (snr / alpha_of(level)).to(z)  # alpha/sigma^2
        self.alpha = alpha_of(log_snr.double()).to(z)
        # Posterior covariance of the colours, the inverse of 1/sd^2 + snr Gram; (M, 10, 1, B or 1)
        a, b, c, d = (g[..., None, None] * snr for g in exact.grams)
        a, c, d = (p + 1 / s**2 for p, s in zip((a, c, d), SD))
        det = a * c - b * b
        self.log_det = -1.5 * (det * d).log()[:, :, 0]  # of three channels
        self.cov = [t.to(z) for t in (c / det, -b / det, a / det, 1 / d)]

    def _gather(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inner products of (B, 3, F, 16, 16) with the three pictures of each clip of the mixture,
        (M, 10, 3, B) each."""
        exact, f = self.exact, self.exact.frames
        # (F, 256, 3 * B)
        columns = video.permute(2, 3, 4, 1, 0).reshape(f, SIZE * SIZE, -1)
        table = torch.bmm(self.inside.expand(f, -1, -1), columns)  # (F, 120 * 20, 3 * B)
        table = table.reshape(f * PLACES, -1)
        inside = embedding_bag(exact.bags, table, mode="sum")
        inside = inside.reshape(len(exact.bags), 2, 10, 3, self.batch)
        total = (self.ends @ columns.sum(0)).reshape(2, 3, self.batch)
        back = total[:, None] - inside
        return back[:, 0], back[:, 1], inside.sum(1)

    def _scatter(self, upper: Tensor, lower: Tensor, front: Tensor) -> Tensor:
        """The transpose of ``_gather``: the sum of all pictures with these coefficients."""
        exact, f = self.exact, self.exact.frames
        inside = torch.stack((front - upper, front - lower), dim=1)  # (M, 2, 10, 3, B)
        table = embedding_bag(
            exact.through, inside.reshape(len(inside), -1), exact.offsets, mode="sum"
        )
        table = table.reshape(f, PLACES * 20, 3 * self.batch)
        columns = torch.bmm(self.inside.T.expand(f, -1, -1), table)
        ends = torch.stack((upper.sum((0, 1)), lower.sum((0, 1)))).reshape(2, -1)
        columns = columns + self.ends.T @ ends
        return columns.reshape(f, SIZE, SIZE, 3, self.batch).permute(4, 3, 0, 1, 2)

    def _colours(self, h: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        v_uu, v_ul, v_ll, v_ff = self.cov
        return v_uu * h[0] + v_ul * h[1], v_ul * h[0] + v_ll * h[1], v_ff * h[2]

    def posterior(self, z: Tensor, log_digit: Tensor) -> Tensor:
        """E[x | z], (B, 3, F, 16, 16); keeps what ``covariance`` needs."""
        # A constant added to a clip is added to its colours; without it the evidence, a difference
        # of large numbers, keeps more digits.
        shift = self.alpha * z.mean((2, 3, 4)).T  # (3, B)
        flat = shift.T[..., None, None, None]
        h = self._gather(z - self.alpha[:, None, None, None, None] * flat)
        h = tuple((m - shift) / s**2 + self.gain * p for m, s, p in zip(MEAN, SD, h))
        self.mean = self._colours(h)
        evidence = sum((m * p).sum(2) for m, p in zip(self.mean, h))
        logits = 0.5 * evidence + self.log_det + self.exact.log_prior[:, None, None]
        logits = (logits + log_digit.T.to(logits)).flatten(0, 1)  # fp64, of two large numbers
        self.best = logits.argmax(0)
        self.p = torch.softmax(logits, dim=0).to(self.dtype)
        p = self.p.reshape(-1, 10, 1, self.batch)
        return self._scatter(*(m * p for m in self.mean)) + flat

    def covariance(self, video: Tensor) -> Tensor:
        """alpha/sigma^2 Cov[x | z] applied to (B, 3, F, 16, 16)."""
        h = self._gather(video)
        along = sum((m * p).sum(2) for m, p in zip(self.mean, h)).flatten(0, 1)  # (M * 10, B)
        along = along - along.gather(0, self.best[None])  # keeps the digits where one has p = 1
        along = along - (self.p * along).sum(0)
        within = self._colours(h)
        p = self.p.reshape(-1, 10, 1, self.batch)
        along = along.reshape(p.shape)
        out = self._scatter(*(p * (m * along + w) for m, w in zip(self.mean, within)))
        return out * self.gain.reshape(-1, 1, 1, 1, 1)


class Loss(NamedTuple):
    """A loss on held-out clips with its standard error."""

    mean: float
    error: float
    clips: int


@torch.no_grad()
def held_out_loss(
    model: Callable[..., Tensor],
    clips: int = 1024,
    prediction: Prediction = "x",
    seed: int = 99,
    cond: bool = False,
) -> Loss:
    """Mean squared error in v of a denoiser, t uniform: for every model the same clips, times and
    noise.

    Clip i has a time from the i-th of as many equal parts of [0, 1], as most of the loss depends on
    it alone; the standard error is therefore that of differences between neighbours.

    Args:
        model: ``model(z, log_snr)``, or with ``cond`` also ``cond=one_hot`` of the digit.
        prediction: what it returns.

    Raises:
        ValueError: an odd number of clips.
    """
    if clips < 2 or clips % 2:
        raise ValueError(f"clips must be even, got {clips}")
    generator = torch.Generator().manual_seed(seed)
    batch = draw(clips, FRAMES, generator)
    t = (torch.arange(clips) + torch.rand(clips, generator=generator)) / clips
    losses = []
    for i in range(0, clips, 32):
        part = slice(i, i + 32)
        x, level = batch.video[part], CosineSchedule().log_snr(t[part])
        alpha, sigma = (fn(level)[:, None, None, None, None] for fn in (alpha_of, sigma_of))
        noise = torch.randn(x.shape, generator=generator)
        options = {"cond": one_hot(batch.digit[part])} if cond else {}
        z = alpha * x + sigma * noise
        out = model(z, level, **options)
        v = convert(out, z, level, source=prediction, target="v")
        losses.append((v - (alpha * noise - sigma * x)).square().mean(dim=(1, 2, 3, 4)))
    loss = torch.cat(losses).double()
    error = (loss[::2] - loss[1::2]).square().sum().sqrt() / clips
    return Loss(loss.mean().item(), error.item(), clips)

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
from paper.data import FRAMES, HEIGHT, MEAN, PLACES, ROOM, SD, SIZE, Tables, draw, positions


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
        chunk: frames of one pass; the temporaries of a small one stay in the cache.

    ``cond`` (B, 10) holds the relative probabilities of the digits; a row of zeros is no condition.
    Gradients flow to z, once. Computes in the dtype of z.

    Raises:
        ValueError: a z or cond of another shape.
    """

    time_input = "logsnr"

    def __init__(
        self, frames: int = FRAMES, prediction: Prediction = "x", chunk: int = 128
    ) -> None:
        self.frames, self.chunk = frames, max(1, chunk // frames)
        self.settings = {"prediction": prediction}  # where ``sample`` looks
        path, weight = motions(frames)
        self.log_prior = weight.log()
        # A table has a row for each (y, frame, x): a position of the digit in a frame.
        width = ROOM[1] + 1
        self.rows = (path // width * frames + torch.arange(frames)) * width + path % width  # (M, F)
        # the same backwards: for each row the motions that pass through it
        order = self.rows.flatten().argsort(stable=True)
        self.through = order // frames
        count = torch.bincount(self.rows.flatten(), minlength=frames * PLACES)
        self.offsets = count.cumsum(0) - count
        tables = Tables(torch.float64)
        area = tables.area.unflatten(0, (10, PLACES))[:, path].sum(-1)  # (10, M)
        gram = tables.gram.unflatten(0, (10, PLACES))[:, path].sum(2)  # (10, M, 2, 2)
        parts = (gram[..., 0, 0], gram[..., 0, 1], gram[..., 1, 1], area)
        self.grams = torch.stack(parts).transpose(1, 2).contiguous()  # (4, M, 10)
        # Both ends of the background inside each mask; for a digit at y only its 7 lines count.
        inside = tables.inside.reshape(SIZE, SIZE, 2, 10, ROOM[0] + 1, width)
        bands = [inside[y : y + HEIGHT, :, :, :, y] for y in range(ROOM[0] + 1)]
        bands = torch.stack(bands).permute(0, 5, 3, 4, 1, 2)  # (10, 12, 2, 10, 7, 16)
        self.bands = bands.reshape(len(bands), width * 20, HEIGHT * SIZE).contiguous()
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
        ctx.chunks, out = [], []
        for i in range(0, len(z), exact.chunk):
            part = slice(i, i + exact.chunk)
            chunk = _Chunk(exact, z[part], log_snr[part])
            digits = log_digit if len(log_digit) == 1 else log_digit[part]
            out.append(chunk.posterior(z[part], digits))
            if ctx.needs_input_grad[0]:
                ctx.chunks.append(chunk)
        return torch.cat(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        parts = grad.split([chunk.batch for chunk in ctx.chunks])
        out = torch.cat([chunk.covariance(part) for chunk, part in zip(ctx.chunks, parts)])
        return out, None, None, None


class _Chunk:
    """The mixture for some noisy clips.

    Inside, tensors are (M, 10, 3, B): motion, digit, channel and clip, so that what belongs to one
    place of a frame lies together. Once the probabilities are known, only the components with more
    than 1e-9 are kept, as (K, 3, B), where they are few.
    """

    def __init__(self, exact: Exact, z: Tensor, log_snr: Tensor) -> None:
        self.exact, self.batch = exact, len(z)
        self.bands, self.ends = exact.bands.to(z), exact.ends.to(z)
        level = log_snr.double()
        self.alpha = alpha_of(level).to(z)
        if bool((level == level[0]).all()):
            level = level[:1]  # as in sampling: one table for all clips
        snr = level.exp()
        self.gain = (snr / alpha_of(level)).to(z)  # alpha/sigma^2
        # Posterior precision of the colours, 1/sd^2 + snr Gram: (a b; b c) and d, (M, 10, B or 1)
        a, b, c, d = (g[..., None] * snr for g in exact.grams)
        a, c, d = (p + 1 / s**2 for p, s in zip((a, c, d), SD))
        det = a * c - b * b
        self.log_weight = exact.log_prior[:, None, None] - 1.5 * (det * d).log()  # three channels
        self.cov = torch.stack((c / det, -b / det, a / det, 1 / d)).flatten(1, 2).to(z)
        self.index: Tensor | None = None

    def _columns(self, video: Tensor) -> Tensor:
        """(B, 3, F, 16, 16) → (F, 256, 3 * B)."""
        return video.permute(2, 3, 4, 1, 0).reshape(self.exact.frames, SIZE * SIZE, -1)

    def _table(self, columns: Tensor) -> Tensor:
        """Inner products with both ends of the background inside every mask: a row of
        (2, 10, 3, B) for each position in each frame."""
        f, n = self.exact.frames, columns.shape[2]
        table = columns.new_empty(len(self.bands), f, self.bands.shape[1], n)
        for y, band in enumerate(self.bands):
            lines = columns[:, SIZE * y : SIZE * (y + HEIGHT)]
            torch.bmm(band.expand(f, -1, -1), lines, out=table[y])
        return table.reshape(f * PLACES, -1)

    def _totals(self, columns: Tensor) -> Tensor:
        """(2, 3, B) inner products with the two ends of the background, over whole frames."""
        return (self.ends @ columns.sum(0)).reshape(2, 3, self.batch)

    def _gather(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Inner products of a video with the three pictures of the kept clips, (K, 3, B) each."""
        columns = self._columns(video)
        return self._split(self._table(columns), self._totals(columns))

    def _split(self, table: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.index is None:
            inside = embedding_bag(self.exact.rows, table, mode="sum")
            inside = inside.reshape(-1, 2, 10, 3, self.batch).transpose(0, 1).flatten(1, 2)
        else:
            inside = table.flatten()[self.index].sum(0)
        back = total[:, None] - inside
        return back[0], back[1], inside.sum(0)

    def _scatter(self, upper: Tensor, lower: Tensor, front: Tensor) -> Tensor:
        """The transpose of ``_gather``: the sum of all pictures with these coefficients."""
        exact, f, n = self.exact, self.exact.frames, 3 * self.batch
        inside = torch.stack((front - upper, front - lower))  # (2, K, 3, B)
        if self.index is None:
            inside = inside.unflatten(1, (-1, 10)).transpose(0, 1).reshape(-1, 20 * n)
            table = embedding_bag(exact.through, inside, exact.offsets, mode="sum")
        else:
            table = inside.new_zeros(f * PLACES * 20 * n)
            table.scatter_add_(0, self.index.flatten(), inside.expand(f, -1, -1, -1, -1).flatten())
        table = table.reshape(len(self.bands), f, -1, n)
        ends = torch.stack((upper.sum(0), lower.sum(0))).reshape(2, n)
        columns = (self.ends.T @ ends).repeat(f, 1, 1)
        for y, band in enumerate(self.bands):
            lines = columns[:, SIZE * y : SIZE * (y + HEIGHT)]
            lines.baddbmm_(band.T.expand(f, -1, -1), table[y])
        return columns.reshape(f, SIZE, SIZE, 3, self.batch).permute(4, 3, 0, 1, 2)

    def _colours(self, h: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        uu, ul, ll, ff = self.kept_cov
        return uu * h[0] + ul * h[1], ul * h[0] + ll * h[1], ff * h[2]

    def _probabilities(self, table: Tensor, base: list[Tensor], log_digit: Tensor) -> Tensor:
        """(M * 10, B). ``base`` (3, B) each: h without what comes from inside the masks.

        log p is half the squared length of L^T h, cov = L L^T, less log-determinants; in place, as
        new memory would cost more than the arithmetic.
        """
        inside = embedding_bag(self.exact.rows, table, mode="sum")
        inside = inside.reshape(-1, 2, 10, 3, self.batch)
        upper, lower = inside[:, 0], inside[:, 1]
        uu, ul, ll, ff = self.cov.unflatten(1, (-1, 10))[:, :, :, None]
        first, out = uu.sqrt(), torch.empty_like(upper)
        second = ul / first
        torch.mul(first, base[0], out=out).addcmul_(second, base[1])
        out.addcmul_(first * -self.gain, upper).addcmul_(second * -self.gain, lower).square_()
        third = (ll - second.square()).sqrt()
        work = third * base[1]
        out.addcmul_(work.addcmul_(third * -self.gain, lower), work)
        fourth = ff.sqrt()
        torch.mul(fourth, base[2], out=work)
        fourth = fourth * self.gain
        work.addcmul_(fourth, upper).addcmul_(fourth, lower)
        evidence = out.addcmul_(work, work).sum(2)
        evidence -= evidence.amax((0, 1))  # so that the next sum keeps its digits
        weight = (self.log_weight + log_digit.T.to(self.log_weight)).to(evidence)
        return torch.softmax(evidence.mul_(0.5).add_(weight).flatten(0, 1), dim=0)

    def _keep(self, p: Tensor) -> None:
        """Chooses the components that count, and finds their places in a table."""
        count = int((p > 1e-9).sum(0).max())
        self.kept_cov = self.cov[:, :, None]
        if count > len(p) // 8:
            self.p = p[:, None]
            return
        top = p.T.contiguous().topk(count, dim=1)
        kept = top.indices.T.contiguous()  # (K, B)
        self.p = top.values.T[:, None]
        if self.cov.shape[2] == 1:
            self.kept_cov = self.cov[:, kept, 0][:, :, None]
        else:
            self.kept_cov = self.cov.gather(1, kept.expand(4, -1, -1))[:, :, None]
        b = self.batch
        place = self.exact.rows[kept // 10].permute(2, 0, 1) * 20 + kept % 10  # (F, K, B)
        place = place[:, None] + 10 * torch.arange(2)[:, None, None]  # (F, 2, K, B)
        place = place[:, :, :, None] * 3 + torch.arange(3)[:, None]
        self.index = place * b + torch.arange(b)  # (F, 2, K, 3, B)

    def posterior(self, z: Tensor, log_digit: Tensor) -> Tensor:
        """E[x | z], (B, 3, F, 16, 16); keeps what ``covariance`` needs."""
        # A constant added to a clip is added to its colours; without it the evidence, a difference
        # of large numbers, keeps more digits.
        shift = self.alpha * z.mean((2, 3, 4)).T  # (3, B)
        flat = shift.T[..., None, None, None]
        columns = self._columns(z - self.alpha[:, None, None, None, None] * flat)
        table, total = self._table(columns), self._totals(columns)
        prior = [(m - shift) / s**2 for m, s in zip(MEAN, SD)]
        base = [prior[0] + self.gain * total[0], prior[1] + self.gain * total[1], prior[2]]
        self._keep(self._probabilities(table, base, log_digit))
        h = self._split(table, total)
        self.mean = self._colours(tuple(m + self.gain * p for m, p in zip(prior, h)))
        return self._scatter(*(m * self.p for m in self.mean)) + flat

    def covariance(self, video: Tensor) -> Tensor:
        """alpha/sigma^2 Cov[x | z] applied to (B, 3, F, 16, 16)."""
        h = self._gather(video)
        along = sum((m * p).sum(1, keepdim=True) for m, p in zip(self.mean, h))  # (K, 1, B)
        best = self.p.argmax(0, keepdim=True)
        along = along - along.gather(0, best)  # keeps the digits where one has p = 1
        along = along - (self.p * along).sum(0)
        within = self._colours(h)
        out = self._scatter(*(self.p * (m * along + w) for m, w in zip(self.mean, within)))
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

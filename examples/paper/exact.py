"""The perfect denoiser of the clips of ``paper.data``: E[x | z] in closed form, and its gradient.

A clip is a mixture of 10 glyphs x 420 motions; given both, it is linear in nine Gaussian numbers,
three colours of three channels. (A colour coefficient outside [-1, 1], 0.13 %, is drawn again; this
is neglected.) So the posterior of a noisy clip needs, for every glyph and motion, the inner
products of z with three pictures, a 2 x 2 solve that the channels share, and a softmax. A sampler
with this denoiser shows what the method does if the network has learned everything.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fastvdm.diffusion import Prediction, alpha_of, convert
from paper.data import (
    FRAMES,
    HEIGHT,
    MEAN,
    PLACES,
    ROOM,
    SD,
    SIZE,
    Tables,
    positions,
)


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


class Exact:
    """``model(z, log_snr)`` or ``model(z, log_snr, cond=one_hot)``: (B, 3, F, 16, 16) → the same.

    Args:
        frames: frames of a clip. A z with a multiple of that is split, and every part is denoised
            separately: ``Exact(1)`` is the best that can be done with each frame alone.
        prediction: what is returned, "x" or "v" (for a loss).
        chunk: frames per pass; the temporaries of a small chunk stay in the cache.

    ``cond`` (B, 10) holds the relative probabilities of the glyphs; a row of zeros is no condition.
    Gradients flow to z, once. It computes in the dtype of z.

    Raises:
        ValueError: z or cond has another shape.
    """

    time_input = "logsnr"

    def __init__(
        self, frames: int = FRAMES, prediction: Prediction = "x", chunk: int = 128
    ) -> None:
        self.frames, self.chunk = frames, max(1, chunk // frames)
        self.settings = {"prediction": prediction}  # where ``sample`` looks
        path, weight = motions(frames)
        self.log_prior = weight.log()
        self.paths = path
        # A table has a row for each (y, frame, x): a position of the glyph in a frame.
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
        # Both ends of the background inside each mask; for a glyph at y only its 9 lines count.
        inside = tables.inside.reshape(SIZE, SIZE, 2, 10, ROOM[0] + 1, width)
        bands = [inside[y : y + HEIGHT, :, :, :, y] for y in range(ROOM[0] + 1)]
        bands = torch.stack(bands).permute(0, 5, 3, 4, 1, 2)  # (8, 8, 2, 10, 9, 16)
        self.bands = bands.reshape(len(bands), width * 20, HEIGHT * SIZE).contiguous()
        self.ends = tables.ends.T.contiguous()  # (2, 256)
        self.pictures = inside.permute(3, 4, 5, 2, 0, 1).reshape(10 * PLACES, 2, SIZE * SIZE)

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
        log_glyph = torch.zeros(1, 10)
        if cond is not None:
            log_glyph = torch.where(cond.sum(1, keepdim=True) > 0, cond, 1.0).log()
            log_glyph = log_glyph.repeat_interleave(count, dim=0)
        x: Tensor = _Posterior.apply(parts, level, log_glyph, self)
        x = x.unflatten(0, (b, count)).transpose(1, 2).flatten(2, 3)
        return convert(x, z, log_snr, source="x", target=self.settings["prediction"])


class _Posterior(torch.autograd.Function):
    """E[x | z], one chunk of clips after the other.

    Its Jacobian is the posterior covariance times alpha/sigma^2 and therefore symmetric, so the
    backward is another pass over the mixture, with the probabilities and colours of the forward.
    """

    @staticmethod
    def forward(ctx, z, log_snr, log_glyph, exact):
        ctx.chunks, out = [], []
        for i in range(0, len(z), exact.chunk):
            part = slice(i, i + exact.chunk)
            chunk = _Chunk(exact, z[part], log_snr[part])
            glyphs = log_glyph if len(log_glyph) == 1 else log_glyph[part]
            out.append(chunk.posterior(z[part], glyphs))
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

    Tensors of all components are (M, 10, 3, B): motion, glyph, channel and clip, so that values of
    one place of a frame are adjacent. If a few components have all the probability (at most 32
    above 1e-9; not below a log-SNR of about 0), the others are dropped, and these tensors are (K,
    3, B). Operations are in place where it matters, because new memory costs more than arithmetic.
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
        self.cov = [t.to(z)[:, :, None] for t in (c / det, -b / det, a / det, 1 / d)]
        self.pictures: Tensor | None = None  # (K, B, F, 2, 256), what the kept ones have inside

    def _columns(self, video: Tensor) -> Tensor:
        """(B, 3, F, 16, 16) → (F, 256, 3 * B)."""
        return video.permute(2, 3, 4, 1, 0).reshape(self.exact.frames, SIZE * SIZE, -1)

    def _inside(self, columns: Tensor) -> Tensor:
        """(2, M, 10, 3, B): inner products with both ends of the background inside the masks.

        First a table with a row for each position in each frame, then its sums along motions.
        """
        f, n = self.exact.frames, columns.shape[2]
        table = columns.new_empty(len(self.bands), f, self.bands.shape[1], n)
        for y, band in enumerate(self.bands):
            lines = columns[:, SIZE * y : SIZE * (y + HEIGHT)]
            torch.bmm(band.expand(f, -1, -1), lines, out=table[y])
        inside = embedding_bag(self.exact.rows, table.reshape(f * PLACES, -1), mode="sum")
        return inside.reshape(-1, 2, 10, 3, self.batch).transpose(0, 1)

    def _gather(self, video: Tensor) -> list[Tensor]:
        """Inner products of a video with the three pictures of each component."""
        columns = self._columns(video)
        total = (self.ends @ columns.sum(0)).reshape(2, 3, self.batch)
        if self.pictures is None:
            inside = self._inside(columns)
        else:
            inside = torch.einsum("kbfjn,bcfn->jkcb", self.pictures, video.flatten(3))
        front = inside[0] + inside[1]
        return [inside[0].neg_().add_(total[0]), inside[1].neg_().add_(total[1]), front]

    def _scatter(self, upper: Tensor, lower: Tensor, front: Tensor) -> Tensor:
        """The transpose of ``_gather``: the sum of all pictures with these coefficients."""
        exact, f, n = self.exact, self.exact.frames, 3 * self.batch
        dims = tuple(range(upper.ndim - 2))
        ends = torch.stack((upper.sum(dims), lower.sum(dims))).reshape(2, n)
        inside = torch.empty(len(front), 2, *front.shape[1:], dtype=front.dtype)
        torch.sub(front, upper, out=inside[:, 0])
        torch.sub(front, lower, out=inside[:, 1])
        columns = (self.ends.T @ ends).repeat(f, 1, 1)
        if self.pictures is None:
            inside = inside.reshape(len(front), -1)
            table = embedding_bag(exact.through, inside, exact.offsets, mode="sum")
            table = table.reshape(len(self.bands), f, -1, n)
            for y, band in enumerate(self.bands):
                lines = columns[:, SIZE * y : SIZE * (y + HEIGHT)]
                lines.baddbmm_(band.T.expand(f, -1, -1), table[y])
        out = columns.reshape(f, SIZE, SIZE, 3, self.batch).permute(4, 3, 0, 1, 2)
        if self.pictures is None:
            return out
        inside = torch.einsum("kbfjn,kjcb->bcfn", self.pictures, inside)
        return out + inside.reshape(out.shape)

    def _colours(self, h: list[Tensor]) -> list[Tensor]:
        """cov h, the two ends and the glyph apart."""
        uu, ul, ll, ff = self.cov
        return [(uu * h[0]).addcmul_(ul, h[1]), (ul * h[0]).addcmul_(ll, h[1]), ff * h[2]]

    def _keep(self, p: Tensor) -> None:
        """Drops all but a few components where they have no probability; p (M * 10, B)."""
        count = int((p > 1e-9).sum(0).max())
        if count > 32:
            self.p = p.reshape(-1, 10, 1, self.batch)
            return
        top = p.T.contiguous().topk(count, dim=1)
        kept = top.indices.T.contiguous()[:, None]  # (K, 1, B)
        self.p = top.values.T[:, None]
        every = [t.flatten(0, 1).expand(-1, -1, self.batch) for t in self.cov]
        self.cov = [t.gather(0, kept) for t in every]
        every, kept = [t.flatten(0, 1) for t in self.mean], kept.expand(-1, 3, -1)
        self.mean = [t.gather(0, kept) for t in every]
        place, glyph = self.exact.paths[kept[:, 0] // 10], kept[:, 0] % 10
        self.pictures = self.exact.pictures.to(p)[glyph[..., None] * PLACES + place]

    def posterior(self, z: Tensor, log_glyph: Tensor) -> Tensor:
        """E[x | z], (B, 3, F, 16, 16); keeps what ``covariance`` needs."""
        # A constant added to a clip is added to its colours; without it the evidence, a difference
        # of large numbers, keeps more digits.
        shift = self.alpha * z.mean((2, 3, 4)).T  # (3, B)
        flat = shift.T[..., None, None, None]
        h = self._gather(z - self.alpha[:, None, None, None, None] * flat)
        for part, m, s in zip(h, MEAN, SD):
            part.mul_(self.gain).add_((m - shift) / s**2)
        self.mean = self._colours(h)
        h[0].mul_(self.mean[0]).addcmul_(h[1], self.mean[1]).addcmul_(h[2], self.mean[2])
        evidence = h[0].sum(2)
        evidence -= evidence.amax((0, 1))  # so that the next sum keeps its digits
        weight = (self.log_weight + log_glyph.T.to(self.log_weight)).to(evidence)
        self._keep(torch.softmax(evidence.mul_(0.5).add_(weight).flatten(0, 1), dim=0))
        return self._scatter(*(m * self.p for m in self.mean)) + flat

    def covariance(self, video: Tensor) -> Tensor:
        """alpha/sigma^2 Cov[x | z] applied to (B, 3, F, 16, 16)."""
        h = self._gather(video)
        within = self._colours(h)
        h[0].mul_(self.mean[0]).addcmul_(h[1], self.mean[1]).addcmul_(h[2], self.mean[2])
        along = h[0].sum(-2, keepdim=True).reshape(-1, self.batch)
        p = self.p.reshape(along.shape)
        along = along - along.gather(0, p.argmax(0, keepdim=True))  # exact where one has p = 1
        along = (along - (p * along).sum(0)).reshape(self.p.shape)
        for part, mean in zip(within, self.mean):
            part.addcmul_(mean, along).mul_(self.p)
        return self._scatter(*within) * self.gain.reshape(-1, 1, 1, 1, 1)

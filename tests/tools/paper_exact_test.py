"""The exact denoiser of the paper's tables against a mixture written down component by component.

The brute force is the density of z itself, from torch.distributions; Tweedie's formula turns its
gradient into E[x | z], and autograd that into what guidance needs.
"""

from __future__ import annotations

import pytest
import torch
from paper.data import GLYPHS, HEIGHT, MEAN, SD, SIZE, WIDTH, draw, gradient, read
from paper.exact import Exact, motions
from paper.imperfect import Alone
from paper.train import HeldOut, Recipe
from torch.distributions import LowRankMultivariateNormal as Normal

from fastvdm.diffusion import alpha_of, convert, sample, sigma_of

DOUBLE = torch.float64


def pictures(glyph: int, path: list[int]) -> torch.Tensor:
    """(F * 256, 3): what one unit of each colour adds to a clip of this motion."""
    frames = []
    g = gradient().double()[:, None].expand(SIZE, SIZE)
    for place in path:
        y, x = divmod(place, 8)
        mask = torch.zeros(SIZE, SIZE, dtype=DOUBLE)
        mask[y : y + HEIGHT, x : x + WIDTH] = GLYPHS[glyph].double()
        frames.append(torch.stack(((1 - g) * (1 - mask), g * (1 - mask), mask), -1))
    return torch.stack(frames).flatten(0, 2)


def brute(z: torch.Tensor, level: float, glyphs: list[int]) -> torch.Tensor:
    """E[x | z] for (B, 3, F, 16, 16) fp64, differentiable."""
    alpha, sigma = (fn(torch.tensor(level, dtype=DOUBLE)) for fn in (alpha_of, sigma_of))
    path, weight = motions(z.shape[2])
    basis = torch.stack([pictures(d, p) for d in glyphs for p in path.tolist()])
    mean, sd = torch.tensor(MEAN, dtype=DOUBLE), torch.tensor(SD, dtype=DOUBLE)
    noise = (sigma**2).expand(basis.shape[1])
    law = Normal(alpha * basis @ mean, alpha * basis * sd, noise.expand(len(basis), -1))
    prior = (weight / len(glyphs)).log().repeat(len(glyphs))
    with torch.enable_grad():
        z = z if z.requires_grad else z.clone().requires_grad_()
        channels = law.log_prob(z.flatten(2).transpose(0, 1)[:, :, None])  # (3, B, components)
        density = torch.logsumexp(channels.sum(0) + prior, dim=1)
        (score,) = torch.autograd.grad(density.sum(), z, create_graph=True)
    return (z + sigma**2 * score) / alpha


def noisy(batch: int, frames: int, level: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = draw(batch, frames, generator).video.double()
    noise = torch.randn(x.shape, dtype=DOUBLE, generator=generator)
    t = torch.tensor(level, dtype=DOUBLE)
    return alpha_of(t) * x + sigma_of(t) * noise


@pytest.mark.parametrize("level", [-6.0, -2.0, 1.0, 5.0])
@pytest.mark.parametrize("case", ["one_frame", "one_glyph"])
def test_against_brute_force(case, level):
    """Value and gradient; one frame of every glyph (640 components), or a glyph over two."""
    frames, glyphs = (1, list(range(10))) if case == "one_frame" else (2, [3])
    z = noisy(2, frames, level, seed=int(level) + 20).requires_grad_()
    cond = None
    if case == "one_glyph":
        cond = torch.zeros(2, 10).index_fill_(1, torch.tensor(glyphs), 1.0)
    want = brute(z, level, glyphs)
    got = Exact(frames)(z, torch.full((2,), level), cond)
    torch.testing.assert_close(got, want, atol=1e-8, rtol=0)
    seed = torch.randn(z.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    (dz,) = torch.autograd.grad(want, z, seed, retain_graph=True)
    (ours,) = torch.autograd.grad(got, z, seed)
    torch.testing.assert_close(ours, dz, atol=1e-7 * float(dz.abs().max()), rtol=1e-6)


@pytest.mark.parametrize("level", [-1.5, 3.0])
def test_gradient_is_that_of_finite_differences(level):
    model, at = Exact(8), torch.full((1,), level)
    z = noisy(1, 8, level).requires_grad_()
    generator = torch.Generator().manual_seed(1)
    seed, step = (torch.randn(z.shape, dtype=DOUBLE, generator=generator) for _ in range(2))
    (dz,) = torch.autograd.grad(model(z, at), z, seed)
    h = 1e-5
    change = (model(z.detach() + h * step, at) - model(z.detach() - h * step, at)) / (2 * h)
    torch.testing.assert_close((dz * step).sum(), (change * seed).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("level", [-20.0, -8.0, -2.0, 0.0, 2.0, 8.0, 20.0])
def test_fp32_against_fp64(level):
    z = noisy(3, 8, level).float()
    model, at = Exact(8, chunk=16), torch.full((3,), level)
    out = []
    for dtype in (torch.float32, DOUBLE):
        leaf = z.to(dtype, copy=True).requires_grad_()
        x = model(leaf, at)
        (dz,) = torch.autograd.grad(x, leaf, torch.ones_like(x))
        assert torch.isfinite(x).all() and torch.isfinite(dz).all()
        out.append((x.detach().double(), dz.double()))
    (x, dx), (wide, dwide) = out
    torch.testing.assert_close(x, wide, atol=2e-5, rtol=0)
    assert (dx - dwide).norm() < 1e-4 * dwide.norm()


def test_batching_levels_and_frames_apart():
    levels = torch.tensor([-3.0, 0.5, 2.0])
    z = torch.cat([noisy(1, 8, float(l)).float() for l in levels])
    together = Exact(8)(z, levels)
    for i in range(3):
        one = Exact(8)(z[i : i + 1], levels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], one, atol=1e-5, rtol=0)
    apart, still = Exact(1)(z, levels), Exact(1)
    frame = still(z[:, :, 3:4], levels)
    torch.testing.assert_close(apart[:, :, 3:4], frame, atol=1e-5, rtol=0)
    cond = torch.eye(10)[[4, 7, 7]]
    both = Exact(8)(z, levels, cond)
    torch.testing.assert_close(
        both[1:2], Exact(8)(z[1:2], levels[1:2], cond[1:2]), atol=1e-5, rtol=0
    )
    assert torch.equal(Exact(8)(z, levels, torch.zeros(3, 10)), together)


def test_samples_come_from_the_data():
    """Unconditional draws are clips of the data: what they leave after ``read`` is nothing."""
    x = sample(Exact(8), (2, 3, 8, 16, 16), num_steps=12, seed=1)
    got = read(x)
    assert got.residual.max() < 1e-3
    assert (got.glyph == got.glyph[:, :1]).all()
    v = Exact(8, prediction="v")
    level = torch.full((2,), 1.0)
    z = noisy(2, 8, 1.0).float()
    x = convert(v(z, level), z, level, source="v", target="x")
    torch.testing.assert_close(x, Exact(8)(z, level), atol=1e-5, rtol=0)


def test_held_out_loss_orders_the_denoisers():
    clips = HeldOut(Recipe("held out"), 24)
    told, joint, apart = (
        clips.loss(Exact(frames, "v"), by_class)
        for frames, by_class in ((8, True), (8, False), (1, False))
    )
    assert told.mean() < joint.mean() < 0.8 * apart.mean()


def test_held_out_error():
    """Over sets of clips the means spread as the interval says."""
    runs = []
    for i in range(60):
        clips = HeldOut(Recipe("held out"), 16, seed=i)
        runs.append(clips.mean(clips.loss(Exact(1, "v"))))
    spread = torch.tensor([mean for mean, _ in runs]).std().item()
    assert 0.6 < sum(half for _, half in runs) / len(runs) / (1.96 * spread) < 1.6


@pytest.mark.parametrize(
    "shape, cond",
    [((1, 1, 8, 16, 16), None), ((1, 3, 7, 16, 16), None), ((1, 3, 8, 16, 16), (1, 9))],
)
def test_wrong_shapes(shape, cond):
    with pytest.raises(ValueError, match="must"):
        Exact(8)(torch.zeros(shape), torch.zeros(1), None if cond is None else torch.zeros(cond))


def test_a_part_of_what_frames_share():
    """The error of a mean of both denoisers: the perfect one's is uncorrelated with the rest."""
    clips = HeldOut(Recipe("held out"), 64)
    best, half, worst = (clips.loss(Alone(part, "v")).mean().item() for part in (0, 0.5, 1))
    assert half == pytest.approx(best + (worst - best) / 4, rel=0.05)

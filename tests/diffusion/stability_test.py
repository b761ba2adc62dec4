"""How far the guidance weights are lowered, against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import DOUBLE

from fastvdm.diffusion import (
    DDIM,
    Ancestral,
    CosineSchedule,
    Langevin,
    alpha_of,
    average_downsample,
    bilinear_downsample,
)
from fastvdm.diffusion.downsample import norm_squared
from fastvdm.diffusion.stability import KAPPA, auto_weight, stable_weights, still_weights

CONTRACTIONS = torch.tensor([1.0, 0.9, 0.75, 0.4, 0.1, 0.05, 1e-3, 1e-6], dtype=DOUBLE)
KNOWN = (0.0, 0.3, 1.0, 3.7, 10.0, 48.0, 1e3, 1e8)
LOW = (0.0, 0.5, 1.0, 1.4, 3.0, 100.0)


def bracket(p, w, y):
    """What c is multiplied by in a mode with the share p of its energy in the drawn frames."""
    return 1 + p * (w * (1 - p) + y - 1)


def stable(c: torch.Tensor, known: float, low: float) -> tuple[torch.Tensor, torch.Tensor]:
    return stable_weights(c, torch.full_like(c, known), torch.full_like(c, low))


def largest(w: float, y: float) -> float:
    """The largest bracket of all shares: at an end or at the vertex of the parabola."""
    shares = [0.0, 1.0]
    if w > 0:
        shares.append(min(max((w + y - 1) / (2 * w), 0.0), 1.0))
    return max(bracket(p, w, y) for p in shares)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("known", KNOWN)
def test_within_the_range_and_no_lower_than_need_be(known, low):
    p = torch.linspace(0, 1, 2001, dtype=DOUBLE)
    kept = stable(CONTRACTIONS, known, low)
    for c, w, y in zip(CONTRACTIONS.tolist(), *(k.tolist() for k in kept)):
        factor = 1 - c * bracket(p, w, y)
        assert factor.min() >= 1 - KAPPA - 1e-9 and factor.max() <= 1 + 1e-12
        assert 0 <= w <= known and 0 <= y <= low
        asked, found = c * largest(known, low), c * largest(w, y)
        if asked <= KAPPA:
            assert (w, y) == (known, low)
        else:
            assert found == pytest.approx(KAPPA, rel=1e-6)
            assert w < known or y < low


def test_known_values():
    assert auto_weight(16, 1) == 32 and auto_weight(16, 5) == pytest.approx(6.4)
    assert auto_weight(8, 8) == 2
    (last, corrector), _ = stable(torch.tensor([1.0, 0.05], dtype=DOUBLE), 1e3, 0.0)
    assert last == pytest.approx(2 + 3**0.5) and corrector == pytest.approx(118, abs=0.1)
    # the low resolution enforces in the last step, and leaves w_r what is there at p = 1/2
    w, y = stable(torch.ones(1, dtype=DOUBLE), 1e3, 1.0)
    assert y.item() == 1 and w.item() == pytest.approx(2)
    # at the limit of y a p of 1 is at the bound, and w may not bend the parabola above it
    w, y = stable(torch.ones(1, dtype=DOUBLE), 1e3, 100.0)
    assert y.item() == KAPPA and w.item() == pytest.approx(KAPPA - 1)
    # a step that moves nothing bears any weight
    still = torch.tensor([1e-12], dtype=DOUBLE)
    for found, asked in zip(stable(still, 1e4, 1e4), (1e4, 1e4)):
        assert (found == asked).all()


@pytest.mark.parametrize("frames, known", [(16, 1), (16, 5), (16, 15), (2, 1)])
def test_still_content_is_not_carried_too_far(frames, known):
    """The factor of an error in what all frames share is 0 with these weights, at any step."""
    w = still_weights(CONTRACTIONS, frames, known)
    share = (frames - known) / frames  # of the drawn ones
    factor = 1 - CONTRACTIONS * (1 - share) * (1 + w * share)
    torch.testing.assert_close(factor, torch.zeros_like(factor), atol=1e-12, rtol=0)
    last = still_weights(torch.ones(1, dtype=DOUBLE), frames, known)
    torch.testing.assert_close(last, torch.full_like(last, frames / known))


def _projection(generator, rank, size):
    basis, _ = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=DOUBLE))
    return basis @ basis.T


@pytest.mark.parametrize("low", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("known", [0.0, 5.0, 1e3])
def test_error_map_of_any_data(known, low):
    """Gaussian denoisers (0 <= P <= 1) of random modes, D of random rows and gains, over random
    frames: no error in the drawn pixels grows."""
    g, size = torch.Generator().manual_seed(0), 12
    kept = stable(CONTRACTIONS, known, low)
    for trial in range(60):
        p = _projection(g, int(torch.randint(1, size, (1,), generator=g)), size)
        if trial % 3 == 2:  # noise levels at which nothing is certain yet
            q, _ = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=DOUBLE))
            p = q @ (torch.rand(size, generator=g, dtype=DOUBLE)[:, None] * q.T)
        drawn = torch.rand(size, generator=g) < 0.6
        drawn[0], drawn[-1] = True, False
        rows = int(torch.randint(1, size + 1, (1,), generator=g))
        basis, _ = torch.linalg.qr(torch.randn(size, rows, generator=g, dtype=DOUBLE))
        d = 3 * torch.rand(rows, generator=g, dtype=DOUBLE)[:, None] * basis.T
        norm_squared = torch.linalg.matrix_norm(d, 2) ** 2
        bb, ba = p[drawn][:, drawn], p[drawn][:, ~drawn]
        eye = torch.eye(len(bb), dtype=DOUBLE)
        for c, w, y in zip(CONTRACTIONS, *kept):
            enforce = (p @ d.T @ d @ p)[drawn][:, drawn] * y / norm_squared
            error = torch.linalg.eigvalsh(eye - c * (eye - bb + w * ba @ ba.T + enforce))
            assert error.max() <= 1 + 1e-9 and error.min() >= 1 - KAPPA - 1e-9


@pytest.mark.parametrize("c", [1.0, 0.5, 0.05])
def test_the_bound_is_of_the_worst_data(c):
    """One mode of share (w - 1)/(2 w) reaches the bound, and twice the weight amplifies it."""
    w = stable(torch.tensor([c], dtype=DOUBLE), 1e9, 0.0)[0].item()
    share = (w - 1) / (2 * w)
    v = torch.tensor([share, 1 - share], dtype=DOUBLE).sqrt()  # (drawn, known)
    p = v[:, None] * v
    factor = [1 - c * (1 - p[0, 0] + k * w * p[0, 1] ** 2).item() for k in (1, 2)]
    assert factor[0] == pytest.approx(1 - KAPPA) and factor[1] < -1


@pytest.mark.parametrize("rule", [Ancestral(0.3), DDIM(0.0), DDIM(0.7), Langevin(0.1)])
def test_every_rule_is_a_contraction_towards_x(rule):
    """z_s/alpha_s = (1 - c) z_t/alpha_t + c x + noise, 0 < c <= 1: what the bound rests on."""
    levels = CosineSchedule().levels(12).log_snr
    lt, ls = levels[:-1], levels[1:]
    update = rule.update(lt) if isinstance(rule, Langevin) else rule.update(lt, ls)
    ls = lt if isinstance(rule, Langevin) else ls
    c = update.u_x / alpha_of(ls)
    assert ((c > 0) & (c <= 1)).all()
    torch.testing.assert_close(update.u_z * alpha_of(lt) / alpha_of(ls), 1 - c)


def _average(k):
    return lambda x: average_downsample(x, (x.shape[3] // k, x.shape[4] // k))


def _bilinear(k):
    return lambda x: bilinear_downsample(x, (x.shape[3] // k, x.shape[4] // k))


DOWN = {
    "average_2": (_average(2), 1 / 4),
    "average_4": (_average(4), 1 / 16),
    "average_3": (_average(3), 1 / 9),
    "bilinear_2": (_bilinear(2), 1 / 4),
    "bilinear_4": (_bilinear(4), 1 / 4),  # reads the middle 2x2 of each 4x4
    "gain": (lambda x: 3 * x[..., ::2, ::2], 9.0),
    "affine": (lambda x: 0.5 * x[..., ::2, ::2] + 7, 0.25),
    "grey": (lambda x: x.mean(1, keepdim=True), 1 / 3),
    "one_pixel": (lambda x: torch.cat((x[..., :-1], 10 * x[..., -1:]), -1), 100.0),
    "no_mean": (lambda x: x - average_downsample(x, (1, 1)), 1.0),
    # largest on the pattern that alternates, the farthest from a constant
    "edges": (lambda x: x[..., 1:] - x[..., :-1], 2 + 2 * math.cos(math.pi / 12)),
}


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("name", DOWN)
def test_norm_of_downsampling(name, dtype):
    """Within 1 %; 2 % where the largest gains lie close together, far inside the margin of 4/3."""
    down, truth = DOWN[name]
    found = norm_squared(down, torch.zeros((2, 3, 2, 12, 12), dtype=dtype))
    assert found.shape == (2,)
    assert found.tolist() == pytest.approx([truth] * 2, rel=0.02 if name == "edges" else 0.01)


def test_norm_of_a_downsampling_that_differs_between_samples():
    mask = torch.rand(3, 1, 2, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[2] = False  # nothing is known of this one
    gain = torch.tensor([1.0, 5.0, 1.0]).view(-1, 1, 1, 1, 1)
    found = norm_squared(lambda x: gain * mask * x, torch.zeros(3, 2, 2, 6, 6))
    assert found.tolist() == pytest.approx([1, 25, 1], rel=0.01)


@pytest.mark.parametrize("down", [torch.tanh, torch.exp, torch.square, torch.abs, torch.relu])
def test_norm_of_a_nonlinear_one_is_finite(down):
    assert 0 < norm_squared(down, torch.zeros(1, 2, 3, 6, 6)).item() < 1e3

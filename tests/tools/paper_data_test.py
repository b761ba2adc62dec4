"""The clips of the paper's tables: what is drawn is what is read, at every frame."""

from __future__ import annotations

import pytest
import torch
from paper.data import FRAMES, GLYPHS, ROOM, continued, draw, positions, read


def test_what_is_drawn_is_read():
    batch = draw(40, 20, torch.Generator().manual_seed(0))
    assert batch.video.shape == (40, 3, 20, 16, 16) and batch.video.abs().max() <= 1
    got = read(batch.video, chunk=77)
    assert torch.equal(got.glyph, batch.glyph[:, None].expand(40, 20))
    assert torch.equal(got.position, positions(batch.moving, batch.phase, 20))
    colours = batch.colours[:, None].expand_as(got.colours)
    torch.testing.assert_close(got.colours, colours, atol=1e-4, rtol=0)
    assert got.residual.max() < 1e-8


def test_read_stands_noise():
    generator = torch.Generator().manual_seed(1)
    batch = draw(40, 2, generator)
    got = read(batch.video + 0.05 * torch.randn(batch.video.shape, generator=generator))
    assert (got.glyph == batch.glyph[:, None]).float().mean() > 0.95
    assert (got.residual / 0.05**2 - 1).abs().max() < 0.3


def test_motion_is_stationary_and_bounces():
    batch = draw(6000, 1, torch.Generator().manual_seed(2))
    assert batch.moving.any(1).all()  # never still altogether
    assert ((~batch.moving).float().mean(0) - 1 / 3).abs().max() < 0.03
    path = positions(batch.moving, batch.phase, 40)
    assert path.min() == 0 and path.amax((0, 1)).tolist() == list(ROOM)
    step = path.diff(dim=1).abs()
    assert torch.equal(step, batch.moving[:, None].long().expand_as(step))
    means = path.float().mean(0)  # the same at every time
    assert (means - torch.tensor(ROOM) / 2).abs().max() < 0.2


def test_continuation_and_seed():
    one, two = (draw(3, FRAMES, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.video, two.video)
    longer = continued(one, 30)
    assert torch.equal(longer[:, :, :FRAMES], one.video)


def test_glyphs_differ():
    flat = GLYPHS.flatten(1).float()
    assert min((flat[i] - flat[j]).abs().sum() for i in range(10) for j in range(i)) >= 2


def test_wrong_shape():
    with pytest.raises(ValueError, match="expected"):
        read(torch.zeros(1, 1, 2, 16, 16))

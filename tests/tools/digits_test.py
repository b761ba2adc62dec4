"""The network of moving digits that ships: small, trained, and made by the script beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peer import peer_or_skip

pytest.importorskip("PIL", reason="the digits are drawn with Pillow")
pytest.importorskip("tqdm")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

from digits import data, train

from fastvdm import UNet3D
from fastvdm.diffusion import DiscreteSchedule, diffusion_loss, sample


def fixed_loss(net: torch.nn.Module) -> float:
    """v-loss on clips of its own and noise levels spread over all of [0, 1]."""
    generator = torch.Generator().manual_seed(5)
    t = (torch.arange(8) * 125 + 63) / 1000
    with torch.no_grad():
        return diffusion_loss(
            net, data.clips(8, generator=generator), schedule=DiscreteSchedule(1000),
            prediction="v", loss_space="v", t=t, generator=generator,
        ).item()  # fmt: skip


def test_clips_are_what_they_say():
    clips = data.clips(3, 9, torch.Generator().manual_seed(0))
    assert clips.shape == (3, 3, 9, 24, 24) and clips.min() >= -1 and clips.max() <= 1
    again = data.clips(3, 9, torch.Generator().manual_seed(0))
    assert torch.equal(clips, again)
    # The digit is all there in every frame, wherever it is, and moves.
    light = (clips + 1).sum(dim=(1, 3, 4))
    assert (light / light[:, :1] - 1).abs().max() < 0.05
    assert (clips[:, :, 1:] - clips[:, :, :-1]).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1
    assert torch.equal(data.fold(torch.tensor([-1.0, 3.0, 11.0]), 10.0), torch.tensor([1.0, 3, 9]))


def test_the_network_ships_small_and_trained():
    assert sum(p.stat().st_size for p in train.MODEL.iterdir()) < 1_000_000
    net = UNet3D.from_pretrained(train.MODEL)
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert fixed_loss(net) < 0.05 < 0.5 < fixed_loss(train.network())
    peer = peer_or_skip("0.7.0").Unet3D(16, dim_mults=(1, 2, 2), attn_heads=4, attn_dim_head=16)
    peer.load_state_dict(net.to_peer_state_dict())


def test_adam_has_both_ends_of_the_network():
    """They are chosen by name, and a name that is no longer there would choose nothing."""
    net = train.network()
    _, adam = train.optimizers(net)
    chosen = {id(p) for group in adam.param_groups for p in group["params"]}
    assert {id(net.stem.weight), id(net.head.conv.weight)} <= chosen
    assert net.stem.weight.numel() > 256  # it is not there for its size


def test_it_draws_digits():
    """Mostly black, one saturated colour, about as much light as a digit has."""
    net = UNet3D.from_pretrained(train.MODEL)
    video = sample(net, 2, num_steps=16, seed=0, value_range=(0, 1))
    real = (data.clips(64, 1, torch.Generator().manual_seed(0)) + 1) / 2
    for one in video:
        dark = (one.amax(dim=0) < 0.2).float().mean()
        assert 0.6 < dark < 0.98
        assert 0.4 < one.mean() / real.mean() < 2.5


def test_an_interrupted_training_ends_the_same(tmp_path):
    whole = train.train(2, 1, tmp_path / "a", every=1)
    train.train(2, 1, tmp_path / "b", every=1, stop=1)
    resumed = train.train(2, 1, tmp_path / "b", every=1)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters()))
    train.save(whole, tmp_path / "model")
    saved = UNet3D.from_pretrained(tmp_path / "model")
    assert dict(saved.settings)["prediction"] == "v"
    for p, q in zip(whole.parameters(), saved.parameters()):
        assert torch.equal(p.half().float(), q)

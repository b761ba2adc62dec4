"""The peer's own GaussianDiffusion as the witness: buffers, training loss, samples."""

from __future__ import annotations

import pytest
import torch
from peer import peer_or_skip

from fastvdm import UNet3D
from fastvdm.diffusion import DiscreteSchedule, diffusion_loss, sample

TIMESTEPS = 20


@pytest.fixture(scope="module")
def peer():
    module = peer_or_skip("0.7.0")
    module.tqdm = lambda steps, **_: steps
    return module


def build(peer, **options):
    torch.manual_seed(0)
    net = peer.Unet3D(
        dim=8, dim_mults=(1, 2), channels=1, attn_heads=2, attn_dim_head=8, cond_dim=4
    )
    diffusion = peer.GaussianDiffusion(
        net, image_size=8, num_frames=3, channels=1, timesteps=TIMESTEPS, **options
    )
    return net, diffusion


@pytest.mark.parametrize("timesteps", [1000, 37])
def test_buffers_bit_for_bit(peer, timesteps):
    theirs = peer.GaussianDiffusion(
        torch.nn.Identity(), image_size=8, num_frames=3, timesteps=timesteps
    ).state_dict()
    ours = DiscreteSchedule(timesteps).buffers()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    again = DiscreteSchedule.from_state_dict(theirs)
    assert torch.equal(again.betas, DiscreteSchedule(timesteps).betas)  # fp64, not the rounded ones


@pytest.mark.parametrize("clip", ["static", "dynamic"])
def test_samples(peer, clip):
    """Same weights, same noise: its checkpoint sampled by us, in its own network and in ours, is
    what its own sampler draws, classifier-free guidance included."""
    net, diffusion = build(peer, use_dynamic_thres=clip == "dynamic")
    cond = torch.randn(2, 4)
    torch.manual_seed(1)
    theirs = diffusion.sample(cond=cond, cond_scale=1.7)
    for model in (net, UNet3D.from_unet3d(net, exact=True)):
        ours = sample(
            model,
            (2, 1, 3, 8, 8),
            schedule=DiscreteSchedule.from_state_dict(diffusion.state_dict()),
            cond=cond,
            guidance_scale=1.7,
            clip=clip,
            generator=torch.Generator().manual_seed(1),
        )
        torch.testing.assert_close((ours + 1) / 2, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["l1", "l2"])
def test_loss(peer, loss_type):
    net, diffusion = build(peer, loss_type=loss_type)
    x, cond, noise = torch.randn(2, 1, 3, 8, 8), torch.randn(2, 4), torch.randn(2, 1, 3, 8, 8)
    index = torch.tensor([3, 14])
    theirs = diffusion.p_losses(x, index, cond=cond, noise=noise)
    schedule = DiscreteSchedule(TIMESTEPS)
    ours = diffusion_loss(
        net,
        x,
        schedule=schedule,
        t=schedule.index_to_t(index),
        noise=noise,
        cond=cond,
        loss_type={"l1": "l1", "l2": "mse"}[loss_type],
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

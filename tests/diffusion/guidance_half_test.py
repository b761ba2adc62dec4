"""Guidance through networks in fp16, whose largest number the seed of a gradient passes; and a D of
Eq. 8 that does something else with every sample."""

from __future__ import annotations

import copy

import pytest
import torch

from fastvdm import UNet3D
from fastvdm.diffusion import Condition, DiscreteSchedule, extend, sample
from fastvdm.diffusion.run import _scaled_gradient

SHAPE = (2, 3, 4, 16, 16)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = UNet3D(dim=16, dim_mults=(1, 2), attn_heads=2, time_input="logsnr")
    for p in net.parameters():  # the same function in both dtypes
        p.data = p.data.half().float()
    return net


def known(**options) -> Condition:
    g = torch.Generator().manual_seed(1)
    frames = torch.rand(2, 3, 1, 16, 16, generator=g) - 0.5
    low_res = torch.rand(2, 3, 4, 8, 8, generator=g) - 0.5
    return Condition(frames, low_res=low_res if options.pop("low", False) else None, **options)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e4, 1e9])
def test_a_seed_of_any_size(size):
    """Each sample has a scale of its own."""
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(16, 16, generator=g).half()
    leaf = torch.randn(SHAPE, generator=g, requires_grad=True)
    seed = torch.randn(SHAPE, generator=g) * torch.tensor([size, 1.0]).view(2, 1, 1, 1, 1)
    got = _scaled_gradient(leaf.half() @ matrix, leaf, seed)
    want = seed @ matrix.float().T
    assert got.dtype == torch.float32
    for a, b in zip(got, want):
        assert (a - b).norm() < 2e-3 * b.norm()


@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
@pytest.mark.parametrize("options", [{}, dict(low=True), dict(guidance_weight=1.0)])
def test_finite_and_near_fp32(net, prediction, options):
    """In fp16 weights, and under autocast."""
    args = dict(prediction=prediction, num_steps=4, seed=0, condition=known(**options))
    wide = sample(net, SHAPE, **args)
    narrow = [sample(copy.deepcopy(net).half(), SHAPE, **args)]
    with torch.autocast("cpu", torch.float16):
        narrow.append(sample(net, SHAPE, **args))
    for x in narrow:
        assert x.isfinite().all()
        if prediction != "eps":  # x_hat of eps is rounding where there is nothing but noise
            assert (x - wide).norm() < 0.02 * wide.norm()


def test_extend_with_the_peers_schedule():
    torch.manual_seed(0)
    net = UNet3D(dim=16, dim_mults=(1, 2), attn_heads=2).half()
    video = torch.full((1, 3, 1, 16, 16), 0.5)
    args = dict(window=4, num_steps=3, seed=0, schedule=DiscreteSchedule())
    assert extend(net, video, 8, **args).isfinite().all()


def test_each_sample_has_its_own_downsampling():
    """A mask for each sample, one of them 3 times as strong: as if each were drawn alone."""
    g = torch.Generator().manual_seed(0)
    b, shape = 4, (4, 1, 4, 8, 8)
    mask = (torch.rand(shape, generator=g) < 0.5).float()
    mask[0] *= 3
    video = 0.3 * torch.randn(b, 1, 1, 8, 8, generator=g).expand(shape)

    def model(z, log_snr):  # x of still videos of deviation 0.3
        level = log_snr.view(-1, 1, 1, 1, 1)
        alpha, noise = torch.sigmoid(level).sqrt(), torch.sigmoid(-level)
        gain = alpha * 0.09 / (4 * alpha**2 * 0.09 + noise)
        return (gain * z.sum(2, keepdim=True)).expand_as(z)

    def draw(rows):
        given = Condition(low_res=(video * mask)[rows], downsample=lambda v: v * mask[rows])
        seeds = torch.arange(b)[rows].tolist()
        return sample(
            model, (len(seeds), *shape[1:]), prediction="x", num_steps=24, seed=seeds,
            condition=given, clip=None,
        )  # fmt: skip

    together = draw(slice(0, b))
    for i in range(b):
        torch.testing.assert_close(together[i : i + 1], draw(slice(i, i + 1)), atol=1e-3, rtol=0)
    assert (together - video)[mask > 0].square().mean() < 0.05 * 0.09

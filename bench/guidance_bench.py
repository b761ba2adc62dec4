"""Reconstruction guidance: the two fused ends alone, and a guided step against an unguided one.

The baseline of ``test_guided_steps`` is the unguided run; it draws another video, so it is not
compared with the reference. "naive" is Eq. 7 written down directly: the loss in plain torch, with
autograd through a network whose parameters require a gradient. Target: at most 2.3 times the
baseline's time.
"""

from __future__ import annotations

import math

import pytest
import torch
from calls import bench_cases, shape
from harness import Contest, Provider, need_kernel

from fastvdm import UNet3D, use_backend
from fastvdm.diffusion import Ancestral, Condition, CosineSchedule, alpha_of, sample, sigma_of
from fastvdm.ops._cost import Cost
from fastvdm.ops.guidance import (
    guidance_seed,
    guidance_seed_cost,
    guidance_update,
    guidance_update_cost,
)

WEIGHT = 9.0
NET = dict(dim=64, dim_mults=(1, 2, 4))  # half as wide for "tiny"


def ends_contest(case: str, device: str) -> Contest:
    """Both ends of one step: x_hat and seed, then x_tilde and z_next, with 5 known frames."""
    s = shape(case, device)
    size = (s.batch, 3, s.frames, s.height, s.width)
    z, out, grad, noise = (torch.randn(size, device=device) for _ in range(4))
    known = torch.randn(s.batch, 3, 5, s.height, s.width, device=device)
    slot = torch.tensor([*range(5), *[-1] * (s.frames - 5)], dtype=torch.int32, device=device)
    seed_coef = torch.rand(s.batch, 4, device=device)
    coef = torch.rand(s.batch, 9, device=device)

    def ends(wide=lambda t: t):
        given = dict(known=wide(known), slot=slot)
        x_hat, seed = guidance_seed(wide(z), wide(out), wide(seed_coef), **given)
        options = dict(grad=wide(grad), noise=wide(noise), clip=True, want_x=False)
        _, z_next = guidance_update(wide(z), x_hat, wide(coef), **given, **options)
        return seed, z_next

    def reference(wide=lambda t: t):
        with use_backend("reference"):
            return ends(wide)

    def fused():
        need_kernel("guidance_seed", device)
        return ends

    def cost(dtype: torch.dtype) -> Cost:
        parts = guidance_seed_cost(size, known=5), guidance_update_cost(size)
        return Cost(*(sum(p) for p in zip(*parts)))

    return Contest(
        reference=lambda: reference(lambda t: t.double()),
        providers={
            "torch": Provider(lambda: reference, tolerance=1e-5),
            "fastvdm": Provider(fused, tolerance=1e-5),
        },
        cost=cost,
        device=device,
    )


@pytest.mark.parametrize("provider", ["torch", "fastvdm"])
@pytest.mark.parametrize("case", bench_cases("tiny", "l0"))
def test_ends(race, case, provider):
    race(ends_contest, case, provider)


def naive(net, frames, size, generator, steps):
    """The same run with Eq. 7 written down: no frozen weights, no fused ends."""
    device = frames.device
    levels = CosineSchedule().levels(steps).log_snr
    count = frames.shape[2]
    z = torch.randn(size, device=device, generator=generator)
    z[:, :, :count] = alpha_of(levels[0]).float() * frames + sigma_of(levels[0]) * z[:, :, :count]
    for i in range(steps):
        level = levels[i]
        alpha, sigma = alpha_of(level).item(), sigma_of(level).item()
        leaf = z.detach().requires_grad_()
        time = torch.full((size[0],), level.item(), device=device)
        x_hat = (leaf - sigma * net(leaf, time)) / alpha
        loss = (x_hat[:, :, :count] - frames).square().sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        x = (x_hat.detach() - 0.5 * WEIGHT * alpha * grad).clamp(-1, 1)
        x[:, :, :count] = frames
        if i + 1 == steps:
            return x
        u_z, u_x, u_n = (u.item() for u in Ancestral().update(level, levels[i + 1]))
        noise = torch.randn(size, device=device, generator=generator)
        z = u_z * z + u_x * x + u_n * noise
        after = levels[i + 1]
        z[:, :, :count] = (
            alpha_of(after).item() * frames + sigma_of(after).item() * noise[:, :, :count]
        )


def steps_contest(case: str, device: str, checkpointing: str = "none") -> Contest:
    """Two ancestral steps of a network of dim 64 with 2 known frames."""
    s = shape(case, device)
    size = (s.batch, 3, s.frames, s.height, s.width)
    options = NET | (dict(dim=32) if case == "tiny" else {})
    net = UNet3D(**options, time_input="logsnr", checkpointing=checkpointing).to(device)
    frames = torch.rand(s.batch, 3, 2, s.height, s.width, device=device) * 2 - 1

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(0)

    def run(condition: Condition | None):
        return sample(
            net, size, num_steps=2, condition=condition, generator=generator(), device=device
        )

    # "none" as in "naive": the limit for two steps would be a third of this weight.
    condition = Condition(frames, guidance_weight=WEIGHT, guidance_limit="none")

    def unfused():
        return naive(net.eval(), frames, size, generator(), 2)

    return Contest(
        reference=unfused,
        providers={
            "unguided": Provider(lambda: lambda: run(None), tolerance=math.inf),
            "naive": Provider(lambda: unfused, tolerance=1e-6),
            "fastvdm": Provider(lambda: lambda: run(condition), tolerance=1e-3),
        },
        device=device,
        hide_host=False,
    )


@pytest.mark.parametrize("provider", ["unguided", "naive", "fastvdm"])
@pytest.mark.parametrize("checkpointing", ["none", "level"])
@pytest.mark.parametrize("case", bench_cases("tiny", full=("l1", "l0")))
def test_guided_steps(race, case, checkpointing, provider):
    race(steps_contest, case, provider, checkpointing=checkpointing)

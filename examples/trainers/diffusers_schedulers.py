"""diffusers' schedulers (DDIM, DPM-Solver++) drive UNet3D: it predicts noise at a step index."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fastvdm import UNet3D

SCHEDULERS = {"ddim": DDIMScheduler, "dpm-solver++": DPMSolverMultistepScheduler}


@torch.no_grad()
def sample(model: UNet3D, shape: tuple[int, ...], name: str, steps: int, seed: int = 0) -> Tensor:
    """(B, C, F, H, W) in [-1, 1]. The betas are those of the peer's cosine schedule."""
    scheduler = SCHEDULERS[name](
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="epsilon"
    )
    scheduler.set_timesteps(steps)
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        eps = model(z, t.expand(shape[0]))
        z = scheduler.step(eps, t, z).prev_sample
    return z.clamp(-1, 1)


if __name__ == "__main__":
    network = UNet3D(16, dim_mults=(1, 2), attn_heads=2).eval()
    for name in SCHEDULERS:
        print(name, tuple(sample(network, (1, 3, 4, 16, 16), name, steps=5).shape))

"""The paper's objective in a plain PyTorch loop."""

from __future__ import annotations

import torch
from clips import arguments, loader

from fastvdm import UNet3D
from fastvdm.diffusion import diffusion_loss


def train(folder: str, steps: int) -> list[float]:
    model = UNet3D(16, dim_mults=(1, 2), attn_heads=2, time_input="logsnr")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses: list[float] = []
    while len(losses) < steps:
        for video in loader(folder):
            loss = diffusion_loss(model, 2 * video - 1, prediction="eps")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


if __name__ == "__main__":
    args = arguments(__doc__)
    print(train(args.folder, args.steps)[-1])

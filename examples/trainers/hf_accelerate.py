"""Hugging Face accelerate: mixed precision, gradient accumulation, several devices."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from clips import arguments, loader

from fastvdm import UNet3D
from fastvdm.diffusion import diffusion_loss


def train(folder: str, steps: int) -> list[float]:
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model = UNet3D(16, dim_mults=(1, 2), attn_heads=2, time_input="logsnr")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model, optimizer, data = accelerator.prepare(model, optimizer, loader(folder))
    losses: list[float] = []
    while len(losses) < steps:
        for video in data:
            with accelerator.accumulate(model):
                loss = diffusion_loss(model, 2 * video - 1, prediction="v")
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


if __name__ == "__main__":
    args = arguments(__doc__)
    print(train(args.folder, args.steps)[-1])

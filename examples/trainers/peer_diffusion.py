"""The peer's (video-diffusion-pytorch) GaussianDiffusion; only the network's import changes."""

from __future__ import annotations

import torch
from clips import FRAMES, SIZE, arguments, loader

from fastvdm import UNet3D as Unet3D


def train(folder: str, steps: int, peer=None) -> list[float]:
    if peer is None:
        import video_diffusion_pytorch as peer
    model = Unet3D(dim=16, dim_mults=(1, 2), attn_heads=2)
    diffusion = peer.GaussianDiffusion(model, image_size=SIZE, num_frames=FRAMES, timesteps=100)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-3)
    losses: list[float] = []
    while len(losses) < steps:
        for video in loader(folder):
            loss = diffusion(video, prob_focus_present=0.1)
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

"""Lightning: the network and its loss in a LightningModule."""

from __future__ import annotations

import lightning
import torch
from clips import arguments, loader
from torch import Tensor

from fastvdm import UNet3D
from fastvdm.diffusion import diffusion_loss


class VideoDiffusion(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = UNet3D(16, dim_mults=(1, 2), attn_heads=2, time_input="logsnr")
        self.losses: list[float] = []

    def training_step(self, video: Tensor) -> Tensor:
        loss = diffusion_loss(self.model, 2 * video - 1, prediction="eps")
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def train(folder: str, steps: int) -> list[float]:
    module = VideoDiffusion()
    trainer = lightning.Trainer(
        max_steps=steps, max_epochs=-1, accelerator="auto", devices=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader(folder))
    return module.losses


if __name__ == "__main__":
    args = arguments(__doc__)
    print(train(args.folder, args.steps)[-1])

"""The Trainer of video-diffusion-pytorch on a folder of gifs; only the network's import changes.

That Trainer moves every batch with ``.cuda()``, so it needs a GPU. The test of this file runs it on
a CPU by making that call the identity.
"""

from __future__ import annotations

from pathlib import Path

import torch
from clips import FRAMES, SIZE, arguments

from fastvdm import UNet3D as Unet3D
from fastvdm.video import list_videos, read_video, write_video


def make_gifs(folder: str | Path, gifs: Path) -> Path:
    """Write the first frames of every video as a gif, which the peer's data set reads."""
    for path in list_videos(folder):
        write_video(gifs / f"{path.stem}.gif", read_video(path, FRAMES, size=SIZE))
    return gifs


def build(folder: str | Path, steps: int, results: str | Path, norm: str = "rms", peer=None):
    """The Trainer; it saves and samples after half of the steps. ``norm``: "group" for peer 0.6."""
    if peer is None:
        import video_diffusion_pytorch as peer
    results = Path(results)
    model = Unet3D(dim=16, dim_mults=(1, 2), attn_heads=2, norm=norm)
    diffusion = peer.GaussianDiffusion(model, image_size=SIZE, num_frames=FRAMES, timesteps=100)
    return peer.Trainer(
        diffusion.to("cuda" if torch.cuda.is_available() else "cpu"),
        make_gifs(folder, results / "gifs"),
        train_batch_size=2,
        train_lr=1e-3,
        train_num_steps=steps,
        gradient_accumulate_every=1,
        step_start_ema=steps // 2,
        update_ema_every=2,
        save_and_sample_every=max(1, steps // 2),
        results_folder=results,
        num_sample_rows=1,
    )


def train(trainer) -> list[float]:
    losses: list[float] = []
    trainer.train(prob_focus_present=0.1, log_fn=lambda log: losses.append(log["loss"]))
    return losses


if __name__ == "__main__":
    args = arguments(__doc__)
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, and the peer's Trainer calls .cuda()")
    print(train(build(args.folder, args.steps, "results"))[-1])

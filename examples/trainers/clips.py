"""The data of the trainer examples: a folder of videos as (C, F, H, W) in [0, 1]."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch.utils.data import DataLoader

from fastvdm.video import VideoFolder

FRAMES, SIZE = 4, 16


def loader(folder: str | Path, batch_size: int = 2) -> DataLoader:
    clips = VideoFolder(folder, num_frames=FRAMES, size=SIZE)
    return DataLoader(clips, batch_size=batch_size, shuffle=True, drop_last=False)


def arguments(about: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("folder", help="a folder of mp4, webm or gif files")
    parser.add_argument("--steps", type=int, default=100)
    return parser.parse_args()

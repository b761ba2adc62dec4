"""The named shapes of the benchmarks: the levels of the networks people train, at their real sizes.

``l0`` .. ``l3``: the four levels of the peer's README network (dim 64, multipliers 1, 2, 4, 8) on
16 x 64 x 64. ``ucf-*``: the attention levels of the paper's base-256 models; ``t2v128-*``: of the
9 x 128 x 128 model. ``tiny`` is for a machine that is busy or slow. The batch is 1 on a CPU, 8 on a
GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Shape:
    """One level of a U-Net. ``x`` is (B, F, H, W, C)."""

    frames: int
    height: int
    width: int
    channels: int
    heads: int = 8
    head_dim: int = 32
    groups: int = 8
    batch: int = 1

    @property
    def x_shape(self) -> tuple[int, int, int, int, int]:
        return self.batch, self.frames, self.height, self.width, self.channels

    @property
    def qkv_shape(self) -> tuple[int, ...]:
        return *self.x_shape[:-1], 3, self.heads, self.head_dim

    @property
    def tokens(self) -> int:
        return self.batch * self.frames * self.height * self.width


SHAPES = {
    "tiny": Shape(8, 16, 16, 32, heads=4),
    "l0": Shape(16, 64, 64, 64),
    "l1": Shape(16, 32, 32, 128),
    "l2": Shape(16, 16, 16, 256),
    "l3": Shape(16, 8, 8, 512),
    "ucf-32": Shape(16, 32, 32, 512, heads=8, head_dim=64, groups=32),
    "ucf-16": Shape(16, 16, 16, 1024, heads=16, head_dim=64, groups=32),
    "ucf-8": Shape(16, 8, 8, 2048, heads=32, head_dim=64, groups=32),
    "t2v128-32": Shape(9, 32, 32, 512, heads=4, head_dim=128, groups=32),
    "joint-24": Shape(24, 32, 32, 256, heads=4, head_dim=64, groups=32),  # 16 frames + 8 images
}


def shape(case: str, device: str = "cpu") -> Shape:
    """The shape of that name; on a GPU with a batch of 8."""
    from dataclasses import replace

    found = SHAPES[case]
    return replace(found, batch=8) if device.startswith("cuda") else found


def bench_cases(*names: str, full: tuple[str, ...] = ()) -> list:
    """Parameters of a bench: ``names`` always, ``full`` only with ``--full``."""
    for name in (*names, *full):
        if name not in SHAPES:
            raise KeyError(f"{name!r} is not in bench/cases.py: {', '.join(SHAPES)}")
    return [*names, *(pytest.param(n, marks=pytest.mark.full) for n in full)]

"""Space-only convolutions on (B, F, H, W, C). The parameters are torch's own Conv2d ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastvdm.ops.conv_group_norm import space_conv, space_conv_transpose


class SpaceConv(nn.Conv2d):
    """A 1 x k x k convolution over every frame: weight (C_out, C_in, k, k), k odd or 4 at stride 2.

    ``upsample`` doubles height and width by nearest neighbour before the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        upsample: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, kernel_size // 2)
        if kernel_size % 2 == 0:
            self.padding = (kernel_size // 2 - 1,) * 2
        self.upsample = "nearest" if upsample else None
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(
        self, x: Tensor, x2: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return space_conv(
            x,
            self.weight,
            self.bias,
            x2=x2,
            stride=self.stride[0],
            residual=residual,
            upsample=self.upsample,
        )


class SpaceConvTranspose(nn.ConvTranspose2d):
    """The 1 x 4 x 4 stride-2 transposed convolution that doubles height and width."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 4, stride=2, padding=1)
        self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return space_conv_transpose(x, self.weight, self.bias)

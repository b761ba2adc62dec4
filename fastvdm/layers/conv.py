"""Space-only convolutions on (B, F, H, W, C), with the parameters of torch's Conv2d."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastvdm.layers.plain import weights_of
from fastvdm.ops.conv_group_norm import space_conv, space_conv_transpose

Size = int | tuple[int, ...]


def _one(name: str, size: Size) -> int:
    """The side of a square size; torch stores it once per axis."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if not sizes or any(n != sizes[0] for n in sizes):
        raise ValueError(f"{name} must be one number, or the same for height and width, got {size}")
    return sizes[0]


def _check_fixed(**options: tuple[Any, Any]) -> None:
    """Check options of torch's constructors that have one supported value: (given, supported)."""
    for name, (given, only) in options.items():
        if given != only:
            raise ValueError(f"{name} must be {only!r}, got {given!r}")


class _Fixed(nn.Module):
    """A convolution whose kernels support one padding and no dilation or groups. Setting another
    value on it, as is done for seamless tiles, would have no effect, so it raises.

    Raises:
        ValueError: such an option is set to another value.
    """

    _FIXED = frozenset({"kernel_size", "stride", "padding", "padding_mode", "dilation", "groups"})

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._FIXED and name in self.__dict__ and value != self.__dict__[name]:
            kind = type(self).__name__
            raise ValueError(f"{name} of a {kind} stays {self.__dict__[name]!r}, got {value!r}")
        super().__setattr__(name, value)


class SpaceConv(_Fixed, nn.Conv2d):
    """A 1 x k x k convolution over every frame: (B, F, H, W, C_in) → (B, F, Ho, Wo, C_out).

    The arguments are those of ``nn.Conv2d``, so ``type(conv)(...)`` makes another one. The weight
    is (C_out, C_in, k, k) with k odd, or k = 4 with ``stride`` 2; the stride is 1 or 2. ``padding``
    keeps or halves the extents: k // 2, or 1 for k = 4.

    Raises:
        ValueError: another kernel, stride or padding; dilation, groups or a padding mode.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | None = None,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        k, step = _one("kernel_size", kernel_size), _one("stride", stride)
        if step not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {step}")
        if k < 1 or (k % 2 == 0 and (k, step) != (4, 2)):
            raise ValueError(f"kernel_size must be odd, or 4 with stride 2, got {k}, stride {step}")
        pad = (k - 1) // 2
        _check_fixed(
            padding=(pad if padding is None else _one("padding", padding), pad),
            dilation=(_one("dilation", dilation), 1),
            groups=(groups, 1),
            padding_mode=(padding_mode, "zeros"),
        )
        super().__init__(
            in_channels, out_channels, k, step, pad, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        return space_conv(x, self.weight, self.bias, stride=self.stride[0])


class SpaceConvTranspose(_Fixed, nn.ConvTranspose2d):
    """The 1 x 4 x 4 transposed convolution with stride 2 that doubles height and width. The
    arguments are those of ``nn.ConvTranspose2d``.

    Raises:
        ValueError: another kernel, stride or padding.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 4,
        stride: Size = 2,
        padding: Size = 1,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check_fixed(
            kernel_size=(_one("kernel_size", kernel_size), 4),
            stride=(_one("stride", stride), 2),
            padding=(_one("padding", padding), 1),
            output_padding=(_one("output_padding", output_padding), 0),
            groups=(groups, 1),
            dilation=(_one("dilation", dilation), 1),
            padding_mode=(padding_mode, "zeros"),
        )
        super().__init__(in_channels, out_channels, 4, 2, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return space_conv_transpose(x, self.weight, self.bias)


def join(x: Tensor, x2: Tensor | None) -> Tensor:
    """Concatenate x and x2 along the channels; x2 may be None."""
    return x if x2 is None else torch.cat((x, x2), dim=-1)


def nearest_up(x: Tensor) -> Tensor:
    """Double every frame of (B, F, H, W, C) by nearest neighbour."""
    b, f, h, w, c = x.shape
    y = x[:, :, :, None, :, None].expand(b, f, h, 2, w, 2, c)
    return y.reshape(b, f, 2 * h, 2 * w, c)


def convolve(
    conv: nn.Module,
    x: Tensor,
    x2: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    upsample: bool = False,
) -> Tensor:
    """conv([x, x2]) + residual; ``upsample`` doubles height and width first. A plain ``SpaceConv``
    runs as one op. Any other module is called on the one tensor that a plain network would pass.

    Raises:
        ValueError: the module is DoRA, whose convolution takes channels on axis 1.
    """
    weights = weights_of(conv, SpaceConv)
    if weights is not None:
        assert isinstance(conv, SpaceConv)
        return space_conv(
            x,
            *weights,
            x2=x2,
            stride=conv.stride[0],
            residual=residual,
            upsample="nearest" if upsample else None,
        )
    if getattr(conv, "lora_magnitude_vector", None):
        raise ValueError(
            "DoRA on a convolution takes channels on axis 1, here they come last: use LoRA there, "
            "and DoRA on linear layers"
        )
    x = join(x, x2)
    y = conv(nearest_up(x) if upsample else x)
    return y if residual is None else y + residual.to(y.dtype)

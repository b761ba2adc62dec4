"""Shared by both variants of the convolution: tiles, phases, and the epilogue."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvdm.kernels.common import cdiv, next_power_of_2
from fastvdm.kernels.tuned import tuned

# Not specialised: their divisibility changes, and a compilation is not worth it.
_SIZES = ["H", "W", "HO", "WO", "GRID_H", "GRID_W", "UNIT", "TILES"]


@dataclass(frozen=True)
class ConvConfig:
    """Tile sizes of one launch. ``tma``: loads use tensor descriptors, box (1, box_h, box_w, k)."""

    block_co: int
    block_p: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    box_h: int = 1
    box_w: int = 1


def pick_box(height: int, width: int, pixels: int) -> tuple[int, int]:
    """The box of ``pixels`` = bh * bw that wastes the fewest pixels of an image; wide if equal."""
    boxes = [(pixels >> i, 1 << i) for i in range(pixels.bit_length())]
    return min(boxes, key=lambda b: (cdiv(height, b[0]) * cdiv(width, b[1]), -min(b[1], 16), -b[1]))


def why_not_tma(
    channels: tuple[int, ...],
    grid: tuple[int, int],
    image: tuple[int, int],
    by_parity: bool,
    itemsize: int,
) -> str | None:
    """Why the descriptor variant cannot take a convolution, or None.

    ``channels``: all widths that are the innermost extent of a tensor, the output's last; ``grid``:
    pixels of a phase; ``image``: the input's H and W; ``by_parity``: it gathers with stride 2.
    """
    if itemsize != 2:
        return "wgmma takes 16-bit operands; fp32 would be TF32"
    if any(c % 8 for c in channels):
        return f"widths {channels} are not multiples of 8 (16-byte strides)"
    if by_parity and (image[0] % 2 or image[1] % 2):
        return f"{image[0]}x{image[1]} images do not split by parity"
    if by_parity and any(c % 16 for c in channels[:-1]):
        return f"widths {channels[:-1]} are not multiples of the smallest step, 16"
    if grid[0] * grid[1] < 64:
        return f"{grid[0]}x{grid[1]} pixels are less than one 64-pixel box"
    return None


@tuned("space_conv")
def pick_config(
    widths: tuple[int, ...], grid: tuple[int, int], itemsize: int, tma: bool
) -> ConvConfig:
    """Analytic default, not measured on a GPU yet. widths are the inputs' and, last, the output's.

    128x128 tiles with 64 channels per step and three stages take 98 KB: two blocks per SM on sm_90.
    Widths that are not multiples of 16 make pointer loads scalar, each with an address and a mask:
    anything larger than 64x64x32 on eight warps then spills.
    """
    cin, cout = max(widths[:-1]), widths[-1]
    block_k = max(16, min(next_power_of_2(cin), 128 // itemsize))
    block_co = max(64 if tma else 16, min(next_power_of_2(cout), 128))
    if block_co == 128 and 0 < cout % 128 <= 64:
        block_co = 64  # 192 = 3 * 64: otherwise a quarter of the tiles' work is wasted
    block_p = 128
    if itemsize > 2:
        block_co, block_p = min(block_co, 64), 256 // itemsize
    if tma:
        block_p = min(block_p, next_power_of_2(grid[0] * grid[1]))
        warps = 8 if block_co * block_p >= 128 * 128 else 4
        return ConvConfig(block_co, block_p, block_k, warps, 3, True, *pick_box(*grid, block_p))
    if any(w % 16 for w in widths):
        return ConvConfig(min(block_co, 64), min(block_p, 64), min(block_k, 32), 8, 3)
    # Addresses and masks are kept in registers: 64x128 with four warps spills on sm_80.
    return ConvConfig(block_co, block_p, block_k, 8 if block_co * block_p >= 64 * 128 else 4, 3)


@triton.jit
def _phase_taps(a, K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """First tap, its input offset and the number of taps along one axis of phase ``a``."""
    if TRANSPOSED:
        first = (a + PAD) % S
        return first, (a + PAD - first) // S, (K - first + S - 1) // S
    else:
        return a, a - PAD, K  # a = 0


@triton.jit
def _finish(
    acc, y_ptr, bias_ptr, res_ptr, part_ptr, out_pixel, ok, offs_co, part_row, COUT,
    HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Add bias and residual and store; then mean and M2 of the stored values over the tile."""
    mask_co = offs_co < COUT
    out = acc
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_co, mask=mask_co, other=0.0).to(acc.dtype)
        out += bias[:, None]
    out = tl.trans(out)  # (BLOCK_P, BLOCK_CO)
    mask = ok[:, None] & mask_co[None, :]
    offs = out_pixel[:, None] * COUT + offs_co[None, :]
    if HAS_RES:
        out += tl.load(res_ptr + offs, mask=mask, other=0.0).to(acc.dtype)
    stored = out.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offs, stored, mask=mask)
    if STATS:
        values = tl.where(ok[:, None], stored.to(acc.dtype), 0.0)
        count = tl.sum(ok.to(acc.dtype), axis=0)
        mean = tl.sum(values, axis=0) / count
        centred = tl.where(ok[:, None], values - mean[None, :], 0.0)
        # A sum of large values is rounded; the mean's error is in the sum of the differences.
        lost = tl.sum(centred, axis=0) / count
        m2 = tl.sum(centred * centred, axis=0) - count * lost * lost
        part = part_ptr + part_row * 2 * COUT + offs_co
        tl.store(part, mean + lost, mask=mask_co)
        tl.store(part + COUT, m2, mask=mask_co)

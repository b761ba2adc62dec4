"""Implicit-GEMM convolution of every frame, with bias, residual and GroupNorm partials.

    y[n, oh, ow, :] = sum_taps W[tap] x[n, ih(oh, tap), iw(ow, tap), :] + bias + residual

One kernel does four jobs, told apart by two flags; no im2col, no concatenation, no flipped weight:

- gather (TRANSPOSED=False): ih = S*i + tap - PAD. The forward convolution, and the dgrad of the
  transposed one.
- scatter, seen from the output (TRANSPOSED=True): output rows of equal oh mod S form a phase;
  phase a reads ih = i + (a + PAD - tap) / S for tap = (a + PAD) mod S, + S, ... The dgrad of a
  convolution (S = 1: one phase), the forward of the transposed one and of the folded upsampling.

x, x2 (N, H, W, C) with N = B*F; weights in any strides, best channels-last, read as (out, k) tiles.
GEMM: acc[BLOCK_CO, BLOCK_P] = W_tile X_tile^T in fp32 (fp64 for fp64): on sm_90 both operands then
come from shared memory, wgmma's SS form. FLOPs 2*N*Ho*Wo*Cin*Cout*taps; least bytes x + y + W.

Descriptors (sm_90 on): a box is unit-stride, and reads 0 outside the image, the padding itself.
With stride 2 rows and columns split by parity, for even extents a view, (N, H/2, 2, W/2, 2 C): tap
t reads a unit-stride box of parity (t + PAD) mod 2. A step of channels must not run from one parity
into the next, so C is a multiple of the step. Odd extents go by pointers.

Statistics: each tile of pixels writes mean and M2 per channel of what it stored; a second kernel
merges them by Chan, Golub & LeVeque 1979. No atomics: two runs give the same bits.

Saved for backward: the inputs. dgrad is this kernel; wgrad is the library's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvdm.kernels import space_conv_library as library
from fastvdm.kernels.common import (
    acc_dtype,
    acc_torch_dtype,
    cdiv,
    dot,
    next_power_of_2,
)
from fastvdm.kernels.tuned import tuned
from fastvdm.runtime.device import facts


def merge_tile(group_width: int) -> dict[str, int]:
    """Tiles and channels that the merge of statistics holds at once: all channels of a group, and
    as many tiles as leave 32 values a thread."""
    block_c = next_power_of_2(group_width)
    return dict(BLOCK_C=block_c, BLOCK_T=max(1, min(64, 4096 // block_c)))


# Not worth a compilation each time their divisibility changes.
_SIZES = ["H", "W", "HO", "WO", "GRID_H", "GRID_W", "UNIT", "TILES"]


@dataclass(frozen=True)
class ConvConfig:
    """Tile sizes of one launch. ``tma``: loads by tensor descriptors, box (1, box_h, box_w, k)."""

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
    """Analytic default, not yet measured on a GPU; widths are the inputs' and, last, the output's.

    128x128 tiles with 64 channels a step and three stages take 98 KB: two blocks an SM on sm_90.
    Widths that are not multiples of 16 leave pointer loads scalar, an address and a mask each:
    anything larger than 64x64x32 on eight warps then spills.
    """
    cin, cout = max(widths[:-1]), widths[-1]
    block_k = max(16, min(next_power_of_2(cin), 128 // itemsize))
    block_co = max(64 if tma else 16, min(next_power_of_2(cout), 128))
    if block_co == 128 and 0 < cout % 128 <= 64:
        block_co = 64  # 192 = 3 * 64: not a quarter of the tiles' work for nothing
    block_p = 128
    if itemsize > 2:
        block_co, block_p = min(block_co, 64), 256 // itemsize
    if tma:
        block_p = min(block_p, next_power_of_2(grid[0] * grid[1]))
        warps = 8 if block_co * block_p >= 128 * 128 else 4
        return ConvConfig(block_co, block_p, block_k, warps, 3, True, *pick_box(*grid, block_p))
    if any(w % 16 for w in widths):
        return ConvConfig(min(block_co, 64), min(block_p, 64), min(block_k, 32), 8, 3)
    # Addresses and masks live in registers: 64x128 with four warps spills on sm_80.
    return ConvConfig(block_co, block_p, block_k, 8 if block_co * block_p >= 64 * 128 else 4, 3)


# --- device --------------------------------------------------------------------------------------


@triton.jit
def _phase_taps(a, K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr):
    """First tap, its input offset and the number of taps along one axis of phase ``a``."""
    if TRANSPOSED:
        first = (a + PAD) % S
        return first, (a + PAD - first) // S, (K - first + S - 1) // S
    else:
        return a, a - PAD, K  # a = 0


@triton.jit
def _accumulate(
    acc, x_ptr, w_ptr, offs_x, h0, w0, pixel_ok, offs_co, taps_h, taps_w, tap_h0, tap_w0,
    H, W, C, COUT, stride_wo, stride_wk, stride_wh, stride_ww,
    S: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + W X^T over every tap and channel of one source, by pointers."""
    tap_step: tl.constexpr = S if TRANSPOSED else 1
    direction: tl.constexpr = -1 if TRANSPOSED else 1
    k_tiles = tl.cdiv(C, BLOCK_K)
    for it in range(0, taps_h * taps_w * k_tiles):
        tap = it // k_tiles
        offs_k = (it - tap * k_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        th = tap // taps_w
        tw = tap - th * taps_w
        dh = direction * th
        dw = direction * tw
        ok = pixel_ok & (h0 + dh >= 0) & (h0 + dh < H) & (w0 + dw >= 0) & (w0 + dw < W)
        mask_k = offs_k < C
        x_ptrs = x_ptr + (dh * W + dw) * C + offs_x[:, None] + offs_k[None, :]
        x = tl.load(x_ptrs, mask=ok[:, None] & mask_k[None, :], other=0.0)  # (BLOCK_P, BLOCK_K)
        w_tap = (tap_h0 + tap_step * th) * stride_wh + (tap_w0 + tap_step * tw) * stride_ww
        w_ptrs = w_ptr + w_tap + offs_co[:, None] * stride_wo + offs_k[None, :] * stride_wk
        w_mask = (offs_co < COUT)[:, None] & mask_k[None, :]
        w = tl.load(w_ptrs, mask=w_mask, other=0.0)  # (BLOCK_CO, BLOCK_K)
        acc = dot(w, tl.trans(x), acc)
    return acc


@triton.jit
def _accumulate_tma(
    acc, x_desc, w_desc, n, h0, w0, co0, taps_h, taps_w, tap_h0, tap_w0, C, WEIGHT_STEP,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    WEIGHT_K_FIRST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """The same by descriptors: what a box reads outside the image is zero, the padding itself."""
    by_parity: tl.constexpr = S == 2 and not TRANSPOSED
    tap_step: tl.constexpr = S if TRANSPOSED else 1
    direction: tl.constexpr = -1 if TRANSPOSED else 1
    k = 0
    th = 0
    tw = 0
    for _ in tl.range(0, taps_h * taps_w * tl.cdiv(C, BLOCK_K), num_stages=NUM_STAGES):
        if by_parity:  # row 2 i + t - PAD is of parity (t + PAD) mod 2; h0 = i - PAD
            i = h0 + (th + PAD) // 2
            j = w0 + (tw + PAD) // 2
            x = x_desc.load([n, i, (th + PAD) % 2, j, (tw + PAD) % 2 * C + k])
        else:
            x = x_desc.load([n, h0 + direction * th, w0 + direction * tw, k])
        x = x.reshape(BLOCK_P, BLOCK_K)
        w_tap = (tap_h0 + tap_step * th) * K + tap_w0 + tap_step * tw
        if WEIGHT_K_FIRST:
            w = tl.trans(w_desc.load([k, w_tap * WEIGHT_STEP + co0]))
        else:
            w = w_desc.load([co0, w_tap * WEIGHT_STEP + k])  # (BLOCK_CO, BLOCK_K)
        acc = dot(w, tl.trans(x), acc)
        k += BLOCK_K  # counted on: a division is 20 instructions
        next_tap = k >= C
        k = tl.where(next_tap, 0, k)
        tw += next_tap.to(tl.int32)
        next_row = tw == taps_w
        tw = tl.where(next_row, 0, tw)
        th += next_row.to(tl.int32)
    return acc


@triton.jit
def _finish(
    acc, y_ptr, bias_ptr, res_ptr, part_ptr, out_pixel, ok, offs_co, part_row, COUT,
    HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Bias, residual, store; then mean and M2 of the stored values over the tile's pixels."""
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
        # A sum of large values is rounded; what the mean lost is in the sum of the differences.
        lost = tl.sum(centred, axis=0) / count
        m2 = tl.sum(centred * centred, axis=0) - count * lost * lost
        part = part_ptr + part_row * 2 * COUT + offs_co
        tl.store(part, mean + lost, mask=mask_co)
        tl.store(part + COUT, m2, mask=mask_co)


@triton.jit(do_not_specialize=_SIZES)
def _conv_kernel(
    x_ptr, x2_ptr, w_ptr, w2_ptr, bias_ptr, res_ptr, y_ptr, part_ptr,
    H, W, C, C2, HO, WO, COUT, GRID_H, GRID_W, UNIT, TILES,
    stride_wo, stride_wk, stride_wh, stride_ww,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_X2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, STATS: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_P pixels in a row of one unit: a run of whole images that statistics may not
    leave (one frame, one video, or the whole batch). UNIT counts its pixels in one phase."""
    phases: tl.constexpr = S if TRANSPOSED else 1
    in_step: tl.constexpr = 1 if TRANSPOSED else S
    pid = tl.program_id(0).to(tl.int64)
    co_tiles = tl.cdiv(COUT, BLOCK_CO)
    offs_co = (pid % co_tiles).to(tl.int32) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    row = pid // co_tiles  # (phase, unit, tile)
    tile = row % TILES
    unit = (row // TILES) // (phases * phases)
    phase = ((row // TILES) % (phases * phases)).to(tl.int32)
    tap_h0, off_h, taps_h = _phase_taps(phase // phases, K, S, PAD, TRANSPOSED)
    tap_w0, off_w, taps_w = _phase_taps(phase % phases, K, S, PAD, TRANSPOSED)

    # (BLOCK_P,): the pixel in the phase's grid, its place in the input and in the output
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    flat = unit * UNIT + offs_p
    n = flat // (GRID_H * GRID_W)
    within = (flat - n * (GRID_H * GRID_W)).to(tl.int32)
    i = within // GRID_W
    j = within - i * GRID_W
    oh = i * phases + phase // phases
    ow = j * phases + phase % phases
    ok = (offs_p < UNIT) & (oh < HO) & (ow < WO)
    h0 = i * in_step + off_h
    w0 = j * in_step + off_w
    source_pixel = (n * H + h0) * W + w0

    acc = tl.zeros((BLOCK_CO, BLOCK_P), dtype=ACC)
    acc = _accumulate(
        acc, x_ptr, w_ptr, source_pixel * C, h0, w0, ok, offs_co, taps_h, taps_w, tap_h0, tap_w0,
        H, W, C, COUT, stride_wo, stride_wk, stride_wh, stride_ww, S, TRANSPOSED, BLOCK_K,
    )  # fmt: skip
    if HAS_X2:
        acc = _accumulate(
            acc, x2_ptr, w2_ptr, source_pixel * C2, h0, w0, ok, offs_co, taps_h, taps_w, tap_h0,
            tap_w0, H, W, C2, COUT, stride_wo, stride_wk, stride_wh, stride_ww, S, TRANSPOSED,
            BLOCK_K,
        )  # fmt: skip
    _finish(
        acc, y_ptr, bias_ptr, res_ptr, part_ptr, (n * HO + oh) * WO + ow, ok, offs_co, row, COUT,
        HAS_BIAS, HAS_RES, STATS,
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES[2:6])
def _conv_tma_kernel(
    x_desc, x2_desc, w_desc, w2_desc, bias_ptr, res_ptr, y_ptr, part_ptr,
    C, C2, WEIGHT_STEP, HO, WO, COUT, GRID_H, GRID_W,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    WEIGHT_K_FIRST: tl.constexpr,
    HAS_X2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, STATS: tl.constexpr,
    BLOCK_CO: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile is a BOX_H x BOX_W box of one image."""
    BLOCK_P: tl.constexpr = BOX_H * BOX_W
    phases: tl.constexpr = S if TRANSPOSED else 1
    pid = tl.program_id(0).to(tl.int64)
    co_tiles = tl.cdiv(COUT, BLOCK_CO)
    co0 = (pid % co_tiles).to(tl.int32) * BLOCK_CO
    row = pid // co_tiles  # (image, phase, tile)
    tiles_w = tl.cdiv(GRID_W, BOX_W)
    tiles = tl.cdiv(GRID_H, BOX_H) * tiles_w
    tile = (row % tiles).to(tl.int32)
    phase = ((row // tiles) % (phases * phases)).to(tl.int32)
    n = ((row // tiles) // (phases * phases)).to(tl.int32)
    tap_h0, off_h, taps_h = _phase_taps(phase // phases, K, S, PAD, TRANSPOSED)
    tap_w0, off_w, taps_w = _phase_taps(phase % phases, K, S, PAD, TRANSPOSED)
    i0 = tile // tiles_w * BOX_H
    j0 = tile % tiles_w * BOX_W

    acc = tl.zeros((BLOCK_CO, BLOCK_P), dtype=ACC)
    acc = _accumulate_tma(
        acc, x_desc, w_desc, n, i0 + off_h, j0 + off_w, co0, taps_h, taps_w, tap_h0, tap_w0, C,
        WEIGHT_STEP, K, S, PAD, TRANSPOSED, WEIGHT_K_FIRST, BLOCK_P, BLOCK_K, NUM_STAGES,
    )  # fmt: skip
    if HAS_X2:
        acc = _accumulate_tma(
            acc, x2_desc, w2_desc, n, i0 + off_h, j0 + off_w, co0, taps_h, taps_w, tap_h0, tap_w0,
            C2, WEIGHT_STEP, K, S, PAD, TRANSPOSED, WEIGHT_K_FIRST, BLOCK_P, BLOCK_K, NUM_STAGES,
        )  # fmt: skip
    offs_p = tl.arange(0, BLOCK_P)
    oh = (i0 + offs_p // BOX_W) * phases + phase // phases
    ow = (j0 + offs_p % BOX_W) * phases + phase % phases
    ok = (oh < HO) & (ow < WO)
    out_pixel = (n.to(tl.int64) * HO + oh) * WO + ow
    _finish(
        acc, y_ptr, bias_ptr, res_ptr, part_ptr, out_pixel, ok, co0 + tl.arange(0, BLOCK_CO), row,
        COUT, HAS_BIAS, HAS_RES, STATS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["TILES", "GRID_H", "GRID_W"])
def _merge_stats_kernel(
    part_ptr, mean_ptr, rstd_ptr, TILES, COUT, GROUPS, GRID_H, GRID_W, eps,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, GROUP_WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(unit, TILES, 2, COUT) partials → mean, rstd (unit, GROUPS); a program is one group.

    Chan et al. 1979: M2 = sum M2_t + sum n_t (mean_t - mean)^2. Means are summed as differences to
    the first, so that mean >> std loses no digits.
    """
    pid = tl.program_id(0).to(tl.int64)
    unit = pid // GROUPS
    offs_c = tl.arange(0, BLOCK_C)
    part = part_ptr + unit * TILES * 2 * COUT + (pid % GROUPS) * GROUP_WIDTH
    tiles_w = tl.cdiv(GRID_W, BOX_W)
    per_image = tl.cdiv(GRID_H, BOX_H) * tiles_w
    first = tl.load(part)
    total = tl.zeros((), dtype=ACC)
    shifted = tl.zeros((), dtype=ACC)
    for t0 in range(0, TILES, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask = (offs_t < TILES)[:, None] & (offs_c < GROUP_WIDTH)[None, :]
        offs = offs_t.to(tl.int64)[:, None] * (2 * COUT) + offs_c[None, :]
        i0 = (offs_t % per_image) // tiles_w * BOX_H
        j0 = (offs_t % per_image) % tiles_w * BOX_W
        n = (tl.minimum(GRID_H - i0, BOX_H) * tl.minimum(GRID_W - j0, BOX_W)).to(ACC)
        n = tl.where(mask, n[:, None], 0.0)  # (BLOCK_T, BLOCK_C)
        delta = tl.load(part + offs, mask=mask, other=0.0) - first
        total += tl.sum(tl.sum(n, axis=1), axis=0)
        shifted += tl.sum(tl.sum(n * delta, axis=1), axis=0)
    shift = shifted / total
    m2 = tl.zeros((), dtype=ACC)
    for t0 in range(0, TILES, BLOCK_T):
        offs_t = t0 + tl.arange(0, BLOCK_T)
        mask = (offs_t < TILES)[:, None] & (offs_c < GROUP_WIDTH)[None, :]
        offs = offs_t.to(tl.int64)[:, None] * (2 * COUT) + offs_c[None, :]
        i0 = (offs_t % per_image) // tiles_w * BOX_H
        j0 = (offs_t % per_image) % tiles_w * BOX_W
        n = (tl.minimum(GRID_H - i0, BOX_H) * tl.minimum(GRID_W - j0, BOX_W)).to(ACC)
        n = tl.where(mask, n[:, None], 0.0)
        delta = tl.load(part + offs, mask=mask, other=0.0) - first - shift
        within = tl.load(part + COUT + offs, mask=mask, other=0.0)
        m2 += tl.sum(tl.sum(within + n * delta * delta, axis=1), axis=0)
    tl.store(mean_ptr + pid, first + shift)
    tl.store(rstd_ptr + pid, 1.0 / tl.sqrt(m2 / total + eps))


# --- launch --------------------------------------------------------------------------------------


def _weight_descriptor(
    weight: Tensor, out_axis: int, block_co: int, block_k: int
) -> TensorDescriptor:
    """(rows, taps * row width) over channels-last memory, starting at the slice ``weight``.

    A tile that reads past the slice's columns finds the next tap's weights, which meet zero
    channels of the input or output channels that are not stored. Two axes, not three: the reshape
    of a 3-D box sends the operand through registers (Triton 3.6, ldmatrix + RS wgmma).
    """
    rows, columns, kernel, _ = weight.shape
    step = weight_step(weight)
    box = [block_co, block_k] if out_axis == 0 else [block_k, block_co]
    width = (kernel * kernel - 1) * step + columns
    return TensorDescriptor(weight, [rows, width], [weight.stride(0), 1], box)


def _input_descriptor(
    x: Tensor, box_h: int, box_w: int, block_k: int, by_parity: bool
) -> TensorDescriptor:
    """(N, H, W, C), or (N, H/2, 2, W/2, 2 C) for the boxes of a stride of 2."""
    images = x.flatten(0, 1)
    if not by_parity:
        return TensorDescriptor.from_tensor(images, [1, box_h, box_w, block_k])
    n, h, w, c = images.shape
    split = images.view(n, h // 2, 2, w // 2, 2 * c)
    return TensorDescriptor.from_tensor(split, [1, box_h, 1, box_w, block_k])


def _is_rows_of_taps(weight: Tensor) -> bool:
    """Whether a descriptor can read it: channels-last, or a slice of its columns."""
    kernel, step = weight.shape[-1], weight_step(weight)
    taps_adjoin = kernel == 1 or weight.stride(2) == kernel * step
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) % 8 == 0 and step % 8 == 0
    return weight.stride(1) == 1 and taps_adjoin and aligned


def weight_step(weight: Tensor) -> int:
    """Elements from one tap to the next; the width of a row where there is only one tap."""
    return weight.stride(3) if weight.shape[-1] > 1 else weight.stride(0)


def conv(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    stride: int,
    pad: int,
    transposed: bool,
    out_axis: int,
    size: tuple[int, int],
    unit_images: int = 0,
) -> tuple[Tensor, Tensor | None, ConvConfig]:
    """One launch. x (B, F, H, W, C); weight 4-D with its output channels on ``out_axis``; size the
    output's H and W. ``unit_images`` > 0: also the partials (units * tiles, 2, Cout)."""
    batch, frames, height, width, c1 = x.shape
    c2 = 0 if x2 is None else x2.shape[-1]
    cout, kernel = weight.shape[out_axis], weight.shape[-1]
    x = x.contiguous()
    x2 = None if x2 is None else x2.contiguous()
    residual = None if residual is None else residual.contiguous()
    phases = stride if transposed else 1
    grid = (cdiv(size[0], phases), cdiv(size[1], phases))
    widths = (c1, cout) if x2 is None else (c1, c2, cout)
    by_parity = stride == 2 and not transposed
    tma = facts(x.device).capability >= 90 and not (
        why_not_tma(widths, grid, (height, width), by_parity, x.element_size())
        or any(t is not None and t.data_ptr() % 16 for t in (x, x2))
    )
    config = pick_config(widths, grid, x.element_size(), tma)
    if config.tma and by_parity:
        config = replace(config, block_k=math.gcd(config.block_k, *widths[:-1]))
    if config.tma and not _is_rows_of_taps(weight):  # a copy is aligned, too
        weight = weight.clone(memory_format=torch.channels_last)
    first, second = (weight, None)
    if x2 is not None:
        first, second = weight.narrow(1 - out_axis, 0, c1), weight.narrow(1 - out_axis, c1, c2)
    images = batch * frames
    y = torch.empty((batch, frames, *size, cout), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y, None, config
    units = images // unit_images if unit_images else 1
    if config.tma:
        tiles = (images // units) * cdiv(grid[0], config.box_h) * cdiv(grid[1], config.box_w)
    else:
        tiles = cdiv(images // units * grid[0] * grid[1], config.block_p)
    partial = None
    if unit_images:
        acc = acc_torch_dtype(x.dtype)
        partial = torch.empty((units * tiles, 2, cout), dtype=acc, device=x.device)
    programs = units * tiles * phases * phases * cdiv(cout, config.block_co)
    flags = dict(
        K=kernel, S=stride, PAD=pad, TRANSPOSED=transposed, HAS_X2=x2 is not None,
        HAS_BIAS=bias is not None, HAS_RES=residual is not None, STATS=partial is not None,
        BLOCK_CO=config.block_co, BLOCK_K=config.block_k, ACC=acc_dtype(x.dtype),
        num_warps=config.num_warps,
    )  # fmt: skip
    if config.tma:
        box = (config.box_h, config.box_w, config.block_k)
        sources = [None if t is None else _input_descriptor(t, *box, by_parity) for t in (x, x2)]
        weights = [
            None if w is None else _weight_descriptor(w, out_axis, config.block_co, config.block_k)
            for w in (first, second)
        ]
        _conv_tma_kernel[(programs,)](
            *sources, *weights, bias, residual, y, partial, c1, c2, weight_step(weight), *size,
            cout, *grid,
            WEIGHT_K_FIRST=out_axis == 1, BOX_H=config.box_h, BOX_W=config.box_w,
            NUM_STAGES=config.num_stages, **flags,
        )  # fmt: skip
    else:
        strides = weight.stride()
        _conv_kernel[(programs,)](
            x, x2, first, second, bias, residual, y, partial, height, width, c1, c2, *size, cout,
            *grid, images // units * grid[0] * grid[1], tiles, strides[out_axis],
            strides[1 - out_axis], strides[2], strides[3], BLOCK_P=config.block_p,
            num_stages=config.num_stages, **flags,
        )  # fmt: skip
    return y, partial, config


def _out_size(x: Tensor, weight: Tensor, stride: int) -> tuple[int, int]:
    kernel = weight.shape[-1]
    slack = 2 * library.padding_of(kernel) - kernel
    return (x.shape[2] + slack) // stride + 1, (x.shape[3] + slack) // stride + 1


def space_conv_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
) -> Tensor:
    return conv(
        x, x2, weight, bias, residual, stride=stride, pad=library.padding_of(weight.shape[-1]),
        transposed=False, out_axis=0, size=_out_size(x, weight, stride),
    )[0]  # fmt: skip


def space_conv_stats_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    groups: int,
    per_frame: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames = x.shape[:2]
    y, partial, config = conv(
        x, x2, weight, bias, residual, stride=stride, pad=library.padding_of(weight.shape[-1]),
        transposed=False, out_axis=0, size=_out_size(x, weight, stride),
        unit_images=1 if per_frame else frames,
    )  # fmt: skip
    units = batch * frames if per_frame else batch
    acc = acc_torch_dtype(x.dtype)
    mean = torch.empty((units, groups), dtype=acc, device=x.device)
    rstd = torch.empty_like(mean)
    if partial is None:  # no pixel, no statistics
        return y, mean.fill_(torch.nan), rstd.fill_(torch.nan)
    cout = weight.shape[0]
    # The pointer variant's tiles are runs of pixels: a box one row high.
    grid, box = tuple(y.shape[2:4]), (config.box_h, config.box_w)
    if not config.tma:
        grid, box = (1, y[0, 0, ..., 0].numel() * (1 if per_frame else frames)), (1, config.block_p)
    _merge_stats_kernel[(units * groups,)](
        partial, mean, rstd, partial.shape[0] // units, cout, groups, *grid, eps,
        BOX_H=box[0], BOX_W=box[1], GROUP_WIDTH=cout // groups,
        **merge_tile(cout // groups), ACC=acc_dtype(x.dtype),
    )  # fmt: skip
    return y, mean, rstd


def space_conv_bwd(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    stride: int,
    need_dx: bool,
    need_dx2: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx and dx2 by the same kernel, each against its slice of the weight; dw by the library."""
    _, _, dw, db = library.space_conv_bwd(dy, x, x2, weight, stride, False, False, need_dw, need_db)
    grads = []
    start = 0
    for source, needed in ((x, need_dx), (x2, need_dx2)):
        if source is None or not needed:
            grads.append(dy.new_empty(0))
        else:
            grads.append(
                conv(
                    dy, None, weight.narrow(1, start, source.shape[-1]), None, None, stride=stride,
                    pad=library.padding_of(weight.shape[-1]), transposed=True, out_axis=1,
                    size=(source.shape[2], source.shape[3]),
                )[0]
            )  # fmt: skip
        start += 0 if source is None else source.shape[-1]
    return grads[0], grads[1], dw, db


def space_conv_transpose_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    size = (2 * x.shape[2], 2 * x.shape[3])
    return conv(
        x, None, weight, bias, residual, stride=2, pad=1, transposed=True, out_axis=1, size=size
    )[0]


def space_conv_transpose_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _, dw, db = library.space_conv_transpose_bwd(dy, x, weight, False, need_dw, need_db)
    if not need_dx:
        return dy.new_empty(0), dw, db
    dx, _, _ = conv(
        dy, None, weight, None, None, stride=2, pad=1, transposed=False, out_axis=0,
        size=(x.shape[2], x.shape[3]),
    )  # fmt: skip
    return dx, dw, db

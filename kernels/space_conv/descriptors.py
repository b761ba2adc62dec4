"""The convolution by tensor descriptors, for calls to which ``why_not_tma`` has no objection."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastvdm.kernels.common import dot
from fastvdm.kernels.space_conv.shared import _SIZES, _finish, _phase_taps


@triton.jit
def _accumulate_tma(
    acc, x_desc, w_desc, n, h0, w0, co0, taps_h, taps_w, tap_h0, tap_w0, C, WEIGHT_STEP,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    WEIGHT_K_FIRST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """acc + W X^T over every tap and channel of one source. A box reads zero outside the image,
    which is the padding."""
    by_parity: tl.constexpr = S == 2 and not TRANSPOSED
    tap_step: tl.constexpr = S if TRANSPOSED else 1
    direction: tl.constexpr = -1 if TRANSPOSED else 1
    k = 0
    th = 0
    tw = 0
    for _ in tl.range(0, taps_h * taps_w * tl.cdiv(C, BLOCK_K), num_stages=NUM_STAGES):
        if by_parity:  # row 2 i + t - PAD has parity (t + PAD) mod 2; h0 = i - PAD
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
        k += BLOCK_K  # counted, because a division is 20 instructions
        next_tap = k >= C
        k = tl.where(next_tap, 0, k)
        tw += next_tap.to(tl.int32)
        next_row = tw == taps_w
        tw = tl.where(next_row, 0, tw)
        th += next_row.to(tl.int32)
    return acc


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


def _weight_descriptor(
    weight: Tensor, out_axis: int, block_co: int, block_k: int
) -> TensorDescriptor:
    """(rows, taps * row width) over channels-last memory, starting at the slice ``weight``.

    A tile that reads past the columns of the slice reads the next tap's weights. They are
    multiplied by zero channels of the input, or belong to output channels that are not stored. Two
    axes, not three: the reshape of a 3-D box sends the operand through registers (Triton 3.6,
    ldmatrix + RS wgmma).
    """
    rows, columns, kernel, _ = weight.shape
    step = weight_step(weight)
    box = [block_co, block_k] if out_axis == 0 else [block_k, block_co]
    width = (kernel * kernel - 1) * step + columns
    return TensorDescriptor(weight, [rows, width], [weight.stride(0), 1], box)


def _input_descriptor(
    x: Tensor, box_h: int, box_w: int, block_k: int, by_parity: bool
) -> TensorDescriptor:
    """(N, H, W, C), or (N, H/2, 2, W/2, 2 C) for the boxes of a stride-2 convolution."""
    images = x.flatten(0, 1)
    if not by_parity:
        return TensorDescriptor.from_tensor(images, [1, box_h, box_w, block_k])
    n, h, w, c = images.shape
    split = images.view(n, h // 2, 2, w // 2, 2 * c)
    return TensorDescriptor.from_tensor(split, [1, box_h, 1, box_w, block_k])


def _is_rows_of_taps(weight: Tensor) -> bool:
    """Whether a descriptor can read it: it is channels-last, or a slice of its columns."""
    kernel, step = weight.shape[-1], weight_step(weight)
    taps_adjoin = kernel == 1 or weight.stride(2) == kernel * step
    aligned = weight.data_ptr() % 16 == 0 and weight.stride(0) % 8 == 0 and step % 8 == 0
    return weight.stride(1) == 1 and taps_adjoin and aligned


def weight_step(weight: Tensor) -> int:
    """Elements from one tap to the next; the width of a row if there is only one tap."""
    return weight.stride(3) if weight.shape[-1] > 1 else weight.stride(0)

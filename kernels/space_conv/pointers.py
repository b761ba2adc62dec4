"""The convolution by pointers: for every GPU, dtype, width and size."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.common import dot
from fastvdm.kernels.space_conv.shared import _SIZES, _finish, _phase_taps


@triton.jit
def _accumulate(
    acc, x_ptr, w_ptr, offs_x, h0, w0, pixel_ok, offs_co, taps_h, taps_w, tap_h0, tap_w0,
    H, W, C, COUT, stride_wo, stride_wk, stride_wh, stride_ww,
    S: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + W X^T over every tap and channel of one source."""
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


@triton.jit(do_not_specialize=_SIZES)
def _conv_kernel(
    x_ptr, x2_ptr, w_ptr, w2_ptr, bias_ptr, res_ptr, y_ptr, part_ptr,
    H, W, C, C2, HO, WO, COUT, GRID_H, GRID_W, UNIT, TILES,
    stride_wo, stride_wk, stride_wh, stride_ww,
    K: tl.constexpr, S: tl.constexpr, PAD: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_X2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RES: tl.constexpr, STATS: tl.constexpr,
    BLOCK_CO: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile is BLOCK_P consecutive pixels of one unit, a run of whole images to which statistics
    are confined (one frame, one video, or the whole batch). UNIT is its pixels in one phase."""
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

    # (BLOCK_P,): the pixel in the phase's grid, its position in the input and in the output
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

"""GroupNorm's statistics of a convolution's output, merged from those of its tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from fastvdm.kernels.common import next_power_of_2


def merge_tile(group_width: int) -> dict[str, int]:
    """Tiles and channels that the merge of statistics holds at once: all channels of a group, and
    as many tiles as give 32 values per thread."""
    block_c = next_power_of_2(group_width)
    return dict(BLOCK_C=block_c, BLOCK_T=max(1, min(64, 4096 // block_c)))


@triton.jit(do_not_specialize=["TILES", "GRID_H", "GRID_W"])
def _merge_stats_kernel(
    part_ptr, mean_ptr, rstd_ptr, TILES, COUT, GROUPS, GRID_H, GRID_W, eps,
    BOX_H: tl.constexpr, BOX_W: tl.constexpr, GROUP_WIDTH: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(unit, TILES, 2, COUT) partials → mean, rstd (unit, GROUPS); one program per group.

    Chan et al. 1979: M2 = sum M2_t + sum n_t (mean_t - mean)^2. Means are summed as differences to
    the first, so that no digits are lost if mean >> std.
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

"""Tiles of the kernels of linear_attention_block: normalised pixels, and rows of weights."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastvdm.kernels.common import LOG2E, next_power_of_2
from fastvdm.kernels.tuned import tuned


class Config(NamedTuple):
    block_n: int  # pixels per tile
    block_f: int  # features per step: whole heads, except for "sum" and "dk"
    num_warps: int
    num_stages: int


@tuned("linear_attention_block")
def pick_config(
    kind: str, channels: int, dim: int, itemsize: int, x_itemsize: int, *, major: int
) -> Config:
    """Tiles that do not spill (``bench/aot.py``). NOT MEASURED. ``kind``: "sum" and "apply" of the
    forward; "dm", "dq", "dk" and "dx" of the backward. ``major`` is the device's compute
    capability, ``itemsize`` that of the projections.

    With four warps and 64 pixels each warp holds whole rows, and its products stay in its
    registers. More pixels, where they fit, read the weights from the L2 cache less often.
    """
    bc, bd = max(16, next_power_of_2(channels)), max(16, next_power_of_2(dim))
    wide, hopper = x_itemsize > 2, major >= 9
    if kind == "dx" and bc <= 64 and wide and not hopper:
        found = Config(64, 32, 4, 1) if bd <= 32 else Config(32, 64, 4, 1)
    elif bc <= 64:
        found = {
            "sum": Config(64, 128, 4, 2),
            "apply": Config(128, 64, 8 if wide else 4, 1) if hopper else Config(64, 64, 4, 1),
            "dm": Config(64, 64, 4, 1),
            "dq": Config(64, 64, 4, 1),
            "dk": Config(64, 128, 8, 2),
            "dx": Config(128, 64, 8, 1) if hopper else Config(64, 64, 4, 1),
        }[kind]
    else:
        found = {
            "sum": Config(64, 128, 8, 2),
            "apply": Config(128 if hopper else 64, 64, 8, 1),
            "dm": Config(64, 64, 4 if hopper else 8, 1),
            "dq": Config(64, 64, 8, 1),
            "dk": Config(64, 128 if hopper else 64, 8, 1),
            "dx": Config(128 if hopper and not wide else 64, 64, 8, 1),
        }[kind]
    return found if kind in ("sum", "dk") else found._replace(block_f=max(found.block_f, bd))


@triton.jit
def load_rows(ptr, count, C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, EVEN: tl.constexpr):
    """(BN, BC) from ``ptr``: ``count`` rows with stride C, zero beyond. EVEN: all rows exist."""
    offs_n, offs_c = tl.arange(0, BN)[:, None], tl.arange(0, BC)[None, :]
    at = ptr + offs_n * C + offs_c
    if EVEN and C == BC:
        return tl.load(at)
    return tl.load(at, mask=(offs_n < count) & (offs_c < C), other=0.0)


@triton.jit
def vector(ptr, C: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """(1, BC), zero beyond C."""
    offs = tl.arange(0, BC)
    return tl.load(ptr + offs, mask=offs < C, other=0.0).to(ACC)[None, :]


@triton.jit
def standardise(x, eps, C: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    """x_hat (BN, BC), zero beyond C, and rstd (BN, 1), in two passes over the registers."""
    x = x.to(ACC)
    x -= (tl.sum(x, 1) / C)[:, None]
    if C != BC:
        x = tl.where((tl.arange(0, BC) < C)[None, :], x, 0.0)
    rstd = (1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps))[:, None]
    return x * rstd, rstd


@triton.jit
def affine(x_hat, weight_ptr, bias_ptr, C: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr):
    y = x_hat * vector(weight_ptr, C, BC, ACC)
    if bias_ptr is not None:
        y += vector(bias_ptr, C, BC, ACC)
    return y


@triton.jit
def normalised(
    ptr, count, weight_ptr, bias_ptr, eps,
    C: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, ACC: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The LayerNorm of BN pixels in ACC, (BN, BC); for missing pixels it is the bias."""
    x = load_rows(ptr, count, C, BN, BC, EVEN)
    x_hat, _ = standardise(x, eps, C, BC, ACC)
    return affine(x_hat, weight_ptr, bias_ptr, C, BC, ACC)


@triton.jit
def rows_of_heads(first, heads, D: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr):
    """The rows in (heads * D, ..) of the BD features of BF / BD heads from ``first`` on, and which
    of them exist."""
    offs = tl.arange(0, BF)
    head, d = first + offs // BD, offs % BD
    return head * D + d, (head < heads) & (d < D)


@triton.jit
def gather_rows(
    ptr, rows, inside, first, C: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr
):  # fmt: skip
    """Columns [first, first + BC) of the given rows of (.., C); zero where there is none. WHOLE:
    all exist."""
    offs_c = first + tl.arange(0, BC)[None, :]
    at = ptr + rows[:, None] * C + offs_c
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=inside[:, None] & (offs_c < C), other=0.0)


@triton.jit
def softmax_of_heads(
    q, D: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """Softmax over the D features of each head, (BN, BF / BD, BD), zero beyond D."""
    q = q.reshape(BN, BF // BD, BD)
    if D != BD:
        q = tl.where((tl.arange(0, BD) < D)[None, None, :], q, float("-inf"))
    top = tl.max(q, 2)
    p = tl.exp2(q * LOG2E - (top * LOG2E)[:, :, None])
    return p * (1.0 / tl.sum(p, 2))[:, :, None]

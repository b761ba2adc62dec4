"""Tiles of the long kernels: their sizes, rows and logits."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from fastvdm.kernels.axis_attention.shared import by_distance, rotary_table, rotate, skew
from fastvdm.kernels.common import LOG2E, dot, next_power_of_2
from fastvdm.kernels.tuned import tuned


@dataclass(frozen=True)
class LongConfig:
    BM: int  # queries per tile
    BN: int  # keys per tile
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # 255: otherwise ptxas limits registers for occupancy, and spills


@tuned("axis_attention_long", n=lambda n: min(4096, next_power_of_2(n)))
def pick_config(
    kind: str, bd: int, itemsize: int, n: int, *, shaw: bool, bias: bool, rotary: bool, major: int
) -> LongConfig:
    """Tiles that do not spill (``bench/aot.py``). Analytic, NOT MEASURED: the exponentials of
    128x64 logits alone take 512 cycles of a multiprocessor. Tiles with more keys have fewer
    instructions but only one block per multiprocessor, so they gain nothing over 128x64 with two
    blocks (590 cycles at D=64, 518 at D=32).

    kind: "fwd", "dq", "dkv", "dbias" or "drel". The Shaw terms need BM == BN and hold 2*BN rows.
    ``major`` is the device's compute capability; ``n`` only distinguishes measured tiles.
    """
    wide = bd > 64
    if kind == "drel":
        return LongConfig(16, 16, 8 if wide else 4, 1, 255)
    if shaw:
        return LongConfig(32, 32, 8, 1, 255 if kind == "dkv" else None)
    if itemsize > 2:  # products on the FMA units: smaller tiles keep operands in registers
        if kind == "dbias":
            return LongConfig(32, 16, 8, 1) if wide else LongConfig(16, 32, 4, 1, 255)
        if wide and (kind == "dq" or (kind == "fwd" and (bias or rotary))):
            return LongConfig(16, 16, 8, 1)
        if wide and kind == "dkv":
            return LongConfig(32, 32, 8, 1, 255)
        more = wide or kind == "dq" or (kind == "fwd" and rotary)
        most = 255 if rotary and kind in ("dq", "dkv") else None
        return LongConfig(32, 32, 8 if more else 4, 1, most)
    if kind == "fwd" and n <= 64 and not wide:  # one tile of keys: nothing to prefetch
        return LongConfig(64, 32, 4, 2) if rotary else LongConfig(64, 64, 4, 1)
    if kind == "fwd":  # a third stage of bias tiles would leave room for only one block
        return LongConfig(128, 32 if wide and major < 9 else 64, 8, 2 if wide or bias else 3)
    if rotary and kind == "dq":  # dq rotates keys in the loop, dkv rotates queries
        return LongConfig(64, 32, 8 if wide else 4, 2, 255)
    if rotary and kind == "dkv":
        small = wide if major >= 9 else bias and bd == 64
        return LongConfig(16 if small else 32, 64, 8, 1, 255)
    if kind == "dkv" and bd == 64 and (bias or major < 9):
        return LongConfig(32, 64, 4, 2)
    if kind == "dbias":
        if rotary:
            return LongConfig(32 if wide or major < 9 else 64, 64, 8, 1, 255)
        return LongConfig(64, 64, 8, 2)
    return LongConfig(64, 64, 8 if wide else 4, 2)


_COUNTS = ["outer", "heads", "reach_k", "reach_v"]  # specialising on them gains nothing


@triton.jit
def _block(n, outer, heads, BLOCK: tl.constexpr):
    """The work of a program: its sequence (batch, outer, head), also as separate int64 indices, and
    the first of its BLOCK rows."""
    blocks = tl.cdiv(n, BLOCK)
    pid = tl.program_id(0)  # divide in int32: an int64 division is a call of 100 instructions
    sequence, start = pid // blocks, pid % blocks * BLOCK
    b, o, head = sequence // heads // outer, sequence // heads % outer, sequence % heads
    return sequence.to(tl.int64), b.to(tl.int64), o.to(tl.int64), head.to(tl.int64), start


@triton.jit
def _rows(
    base, offs_n, n, stride_n, D: tl.constexpr, BD: tl.constexpr, FULL: tl.constexpr = False
):  # fmt: skip
    """(BLOCK, BD) rows offs_n of one sequence and head, zero outside; FULL: all are inside."""
    offs_d = tl.arange(0, BD)
    at = base + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    if FULL and D == BD:
        return tl.load(at)
    elif FULL:
        return tl.load(at, mask=(offs_d < D)[None, :], other=0.0)
    else:
        return tl.load(at, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :], other=0.0)


@triton.jit
def _numbers(ptr, offs_n, n, FULL: tl.constexpr = False):
    """One number per row, masked like ``_rows``."""
    if FULL:
        return tl.load(ptr + offs_n)
    else:
        return tl.load(ptr + offs_n, mask=offs_n < n, other=0.0)


@triton.jit
def _put_rows(base, x, offs_n, n, stride_n, D: tl.constexpr, BD: tl.constexpr):
    offs_d = tl.arange(0, BD)
    at = offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :]
    tl.store(base + at, x, mask=(offs_n < n)[:, None] & (offs_d < D)[None, :])


@triton.jit
def _turned(
    x, rot_ptr, offs_n, n, total, HALF: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if rot_ptr is not None:
        cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
        return rotate(x.to(ACC), cos, sin).to(x.dtype)
    else:
        return x


@triton.jit
def _turned_back(
    x, rot_ptr, offs_n, n, total, HALF: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    if rot_ptr is not None:
        cos, sin = rotary_table(rot_ptr, offs_n, n, total, HALF, BD, ACC)
        return rotate(x, cos, -sin)
    else:
        return x


@triton.jit
def _relative_rows(
    ptr, reach, start_m, start_n, n,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """(2*BN, BD): the table rows that a tile (BM == BN) needs; key j and query i use the local row
    j - i + BM - 1."""
    return by_distance(ptr, start_n - start_m - (BM - 1), reach, n, 2 * BN, D, BD)


@triton.jit
def _relative_product(
    x, ptr, reach, start_m, start_n, n,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x_i·table[j-i] for a tile, (BM, BN)."""
    rows = _relative_rows(ptr, reach, start_m, start_n, n, D, BM, BN, BD)
    product = dot(x, tl.trans(rows), tl.zeros([BM, 2 * BN], ACC))
    return skew(product, tl.arange(0, BM) - (BM - 1), BM, BN)


@triton.jit
def _along(x, FIRST: tl.constexpr):
    """Broadcast a vector along the first axis of a tile, or along the second."""
    if FIRST:
        return x[:, None]
    else:
        return x[None, :]


@triton.jit
def _tile_product(
    of_query, of_key, plain, table_ptr, reach, start_m, start_n, n, T: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """of_query_i·of_key_j + plain_i·table[j-i], (BM, BN), or with T (BN, BM)."""
    if T:
        s = dot(of_key, tl.trans(of_query), tl.zeros([BN, BM], ACC))
    else:
        s = dot(of_query, tl.trans(of_key), tl.zeros([BM, BN], ACC))
    if table_ptr is not None:
        more = _relative_product(plain, table_ptr, reach, start_m, start_n, n, D, BM, BN, BD, ACC)
        if T:
            more = tl.trans(more)
        s += more
    return s


@triton.jit
def _logits(
    q, q_plain, k, bias_ptr, rel_k_ptr, reach_k, start_m, start_n, n, scale, T: tl.constexpr,
    FOLD: tl.constexpr, MASK: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The logits of a tile, (BM, BN), or with T (BN, BM), in units of ``_unit``. MASK: -inf for
    keys beyond n, which were loaded as zero."""
    s = _tile_product(q, k, q_plain, rel_k_ptr, reach_k, start_m, start_n, n, T, D, BM, BN, BD, ACC)
    if not FOLD:
        s = s * (scale if bias_ptr is not None else scale * LOG2E)
    offs_m, offs_n = start_m + tl.arange(0, BM), start_n + tl.arange(0, BN)
    if bias_ptr is not None:
        at = _along(offs_m.to(tl.int64), not T) * n + _along(offs_n, T)
        mask = _along(offs_m < n, not T) & _along(offs_n < n, T)
        s += tl.load(bias_ptr + at, mask=mask, other=0.0).to(ACC)
    if MASK:
        s = tl.where(_along(offs_n < n, T), s, float("-inf"))
    return s


@triton.jit
def _exp(x, BIAS: tl.constexpr):
    """exp of differences of ``_logits``. With a bias these are in plain units: finfo.min times
    LOG2E would be -inf, which masks, and it does not."""
    return tl.exp2(x * LOG2E if BIAS else x)


@triton.jit
def _unit(scale, FOLD: tl.constexpr):
    """The factor that converts ``_logits`` to powers of 2. With FOLD it includes the scale, and one
    instruction applies it and subtracts the maximum. If the scale is not positive, the logits are
    already scaled; with a bias they are in plain units (``_exp``)."""
    if FOLD:
        return scale * LOG2E
    else:
        return 1.0

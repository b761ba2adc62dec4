"""Shared by all Triton kernels of the package. Imported only when a kernel is launched."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastvdm.runtime.device import INTERPRETED, facts

# True if this process runs kernels under TRITON_INTERPRET=1 (tests on a machine without a GPU).
INTERPRET = tl.constexpr(INTERPRETED)

LOG2E = tl.constexpr(1.4426950408889634)


def acc_dtype(dtype: torch.dtype) -> tl.dtype:
    """The accumulator's dtype: fp64 for fp64 input, so that gradcheck works; otherwise fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def acc_torch_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@triton.jit
def dot(a, b, acc):
    """acc + a @ b. The interpreter has no bf16, so it widens the operands first."""
    if INTERPRET:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), input_precision="ieee").to(acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def dot_x3(a, b, acc):
    """Like ``dot``, but fp32 operands become three TF32 products of their split halves (about 22
    bits) on the tensor cores. "ieee" multiplies on the plain cores and holds the whole inner axis
    in registers: at 64 x 64 it spills kilobytes (ptxas, sm_90).
    """
    if INTERPRET:
        return acc + tl.dot(a.to(acc.dtype), b.to(acc.dtype), input_precision="ieee").to(acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3", out_dtype=acc.dtype)


@triton.jit
def at_least(x, low):
    """max(x, low), NaN if x is NaN. PTX's plain max and min return the operand that is a number,
    whereas torch and the interpreter return NaN. Use it for values, not for indices and counts."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def at_most(x, high):
    """min(x, high), NaN if x is NaN."""
    return tl.minimum(x, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def widened(x, ACC: tl.constexpr):
    """x in ACC. bf16 is widened by hand: to extract the upper of two values in a register, Triton
    takes two instructions and this takes one (Triton 3.6, sm_90)."""
    if INTERPRET or x.dtype != tl.bfloat16 or tl.float32 != ACC:
        return x.to(ACC)
    else:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(x):
    """1 / x. On a GPU it is within an ulp of fp32, and denormals are flushed to 0: a division takes
    8 instructions, half of them for denormals."""
    if INTERPRET or x.dtype.primitive_bitwidth == 64:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid(t):
    """1 / (1 + exp(-t)). exp may overflow to inf or underflow to 0; the result is exact then."""
    return reciprocal(1.0 + tl.exp2(t * -LOG2E))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


def major(device: torch.device) -> int:
    """The major compute capability, on which tiles depend; Hopper's under the interpreter. From
    sm_120 on it is Ampere's, whose matrix instruction those GPUs have: with the tiles of Hopper
    and of sm_100 ptxas spills there, up to 976 bytes."""
    found = facts(device)
    if found.capability >= 120:
        return 8
    return found.capability // 10 if found.is_gpu else 9


def program_budget(device: torch.device) -> int:
    """The number of programs to start if each walks over many tiles: four per multiprocessor. Under
    the interpreter it is small, so that programs walk over several tiles there too."""
    found = facts(device)
    return 4 * found.multiprocessors if found.is_gpu else 6

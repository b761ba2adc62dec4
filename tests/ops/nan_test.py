"""What is not a number stays so: a NaN or an infinity in an input of a C++ op gives the NaNs and
infinities of the reference, in every output and gradient, on every instruction set.

Minimum and maximum instructions return one operand where the other is NaN, and which one is the
kernel's order of operands. What Triton's compiled kernels do is in aot_test.py: the interpreter
cannot show it.
"""

from __future__ import annotations

import math

import pytest
import torch

from fastvdm import use_backend
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.guidance import guidance_seed, guidance_update
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_attention_block import linear_attention_block
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.temporal_block import temporal_block
from fastvdm.testing import cpu_isas, grads

pytestmark = pytest.mark.skipif(not cpu_isas(), reason="no C++ extension")

SLOT = torch.tensor([-1, 0, -1], dtype=torch.int32)


def norm(kind):
    return lambda x, w: norm_act(x, w, kind=kind, groups=3)


def seed(z, m, coef, known, low):
    options = dict(known=known, slot=SLOT, low_res=low, low_slot=SLOT.flip(0).roll(1), clip=True)
    return guidance_seed(z, m, coef, **options)


def update(z, m, coef, grad, noise, threshold):
    return guidance_update(z, m, coef, grad=grad, noise=noise, threshold=threshold, clip=True)


def clip(z, m, coef):
    return guidance_update(z, m, coef, clip=True)


# name: (op, shapes of its inputs, of which the first gets the value, an element of it)
OPS = {
    "group": (norm("group"), [(2, 3, 5, 7, 24), (24,)], (1, 2, 3, 4, 5)),
    "rms": (norm("rms"), [(2, 3, 5, 7, 33), (33,)], (1, 2, 3, 4, 5)),
    "layer": (norm("layer"), [(2, 3, 5, 7, 33), (33,)], (1, 2, 3, 4, 32)),
    "linear q": (linear_attention, [(1, 2, 9, 5, 3, 2, 24)], (0, 1, 3, 4, 0, 1, 5)),
    "linear k": (linear_attention, [(1, 2, 9, 5, 3, 2, 24)], (0, 1, 3, 4, 1, 1, 5)),
    "linear last k": (linear_attention, [(1, 2, 9, 5, 3, 2, 24)], (0, 1, 8, 4, 1, 1, 23)),
    "linear v": (linear_attention, [(1, 2, 9, 5, 3, 2, 24)], (0, 1, 3, 4, 2, 1, 5)),
    "time q": (
        lambda qkv: axis_attention(qkv, axis="time"),
        [(1, 18, 2, 3, 3, 2, 24)], (0, 4, 1, 2, 0, 1, 5),
    ),
    "time k, bias": (
        lambda qkv, bias: axis_attention(qkv, axis="time", bias=bias),
        [(1, 18, 2, 3, 3, 2, 24), (2, 18, 18)], (0, 4, 1, 2, 1, 1, 5),
    ),
    "space v": (
        lambda qkv: axis_attention(qkv, axis="space"),
        [(1, 2, 4, 5, 3, 2, 24)], (0, 1, 3, 4, 2, 1, 5),
    ),
    "temporal block": (
        lambda x, w, qkv, out: temporal_block(x, w, qkv, out, heads=2),
        [(1, 5, 2, 3, 24), (24,), (96, 24), (24, 32)], (0, 4, 1, 2, 5),
    ),
    "linear block": (
        lambda x, w, qkv, out: linear_attention_block(x, w, qkv, out, heads=2),
        [(1, 2, 9, 5, 24), (24,), (96, 24), (24, 32)], (0, 1, 3, 4, 5),
    ),
    "seed": (
        seed, [(2, 2, 3, 4, 38), (2, 2, 3, 4, 38), (2, 4), (2, 2, 1, 4, 38), (2, 2, 1, 2, 19)],
        (1, 1, 2, 3, 5),
    ),
    "update": (update, [*[(2, 2, 3, 4, 38)] * 2, (2, 9), *[(2, 2, 3, 4, 38)] * 2, (2,)],
               (1, 1, 2, 3, 5)),
    "clip": (clip, [*[(2, 2, 3, 4, 38)] * 2, (2, 9)], (1, 1, 2, 3, 37)),
}  # fmt: skip
FORWARD_ONLY = ("seed", "update", "clip")


# As Python and CPUs write it, and as GPUs do: all ones.
NANS = {"nan": math.nan, "nan of a GPU": torch.tensor(-1, dtype=torch.int32).view(torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [*NANS.values(), math.inf, -math.inf], ids=[*NANS, "inf", "-inf"])
@pytest.mark.parametrize("case", OPS)
def test_stays(case, value, dtype, isa):
    op, shapes, at = OPS[case]
    dtype = torch.float32 if case in FORWARD_ONLY else dtype
    inputs = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs[0][at] = value
    found = []
    for backend in ("cpu", "reference"):
        with use_backend(backend, strict=True):
            if case in FORWARD_ONLY:
                found.append(op(*inputs))
                continue
            dout = torch.randn(op(*inputs).shape, generator=torch.Generator().manual_seed(0))
            out, gradients = grads(op, inputs, dout)
            found.append((*out, *gradients))
    for i, (mine, theirs) in enumerate(zip(*found)):
        assert torch.equal(mine.isnan(), theirs.isnan()), f"result {i}"
        assert torch.equal(mine.isinf(), theirs.isinf()), f"result {i}"

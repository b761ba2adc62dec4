"""temporal_block on Triton, beside the suite: isolation, exactness, what fits a GPU's registers."""

from __future__ import annotations

import os
import re

import pytest
import torch
from op_cases import ROWS, by_reference, make, time_block
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvdm.ops._call import select
from fastvdm.ops.attention_block import AttentionOptions
from fastvdm.ops.temporal_block import (
    exceeds_registers,
    temporal_block_cost,
)
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByDesign, explain
from fastvdm.testing import assert_close3, make_exact_operand

# On a GPU fp64 is the reference's, and compiled kernels have none: fp16 takes its place where the
# dtype does not matter.
GPU = torch.cuda.is_available()
DTYPE = torch.float16 if GPU or "FASTVDM_EMULATE" in os.environ else torch.float64


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("auto" if GPU else "triton"):
        yield


def moved(x, frame, factor=-3.0):
    x = x.clone()
    x[:, frame] *= factor
    return x


def test_focused_frames_do_not_leak(device):
    case = make(ROWS["temporal_block/masks"], DTYPE, device, dict(num_images=0))
    x, *rest = case.tensors.values()
    before, after = case.first(x, *rest), case.first(moved(x, 1), *rest)
    focused = case.rest["focus_mask"]
    assert torch.equal(before[focused][:, ::2], after[focused][:, ::2])
    assert not torch.equal(before[~focused][:, 0], after[~focused][:, 0])


def test_images_do_not_leak(device):
    options = dict(num_images=2, given=("norm_bias", "bias", "rotary"))
    case = make(ROWS["temporal_block/masks"], DTYPE, device, options)
    x, *rest = case.tensors.values()
    before, after = case.first(x, *rest), case.first(moved(x, 6), *rest)  # the second image
    assert torch.equal(before[:, :6], after[:, :6])
    after = case.first(moved(x, 2), *rest)  # a frame of the video
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_pixels_and_padding_do_not_leak(device):
    """NaN in one pixel stays there: neither a neighbour of the tile nor padding carries it."""
    case = make(ROWS["temporal_block/bias"], DTYPE, device, dict(B=1, given=()))
    case.tensors["x"][0, 2, 1, 1] = torch.nan
    out = case.first(*case.tensors.values())
    poisoned = torch.isnan(out).any(-1).any(1)[0]
    assert poisoned.nonzero().tolist() == [[1, 1]]


def test_exact(device):
    """Rows of +-1 normalise to themselves, 0/1 projections: every intermediate is an integer."""
    b, f, h, w, c, heads, d = 1, 3, 2, 5, 32, 2, 16
    x = make_exact_operand((b, f, h, w, c // 2), high=1, seed=1)
    x = torch.where(x == 0, 1.0, x)
    x = torch.cat((x, -x), dim=-1)  # mean 0, variance 1
    inner = heads * d
    select_rows = torch.randperm(c, generator=torch.Generator().manual_seed(5))
    v = torch.eye(c)[select_rows][:inner]
    qkv_weight = torch.cat((torch.zeros(2 * inner, c), v))
    out_weight = torch.eye(c)[:, select_rows][:, :inner] * 2
    # A bias that picks frame (i + 1) mod F: the softmax is exactly one-hot.
    bias = torch.full((heads, f, f), -1e4)
    for i in range(f):
        bias[:, i, (i + 1) % f] = 0.0
    args = (x, torch.ones(c), qkv_weight, out_weight)
    out = time_block(*(t.to(device) for t in args), heads=heads, bias=bias.to(device), eps=1e-12)
    expected = x + 2 * x.roll(-1, 1)[..., select_rows][..., select_rows.argsort()]
    assert torch.equal(out.cpu().float(), expected)


def test_masked_rows(device):
    """A row of nothing but -inf in the bias attends to nothing: y = x + out_bias there."""
    case = make(ROWS["temporal_block/bias"], DTYPE, device)
    case.tensors["bias"].fill_(-torch.inf)
    out = case.first(*case.tensors.values())
    assert torch.equal(out, case.tensors["x"] + case.tensors["out_bias"])


PARTS = {
    "width": (dict(F=3, C=264), torch.float16),
    "length": (dict(F=34), torch.float16),
    "fp32": (dict(F=3), torch.float32),
}


@pytest.mark.parametrize("sizes, dtype", PARTS.values(), ids=PARTS)
def test_parts(sizes, dtype):
    """What does not fit is composed of the parts, on the same backend, with no fallback."""
    tensors = make(ROWS["temporal_block/bias"], dtype, "cpu", sizes).tensors
    call = ("time", tensors["x"], tensors["qkv_weight"], 2, AttentionOptions(tensors["bias"]))
    assert re.search("above|exceed", explain("attention_block", *call)["triton"])
    with use_backend("triton", strict=True):
        assert select("attention_block", torch.device("cpu"), *call) == "parts"


LIMITS = [  # frames, channels, heads' features, stream, tables; fused?
    (16, 256, 32, torch.bfloat16, False, True),
    (16, 256, 32, torch.float32, False, False),
    (16, 256, 64, torch.bfloat16, False, False),
    (16, 256, 32, torch.bfloat16, True, False),
    (17, 64, 32, torch.float32, False, True),
    (17, 64, 64, torch.bfloat16, False, False),
    (17, 72, 32, torch.bfloat16, False, False),
    (16, 128, 64, torch.float32, False, True),
    (16, 128, 64, torch.float32, True, False),
    (16, 128, 64, torch.bfloat16, True, True),
]


@pytest.mark.parametrize("frames, c, dim, dtype, tables, fused", LIMITS)
def test_limits_of_the_registers(frames, c, dim, dtype, tables, fused):
    x = torch.empty(0, frames, 1, 1, c, dtype=dtype)
    weight = torch.empty(3 * 2 * dim, c, dtype=torch.bfloat16)
    assert (exceeds_registers(x, weight, 2, tables, weight.dtype) is None) == fused


def test_rows_are_counted_in_32_bits():
    weight = torch.empty(3 * 2 * 32, 64, dtype=torch.bfloat16, device="meta")
    for batch, fused in ((2**17 - 1, True), (2**17, False)):
        x = torch.empty(batch, 16, 32, 32, 64, dtype=torch.bfloat16, device="meta")
        assert (exceeds_registers(x, weight, 2, False, weight.dtype) is None) == fused


def test_fp64_on_a_gpu_is_the_references():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = (torch.empty(s, device="cuda", dtype=torch.float64) for s in ((1,) * 5, (3, 1)))
        reason = explain("attention_block", "time", x, weight, 1)["triton"]
        assert reason == "fp64 has no kernel" and isinstance(reason, ByDesign)
        assert explain("attention_block", "time", x.half(), weight.half(), 1)["triton"] is None


BAD = {
    "heads": (dict(heads=5), ValueError, "heads = 5"),
    "images": (dict(num_images=8), ValueError, "num_images"),
    "eps": (dict(eps=0.0), ValueError, "eps must be positive"),
}


@pytest.mark.parametrize("change, error, text", BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    case = make(ROWS["temporal_block/bias"], torch.float32, "cpu", change)
    with pytest.raises(error, match=text):
        case.first(*case.tensors.values())


def test_cost():
    cost = temporal_block_cost((1, 16, 8, 8, 64), 8, 32, 2)
    rows = 16 * 64
    assert cost.bytes == 2 * (2 * rows * 64 + 4 * 64 * 256)
    assert cost.flops == 8 * rows * 64 * 256 + 4 * rows * 16 * 256


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [65535, 65536, 70001])
def test_many_pixels(pixels, device):
    """Batches of sequences that a grid axis other than x cannot hold."""
    sizes = dict(B=1, F=16, H=1, W=pixels, C=64, A=1, D=32, given=("bias", "rotary"))
    case = make(ROWS["temporal_block/bias"], torch.bfloat16, device, sizes)
    x, *rest = case.tensors.values()
    out, tail = case.first(x, *rest), (x[..., -7:, :], *rest)
    base = by_reference(case.first)(*tail)
    wide = by_reference(case.first)(*(t.double() for t in tail))
    assert_close3(out[..., -7:, :], base, wide)

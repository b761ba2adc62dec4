"""The linear attention block, beside the suite: what it reorders, its splits of a frame and chunks
of frames, what fits a GPU's registers, and what a layer does with it."""

from __future__ import annotations

import os
import re

import pytest
import torch
from op_cases import linear_block
from torch import nn

from fastvdm import use_backend
from fastvdm.layers.attention import Attention
from fastvdm.layers.norm import Norm
from fastvdm.ops._call import select
from fastvdm.ops.linear_attention_block import linear_attention_block_cost
from fastvdm.reference.attention_block import attention_block_ref
from fastvdm.runtime.dispatch import explain
from fastvdm.testing import cpu_isas, grads, max_error

pytestmark = pytest.mark.skipif(not cpu_isas(), reason="no C++ extension")

# (B, F, H, W, C), heads, D. "splits": more than one of a frame, the last one smaller; "frames":
# several chunks of pixels, and frames enough that none is split.
SHAPES = {
    "odd": ((2, 3, 5, 7, 17), 4, 24),
    "splits": ((1, 2, 24, 37, 24), 2, 32),
    "frames": ((2, 17, 10, 11, 40), 2, 64),
}


def operands(case: str, sharp: float = 2.0):
    """Sharpened weights: near-uniform softmaxes would hide a wrong q or k."""
    shape, heads, d = SHAPES[case]
    c, inner = shape[-1], heads * d
    inputs = [
        torch.randn(shape),
        1 + 0.1 * torch.randn(c),
        torch.randn(3 * inner, c) * sharp * c**-0.5,
        torch.randn(c, inner) * 3 * inner**-0.5,
        0.1 * torch.randn(c),
        torch.randn(c),
    ]
    return inputs, heads


def block(heads: int, fn=linear_block, **options):
    def call(x, norm_weight, qkv, out, norm_bias=None, out_bias=None):
        return fn(
            x,
            norm_weight,
            qkv,
            out,
            core="linear",
            heads=heads,
            norm_bias=norm_bias,
            out_bias=out_bias,
            **options,
        )

    return call


@pytest.mark.parametrize("wrong", ["q and k swapped", "v from k", "out turned", "no norm bias"])
def test_negative_controls(wrong):
    """The tolerance would notice each of these."""
    inputs, heads = operands("frames")
    expected = block(heads, attention_block_ref)(*inputs)
    x, norm_weight, qkv, out, norm_bias, bias = inputs
    q, k, v = qkv.chunk(3)
    if wrong == "q and k swapped":
        qkv = torch.cat((k, q, v))
    elif wrong == "v from k":
        qkv = torch.cat((q, k, k))
    elif wrong == "out turned":
        out = out.flip(1)
    else:
        norm_bias = torch.zeros_like(norm_bias)
    found = linear_block(x, norm_weight, qkv, out, heads=heads, norm_bias=norm_bias, out_bias=bias)
    assert max_error(found, expected) > 1e-2


def test_the_softmax_needs_no_bound(isa):
    """Logits of hundreds: a running maximum, carried over chunks and splits."""
    inputs, heads = operands("splits", sharp=200.0)
    with use_backend("cpu", strict=True):
        found = block(heads)(*inputs)
    wide = block(heads, attention_block_ref)(*(t.double() for t in inputs))
    plain = block(heads, attention_block_ref)(*inputs)
    assert torch.isfinite(found).all()
    assert max_error(found, wide) < 3 * max_error(plain, wide) + 1e-5


TRITON = torch.float64 if os.environ.get("TRITON_INTERPRET") == "1" else torch.bfloat16


def test_the_softmax_needs_no_bound_on_triton(device):
    """The same with partial sums of splits that are merged."""
    inputs, heads = operands("splits", sharp=200.0)
    inputs = [t.to(device, TRITON) for t in inputs]
    with use_backend("triton", strict=True):
        found = block(heads)(*inputs)
    wide = block(heads, attention_block_ref)(*(t.double() for t in inputs))
    plain = block(heads, attention_block_ref)(*inputs)
    assert torch.isfinite(found).all()
    assert max_error(found, wide) < 3 * max_error(plain, wide) + 1e-9


def test_frames_are_apart_on_triton(device):
    """NaN in one frame stays there; two runs give the same bits."""
    inputs, heads = operands("odd")
    inputs = [t.to(device, TRITON) for t in inputs]
    inputs[0][0, 1, 2, 3, 4] = torch.nan
    with use_backend("triton", strict=True):
        y, found = grads(block(heads), inputs, torch.ones_like(inputs[0]))
        again = grads(block(heads), inputs, torch.ones_like(inputs[0]))
    for t, other in ((y[0], again[0][0]), (found[0], again[1][0])):
        bad = t.isnan()
        assert bad[0, 1].all() and not bad[0, 0].any() and not bad[1].any()
        assert torch.equal(t.nan_to_num(), other.nan_to_num())


PARTS = {  # height, width, channels, heads' features, dtypes of x and the projections
    "wide": (16, 16, 136, 32, torch.bfloat16, torch.bfloat16),
    "features": (16, 16, 64, 72, torch.bfloat16, torch.bfloat16),
    "few pixels": (7, 9, 64, 32, torch.bfloat16, torch.bfloat16),
    "fp32": (16, 16, 64, 32, torch.float32, torch.float32),
    None: (8, 8, 64, 64, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("case", PARTS)
def test_what_triton_leaves_to_the_parts(case):
    """With a reason, and no fallback."""
    h, w, c, d, stream, low = PARTS[case]
    x = torch.empty(1, 2, h, w, c, dtype=stream)
    call = ("linear", x, torch.empty(3 * 2 * d, c, dtype=low), 2)
    reason = explain("attention_block", *call)["triton"]
    assert reason is None if case is None else re.search("above|exceed", reason)
    with use_backend("triton", strict=True):
        chosen = select("attention_block", torch.device("cpu"), *call)
        assert chosen == ("parts" if case else "triton")


def test_frames_are_apart():
    """A frame's result does not depend on its neighbours."""
    inputs, heads = operands("frames")
    x, rest = inputs[0], inputs[1:]
    whole = block(heads)(*inputs)
    parts = [block(heads)(f, *rest) for f in x.split(1, dim=1)]
    assert max_error(torch.cat(parts, dim=1), whole) < 2e-6


def test_threads_change_nothing():
    """The sums are cut where the shape says, not where the threads are."""
    inputs, heads = operands("splits")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(sum(grads(block(heads), inputs, torch.ones_like(inputs[0])), ()))
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_matrices_in_chunks_of_frames():
    """Their memory is bounded: here four frames at a time (13 MB each in the backward)."""
    shape, heads, d = (1, 7, 12, 12, 768), 8, 128
    inputs = [
        torch.randn(shape),
        torch.ones(768),
        torch.randn(3 * heads * d, 768) * 768**-0.5,
        torch.randn(768, heads * d) * (heads * d) ** -0.5,
    ]
    both = torch.cat((inputs[0], inputs[0].flip(1)), dim=1)
    dy = torch.randn(shape)
    _, once = grads(block(heads), inputs, dy)
    _, twice = grads(block(heads), [both, *inputs[1:]], torch.cat((dy, dy.flip(1)), dim=1))
    assert max_error(twice[0][:, :7], once[0]) < 1e-5
    for a, b in zip(twice[1:], once[1:]):
        assert max_error(a, 2 * b) < 1e-5


def test_bad_input():
    (x, norm_weight, qkv, out, *_), heads = operands("odd")
    with pytest.raises(ValueError, match="with heads = 5"):
        block(5)(x, norm_weight, qkv, out)
    with pytest.raises(TypeError, match="out_weight must be"):
        block(heads)(x, norm_weight, qkv, out.bfloat16())
    with pytest.raises(ValueError, match="eps must be positive"):
        block(heads, eps=0.0)(x, norm_weight, qkv, out)


def test_cost():
    """Four products of pixels by channels by features, and two small ones a frame."""
    cost = linear_attention_block_cost((1, 2, 3, 4, 5), 6, 7, 2)
    assert cost.flops == 4 * 2 * 24 * 5 * 42 + 2 * 2 * 2 * 42 * 7 * 5
    assert cost.bytes == 2 * (3 * 24 * 5 + 4 * 5 * 42)


def test_adapter_is_called():
    """A layer put in the place of a projection (as LoRA does) is not bypassed."""

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        @property
        def weight(self) -> torch.Tensor:
            return self.inner.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    layer = Attention("linear", Norm("layer", 16), heads=2, head_dim=8)
    x = torch.randn(1, 2, 4, 4, 16)
    wanted = Attention("linear", Norm("layer", 16), heads=2, head_dim=8)
    wanted.load_state_dict(layer.state_dict())
    with torch.no_grad():
        wanted.qkv.weight.mul_(2)
        layer.qkv = Doubled(layer.qkv)
        torch.testing.assert_close(layer(x), wanted(x))

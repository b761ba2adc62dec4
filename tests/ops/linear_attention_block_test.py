"""The linear attention block in C++ against the plain composition: norm to residual, all gradients.

The attention itself is covered by linear_attention_test.py; here it is what the block reorders (v
and the attention's output are never made), its splits of a frame and chunks of frames, and what a
layer does with it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvdm import use_backend
from fastvdm.layers.attention import LinearAttention
from fastvdm.layers.norm import Norm
from fastvdm.ops.linear_attention_block import (
    linear_attention_block,
    linear_attention_block_bwd,
    linear_attention_block_cost,
    linear_attention_block_fwd,
)
from fastvdm.reference.linear_attention_block import linear_attention_block_ref
from fastvdm.testing import assert_parity, cpu_isas, grads, max_error, opcheck_op

pytestmark = pytest.mark.skipif(not cpu_isas(), reason="no C++ extension")

# (B, F, H, W, C), heads, D. "splits": more than one of a frame, the last one smaller; "frames":
# several chunks of pixels, and frames enough that none is split.
SHAPES = {
    "one pixel": ((1, 1, 1, 1, 3), 1, 5),
    "odd": ((2, 3, 5, 7, 17), 4, 24),
    "splits": ((1, 2, 24, 37, 24), 2, 32),
    "frames": ((2, 17, 10, 11, 40), 2, 64),
}
NAMES = ["x", "norm_weight", "qkv_weight", "out_weight", "norm_bias", "out_bias"]


def operands(case: str, dtype: torch.dtype = torch.float32, sharp: float = 2.0):
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
    return [t.to(dtype) for t in inputs], heads


def block(heads: int, fn=linear_attention_block, **options):
    def call(x, norm_weight, qkv, out, norm_bias=None, out_bias=None):
        return fn(
            x, norm_weight, qkv, out, heads=heads, norm_bias=norm_bias, out_bias=out_bias, **options
        )

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SHAPES)
def test_parity(isa, case, dtype, poison):
    inputs, heads = operands(case, dtype)
    with use_backend("cpu", strict=True):
        assert_parity(block(heads), block(heads, linear_attention_block_ref), inputs, names=NAMES)


def test_parity_without_biases(isa):
    inputs, heads = operands("odd")
    plain = block(heads, linear_attention_block_ref, sm_scale=0.7, eps=1e-3)
    with use_backend("cpu", strict=True):
        assert_parity(block(heads, sm_scale=0.7, eps=1e-3), plain, inputs[:4], names=NAMES[:4])


@pytest.mark.parametrize("wrong", ["q and k swapped", "v from k", "out turned", "no norm bias"])
def test_negative_controls(wrong):
    """The tolerance would notice each of these."""
    inputs, heads = operands("frames")
    expected = block(heads, linear_attention_block_ref)(*inputs)
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
    found = linear_attention_block(
        x, norm_weight, qkv, out, heads=heads, norm_bias=norm_bias, out_bias=bias
    )
    assert max_error(found, expected) > 1e-2


def test_the_softmax_needs_no_bound(isa):
    """Logits of hundreds: a running maximum, carried over chunks and splits."""
    inputs, heads = operands("splits", sharp=200.0)
    with use_backend("cpu", strict=True):
        found = block(heads)(*inputs)
    wide = block(heads, linear_attention_block_ref)(*(t.double() for t in inputs))
    plain = block(heads, linear_attention_block_ref)(*inputs)
    assert torch.isfinite(found).all()
    assert max_error(found, wide) < 3 * max_error(plain, wide) + 1e-5


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


@pytest.mark.parametrize("trained", range(6), ids=NAMES)
def test_only_one_gradient(trained):
    """What needs no gradient gets none, and the other's is the same."""
    inputs, heads = operands("odd")
    everything = [t.clone().requires_grad_() for t in inputs]
    block(heads)(*everything).square().sum().backward()
    one = [t.clone().requires_grad_(i == trained) for i, t in enumerate(inputs)]
    block(heads)(*one).square().sum().backward()
    for i, (a, b) in enumerate(zip(one, everything)):
        if i == trained:
            assert max_error(a.grad, b.grad) < 1e-6
        else:
            assert a.grad is None


def test_opcheck():
    inputs, heads = operands("odd")
    x, norm_weight, qkv, out, norm_bias, bias = (t.requires_grad_() for t in inputs)
    args = (x, norm_weight, norm_bias, qkv, out, bias, heads, 1e-5, 0.2, "cpu")
    opcheck_op(linear_attention_block_fwd, args)
    y, g, lse = linear_attention_block_fwd(*args)
    tensors = tuple(t.detach() for t in (torch.randn_like(y), *args[:6], g, lse))
    for need in ((True, True, True), (False, False, False), (False, True, False)):
        opcheck_op(linear_attention_block_bwd, (*tensors, heads, 1e-5, 0.2, *need, "cpu"))


def test_autocast():
    """fp32 stream, bf16 projections: the stream keeps its type."""
    inputs, heads = operands("odd")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = block(heads)(*inputs)
        with use_backend("reference"):
            expected = block(heads)(*inputs)
    assert found.dtype == expected.dtype == torch.float32
    assert max_error(found, expected) < 2e-2


def test_empty():
    inputs, heads = operands("odd")
    x = inputs[0][:0].requires_grad_()
    y = block(heads)(x, *inputs[1:])
    assert y.shape == x.shape
    y.sum().backward()


def test_bad_input():
    (x, norm_weight, qkv, out, norm_bias, bias), heads = operands("odd")
    call = block(heads)
    with pytest.raises(ValueError, match="x must be"):
        call(x[0], norm_weight, qkv, out)
    with pytest.raises(ValueError, match="with heads = 5"):
        block(5)(x, norm_weight, qkv, out)
    with pytest.raises(ValueError, match="qkv_weight must be"):
        call(x, norm_weight, qkv[:, :-1], out)
    with pytest.raises(ValueError, match="out_weight must be"):
        call(x, norm_weight, qkv, out.t())
    with pytest.raises(ValueError, match="out_bias must be"):
        call(x, norm_weight, qkv, out, norm_bias, bias[1:])
    with pytest.raises(TypeError, match="out_weight must be"):
        call(x, norm_weight, qkv, out.bfloat16())
    with pytest.raises(TypeError, match="x must be fp32"):
        call(x.int(), norm_weight, qkv, out)
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

    layer = LinearAttention(Norm("layer", 16), heads=2, head_dim=8)
    x = torch.randn(1, 2, 4, 4, 16)
    wanted = LinearAttention(Norm("layer", 16), heads=2, head_dim=8)
    wanted.load_state_dict(layer.state_dict())
    with torch.no_grad():
        wanted.qkv.weight.mul_(2)
        layer.qkv = Doubled(layer.qkv)
        torch.testing.assert_close(layer(x), wanted(x))

"""Linear attention with its projection in C++ against the plain composition.

The attention itself is covered by linear_attention_test.py; here it is the chunks of frames, the
gradients of the projection and what a layer does with it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastvdm import _ext, use_backend
from fastvdm.layers.attention import LinearAttention
from fastvdm.layers.norm import Norm
from fastvdm.ops.linear_attention_projected import (
    linear_attention_projected,
    linear_attention_projected_bwd,
    linear_attention_projected_fwd,
)
from fastvdm.testing import assert_parity, cpu_isas, max_error, opcheck_op

pytestmark = pytest.mark.skipif(not cpu_isas(), reason="no C++ extension")

# (B, F, H, W, C), heads, D. "chunks": more than one chunk of frames, the last one smaller.
SHAPES = {
    "tiny": ((1, 1, 1, 1, 3), 1, 5),
    "odd": ((2, 3, 5, 7, 17), 4, 24),
    "chunks": ((1, 7, 24, 20, 24), 8, 64),
}


@pytest.fixture(params=cpu_isas() or ["none"])
def isa(request):
    assert _ext.set_cpu_isa(request.param) == request.param
    yield request.param
    _ext.set_cpu_isa("auto")


def operands(case: str, dtype: torch.dtype = torch.float32):
    shape, heads, d = SHAPES[case]
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(3 * heads * d, shape[-1]) * 2 * shape[-1] ** -0.5).to(dtype)
    return x, weight, heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SHAPES)
def test_parity(isa, case, dtype, poison):
    x, weight, heads = operands(case, dtype)

    def fn(x, weight):
        return linear_attention_projected(x, weight, heads=heads)

    def reference(x, weight):
        with use_backend("reference"):
            return fn(x, weight)

    with use_backend("cpu", strict=True):
        assert_parity(fn, reference, [x, weight], names=["x", "weight"])


def test_chunks_are_the_frames_one_by_one():
    """A frame's result does not depend on its chunk: nothing is carried from one to the next."""
    x, weight, heads = operands("chunks")
    whole = linear_attention_projected(x, weight, heads=heads)
    parts = [linear_attention_projected(f, weight, heads=heads) for f in x.split(1, dim=1)]
    assert max_error(torch.cat(parts, dim=1), whole) < 1e-6
    again = linear_attention_projected(x, weight, heads=heads)
    assert torch.equal(whole, again)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen(frozen):
    """What needs no gradient gets none, and the other's is the same."""
    x, weight, heads = operands("odd")
    both = [t.clone().requires_grad_() for t in (x, weight)]
    linear_attention_projected(*both, heads=heads).square().sum().backward()
    one = [t.clone().requires_grad_(n != frozen) for n, t in (("x", x), ("weight", weight))]
    linear_attention_projected(*one, heads=heads).square().sum().backward()
    for a, b, name in zip(one, both, ("x", "weight")):
        if name == frozen:
            assert a.grad is None
        else:
            assert torch.equal(a.grad, b.grad)


def test_opcheck():
    x, weight, heads = operands("odd")
    args = (x.requires_grad_(), weight.requires_grad_(), heads, 0.2, "cpu")
    opcheck_op(linear_attention_projected_fwd, args)
    out, lse, ctx = linear_attention_projected_fwd(*args)
    saved = (x.detach(), weight.detach(), lse.detach(), ctx.detach())
    for need in ((True, True), (True, False), (False, True)):
        args = (torch.randn_like(out).detach(), *saved, heads, 0.2, *need, "cpu")
        opcheck_op(linear_attention_projected_bwd, args)


def test_autocast():
    x, weight, heads = operands("odd")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_attention_projected(x, weight, heads=heads)
        with use_backend("reference"):
            expected = linear_attention_projected(x, weight, heads=heads)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert max_error(out, expected) < 2e-2


def test_bad_input():
    x, weight, heads = operands("odd")
    for wrong in (x[0], x[..., :-1]):
        with pytest.raises(ValueError, match="expected x"):
            linear_attention_projected(wrong, weight, heads=heads)
    with pytest.raises(ValueError, match="features are not 3 x 5 heads"):
        linear_attention_projected(x, weight, heads=5)
    with pytest.raises(TypeError, match="weight"):
        linear_attention_projected(x, weight.bfloat16(), heads=heads)


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

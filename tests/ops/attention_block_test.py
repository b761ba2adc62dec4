"""attention_block: who runs which core, and what it refuses. The kernels' own tests are those of
temporal_block and linear_attention_block."""

from __future__ import annotations

import pytest
import torch

from fastvdm import use_backend
from fastvdm.ops._call import select
from fastvdm.ops.attention_block import AttentionOptions, attention_block
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.linear import linear
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_act import norm_act
from fastvdm.reference.attention_block import attention_block_ref
from fastvdm.runtime.config import BACKENDS
from fastvdm.runtime.dispatch import explain
from fastvdm.testing import assert_parity

CPU = torch.device("cpu")
HEADS = 2
# Each option that a network may have along five frames, of 2 heads of 4.
ROTARY = torch.stack((torch.ones(5, 2).cos(), torch.ones(5, 2).sin()))
OPTIONS = dict(bias=torch.ones(2, 5, 5), rel_k=torch.ones(1, 3, 4), rel_v=torch.ones(2, 3, 4))
OPTIONS |= dict(rotary=ROTARY, focus_mask=torch.tensor([True]), num_images=2)


def operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    c, inner = 12, HEADS * 4
    x, norm, qkv = torch.randn(1, 5, 2, 3, c), torch.rand(c), torch.randn(3 * inner, c)
    return [t.to(dtype) for t in (x, norm, qkv, torch.randn(c, inner), torch.randn(c))]


def call(core: str, **rest):
    def block(x, norm_weight, qkv_weight, out_weight, out_bias):
        return attention_block(
            x,
            norm_weight,
            qkv_weight,
            out_weight,
            core=core,
            heads=HEADS,
            out_bias=out_bias,
            **rest,
        )

    return block


@pytest.mark.parametrize("core", ["time", "space", "linear"])
def test_every_core(core):
    def plain(x, norm_weight, qkv_weight, out_weight, out_bias):
        weights = (norm_weight, qkv_weight, out_weight)
        return attention_block_ref(x, *weights, core=core, heads=HEADS, out_bias=out_bias)

    assert_parity(call(core), plain, operands())


def by_hand(x, norm_weight, qkv_weight, out_weight, out_bias):
    normed = norm_act(x, norm_weight, kind="layer", act=False)
    qkv = linear(
        normed if torch.is_autocast_enabled("cpu") else normed.to(qkv_weight.dtype), qkv_weight
    )
    out = axis_attention(qkv.unflatten(-1, (3, HEADS, 4)), axis="space").flatten(-2)
    return linear_residual(x, out, out_weight, out_bias)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
@pytest.mark.parametrize("low", [torch.float32, torch.float16, torch.bfloat16])
def test_the_parts_to_the_bit(low, backend):
    """Of an fp32 stream over projections of any type; under autocast from fp32 ones."""
    inputs = [t if i < 2 else t.to(low) for i, t in enumerate(operands())]
    with use_backend(backend):
        found = call("space")(*inputs)
        assert found.dtype == torch.float32 and torch.equal(found, by_hand(*inputs))
        if low == torch.float32:
            return
        with torch.autocast("cpu", low):
            cast = call("space")(*operands_like(inputs))
            assert cast.dtype == torch.float32 and torch.equal(
                cast, by_hand(*operands_like(inputs))
            )
            assert torch.equal(cast, found)


def operands_like(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same values in fp32."""
    return [t.float() for t in inputs]


def test_pixels_do_not_leak_before_the_attention():
    """NaN in one frame stays there: attention over space sees no other."""
    inputs = operands()
    inputs[0][0, 3, 1, 2, 7] = torch.nan
    found = call("space")(*inputs).isnan()
    assert found[:, 3].all() and not found[:, :3].any() and not found[:, 4:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_shaw_tables_beside_a_bias_are_composed(backend):
    """As few networks ask for it, no fused kernel has it; and that is no fallback."""
    mixed = AttentionOptions(rel_k=OPTIONS["rel_k"], bias=OPTIONS["bias"])
    x, _, qkv, *_ = operands(torch.bfloat16)
    for kernel in ("cpu", "triton"):
        assert (
            "only causal networks"
            in explain("attention_block", "time", x, qkv, HEADS, mixed)[kernel]
        )
    with use_backend(backend, strict=True):
        expected = "reference" if backend == "reference" else "parts"
        assert select("attention_block", CPU, "time", x, qkv, HEADS, mixed) == expected


@pytest.mark.parametrize("core", ["space", "linear"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_of_attention_over_time(core, name):
    options = AttentionOptions(**{name: OPTIONS[name]})
    with pytest.raises(ValueError, match=f"'{core}' takes no options, got .*{name}"):
        call(core, options=options)(*operands())
    assert call("time", options=options)(*operands()).shape == (1, 5, 2, 3, 12)


def test_bad_input():
    with pytest.raises(ValueError, match="core must be one of time, space, linear, got 'frames'"):
        call("frames")(*operands())
    with pytest.raises(TypeError, match="options must be AttentionOptions, got dict"):
        call("time", options=OPTIONS)(*operands())
    with pytest.raises(ValueError, match="'linear' takes no qkv_bias"):
        call("linear", qkv_bias=torch.ones(24))(*operands())


def test_options_under_compile():
    """One value of several tensors, and a gradient of one of them."""
    torch._dynamo.reset()
    inputs, bias = operands(), torch.randn(2, 5, 5, requires_grad=True)

    def fn(bias):
        options = AttentionOptions(bias=bias, rotary=ROTARY, num_images=1)
        return call("time", options=options)(*inputs).square().sum()

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(bias), bias), torch.autograd.grad(fn(bias), bias)):
        assert torch.equal(a, b) and a.abs().max() > 0

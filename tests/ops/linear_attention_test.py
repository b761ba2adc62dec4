"""linear_attention, beside the suite: wide heads, logits without a bound, exactness, isolation."""

from __future__ import annotations

import pytest
import torch

from fastvdm.ops.linear_attention import (
    linear_attention,
    linear_attention_cost,
)
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import FallbackError, explain
from fastvdm.testing import assert_close3, assert_parity, make_exact_operand


@pytest.fixture
def device(lane):
    """Of each implementation in turn."""
    backend, device = lane
    with use_backend(backend):
        yield device


def _randn(shape, dtype=torch.float32, device="cpu", scale=3.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(device, dtype)


@pytest.mark.parametrize("dim", [100, 128])
def test_widest_heads(dim, device, poison):
    qkv = _randn((1, 1, 5, 27, 3, 1, dim), torch.float16, device)
    assert_parity(linear_attention, linear_attention_ref, [qkv])


def test_large_logits(device):
    """The maximum is subtracted per feature of k and per pixel of q: no overflow at 1e4."""
    qkv = _randn((1, 2, 3, 29, 3, 1, 16), device=device)
    qkv[..., :2, :, :] *= 1e4
    out = linear_attention(qkv)
    assert torch.isfinite(out).all()
    assert_close3(out, linear_attention_ref(qkv), linear_attention_ref(qkv.double()))


def test_growing_logits(device):
    """k grows along the pixels, so that the running maximum moves in every chunk."""
    qkv = _randn((1, 2, 12, 11, 3, 4, 32), device=device)
    qkv[..., 1, :, :] += torch.linspace(-12, 12, 132, device=device).view(12, 11, 1, 1)
    assert_parity(linear_attention, linear_attention_ref, [qkv])


def test_padding_and_minus_infinity(device):
    """A feature whose first pixels are -inf is a matter of masking, not NaN."""
    qkv = _randn((1, 1, 5, 23, 3, 1, 16), device=device)
    qkv[0, 0, :4, :, 1, 0, 3] = -torch.inf
    out = linear_attention(qkv)
    assert torch.isfinite(out).all()
    assert_close3(out, linear_attention_ref(qkv), linear_attention_ref(qkv.double()))


def test_frames_do_not_mix(device):
    qkv = _randn((1, 3, 4, 5, 3, 2, 16), device=device)
    before = linear_attention(qkv)
    qkv[:, 1] += 1.0 + qkv[:, 1].square()
    after = linear_attention(qkv)
    assert torch.equal(before[:, ::2], after[:, ::2])
    assert not torch.equal(before[:, 1], after[:, 1])


@pytest.mark.parametrize("lane", ["triton"], indirect=True)  # the C++ exp ends at 1e-38
def test_exact(device):
    """One-hot q and k: out is a plain gather of v, exact, so an index error cannot hide."""
    b, f, h, w, heads, d = 1, 2, 3, 5, 2, 16
    v = make_exact_operand((b, f, h, w, heads, d))
    q = torch.full_like(v, -1e4)
    k = torch.full_like(v, -1e4)
    feature = torch.arange(h * w).reshape(h, w) % d
    for y in range(h):
        for x in range(w):
            q[:, :, y, x, :, feature[y, x]] = 0.0  # pixel n asks for feature n mod D
            k[:, :, y, x, :, (feature[y, x] + 1) % d] = 0.0  # and pixel n answers n+1 mod D
    k[..., 0] = -1e4
    k[:, :, 2, 2, :, 0] = 0.0
    out = linear_attention(torch.stack((q, k, v), dim=4).to(device), sm_scale=1.0).cpu()
    flat, source = v.reshape(b, f, h * w, heads, d), {0: 12}
    source.update({n + 1: n for n in range(h * w - 1)})
    for n in range(h * w):
        assert torch.equal(out.reshape(b, f, h * w, heads, d)[:, :, n], flat[:, :, source[n]]), n


def test_bad_input():
    with pytest.raises(ValueError, match="must be .B, F, H, W, 3, heads, D."):
        linear_attention(torch.zeros(1, 2, 3, 4, 2, 5, 6))


def test_fallback_reason():
    wide = torch.zeros(1, 1, 1, 2, 3, 1, 130)
    assert explain("linear_attention", wide)["triton"] == "head dim 130 is above 128"
    with use_backend("triton"):
        with pytest.raises(FallbackError, match="head dim 130"):
            linear_attention(wide)
        with pytest.raises(FallbackError, match="above 64"):
            linear_attention(torch.zeros(1, 1, 1, 2, 3, 1, 65))


def test_cost():
    cost = linear_attention_cost((1, 2, 3, 4, 3, 5, 6), 2)
    assert cost.bytes == 4 * 2 * (1 * 2 * 3 * 4 * 5 * 6)
    assert cost.flops == 2 * 2 * (24 * 5 * 6 * 6)


@pytest.mark.gpu
def test_many_problems(device):
    """More programs than a grid axis other than x may hold, offsets beyond 2**31 elements."""
    qkv = torch.randn((2, 256, 16, 16, 3, 256, 32), device=device, dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    out = linear_attention(qkv)
    last = linear_attention_ref(qkv[-1:, -1:].float())
    assert (out[-1:, -1:].float() - last).abs().max() < 2e-2 * last.abs().max()

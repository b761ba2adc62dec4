"""linear_attention: the Triton kernels (interpreted without a GPU) against torch.

bf16 runs on a GPU only: the interpreter truncates it. Widths between the ones below add no branch;
head dims above 64 are 16-bit only. Frames of several tiles and of one, split over programs and not.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastvdm.ops.linear_attention import (
    linear_attention,
    linear_attention_bwd,
    linear_attention_cost,
    linear_attention_fwd,
)
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import FallbackError, explain
from fastvdm.testing import assert_close3, assert_parity, make_exact_operand, opcheck_op

# (B, F, H, W, 3, heads, D)
SHAPES = {
    "one_pixel": (2, 3, 1, 1, 3, 1, 20),
    "odd": (1, 2, 3, 5, 3, 2, 16),
    "two_tiles": (1, 2, 7, 11, 3, 1, 32),  # more pixels than a tile, too few to split
    "split": (1, 1, 13, 23, 3, 2, 24),
    "wide": (1, 2, 9, 5, 3, 1, 64),
}


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def _randn(shape, dtype=torch.float32, device="cpu", scale=3.0):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    return x.to(device, dtype)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity(shape, dtype, device, poison):
    assert_parity(linear_attention, linear_attention_ref, [_randn(shape, dtype, device)])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parity_bf16(shape, device):
    assert_parity(linear_attention, linear_attention_ref, [_randn(shape, torch.bfloat16, device)])


@pytest.mark.parametrize("dim", [100, 128])
def test_widest_heads(dim, device, poison):
    qkv = _randn((1, 1, 5, 27, 3, 1, dim), torch.float16, device)
    assert_parity(linear_attention, linear_attention_ref, [qkv])


def test_scale_strides_and_expanded_gradient(device):
    base = _randn((1, 2, 3, 5, 3, 2, 32), device=device)
    qkv = base[..., ::2].detach().requires_grad_()  # stride 2 in the last axis
    assert not qkv.is_contiguous()
    linear_attention(qkv, sm_scale=0.7).sum().backward()  # the gradient arrives expanded
    ref = base[..., ::2].double().requires_grad_()
    linear_attention_ref(ref, sm_scale=0.7).sum().backward()
    plain = base[..., ::2].detach().clone().requires_grad_()
    linear_attention_ref(plain, sm_scale=0.7).sum().backward()
    assert_close3(qkv.grad, plain.grad, ref.grad, factor=3.0)


def test_large_logits(device):
    """The maximum is subtracted per feature of k and per pixel of q: no overflow at 1e4."""
    qkv = _randn((1, 2, 3, 29, 3, 1, 16), device=device)
    qkv[..., :2, :, :] *= 1e4
    out = linear_attention(qkv)
    assert torch.isfinite(out).all()
    assert_close3(out, linear_attention_ref(qkv), linear_attention_ref(qkv.double()))


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


def test_deterministic(device):
    qkv = _randn((1, 1, 13, 23, 3, 1, 32), device=device)
    runs = []
    for _ in range(2):
        leaf = qkv.clone().requires_grad_()
        out = linear_attention(leaf)
        runs.append((out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_gradcheck(device):
    qkv = _randn((1, 2, 2, 3, 3, 1, 4), torch.float64, device, 1.0).requires_grad_()
    assert torch.autograd.gradcheck(linear_attention, (qkv,), nondet_tol=0.0, fast_mode=True)


def test_opcheck(device):
    qkv = _randn((1, 2, 4, 5, 3, 6, 7), device=device).requires_grad_()
    opcheck_op(linear_attention_fwd, (qkv, 0.5, "triton"))
    out, lse, ctx = linear_attention_fwd(qkv.detach(), 0.5, "triton")
    opcheck_op(linear_attention_bwd, (out, qkv.detach(), lse, ctx, 0.5, "triton"))


def test_compile_without_recompiling(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_attention, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for frames in (5, 6, 9):  # extents that differ from every other: equal ones share a symbol
        qkv = _randn((1, frames, 2, 4, 3, 1, 16), device=device).requires_grad_()
        out = compiled(qkv)
        out.sum().backward()
        assert torch.equal(out, linear_attention(qkv))
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def test_double_backward_is_refused(device):
    qkv = _randn((1, 1, 2, 3, 3, 1, 16), device=device).requires_grad_()
    (grad,) = torch.autograd.grad(linear_attention(qkv).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


def test_autocast(device):
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    with torch.autocast(device, dtype), use_backend("reference"):
        assert linear_attention(_randn((1, 1, 2, 3, 3, 1, 16), device=device)).dtype == dtype


def test_bad_input(device):
    with pytest.raises(ValueError, match="must be .B, F, H, W, 3, heads, D."):
        linear_attention(torch.zeros(1, 2, 3, 4, 2, 5, 6, device=device))
    with pytest.raises(TypeError, match="int64"):
        linear_attention(torch.zeros(1, 2, 3, 4, 3, 5, 6, device=device, dtype=torch.int64))


def test_empty_batch(device):
    out = linear_attention(torch.zeros(0, 2, 3, 4, 3, 5, 16, device=device))
    assert out.shape == (0, 2, 3, 4, 5, 16)


def test_fallback_reason(device):
    wide = torch.zeros(1, 1, 1, 2, 3, 1, 130, device=device)
    assert explain("linear_attention", wide)["triton"] == "head dim 130 is above 128"
    with pytest.raises(FallbackError, match="head dim 130"):
        linear_attention(wide)
    with pytest.raises(FallbackError, match="above 64"):
        linear_attention(torch.zeros(1, 1, 1, 2, 3, 1, 65, device=device))


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

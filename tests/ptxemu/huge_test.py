"""Tensors above 2^31 elements: some CTAs of each launch, on memory that is only reserved.

An offset that overflows 32 bits leaves its tensor, which is a finding, or misses the last rows,
which are compared with the reference on those rows alone. Nothing but the touched pages is
allocated.
"""

from __future__ import annotations

import os
import resource

import pytest
import torch
from torch import Tensor

from fastvdm.kernels import (
    axis_attention,
    guidance,
    linear_attention,
    linear_attention_block,
    linear_residual,
    norm_act,
    space_conv,
    temporal_block,
)
from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.limits import GROUP, LAYER, RMS, SPACE, TIME
from fastvdm.reference.attention_block import attention_block_ref
from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.reference.linear_residual import linear_residual_ref
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.reference.space_conv import space_conv_ref

from .emulator import emulate

pytestmark = pytest.mark.slow

ARCH = int(os.environ["FASTVDM_EMULATE"])
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
MOST = 6 << 30  # bytes that may be touched: the last rows are few


@pytest.fixture(autouse=True)
def sampled(request):
    """Three CTAs of each launch, the last one among them."""
    count = getattr(request, "param", 132)
    with emulate(ARCH, sample=3, check=False, multiprocessors=count) as emulator:
        yield emulator
    assert not emulator.bad(), "\n".join(map(str, emulator.bad()))
    assert all(launch.ran < launch.grid[0] for launch in emulator.launches[:1])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < MOST


def huge(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    t = torch.empty(shape, dtype=dtype)
    assert t.numel() > 2**31
    return t


def tail(t: Tensor, rows: int, width: int, seed: int = 1) -> Tensor:
    """The last rows, made random; a copy in fp64."""
    part = t.view(-1)[-rows * width :].view(rows, width)
    part.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))
    return part.double()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def close(found: Tensor, expected: Tensor, tolerance: float = 0.03) -> None:
    """Of the last elements; the last CTA may hold a part of them, and fresh pages read 0."""
    last = found.view(-1)[-expected.numel() :].double()
    wrote, expected = last != 0, expected.detach().reshape(-1)
    assert wrote.any()
    assert ((last - expected).abs() * wrote).max() < tolerance * expected.abs().max()


@pytest.mark.parametrize(
    "axis, shape",
    [
        pytest.param(TIME, (700_000, 4, 1, 1, 3, 8, 32), id="time"),
        pytest.param(TIME, (50_000, 60, 1, 1, 3, 8, 32), id="time-long"),
        pytest.param(SPACE, (12_000, 1, 16, 16, 3, 8, 32), id="space"),
    ],
)
def test_axis_attention(axis, shape):
    qkv = huge(*shape)
    _, f, h, w, _, heads, d = shape
    n, width, scale = f if axis == TIME else h * w, 3 * heads * d, d**-0.5
    bias = draw(heads, n, n)
    options = AttentionOptions(bias)
    last = tail(qkv, n, width).view(1, f, h, w, 3, heads, d).requires_grad_()
    saved = axis_attention.axis_attention_fwd(qkv, axis, options, scale)
    name = "time" if axis == TIME else "space"
    expected = axis_attention_ref(last, axis=name, bias=bias.double(), sm_scale=scale)
    close(saved[0], expected)
    if axis == SPACE:
        return  # its backward reads what CTAs saved that did not run
    dout = torch.empty_like(saved[0])
    dlast = tail(dout, n, heads * d, 2)
    found = axis_attention.axis_attention_bwd(
        dout, qkv, *saved, axis, options, scale, True, False, False, False
    )
    expected.backward(dlast.view(expected.shape))
    close(found[0], last.grad)


@pytest.mark.parametrize("kind, name", [(GROUP, "group"), (RMS, "rms"), (LAYER, "layer")])
def test_norm_act(kind, name):
    b, c, rows = 1000, 64, 32
    x = huge(b, 1, 34_000, 1, c)
    weight, bias, film = draw(c).to(BF16), draw(c).to(BF16), draw(b, c).to(BF16)
    stats = (torch.zeros(b, 8), torch.ones(b, 8)) if kind == GROUP else (None, None)
    last, scale = tail(x, rows, c), film[-1:].double()
    params = (x, None, None, weight, bias, film, film)
    options = (kind, 8, False, 1e-5, True)
    y = norm_act.norm_act_fwd(*params, None, None, *stats, *options)[0]
    if kind == GROUP:  # by statistics that say nothing
        v = (last * weight.double() + bias.double()) * (1 + scale) + scale
        close(y, v * v.sigmoid())
    else:
        close(y, norm_act_ref(last.view(1, 1, rows, 1, c), weight.double(), bias.double(),
                              kind=name, scale=scale, shift=scale, eps=1e-5))  # fmt: skip
    dy = torch.empty_like(x)
    tail(dy, rows, c, 2)
    norm_act.norm_act_bwd(dy, *params, None, *stats, *options, True, False, True, True)


# So many programs that one of its backward, which walks over tiles, has a few; the last tile is the
# last program's.
@pytest.mark.parametrize("sampled", [30_000], indirect=True)
def test_temporal_block():
    b, f, c, heads, d = 3 * 8 * 120_000, 16, 64, 8, 32
    x = huge(b, f, 1, 1, c)
    last = tail(x, f, c).view(1, f, 1, 1, c).requires_grad_()
    weight, bias = draw(c).to(BF16), draw(heads, f, f)
    qkv, out = (draw(3 * heads * d, c) / 8).to(BF16), (draw(c, heads * d) / 16).to(BF16)
    options = AttentionOptions(bias)
    args = (x, weight, None, qkv, None, out, None, heads, 1e-5, options)
    y = temporal_block.temporal_block_fwd(*args)
    expected = attention_block_ref(
        last, weight.double(), qkv.double(), out.double(), core="time", heads=heads,
        bias=bias.double(),
    )  # fmt: skip
    close(y, expected)
    dy = torch.empty_like(x)
    dlast = tail(dy, f, c, 2)
    found = temporal_block.temporal_block_bwd(dy, *args, False, False, False, False, False)
    expected.backward(dlast.view(expected.shape))
    close(found[0], last.grad)


def test_linear_attention():
    qkv, scale = huge(45_000, 1, 8, 8, 3, 8, 32), 32**-0.5
    last = tail(qkv, 64, 768).view(1, 1, 8, 8, 3, 8, 32).requires_grad_()
    out, *saved = linear_attention.linear_attention_fwd(qkv, scale)
    expected = linear_attention_ref(last, sm_scale=scale)
    close(out, expected)
    dout = torch.empty_like(out)
    dlast = tail(dout, 64, 256, 2)
    found = linear_attention.linear_attention_bwd(dout, qkv, *saved, scale)
    expected.backward(dlast.view(expected.shape))
    close(found, last.grad)


# One head: the last program of each launch has all of the last frame.
def test_linear_attention_block():
    c, heads, d = 64, 1, 32
    x = huge(600_000, 1, 8, 8, c)
    last = tail(x, 64, c).view(1, 1, 8, 8, c).requires_grad_()
    weight, qkv = draw(c).to(BF16), (draw(3 * heads * d, c) / 8).to(BF16)
    out = (draw(c, heads * d) / 8).to(BF16)
    args = (x, weight, None, qkv, out, None)
    y, *saved = linear_attention_block.linear_attention_block_fwd(*args, heads, 1e-5)
    expected = attention_block_ref(
        last, weight.double(), qkv.double(), out.double(), core="linear", heads=heads
    )
    close(y, expected)
    dy = torch.empty_like(x)
    dlast = tail(dy, 64, c, 2)
    found = linear_attention_block.linear_attention_block_bwd(
        dy, *args, *saved, heads, 1e-5, False, False, False
    )
    expected.backward(dlast.view(expected.shape))
    close(found[0], last.grad)


def test_linear_residual():
    rows, c, k = 34_000_000, 64, 16
    x, o, weight = huge(rows, c), torch.empty(rows, k, dtype=BF16), draw(c, k).to(BF16)
    last, inner = tail(x, 16, c), tail(o, 16, k, 2)
    y = linear_residual.linear_residual_fwd(x, o, weight, None)
    close(y, linear_residual_ref(last, inner, weight.double()))


@pytest.mark.parametrize("c", [64, 36], ids=["descriptors", "pointers"])
def test_space_conv(c):
    x = huge(1, 2**31 // (64 * 64 * c) + 3, 64, 64, c)
    last = tail(x, 4096, c).view(1, 1, 64, 64, c)
    weight = (
        (draw(c, c, 3, 3) / (3 * c**0.5)).to(BF16).contiguous(memory_format=torch.channels_last)
    )
    y = space_conv.space_conv_fwd(x, None, weight, None, None, 1)
    expected = space_conv_ref(last, weight.double(), None, None, 1, None, None)
    close(y, expected[..., -1:, -8:, :])  # the end of what the last CTA wrote


def test_guidance():
    z = huge(11_000, 3, 16, 64, 64, dtype=FP32)
    model = torch.empty_like(z)
    last, out = tail(z, 1, 4096), tail(model, 1, 4096, 2)
    coef = draw(11_000, 4)
    args = (z, model, coef, None, None, None, None, None, False)
    x_hat, _ = guidance.guidance_seed_fwd(*args)
    expected = coef[-1, 0].double() * last + coef[-1, 1].double() * out
    close(x_hat, expected.view(-1)[-512:], 1e-5)

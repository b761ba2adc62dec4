"""norm_linear, beside the suite: statistics far from zero, exactness, what a gradient costs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvdm.ops import norm_linear as op
from fastvdm.ops._call import select
from fastvdm.ops.norm_linear import (
    norm_linear,
    norm_linear_cost,
)
from fastvdm.reference.norm_linear import norm_linear_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByName, FallbackError, explain
from fastvdm.testing import (
    assert_close3,
    grads,
    make_exact_operand,
)

NAMES = ("x", "norm_weight", "weight", "norm_bias", "bias")
ODD = (2, 3, 1, 11, 300), 130, True  # (B, F, H, W, C), N, biases


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def _inputs(shape, n, biases, dtype, device, low=None):
    generator = torch.Generator().manual_seed(3)
    c, low = shape[-1], low or dtype

    def randn(*size, scale=1.0, shift=0.0, dtype=dtype):
        t = torch.randn(size, generator=generator, dtype=torch.float64) * scale + shift
        return t.to(device, dtype)

    return [
        randn(*shape, scale=2.0, shift=0.5),
        randn(c, scale=0.25, shift=1.0),
        randn(n, c, scale=c**-0.5, dtype=low),
        randn(c, scale=0.25) if biases else None,
        randn(n, scale=0.25, dtype=low) if biases else None,
    ]


def _call(fn, **options):
    return lambda x, norm_weight, weight, norm_bias, bias: fn(
        x, norm_weight, weight, norm_bias=norm_bias, bias=bias, **options
    )


@pytest.mark.parametrize("mean", [1e4, -1e4])
@pytest.mark.parametrize("c", [17, 512])
def test_mean_far_above_deviation(c, mean, device):
    """1e4 +- 1 in fp32: x - mean keeps the digits of x."""
    inputs = _inputs((1, 3, 2, 5, c), 20, True, torch.float32, device)
    inputs[0] = torch.randn_like(inputs[0]) + mean
    out = _call(norm_linear)(*inputs)
    wide = _call(norm_linear_ref)(*(t.double() for t in inputs))
    assert (out - wide).abs().max() < 2e-5 * wide.abs().max()
    inputs[0][..., 0] = -mean  # the first value, which the statistics are taken from, far away
    out = _call(norm_linear)(*inputs)
    wide = _call(norm_linear_ref)(*(t.double() for t in inputs))
    assert (out - wide).abs().max() < 2e-5 * wide.abs().max()


def test_exact(device):
    """Rows of +-1 normalise to themselves; small integers multiply exactly."""
    x = make_exact_operand((2, 1, 3, 7, 36), high=1, seed=1)
    x = torch.where(x == 0, 1.0, x)
    x = torch.cat((x, -x), dim=-1)  # mean 0, variance 1
    weight, bias = make_exact_operand((133, 72), seed=2), make_exact_operand((133,), seed=3)
    gain, offset = make_exact_operand((72,), seed=4), make_exact_operand((72,), seed=5)
    args = [t.to(device) for t in (x, gain, weight, offset, bias)]
    out = _call(norm_linear, eps=1e-12)(*args)
    assert torch.equal(out.cpu(), (x * gain + offset) @ weight.t() + bias)


def test_rows_do_not_leak(device):
    inputs = _inputs(*ODD, torch.float32, device)
    inputs[0][1, 2, 0, 3, 7] = torch.nan
    out = _call(norm_linear)(*inputs)
    assert torch.isnan(out).any(-1).nonzero().tolist() == [[1, 2, 0, 3]]
    assert torch.isnan(out[1, 2, 0, 3]).all()


@pytest.mark.parametrize("trained", [(), ("norm_weight", "norm_bias"), ("weight",), ("bias",)])
def test_frozen_weights(trained, device, monkeypatch):
    """What is not trained is not asked for, and x is normalised again for ``weight`` alone."""
    from fastvdm.kernels import norm_linear as kernels

    inputs = _inputs(*ODD, torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in inputs]
    dout = torch.randn(*ODD[0][:-1], ODD[1], device=device)
    _, full = grads(_call(norm_linear), leaves, dout)

    seen, again = [], []
    launch, normalise = kernels.norm_linear_bwd, kernels.norm_act_fwd

    def spy(*args):
        seen.append(args[-4:])
        return launch(*args)

    monkeypatch.setattr(kernels, "norm_linear_bwd", spy)
    monkeypatch.setattr(kernels, "norm_act_fwd", lambda *a: again.append(1) or normalise(*a))
    leaves = [t.clone().requires_grad_(n in ("x", *trained)) for n, t in zip(NAMES, inputs)]
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(_call(norm_linear)(*leaves), wanted, dout)
    assert all(
        torch.equal(a, b)
        for a, b in zip(found, [g for g, t in zip(full, leaves) if t.requires_grad])
    )
    assert seen == [(True, "norm_weight" in trained, "weight" in trained, "bias" in trained)]
    assert len(again) == ("weight" in trained)


def test_too_wide(device):
    x = torch.zeros(1, 1, 1, 1, 4104, device=device)
    assert "above 4096" in explain("norm_linear", x)["triton"]
    with pytest.raises(FallbackError, match="above 4096"):
        select("norm_linear", x.device, x)


def test_fp64_on_a_gpu_is_the_references():
    with FakeTensorMode():
        x = torch.empty(1, 1, 1, 1, 8, device="cuda", dtype=torch.float64)
        assert explain("norm_linear", x)["triton"] == "fp64 has no kernel"
        assert isinstance(explain("norm_linear", x.half())["triton"], ByName)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_elsewhere_it_is_the_parts(backend, monkeypatch):
    """No kernel is missed and no op of ours is called: norm_act, then linear."""
    monkeypatch.setattr(op, "norm_linear_fwd", None)
    inputs = _inputs((1, 2, 4, 8, 64), 192, False, torch.float32, "cpu")
    with use_backend(backend):
        out = norm_linear(*inputs[:3])
    wide = norm_linear_ref(*(t.double() for t in inputs[:3]))
    assert_close3(out, norm_linear_ref(*inputs[:3]), wide)


BAD = {
    "rank": (dict(x=(2, 3, 24)), ValueError, "x must be"),
    "pixels": (dict(x=(1, 2, 0, 3, 24)), ValueError, "only the batch"),
    "eps": (dict(eps=0.0), ValueError, "eps must be positive"),
    "integers": (dict(kind=torch.int64), TypeError, "x must be fp32"),
    "fp64": (dict(kind=torch.float64), TypeError, "fp64 only throughout"),
}


@pytest.mark.parametrize("change, error, text", BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    kind, eps = change.get("kind", torch.float32), change.get("eps", 1e-5)
    x = torch.zeros(change.get("x", (1, 2, 2, 3, 24)), dtype=kind)
    with pytest.raises(error, match=text):
        norm_linear(x, torch.zeros(24), torch.zeros(8, 24), eps=eps)


def test_cost():
    assert norm_linear_cost(10, 64, 192, 2) == (2 * 10 * 64 * 192, 2 * (10 * 256 + 64 * 192))
    back = norm_linear_cost(10, 64, 192, 2, x_itemsize=4, backward=True)
    assert back.bytes == 10 * (8 * 64 + 2 * 192) + 2 * 2 * 64 * 192


@pytest.mark.gpu
def test_many_rows(device):
    """Offsets beyond 2^31."""
    x = torch.randn(1, 1, 1, 3_000_000, 64, device=device, dtype=torch.bfloat16)
    weight = torch.randn(768, 64, device=device, dtype=torch.bfloat16)
    gain = torch.ones(64, device=device)
    out = norm_linear(x, gain, weight)[..., -3:, :]
    tail = x[..., -3:, :]
    wide = norm_linear_ref(tail.double(), gain.double(), weight.double())
    assert_close3(out, norm_linear_ref(tail, gain, weight), wide)

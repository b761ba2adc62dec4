"""linear_residual: the Triton kernel (interpreted without a GPU) against torch.

bf16 runs on a GPU only: the interpreter truncates it. What the two halves of a block share, such as
tiles and rows beyond them, is covered by norm_linear_test.py too.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvdm.ops import linear_residual as op
from fastvdm.ops.linear_residual import (
    linear_residual,
    linear_residual_bwd,
    linear_residual_cost,
    linear_residual_fwd,
)
from fastvdm.reference.linear_residual import linear_residual_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByName, explain
from fastvdm.testing import assert_close3, assert_parity, grads, make_exact_operand, opcheck_op

NAMES = ("x", "o", "weight", "bias")
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# x without its last axis, K, N, bias
CASES = {
    "one_row": ((1, 1, 1, 1), 5, 17, True),
    "narrow": ((2, 3, 1, 5), 9, 3, False),
    "tile": ((1, 2, 4, 16), 64, 64, False),
    "odd": ((2, 3, 1, 11), 130, 300, True),
    "wide": ((1, 5, 2, 7), 70, 512, True),
}


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


def _inputs(shape, k, n, bias, dtype, device, low=None):
    generator = torch.Generator().manual_seed(3)
    low = low or dtype

    def randn(*size, scale=1.0, dtype=low):
        t = torch.randn(size, generator=generator, dtype=torch.float64) * scale
        return t.to(device, dtype)

    return [
        randn(*shape, n, scale=2.0, dtype=dtype),
        randn(*shape, k),
        randn(n, k, scale=k**-0.5),
        randn(n, scale=0.25) if bias else None,
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype, device, poison):
    inputs = _inputs(*case, dtype, device)
    assert_parity(linear_residual, linear_residual_ref, inputs, names=NAMES)


@pytest.mark.parametrize("name", ["narrow", "odd"])
def test_mixed_precision(name, device, poison):
    """As under autocast: 16-bit operands added to an fp32 stream, which keeps its digits."""
    inputs = _inputs(*CASES[name], torch.float32, device, low=torch.float16)
    assert_parity(linear_residual, linear_residual_ref, inputs, names=NAMES)
    inputs[1].zero_()
    out = linear_residual(*inputs[:3])
    assert out.dtype == torch.float32 and torch.equal(out, inputs[0])


def test_autocast(device):
    inputs = _inputs(*CASES["odd"], torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast(device, torch.bfloat16 if GPU else torch.float16):
        out = linear_residual(*leaves)
        with use_backend("reference"):
            plain = linear_residual(*inputs)
    found = torch.autograd.grad(out.square().sum(), leaves)
    assert out.dtype == torch.float32 and all(g.dtype == torch.float32 for g in found)
    assert_close3(out, plain, linear_residual_ref(*(t.double() for t in inputs)))


def test_exact(device):
    shape, k, n = (2, 1, 3, 23), 77, 133
    x, o = make_exact_operand((*shape, n), seed=1), make_exact_operand((*shape, k), seed=2)
    weight, bias = make_exact_operand((n, k), seed=3), make_exact_operand((n,), seed=4)
    out = linear_residual(*(t.to(device) for t in (x, o, weight, bias)))
    assert torch.equal(out.cpu(), x + o @ weight.t() + bias)


@pytest.mark.parametrize("trained", [("x",), ("o",), ("x", "weight"), ("bias",)])
def test_frozen_weights(trained, device, monkeypatch):
    from fastvdm.kernels import linear_residual as kernels

    inputs = _inputs(*CASES["odd"], torch.float32, device)
    dout = torch.randn_like(inputs[0])
    _, full = grads(linear_residual, inputs, dout)
    seen, launch = [], kernels.linear_residual_bwd

    def spy(*args):
        found = launch(*args)
        seen.append((args[-3:], [t.numel() > 0 for t in found]))
        return found

    monkeypatch.setattr(kernels, "linear_residual_bwd", spy)
    leaves = [t.clone().requires_grad_(n in trained) for n, t in zip(NAMES, inputs)]
    wanted = [t for t in leaves if t.requires_grad]
    found = torch.autograd.grad(linear_residual(*leaves), wanted, dout)
    chosen = [g for g, t in zip(full, leaves) if t.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(found, chosen))
    need = [name in trained for name in NAMES[1:]]
    assert seen == ([(tuple(need), need)] if any(need) else [])


def test_strides_and_expanded_gradient(device):
    x, o, weight, _ = _inputs(*CASES["tile"], torch.float32, device)
    apart = [torch.stack((t, t), dim=-1)[..., 0].requires_grad_() for t in (x, o, weight)]
    together = [t.clone().requires_grad_() for t in (x, o, weight)]
    out, plain = linear_residual(*apart), linear_residual(*together)
    assert torch.equal(out, plain)
    found = torch.autograd.grad(out.sum(), apart)
    wanted = torch.autograd.grad(plain, together, torch.ones_like(plain))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.skipif(GPU, reason="fp64 is the reference's there")
def test_gradcheck():
    leaves = [t.requires_grad_() for t in _inputs((1, 2, 1, 2), 5, 4, True, torch.float64, "cpu")]
    assert torch.autograd.gradcheck(linear_residual, leaves, nondet_tol=0.0, fast_mode=True)


def test_opcheck(device):
    args = _inputs((2, 3, 1, 4), 5, 7, True, torch.float32, device)
    opcheck_op(linear_residual_fwd, (*(t.clone().requires_grad_() for t in args), "triton"))
    dy = torch.randn_like(args[0])
    for flags in ((True,) * 3, (False, True, False), (True, False, True)):
        opcheck_op(linear_residual_bwd, (dy, *args[1:], *flags, "triton"))


def test_compile(device):
    torch._dynamo.reset()
    inputs = _inputs(*CASES["narrow"], torch.float32, device)
    compiled = torch.compile(linear_residual, backend="aot_eager", fullgraph=True)
    outs = [grads(fn, inputs, inputs[0]) for fn in (compiled, linear_residual)]
    assert torch.equal(outs[0][0][0], outs[1][0][0])
    assert all(torch.equal(a, b) for a, b in zip(*(g for _, g in outs)) if a is not None)


def test_autocast_casts_whatever_comes(device):
    """As F.linear does, also where the weight already has autocast's type."""
    low = torch.bfloat16 if GPU else torch.float16
    x, o, weight, bias = _inputs(*CASES["narrow"], torch.float32, device)
    with torch.autocast(device, low):
        found = linear_residual(x, o, weight.to(low), bias)
        expected = linear_residual(x, o.to(low), weight.to(low), bias)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_double_backward_is_refused(device):
    x, o, weight, _ = _inputs(*CASES["narrow"], torch.float32, device)
    o.requires_grad_()
    y = linear_residual(x, o, weight)
    (grad,) = torch.autograd.grad(y.square().sum(), o, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


def test_empty(device):
    inputs = _inputs(*CASES["odd"], torch.float32, device)
    leaves = [t[:0] if i < 2 else t for i, t in enumerate(inputs)]
    leaves = [t.requires_grad_() for t in leaves]
    out = linear_residual(*leaves)
    assert out.shape == (0, 3, 1, 11, 300)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_fp64_on_a_gpu_is_the_references():
    with FakeTensorMode():
        x = torch.empty(1, 8, device="cuda", dtype=torch.float64)
        assert explain("linear_residual", x)["triton"] == "fp64 has no kernel"
        assert isinstance(explain("linear_residual", x.half())["triton"], ByName)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_elsewhere_it_is_the_parts(backend, monkeypatch):
    monkeypatch.setattr(op, "linear_residual_fwd", None)
    inputs = _inputs(*CASES["tile"], torch.float32, "cpu")
    with use_backend(backend):
        assert torch.equal(linear_residual(*inputs), linear_residual_ref(*inputs))


BAD = {
    "rows": (dict(o=(2, 5, 6)), ValueError, "o must be"),
    "weight": (dict(weight=(4, 3, 6)), ValueError, "weight must be"),
    "features": (dict(weight=(5, 6)), ValueError, "x must be"),
    "bias": (dict(bias=(3,)), ValueError, "bias must be"),
    "o": (dict(kind=torch.float16), TypeError, "o must be"),
    "fp64": (dict(wide=torch.float64), TypeError, "fp64 only throughout"),
}


@pytest.mark.parametrize("change, error, text", BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    x = torch.zeros(2, 3, 4, dtype=change.get("wide", torch.float32))
    o = torch.zeros(change.get("o", (2, 3, 6)), dtype=change.get("kind", torch.float32))
    weight, bias = torch.zeros(change.get("weight", (4, 6))), change.get("bias")
    with pytest.raises(error, match=text):
        linear_residual(x, o, weight, None if bias is None else torch.zeros(bias))


def test_cost():
    assert linear_residual_cost(10, 64, 192, 2) == (2 * 10 * 64 * 192, 2 * (10 * 448 + 64 * 192))
    back = linear_residual_cost(10, 64, 192, 2, x_itemsize=4, backward=True)
    assert back.bytes == 10 * (4 * 192 + 2 * 128) + 2 * 2 * 64 * 192


@pytest.mark.gpu
def test_many_rows(device):
    """Offsets beyond 2^31."""
    make = dict(device=device, dtype=torch.bfloat16)
    o, weight = torch.randn(3_000_000, 64, **make), torch.randn(768, 64, **make)
    x = torch.randn(3_000_000, 768, **make)
    out, tail = linear_residual(x, o, weight)[-3:], (x[-3:], o[-3:], weight)
    wide = linear_residual_ref(*(t.double() for t in tail))
    assert_close3(out, linear_residual_ref(*tail), wide)

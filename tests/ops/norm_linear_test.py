"""norm_linear: the Triton kernel (interpreted without a GPU) against torch.

bf16 runs on a GPU only: the interpreter truncates it. Widths cross the blocks of the inner axis
(32 and 64) and of the columns (64 and 128), rows those of a tile; their products add no branch.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvdm.ops import norm_linear as op
from fastvdm.ops._call import select
from fastvdm.ops.norm_linear import (
    norm_linear,
    norm_linear_bwd,
    norm_linear_cost,
    norm_linear_fwd,
)
from fastvdm.reference.norm_linear import norm_linear_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByName, FallbackError, explain
from fastvdm.testing import (
    assert_close3,
    assert_parity,
    grads,
    make_exact_operand,
    opcheck_op,
)

NAMES = ("x", "norm_weight", "weight", "norm_bias", "bias")
GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU
# (B, F, H, W, C), N, biases
CASES = {
    "one_row": ((1, 1, 1, 1, 17), 5, True),
    "narrow": ((2, 3, 1, 5, 3), 9, False),
    "tile": ((1, 2, 4, 8, 64), 192, False),
    "odd": ((2, 3, 1, 11, 300), 130, True),
    "wide": ((1, 5, 2, 7, 512), 70, True),
    "shares": ((1, 1, 3, 1, 40), 1000, True),
}


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype, device, poison):
    assert_parity(
        _call(norm_linear), _call(norm_linear_ref), _inputs(*case, dtype, device), names=NAMES
    )


@pytest.mark.parametrize("name", ["narrow", "odd"])
def test_mixed_precision(name, device, poison):
    """As under autocast: an fp32 residual stream into a 16-bit projection."""
    inputs = _inputs(*CASES[name], torch.float32, device, low=torch.float16)
    assert norm_linear(*inputs[:3]).dtype == torch.float16
    assert_parity(_call(norm_linear), _call(norm_linear_ref), inputs, names=NAMES)


def test_autocast(device):
    """fp32 parameters: the product in 16 bits, their gradients in fp32."""
    inputs = _inputs(*CASES["odd"], torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in inputs]
    with torch.autocast(device, torch.bfloat16 if GPU else torch.float16):
        out = _call(norm_linear)(*leaves)
        with use_backend("reference"):
            plain = _call(norm_linear)(*inputs)
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    assert out.dtype == plain.dtype and all(g.dtype == torch.float32 for g in found)
    wide = _call(norm_linear_ref)(*(t.double() for t in inputs))
    assert_close3(out, plain, wide)


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
    inputs = _inputs(*CASES["odd"], torch.float32, device)
    inputs[0][1, 2, 0, 3, 7] = torch.nan
    out = _call(norm_linear)(*inputs)
    assert torch.isnan(out).any(-1).nonzero().tolist() == [[1, 2, 0, 3]]
    assert torch.isnan(out[1, 2, 0, 3]).all()


@pytest.mark.parametrize("trained", [(), ("norm_weight", "norm_bias"), ("weight",), ("bias",)])
def test_frozen_weights(trained, device, monkeypatch):
    """What is not trained is not asked for, and x is normalised again for ``weight`` alone."""
    from fastvdm.kernels import norm_linear as kernels

    inputs = _inputs(*CASES["odd"], torch.float32, device)
    leaves = [t.clone().requires_grad_() for t in inputs]
    dout = torch.randn(*CASES["odd"][0][:-1], CASES["odd"][1], device=device)
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


def test_strides_and_expanded_gradient(device):
    inputs = _inputs(*CASES["tile"], torch.float32, device)
    x = torch.stack((inputs[0], inputs[0]), dim=-1)[..., 0].requires_grad_()
    weight = inputs[2].t().contiguous().t()
    assert not x.is_contiguous() and not weight.is_contiguous()
    out = norm_linear(x, inputs[1], weight)
    (dx,) = torch.autograd.grad(out.sum(), x)
    y = inputs[0].clone().requires_grad_()
    plain = norm_linear(y, inputs[1], inputs[2])
    assert torch.equal(out, plain)
    assert torch.equal(dx, torch.autograd.grad(plain, y, torch.ones_like(plain))[0])


def test_deterministic(device):
    runs = []
    for _ in range(2):
        leaves = [
            t.clone().requires_grad_() for t in _inputs(*CASES["wide"], torch.float16, device)
        ]
        out = _call(norm_linear)(*leaves)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.skipif(GPU, reason="fp64 is the reference's there")
def test_gradcheck():
    inputs = _inputs((1, 2, 1, 2, 5), 4, True, torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(_call(norm_linear), leaves, nondet_tol=0.0, fast_mode=True)


def test_opcheck(device):
    x, gain, weight, offset, bias = _inputs((2, 3, 1, 4, 7), 5, True, torch.float32, device)
    args = (x, gain, offset, weight, bias, 1e-5)
    opcheck_op(
        norm_linear_fwd,
        (
            *(t.clone().requires_grad_() if isinstance(t, torch.Tensor) else t for t in args),
            "triton",
        ),
    )
    dy = torch.randn(2, 3, 1, 4, 5, device=device)
    for flags in ((True,) * 4, (False, True, False, True), (True, False, True, False)):
        opcheck_op(norm_linear_bwd, (dy, *args, *flags, "triton"))


def test_compile_without_recompiling(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs = _inputs(*CASES["narrow"], torch.float32, device)

    def run(x):
        return norm_linear(x, *inputs[1:3])

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for frames in (6, 7, 9):
        x = torch.randn(2, frames, 4, 5, 3, device=device).requires_grad_()
        out, plain = compiled(x), run(x)
        assert torch.equal(out, plain)
        found, wanted = (torch.autograd.grad(t.square().sum(), x)[0] for t in (out, plain))
        assert torch.equal(found, wanted)
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def test_double_backward_is_refused(device):
    inputs = _inputs(*CASES["narrow"], torch.float32, device)
    x = inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(norm_linear(x, *inputs[1:3]).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


def test_empty(device):
    inputs = _inputs(*CASES["odd"], torch.float32, device)
    leaves = [inputs[0][:0].requires_grad_(), *(t.requires_grad_() for t in inputs[1:])]
    out = _call(norm_linear)(*leaves)
    assert out.shape == (0, 3, 1, 11, 130)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


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
    inputs = _inputs(*CASES["tile"], torch.float32, "cpu")
    with use_backend(backend):
        out = norm_linear(*inputs[:3])
    wide = norm_linear_ref(*(t.double() for t in inputs[:3]))
    assert_close3(out, norm_linear_ref(*inputs[:3]), wide)


BAD = {
    "rank": (dict(x=(2, 3, 24)), ValueError, "x must be"),
    "width": (dict(x=(1, 2, 2, 3, 25)), ValueError, "weight must be"),
    "pixels": (dict(x=(1, 2, 0, 3, 24)), ValueError, "only the batch"),
    "norm": (dict(norm_weight=(23,)), ValueError, "norm_weight must be"),
    "bias": (dict(bias=(7,)), ValueError, "bias must be"),
    "eps": (dict(eps=0.0), ValueError, "eps must be positive"),
    "integers": (dict(kind=torch.int64), TypeError, "x must be fp32"),
    "fp64": (dict(kind=torch.float64), TypeError, "fp64 only throughout"),
}


@pytest.mark.parametrize("change, error, text", BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    kind, eps = change.get("kind", torch.float32), change.get("eps", 1e-5)
    x = torch.zeros(change.get("x", (1, 2, 2, 3, 24)), dtype=kind)
    gain, bias = torch.zeros(change.get("norm_weight", (24,))), change.get("bias")
    with pytest.raises(error, match=text):
        norm_linear(
            x, gain, torch.zeros(8, 24), bias=None if bias is None else torch.zeros(bias), eps=eps
        )


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

"""linear: the C++ kernel, asked for by name on whatever machine, against torch's own product."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvdm import UNet3D
from fastvdm.layers.attention import AxisAttention, LinearAttention
from fastvdm.layers.norm import Norm
from fastvdm.ops import linear as op
from fastvdm.ops._call import BODIES, select
from fastvdm.ops.linear import linear, linear_bwd, linear_cost, linear_fwd
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.runtime import extension
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByName, FallbackError, explain
from fastvdm.testing import assert_parity, cpu_isas, grads, make_exact_operand, opcheck_op

NAMES = ("x", "weight", "bias")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# x without its last axis, K, N, bias
CASES = {
    "vector": ((), 5, 17, True),
    "one_row": ((1, 1), 33, 3, False),
    "odd": ((2, 3, 11), 130, 300, True),
    "wide": ((70,), 24, 401, True),
}
kernel = pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"no C++ extension: {extension.reason_off()}"
)


@pytest.fixture
def named():
    with use_backend("cpu", strict=True):
        yield


@pytest.fixture(params=cpu_isas() or ["none"])
def isa(request, named):
    assert extension.set_cpu_isa(request.param) == request.param
    yield request.param
    extension.set_cpu_isa("auto")


def _inputs(shape, k, n, bias, dtype=torch.float32):
    tensors = [torch.randn(*shape, k) * 2, torch.randn(n, k) / k**0.5, torch.randn(n)]
    return [t.to(dtype) if i < 2 or bias else None for i, t in enumerate(tensors)]


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(isa, case, dtype, poison, monkeypatch):
    calls, call = [], BODIES["linear_fwd"]
    monkeypatch.setitem(BODIES, "linear_fwd", lambda *args: calls.append(1) or call(*args))
    assert_parity(linear, F.linear, _inputs(*case, dtype), names=NAMES)
    assert calls  # the kernel, not torch's product


@kernel
def test_exact(isa):
    x, weight = make_exact_operand((2, 3, 77), seed=1), make_exact_operand((133, 77), seed=2)
    bias = make_exact_operand((133,), seed=3)
    assert torch.equal(linear(x, weight, bias), x @ weight.t() + bias)


@kernel
def test_strides_and_expanded_gradient(named):
    inputs = _inputs(*CASES["odd"], torch.float16)
    apart = [torch.stack((t, t), dim=-1)[..., 0].requires_grad_() for t in inputs]
    apart[1] = inputs[1].t().contiguous().t().requires_grad_()
    together = [t.clone().requires_grad_() for t in inputs]
    out, plain = linear(*apart), linear(*together)
    assert torch.equal(out, plain)
    found = torch.autograd.grad(out.sum(), apart)
    wanted = torch.autograd.grad(plain, together, torch.ones_like(plain))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))


@kernel
def test_same_bits_again(named):
    inputs = _inputs(*CASES["odd"], torch.bfloat16)
    runs = [grads(linear, inputs, torch.ones(2, 3, 11, 300)) for _ in range(2)]
    assert torch.equal(runs[0][0][0], runs[1][0][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1]))


@kernel
@pytest.mark.parametrize("trained", [("x",), ("weight",), ("bias",), ("x", "bias")], ids=str)
def test_each_gradient_alone(trained, named, monkeypatch):
    """What is frozen is not computed."""
    inputs = _inputs(*CASES["odd"])
    dout = torch.randn(2, 3, 11, 300)
    _, full = grads(linear, inputs, dout)
    seen, call = [], BODIES["linear_bwd"]
    spy = lambda *args: seen.append(call(*args)) or seen[-1]  # noqa: E731
    monkeypatch.setitem(BODIES, "linear_bwd", spy)
    leaves = [t.clone().requires_grad_(n in trained) for n, t in zip(NAMES, inputs)]
    found = torch.autograd.grad(linear(*leaves), [t for t in leaves if t.requires_grad], dout)
    wanted = [g for n, g in zip(NAMES, full) if n in trained]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert [t.numel() > 0 for t in seen[0]] == [n in trained for n in NAMES]
    with torch.no_grad():
        assert not linear(*leaves).requires_grad


@kernel
def test_empty(named):
    x, weight, bias = _inputs((0, 3), 5, 7, True)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    out = linear(*leaves)
    assert out.shape == (0, 3, 7)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


@kernel
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low, named):
    leaves = [t.requires_grad_() for t in _inputs(*CASES["odd"])]
    with torch.autocast("cpu", low):
        out = linear(*leaves)
        mixed = linear(leaves[0], leaves[1].to(low), leaves[2])
    assert out.dtype == low and torch.equal(out, mixed)
    assert torch.equal(out, linear(*(t.to(low) for t in leaves)))
    found = torch.autograd.grad(out.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)


@kernel
def test_opcheck():
    x, weight, bias = (t.requires_grad_() for t in _inputs((2, 3, 4), 5, 7, True))
    opcheck_op(linear_fwd, (x, weight, bias, "cpu"))
    opcheck_op(linear_fwd, (x, weight, None, "cpu"))
    dy = torch.randn(2, 3, 4, 7)
    for needs in ((True,) * 3, (False, True, False), (True, False, True)):
        opcheck_op(linear_bwd, (dy, x.detach(), weight.detach(), *needs, "cpu"))


@kernel
def test_compile(named):
    torch._dynamo.reset()
    inputs = _inputs(*CASES["odd"], torch.float16)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    dout = torch.randn(2, 3, 11, 300)
    found, wanted = grads(compiled, inputs, dout), grads(linear, inputs, dout)
    for a, b in zip((*found[0], *found[1]), (*wanted[0], *wanted[1])):
        assert torch.equal(a, b)


@kernel
def test_double_backward_is_refused(named):
    x, weight, _ = (t if t is None else t.requires_grad_() for t in _inputs((3,), 5, 7, False))
    (grad,) = torch.autograd.grad(linear(x, weight).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="linear has no double backward"):
        grad.sum().backward()


def test_who_takes_it(monkeypatch):
    """Left to itself: the kernel where the machine only emulates the type, else torch's product."""
    half, device = torch.float16, torch.device("cpu")
    monkeypatch.setattr(op, "EMULATED", (half,))
    reasons = explain("linear", half)
    assert reasons["triton"] == "no kernel for this op" and reasons["cpu"] == extension.reason_off()
    if extension.reason_off() is None:
        assert select("linear", device, half) == "cpu"
        assert isinstance(explain("linear", torch.bfloat16)["cpu"], ByName)
        assert select("linear", device, torch.bfloat16) == "torch"
        with use_backend("cpu", strict=True):
            assert select("linear", device, torch.float32) == "cpu"
            with pytest.raises(FallbackError, match="linear fell back to torch's own: cpu: .*64"):
                select("linear", device, torch.float64)
    monkeypatch.setattr(op, "EMULATED", ())
    assert select("linear", device, half) == "torch"
    monkeypatch.setitem(BODIES, "linear_fwd", None)
    inputs = _inputs(*CASES["odd"])
    for backend in ("auto", "reference", "triton"):
        with use_backend(backend, strict=True):
            assert torch.equal(linear(*inputs), F.linear(*inputs))


# --- one answer on every machine -----------------------------------------------------------------

BACKENDS = ["auto", "reference"] + ["cpu"] * (extension.reason_off() is None)
X, W, B = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
BAD = {
    "features": ((X, torch.zeros(5, 3)), ValueError, r"x must be \(\.\.\., 3\), got \(2, 3, 4\)"),
    "scalar": ((torch.tensor(1.0), W), ValueError, r"x must be \(\.\.\., 4\), got \(\)"),
    "vector_weight": ((X, torch.zeros(4)), ValueError, r"weight must be \(N, K\), got \(4,\)"),
    "no_features": ((X, torch.zeros(0, 4)), ValueError, r"weight must be \(N, K\), got \(0, 4\)"),
    "bias_shape": ((X, W, torch.zeros(4)), ValueError, r"bias must be \(5,\), got \(4,\)"),
    "bias_matrix": ((X, W, torch.zeros(1, 5)), ValueError, r"bias must be \(5,\)"),
    "bias_device": ((X, W, B.to("meta")), ValueError, "bias must be on cpu like x, got meta"),
    "weight_device": ((X, W.to("meta")), ValueError, "weight must be on cpu like x, got meta"),
    "integer_weight": (
        (X, W.char()),
        TypeError,
        "weight must be fp32.*, got torch.int8",
    ),
    "integer_x": ((X.long(), W), TypeError, "x must be fp32.*, got torch.int64"),
    "integer_bias": (
        (X, W, B.int()),
        TypeError,
        "bias must be fp32.*, got torch.int32",
    ),
    "half_x": ((X.half(), W), TypeError, "weight must be torch.float16 like x"),
    "half_weight": (
        (X, W.bfloat16()),
        TypeError,
        "weight must be torch.float32 like x",
    ),
    "half_bias": (
        (X, W, B.half()),
        TypeError,
        "bias must be torch.float32 like x",
    ),
    "wide_weight": (
        (X, W.double()),
        TypeError,
        "weight must be torch.float32 like x",
    ),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inputs, error, text", BAD.values(), ids=BAD)
def test_bad_input(inputs, error, text, backend):
    with use_backend(backend), pytest.raises(error, match=text):
        linear(*inputs)
    if error is TypeError and "is" in text.split()[:2]:
        with pytest.raises(RuntimeError):  # as torch's own
            F.linear(*inputs)


def test_autocast_mixes_all_but_fp64():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(X.half(), W, B.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(
            TypeError, match="weight must be torch.float64 like x, got torch.float32"
        ):
            linear(X.double(), W)


LOW = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", LOW)
def test_narrow_input_of_wide_layers(low, backend):
    """A 16-bit input of fp32 layers raises outside autocast, whatever multiplies, as F.linear does;
    an fp32 stream over 16-bit projections is a supported mix."""
    norm = torch.ones(8)
    x, o = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 3, 4, 6)
    w, bias = torch.randn(8, 6), torch.randn(8)
    layers = [LinearAttention(Norm("layer", 8), 2, 4), LinearAttention(Norm("rms", 8), 2, 4)]
    layers += [AxisAttention(a, Norm("layer", 8), 2, 4, bias=True) for a in ("time", "space")]
    with use_backend(backend):
        for layer in layers:
            with pytest.raises(TypeError, match=f"{low}.*float32|float32.*{low}"):
                layer(x.to(low))
            layer.qkv.to(low), layer.out.to(low)
            if layer.norm.kind == "layer" and getattr(layer, "axis", "time") == "time":
                assert layer(x).dtype == torch.float32
                assert layer.to(low)(x.to(low)).dtype == low
        calls = (
            lambda: norm_linear(x.to(low), norm, torch.randn(5, 8)),
            lambda: norm_linear(x, norm, torch.randn(5, 8).to(low), bias=torch.randn(5)),
            lambda: linear_residual(x.to(low), o, w),
            lambda: linear_residual(x, o.to(low), w.to(low), bias),
            lambda: linear_residual(x, o.to(low), w),
        )
        for call in calls:
            with pytest.raises(TypeError, match=f"{low}"):
                call()
        found = linear_residual(x, o.to(low), w.to(low), bias.to(low))
        assert found.dtype == torch.float32
        for other in (torch.float64, *(t for t in LOW if t != low)):
            with pytest.raises(TypeError, match=f"{other}"):
                linear_residual(x.to(other), o.to(low), w.to(low))


@pytest.mark.parametrize("low", LOW)
def test_narrow_input_of_a_wide_network(low):
    model = UNet3D(8, dim_mults=(1, 2), attn_heads=2, cond_dim=3)
    x, time, cond = torch.randn(1, 3, 2, 4, 4), torch.tensor([1]), torch.randn(1, 3)
    with pytest.raises(TypeError, match=f"weight must be {low} like x, got torch.float32"):
        model(x.to(low), time, cond)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x.to(low), time, cond).isfinite().all()


def test_cost():
    assert linear_cost(10, 64, 192, 2) == (2 * 10 * 64 * 192, 2 * (10 * 256 + 64 * 192))


def test_a_weight_of_another_kind_goes_to_torch():
    """As quantisation and sharding make them: a tensor that is no plain one."""
    from torch.testing._internal.two_tensor import TwoTensor

    x, w = torch.randn(5, 7), torch.randn(3, 7)
    with use_backend("cpu"):
        y = linear(TwoTensor(x, x), TwoTensor(w, 2 * w))
    assert isinstance(y, TwoTensor) and torch.equal(y.b, F.linear(x, 2 * w))

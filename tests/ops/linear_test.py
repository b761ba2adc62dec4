"""linear, beside the suite: who takes a call, one answer on every machine, narrow inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastvdm import UNet3D
from fastvdm.layers.attention import Attention
from fastvdm.layers.norm import Norm
from fastvdm.ops import linear as op
from fastvdm.ops._call import BODIES, select
from fastvdm.ops.linear import linear, linear_cost
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.runtime import extension
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByName, FallbackError, explain


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
    inputs = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)
    for backend in ("auto", "reference", "triton"):
        with use_backend(backend, strict=True):
            assert torch.equal(linear(*inputs), F.linear(*inputs))


# --- one answer on every machine -----------------------------------------------------------------

BACKENDS = ["auto", "reference"] + ["cpu"] * (extension.reason_off() is None)
X, W, B = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5)
BAD = {
    "features": ((X, torch.zeros(5, 3)), r"x must be \(\.\.\., 3\), got \(2, 3, 4\)"),
    "scalar": ((torch.tensor(1.0), W), r"x must be \(\.\.\., 4\), got \(\)"),
    "vector_weight": ((X, torch.zeros(4)), r"weight must be \(N, K\), got \(4,\)"),
    "no_features": ((X, torch.zeros(0, 4)), r"weight must be \(N, K\), got \(0, 4\)"),
    "bias_shape": ((X, W, torch.zeros(4)), r"bias must be \(5,\), got \(4,\)"),
    "bias_matrix": ((X, W, torch.zeros(1, 5)), r"bias must be \(5,\)"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inputs, text", BAD.values(), ids=BAD)
def test_bad_input(inputs, text, backend):
    with use_backend(backend), pytest.raises(ValueError, match=text):
        linear(*inputs)


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
    x, o = torch.randn(1, 2, 3, 4, 8), torch.randn(1, 2, 3, 4, 6)
    w, bias = torch.randn(8, 6), torch.randn(8)
    layers = [Attention("linear", Norm(kind, 8), 2, 4) for kind in ("layer", "rms")]
    layers += [Attention(a, Norm("layer", 8), 2, 4, bias=True) for a in ("time", "space")]
    with use_backend(backend):
        for layer in layers:
            with pytest.raises(TypeError, match=f"{low}.*float32|float32.*{low}"):
                layer(x.to(low))
            layer.qkv.to(low), layer.out.to(low)
            if layer.norm.kind == "layer" and layer.core != "space":
                assert layer(x).dtype == torch.float32
                assert layer.to(low)(x.to(low)).dtype == low
        calls = (
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

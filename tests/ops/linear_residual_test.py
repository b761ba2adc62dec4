"""linear_residual, beside the suite: autocast, who takes a call, what is refused, costs."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvdm.ops import linear_residual as op
from fastvdm.ops.linear_residual import (
    linear_residual,
    linear_residual_cost,
)
from fastvdm.reference.linear_residual import linear_residual_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByDesign, explain
from fastvdm.testing import assert_close3

GPU = torch.cuda.is_available()


def test_autocast_casts_whatever_comes(device):
    """As F.linear does, also where the weight already has autocast's type."""
    low = torch.bfloat16 if GPU else torch.float16
    x, o = torch.randn(2, 5, 3, device=device), torch.randn(2, 5, 9, device=device)
    weight, bias = torch.randn(3, 9, device=device), torch.randn(3, device=device)
    with use_backend("triton"), torch.autocast(device, low):
        found = linear_residual(x, o, weight.to(low), bias)
        expected = linear_residual(x, o.to(low), weight.to(low), bias)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_what_a_gpu_leaves_to_its_parts():
    def why(dtype: torch.dtype, depth: int) -> str | None:
        x = torch.empty(1, 8, device="cuda", dtype=dtype)
        return explain("linear_residual", x, torch.empty(8, depth, device="cuda"))["triton"]

    with FakeTensorMode():
        assert why(torch.float64, 8) == "fp64 has no kernel"
        assert why(torch.float16, 1024) is None
        assert isinstance(why(torch.float16, 1025), ByDesign)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_elsewhere_it_is_the_parts(backend, monkeypatch):
    monkeypatch.setattr(op, "linear_residual_fwd", None)
    inputs = torch.randn(2, 5, 3), torch.randn(2, 5, 9), torch.randn(3, 9)
    with use_backend(backend):
        torch.testing.assert_close(linear_residual(*inputs), linear_residual_ref(*inputs))


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
    with use_backend("triton"):
        out = linear_residual(x, o, weight)[-3:]
    tail = (x[-3:], o[-3:], weight)
    wide = linear_residual_ref(*(t.double() for t in tail))
    assert_close3(out, linear_residual_ref(*tail), wide)

"""The ends of a convolution on a GPU, beside the suite: gradients, and who calls them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvdm import use_backend
from fastvdm.kernels import space_conv_library as library
from fastvdm.ops import space_conv as conv
from fastvdm.ops.space_conv_ends import bias_residual, fold_upsample_weight
from fastvdm.runtime.dispatch import ByDesign, explain
from fastvdm.testing import assert_close3, make_exact_operand


def test_gradient_of_the_fold():
    """Against autograd through the sums of plain torch."""
    weight = make_exact_operand((5, 3, 3, 3), seed=1).requires_grad_()
    dy = make_exact_operand((3, 5, 4, 4), seed=2)
    found = []
    for backend in ("reference", "triton"):
        with use_backend(backend):
            y = fold_upsample_weight(weight)
        found.append((y, *torch.autograd.grad(y, weight, dy)))
    for a, b in zip(*found):
        assert torch.equal(a, b) and a.stride() == b.stride()


def test_a_sum_that_is_rounded_once(device):
    y, bias, residual = (torch.randn(*s, device=device) for s in ((3, 7, 40), (40,), (3, 7, 40)))
    low = [t.half() for t in (y, bias, residual)]
    with use_backend("triton"):
        found = bias_residual(*low)
    assert torch.equal(found, bias_residual(*(t.float() for t in low)).half())
    wide = bias_residual(*(t.double() for t in low))
    assert_close3(found, low[0] + low[1] + low[2], wide)


CALLS = {
    "bias": dict(),
    "residual": dict(residual=True),
    "no_bias": dict(bias=False, residual=True),
    "pair": dict(c2=4, residual=True),
    "1x1": dict(kernel=1, residual=True),
    "4x4": dict(kernel=4, stride=2),
    "upsample": dict(upsample="nearest", residual=True),
}


def _operands(
    *, kernel: int = 3, stride: int = 1, c2: int = 0, bias: bool = True, residual: bool = False,
    upsample: str | None = None,
) -> tuple[tuple, dict]:  # fmt: skip
    x, more = torch.randn(2, 3, 6, 4, 5), torch.randn(2, 3, 6, 4, c2) if c2 else None
    weight = torch.randn(7, 5 + c2, kernel, kernel)
    size = (12, 8) if upsample else (6 // stride, 4 // stride)
    other = torch.randn(2, 3, *size, 7) if residual else None
    options = dict(x2=more, stride=stride, residual=other, upsample=upsample)
    return (x, weight, torch.randn(7) if bias else None), options


@pytest.mark.parametrize("name", CALLS)
def test_what_cudnn_leaves_over(name, monkeypatch):
    """A GPU's way, whose convolutions here are torch's own of a CPU: at most one pass behind them,
    and the same result."""
    args, options = _operands(**CALLS[name])
    with use_backend("reference"):
        expected = conv.space_conv(*args, **options)
    passes = []

    def counted(*given: Tensor | None) -> Tensor:
        passes.append([t is not None for t in given])
        return bias_residual(*given)

    monkeypatch.setattr(conv, "bias_residual", counted)
    monkeypatch.setattr(Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(library, "emulated", lambda *_: False)
    which = "library" if options["x2"] is not None else "torch"
    (x, weight, bias), more = args, dict(options)
    x2, stride, residual, upsample = (more[n] for n in ("x2", "stride", "residual", "upsample"))
    found = conv.convolve(which, x, weight, bias, x2, stride, residual, upsample)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    apart = bias is not None and weight.shape[-1] > 1
    assert passes == (
        [[True, apart, residual is not None]] if apart or options["residual"] is not None else []
    )


def test_a_compiler_gets_sums():
    why = explain("bias_residual")
    assert why["triton"] is None or not isinstance(why["triton"], ByDesign)

    def call(y: Tensor, bias: Tensor) -> Tensor:
        return bias_residual(y, bias, y)

    y, bias = torch.randn(2, 3), torch.randn(3)
    with use_backend("triton"):
        graphs = torch._dynamo.export(call)(y, bias)[0].graph
    names = {str(n.target) for n in graphs.nodes if n.op == "call_function"}
    assert names and not any("fastvdm" in n for n in names)

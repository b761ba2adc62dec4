"""The seam between a function and a ``torch.library`` op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.ops.norm_act import norm_act
from fastvdm.testing import opcheck_op


@define
def define_test_fwd(x: Tensor, factor: float, shift: Tensor | None = None) -> Tensor:
    return x * factor if shift is None else x * factor + shift


@define
def define_test_bwd(dy: Tensor, factor: float) -> Tensor:
    return dy * factor


@fake(define_test_fwd)
def _(x, factor, shift=None):
    return torch.empty_like(x)


@fake(define_test_bwd)
def _(dy, factor):
    return torch.empty_like(dy)


seen: list[tuple] = []


def _save(ctx, inputs, output):
    seen.append(inputs)
    ctx.factor = inputs[1]


def _backward(ctx, dy):
    return define_test_bwd(dy, ctx.factor), None, dy if ctx.needs_input_grad[2] else None


autograd(define_test_fwd, _backward, setup_context=_save)
no_double_backward(define_test_bwd)


def test_an_op_of_torch_library():
    assert define_test_fwd is torch.ops.fastvdm.define_test_fwd.default
    for shift in (None, torch.randn(3, 5, requires_grad=True)):
        opcheck_op(define_test_fwd, (torch.randn(3, 5, requires_grad=True), 2.0, shift))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_gradient(backend):
    def run(x, shift):
        return define_test_fwd(x, 3.0, shift).sum()

    call = run if backend is None else torch.compile(run, backend=backend, fullgraph=True)
    x, shift = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    dx, dshift = torch.autograd.grad(call(x, shift), (x, shift))
    assert torch.equal(dx, torch.full((2, 3), 3.0)) and torch.equal(dshift, torch.ones(2, 3))
    assert not run(x.detach(), None).requires_grad
    with torch.inference_mode():
        assert torch.equal(run(x, shift), (3 * x + shift).sum())


def test_arguments_that_equal_their_default_are_seen_too():
    """The dispatcher takes them off; setup_context and the gradients count every argument."""
    seen.clear()
    x = torch.randn(2, requires_grad=True)
    define_test_fwd(x, 2.0, None).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))
    ((_, factor, shift),) = seen
    assert factor == 2.0 and shift is None


def test_a_profile_names_the_op():
    x = torch.randn(1, 1, 2, 2, 4, requires_grad=True)
    assert define_test_fwd(x, 2.0).grad_fn.name() == "define_test_fwd_Backward"
    y = norm_act(x, torch.ones(4), kind="group", groups=2)
    assert "norm_act_fwd_Backward" in (y.grad_fn.name(), y.grad_fn.next_functions[0][0].name())


def test_no_double_backward():
    x = torch.randn(2, requires_grad=True)
    (dx,) = torch.autograd.grad(define_test_fwd(x, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="define_test has no double backward"):
        dx.sum().backward()

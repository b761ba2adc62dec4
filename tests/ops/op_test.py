"""The seam between a function and a ``torch.library`` op."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastvdm.ops.guidance  # noqa: F401, its ops are compared with C++, too
from fastvdm import use_backend
from fastvdm.ops import _op
from fastvdm.ops._call import BODIES, run
from fastvdm.ops._op import autograd, backward_of, define, fake, no_double_backward, op
from fastvdm.ops.linear import linear
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.space_conv import space_conv
from fastvdm.runtime import extension
from fastvdm.runtime.dispatch import off_on
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


# --- what is derived ------------------------------------------------------------------------------


def _arguments(schema) -> list[tuple[str, str]]:
    """A C++ ``int`` may be the op's ``SymInt``: the launcher is called with numbers."""
    return [(a.name, str(a.type).replace("SymInt", "int")) for a in schema.arguments]


@pytest.mark.skipif(extension.reason_off() is not None, reason="no C++ extension")
def test_cpp_launchers_have_the_schemas_of_their_ops():
    """Names, types and order of all arguments but the backend, and the number of results."""
    schemas = {s.name: s for s in torch._C._jit_get_all_schemas()}
    compared = set()
    for name, schema in schemas.items():
        namespace, _, opname = name.partition("::")
        launcher = schemas.get(f"fastvdm_C::{opname}_cpu")
        if namespace != "fastvdm" or launcher is None:
            continue
        *arguments, backend = _arguments(schema)
        assert backend == ("backend", "str")
        assert _arguments(launcher) == arguments, opname
        assert len(launcher.returns) == len(schema.returns), opname
        compared.add(opname)
    # What the C++ kernels have beside, and no op of its own: the pieces of a backward, and a test's
    # way to ask for a tile.
    launchers = {n.removeprefix("fastvdm_C::") for n in schemas if n.startswith("fastvdm_C::")}
    beside = {n.removesuffix("_cpu") for n in launchers if n.endswith("_cpu")} - compared
    pieces = {"linear_dx", "space_conv_dx", "space_conv_dw", "conv3x3", "conv3x3_dw"}
    assert beside == pieces and len(compared) > 12


@op("toy", backward="dy x weight gain k", grads="x! weight:w gain:w", residual="beside",
    laid_out="weight")  # fmt: skip
def op_test_fwd(
    x: Tensor, weight: Tensor, gain: Tensor | None, beside: Tensor, k: int, backend: str
) -> Tensor:
    return x.new_empty(x.shape)


def test_the_backward_of_a_declared_op():
    """Schema, flags of the groups, and the form of every gradient."""
    back = backward_of(op_test_fwd)
    assert str(back._schema) == (
        "fastvdm::op_test_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? gain, SymInt k, "
        "bool need_w, str backend) -> (Tensor, Tensor, Tensor)"
    )
    with FakeTensorMode():
        x, weight = torch.empty(2, 3), torch.empty(5, 7).t()
        for need in (True, False):
            dx, dw, dgain = back(x, x, weight, None, 1, need, "cpu")
            assert dx.shape == x.shape and dgain.shape == (0,)
            assert dw.shape == (weight.shape if need else (0,))
            assert not need or dw.stride() == weight.stride()


def test_what_a_declared_op_asks_of_its_backward(monkeypatch):
    asked = []

    def back(dy, x, weight, gain, k, need_w, backend):
        asked.append((k, need_w, backend))
        return torch.ones_like(x), torch.ones_like(weight), x.new_empty(0)

    monkeypatch.setitem(BODIES, "op_test_fwd", lambda x, *_: x.clone())
    monkeypatch.setitem(BODIES, "op_test_bwd", back)
    x, weight, beside = torch.ones(2, 3), torch.ones(4), torch.ones(2, 3)

    def grads_of(*trained):
        for t in (x, weight, beside):
            t.requires_grad_(any(t is s for s in trained))
        run(op_test_fwd, x, weight, None, beside, 7, "toy").sum().backward()
        found = [t.grad is not None for t in (x, weight, beside)]
        x.grad = weight.grad = beside.grad = None
        return found

    assert grads_of(x) == [True, False, False] and asked.pop() == (7, False, "toy")
    assert grads_of(weight, beside) == [False, True, True] and asked.pop() == (7, True, "toy")
    assert grads_of(beside) == [False, False, True] and not asked  # it is dy itself


# --- past the dispatcher --------------------------------------------------------------------------


def _frames_of(call) -> list[str]:
    seen = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename == _op.__file__:
            seen.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


@pytest.mark.skipif(extension.reason_off() is not None, reason="no C++ extension")
@pytest.mark.parametrize("train", [False, True])
def test_nobody_listens(train):
    """Then a call is not taken through the dispatcher, forward or backward, with the same bits."""
    x = torch.randn(1, 2, 3, 4, 8, requires_grad=train)
    w = torch.randn(8)

    def call():
        y = norm_act(x, w, kind="group", groups=2)
        if train:
            y.backward(torch.ones_like(y))
        return y

    assert "through_dispatcher" not in _frames_of(call)
    with torch.profiler.profile() as profile:
        seen = call()
    assert torch.equal(seen, call())
    names = {event.key for event in profile.key_averages()}
    assert "fastvdm::norm_act_fwd" in names and (not train or "fastvdm::norm_act_bwd" in names)


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    """One that only ``__torch_dispatch__`` tells from a tensor, as DTensor is."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    names: list[str] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.names.append(func.name())
        with torch._C._DisableTorchDispatch():
            return func(*args, **(kwargs or {}))


def test_whoever_listens_hears_the_op():
    x, w = torch.randn(1, 2, 3, 4, 8), torch.randn(8)
    wanted = "fastvdm::norm_act_fwd"
    with use_backend("auto", strict=False):

        def call(x, w):
            return norm_act(x, w, kind="rms")

        with _Seen() as mode:
            call(x, w)
        assert wanted in mode.names
        with _Functions() as functions:
            call(x, w)
        assert any("fastvdm.norm_act_fwd" in name for name in functions.names)
        _Subclass.names.clear()
        call(x, w.as_subclass(_Subclass))  # the last of its arguments counts, too
        assert wanted in _Subclass.names
        assert wanted in str(torch.jit.trace(call, (x, w), check_trace=False).graph)
        traced = make_fx(call)(x, w)
        assert "norm_act_fwd" in traced.code
        with FakeTensorMode() as fake_mode:
            assert call(fake_mode.from_tensor(x), fake_mode.from_tensor(w)).shape == x.shape


# -- what every op owes its callers ---------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_view_of_minus_x(backend, device, monkeypatch):
    """As the imaginary part of a conjugate is one: memory holds x. The dispatcher hides that from
    launchers, so a call that goes past it must, too."""
    if why := off_on("norm_act", backend, torch.device(device)):
        pytest.skip(why)
    x, dy = (torch._neg_view(torch.randn(1, 2, 3, 4, 8, device=device)) for _ in "ab")
    assert x.is_neg() and dy.is_neg()
    w, found, raw = torch.randn(8, device=device), [], []
    for name in ("norm_act_fwd", "norm_act_bwd"):

        def spy(*args, body=BODIES[name]):
            raw.extend(t for t in args if isinstance(t, Tensor) and t.is_neg())
            return body(*args)

        monkeypatch.setitem(BODIES, name, spy)
    with use_backend(backend):
        for a, da in ((x, dy), (x.resolve_neg(), dy.resolve_neg())):
            a = a.detach().requires_grad_()
            y = norm_act(a, w, kind="group", groups=2)
            found.append((y, *torch.autograd.grad(y, a, da)))
    assert not raw and all(torch.equal(a, b) for a, b in zip(*found))


def _bias_of(name, x, bias):
    weight = torch.ones(6, 8, 3, 3, device=x.device)
    if name == "linear":
        return linear(x, weight[..., 0, 0], bias)
    if name == "pair":
        return space_conv(x[..., :5], weight, bias, x2=x[..., 5:])
    return space_conv(x, weight, bias, upsample="nearest" if name == "upsample" else None)


@pytest.mark.parametrize("backend", ["auto", "cpu", "triton"])
@pytest.mark.parametrize("name", ["linear", "conv", "pair", "upsample"])
def test_a_bias_is_not_kept_for_the_backward(name, backend, device):
    x = torch.randn(1, 2, 3, 4, 8, device=device, requires_grad=True)
    bias, kept = torch.randn(6, device=device, requires_grad=True), []
    with (
        use_backend(backend, strict=False),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.data_ptr()) or t, lambda t: t
        ),
    ):
        y = _bias_of(name, x, bias)
        assert bias.data_ptr() not in kept
        with torch.no_grad():
            bias.add_(1)  # as an optimiser does between the forward and the backward of a pipeline
        _, db = torch.autograd.grad(y.sum(), (x, bias))
    assert torch.equal(db, torch.full_like(db, y[..., 0].numel()))

"""norm_conv: a norm in the prologue of a convolution against the two ops, and what it launches.

Under the interpreter fp32, fp16 (every option) and fp64; maps of a few hundred pixels.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from fastvdm.ops import norm_conv as ops
from fastvdm.ops._call import BODIES, select
from fastvdm.ops.conv_group_norm import norm_conv
from fastvdm.ops.space_conv import space_conv_stats
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.reference.space_conv import group_stats_ref, space_conv_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import INTERPRETED, explain
from fastvdm.testing import assert_parity, grads, make_exact_operand, opcheck_op

EVERYTHING = ("norm_bias", "scale", "shift", "bias", "residual")
# name: x (B, F, H, W, C), Cout, kernel, groups, tensors that are given, options
CASES = {
    "video": ((2, 2, 5, 7, 12), 9, 3, 4, EVERYTHING, {}),
    "frames": ((2, 3, 5, 4, 6), 17, 3, 3, EVERYTHING, {"per_frame": True}),
    "bare": ((1, 2, 3, 9, 16), 5, 3, 2, (), {"act": False}),
    "one_pixel": ((2, 3, 1, 1, 24), 6, 3, 3, ("norm_bias",), {}),
    "off_tile": ((2, 1, 17, 9, 3), 4, 3, 1, ("norm_bias", "shift"), {}),
    "1x1": ((2, 2, 3, 5, 40), 20, 1, 8, ("norm_bias", "scale"), {}),
    "5x5": ((1, 2, 4, 7, 6), 8, 5, 2, ("norm_bias", "residual"), {}),
}
TMA_CASES = {  # widths that are multiples of 8
    "video": ((2, 2, 5, 7, 24), 72, 3, 4, EVERYTHING, {}),
    "frames": ((2, 3, 5, 9, 16), 16, 3, 2, EVERYTHING, {"per_frame": True}),
    "one_pixel": ((2, 3, 1, 1, 16), 8, 3, 2, ("norm_bias",), {}),
}
TENSORS = ("x", "norm_weight", "norm_bias", "scale", "shift", "weight", "bias", "residual")


@pytest.fixture
def tma(monkeypatch, device):
    """The descriptor variant with small boxes."""
    kernels = pytest.importorskip("fastvdm.kernels.space_conv")
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need sm_90")

    def pick(widths, grid, itemsize, tma):
        return kernels.ConvConfig(64, 32, 16, 4, 2, True, *kernels.pick_box(*grid, 32))

    monkeypatch.setattr(kernels, "pick_config", pick)


def make_inputs(case, dtype, device, make=None):
    shape, cout, kernel, _, given, _ = case
    random = make is None
    make = make or (lambda *s: torch.randn(s, dtype=torch.float64))
    b, c = shape[0], shape[-1]
    shapes = dict(x=shape, norm_weight=(c,), norm_bias=(c,), scale=(b, c), shift=(b, c))
    shapes |= dict(weight=(cout, c, kernel, kernel), bias=(cout,), residual=(*shape[:-1], cout))
    wanted = {"x", "norm_weight", "weight", *given}
    made = {n: make(*shapes[n]) for n in TENSORS if n in wanted}
    if random:
        made["weight"] *= (c * kernel**2) ** -0.5
    return [made[n].to(device, dtype) if n in made else None for n in TENSORS]


def bind(case, backend, stats=None):
    """``norm_conv`` with the statistics of x in its own precision, unless given."""
    groups, options = case[3], case[-1]

    def call(x, norm_weight, norm_bias, scale, shift, weight, bias, residual):
        found = stats or group_stats_ref(x.detach(), groups, options.get("per_frame", False))
        with use_backend(backend):
            return norm_conv(
                x, found, norm_weight, norm_bias, weight, bias, scale=scale, shift=shift,
                residual=residual, **options,
            )  # fmt: skip

    return call


def check(case, dtype, device):
    inputs = make_inputs(case, dtype, device)
    assert_parity(bind(case, "triton"), bind(case, "reference"), inputs, names=TENSORS)


@pytest.fixture(autouse=True)
def _ieee_baseline():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, device):
    check(case, torch.float32, device)


@pytest.mark.parametrize("name", ["video", "frames"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_parity_16_bit(name, dtype, device):
    check(CASES[name], dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", TMA_CASES.values(), ids=TMA_CASES)
def test_parity_descriptors(case, dtype, device, tma):
    check(case, dtype, device)


@pytest.mark.parametrize("name", ["video", "frames"])
def test_the_reference_is_the_two_ops(name):
    case = CASES[name]
    inputs = make_inputs(case, torch.float64, "cpu")
    x, nw, nb, scale, shift, weight, bias, residual = inputs
    h = norm_act_ref(x, nw, nb, kind="group", groups=case[3], scale=scale, shift=shift, **case[-1])
    expected = space_conv_ref(h, weight, bias, None, 1, residual)
    torch.testing.assert_close(bind(case, "reference")(*inputs), expected)


@pytest.mark.parametrize("variant", ["pointers", "descriptors"])
def test_exact(variant, device, request, poison):
    """Integers, and rstd a power of two: bit for bit. The padding stays 0 although the norm makes
    something of a 0."""
    if variant == "descriptors":
        request.getfixturevalue("tma")
    case = ((2, 2, 5, 7, 16), 8, 3, 4, EVERYTHING, {"act": False, "per_frame": True})
    seeds = iter(range(100))
    inputs = make_inputs(
        case, torch.float32, device, lambda *s: make_exact_operand(s, high=2, seed=next(seeds))
    )
    mean = make_exact_operand((4, 4), seed=98).to(device)
    rstd = 2.0 ** make_exact_operand((4, 4), high=1, seed=99).to(device)
    runs = [bind(case, b, (mean, rstd))(*inputs) for b in ("triton", "triton", "reference")]
    assert torch.equal(runs[0], runs[2]) and torch.equal(runs[0], runs[1])


def test_two_runs_are_bit_equal_and_nothing_is_left_unwritten(device, poison):
    case = CASES["frames"]
    inputs = make_inputs(case, torch.float32, device)
    fn = bind(case, "triton")
    dy = torch.randn_like(fn(*inputs))
    first, second = grads(fn, inputs, dy), grads(fn, inputs, dy)
    for a, b in zip(first[0] + first[1], second[0] + second[1]):
        assert torch.isfinite(a).all() and torch.equal(a, b)


def test_large_mean(device):
    """1e4 ± 1: x gain + offset cancels; what is lost is a rounding at 1e4, as without it."""
    x = (torch.randn(1, 2, 5, 7, 4, dtype=torch.float64) + 1e4).float().to(device)
    w, weight = torch.ones(4, device=device), torch.eye(4, device=device)[:, :, None, None]
    mean, rstd = group_stats_ref(x.double(), 2)
    stats = (mean.float(), rstd.float())
    with use_backend("triton"):
        y = norm_conv(x, stats, w, None, weight, act=False)
    ref = norm_act_ref(x.double(), w.double(), kind="group", groups=2, act=False)
    half_ulp = torch.finfo(torch.float32).eps / 2 * 1e4
    assert (y.double() - ref).abs().max() < 4 * half_ulp  # of mean, offset, product and sum


def test_statistics_of_the_producer(device):
    """conv → stats → norm → conv, as a block chains them, against the reference."""
    x, w1 = torch.randn(2, 2, 6, 5, 8, device=device), torch.randn(12, 8, 3, 3, device=device) / 9
    g, h = torch.randn(2, 12, device=device)
    w2 = torch.randn(8, 12, 3, 3, device=device) / 9

    def block(x, w1, g, h, w2):
        y, *stats = space_conv_stats(x, w1, groups=4)
        return norm_conv(y, stats, g, h, w2, residual=x)

    def run(backend):
        def call(*inputs):
            with use_backend(backend):
                return block(*inputs)

        return call

    assert_parity(run("triton"), run("reference"), (x, w1, g, h, w2), grad_factor=4.0)


def test_strides(device):
    """x of any strides; scale and shift as the halves of one projection; an expanded gradient."""
    x = torch.randn(2, 2, 5, 4, 6, device=device).transpose(2, 3)
    film = torch.randn(2, 12, device=device)
    weight, w = torch.randn(7, 6, 3, 3, device=device), torch.randn(6, device=device)
    leaves = [t.detach().requires_grad_() for t in (x, film, weight, w)]

    def run(backend):
        x, film, weight, w = leaves
        with use_backend(backend):
            stats = group_stats_ref(x.detach(), 3)
            y = norm_conv(x, stats, w, None, weight, scale=film[:, :6], shift=film[:, 6:])
        return y, *torch.autograd.grad(y.sum(), leaves)

    for a, b in zip(run("triton"), run("reference")):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nothing_is_made_for_frozen_weights(device, monkeypatch):
    """Guidance: the normalised activation is made again for a weight gradient, and only for it."""
    made = []
    forward = BODIES["norm_act_fwd"]
    monkeypatch.setitem(BODIES, "norm_act_fwd", lambda *a: made.append(1) or forward(*a))
    case = CASES["bare"]
    inputs = make_inputs(case, torch.float32, device)
    for leaf, count in ((0, 0), (1, 0), (5, 1)):
        inputs[leaf].requires_grad_()
        made.clear()
        bind(case, "triton")(*inputs).sum().backward()
        assert len(made) == count
        assert [t is not None and t.grad is not None for t in inputs].index(True) == leaf
        inputs[leaf].requires_grad_(False)
        inputs[leaf].grad = None


def test_saved_for_backward(device):
    """x, and nothing else of its size: the activation is not kept."""
    case = CASES["1x1"]
    inputs = [None if t is None else t.requires_grad_() for t in
              make_inputs(case, torch.float32, device)]  # fmt: skip
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        bind(case, "triton")(*inputs)
    large = {t.data_ptr() for t in saved if t.numel() >= inputs[0].numel()}
    assert large == {inputs[0].data_ptr()}


# --- what runs ------------------------------------------------------------------------------------


def test_it_is_taken_by_name_alone(monkeypatch):
    x = torch.empty(1, 1, 2, 2, 4)
    assert select("norm_conv", x.device, x, 3) == "parts"
    assert select("norm_conv", torch.device("meta"), x.to("meta"), 3) == "parts"
    with use_backend("triton"):
        assert select("norm_conv", x.device, x, 3) == ("triton" if INTERPRETED else "parts")
        with torch.autocast("cpu", torch.bfloat16):  # norm in fp32, convolution in bf16
            assert select("norm_conv", x.device, x, 3) == "parts"
    monkeypatch.setitem(BODIES, "norm_conv_fwd", None)
    case = CASES["video"]
    inputs = make_inputs(case, torch.float32, "cpu")
    for backend in ("auto", "reference"):
        bind(case, backend)(*inputs)
    assert explain("norm_conv")["cpu"] == "no kernel for this op"


def test_autocast_reaches_every_operand_of_the_product(monkeypatch):
    """The interpreter would multiply two types; a compiled kernel does not."""
    seen = []
    body = BODIES["norm_conv_fwd"]

    def spy(*args):
        seen.extend(args[i].dtype for i in (0, 7, 8, 9))  # x, weight, bias, residual
        return body(*args)

    monkeypatch.setitem(BODIES, "norm_conv_fwd", spy)
    inputs = make_inputs(CASES["frames"], torch.float32, "cpu")
    with torch.autocast("cpu", torch.float16):
        bind(CASES["frames"], "triton")(inputs[0].half(), *inputs[1:])
    assert seen == [torch.float16] * 4


def test_opcheck(device):
    case = CASES["frames"]
    inputs = [None if t is None else t.requires_grad_() for t in
              make_inputs(case, torch.float32, device)]  # fmt: skip
    x, nw, nb, scale, shift, weight, bias, residual = inputs
    stats = group_stats_ref(x.detach(), 3, True)
    args = (x, *stats, nw, nb, scale, shift, weight, bias, residual, True, "triton")
    opcheck_op(ops.norm_conv_fwd, args)
    opcheck_op(ops.norm_conv_fwd, (x, *stats, nw, None, None, None, weight, None, None, False,
                                   "triton"))  # fmt: skip


@pytest.mark.parametrize("per_frame", [False, True])
def test_gradcheck(per_frame, device):
    case = ((2, 2, 2, 3, 4), 3, 3, 2, EVERYTHING, {"per_frame": per_frame})
    inputs = [t.requires_grad_() for t in make_inputs(case, torch.float64, device)]
    assert torch.autograd.gradcheck(bind(case, "triton"), inputs, fast_mode=True)


def test_second_derivative(device):
    case = CASES["bare"]
    inputs = make_inputs(case, torch.float32, device)
    inputs[0].requires_grad_()
    y = bind(case, "triton")(*inputs)
    (dx,) = torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


def test_compile(device):
    """One graph for two frame counts, the gradients of the eager call."""
    w, weight = torch.randn(8, device=device), torch.randn(6, 8, 3, 3, device=device)

    def block(x: Tensor, w: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
        return norm_conv(x, (mean, rstd), w, None, weight) * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with use_backend("triton"):
        for frames in (7, 9):  # of no other extent: dynamo takes equal sizes for one
            x = torch.randn(2, frames, 4, 5, 8, device=device)
            leaves = [t.detach().requires_grad_() for t in (x, w, weight)]
            stats = group_stats_ref(x, 2)
            found = []
            for fn in (compiled, block):
                y = fn(*leaves, *stats)
                found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
            for a, e in zip(*found):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_empty_batch(backend, device):
    x = torch.randn(0, 2, 3, 5, 4, device=device, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, device=device, requires_grad=True)
    stats = torch.empty(2, 0, 2, device=device).unbind()
    with use_backend(backend):
        y = norm_conv(x, stats, torch.ones(4, device=device), None, weight)
        y.sum().backward()
    assert y.shape == (0, 2, 3, 5, 6) and torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_bad_inputs(backend):
    x, w, weight = torch.randn(2, 3, 4, 5, 6), torch.ones(6), torch.randn(7, 6, 3, 3)
    stats = torch.ones(2, 2, 3).unbind()
    bad = [
        (ValueError, "takes 5 channels", dict(weight=torch.randn(7, 5, 3, 3))),
        (ValueError, "groups must divide the 6", dict(stats=torch.ones(2, 2, 4).unbind())),
        (ValueError, r"mean must be \(6, 3\)", dict(per_frame=True)),
        (TypeError, "mean must be fp32", dict(stats=[torch.ones(2, 3).double()] * 2)),
        (ValueError, r"must be \(6,\)", dict(norm_weight=torch.ones(5))),
        (ValueError, r"scale must be \(2, 6\)", dict(scale=torch.ones(6))),
        (TypeError, "shift must be fp32", dict(shift=torch.ones(2, 6).long())),
        (ValueError, "residual must be", dict(residual=x)),
        (ValueError, "x must be", dict(x=x[0])),
        (TypeError, "^norm_weight must be a tensor", dict(norm_weight=None)),
        (ValueError, "weight must be 4-D", dict(weight=torch.tensor(1.0))),
        (ValueError, r"stats must be \(mean, rstd\)", dict(stats=(None, stats[1]))),
        (ValueError, r"stats must be \(mean, rstd\)", dict(stats=(stats[0], None))),
        (ValueError, r"stats must be \(mean, rstd\)", dict(stats=torch.ones(2))),
    ]
    for error, text, change in bad:
        given = dict(x=x, stats=stats, norm_weight=w, norm_bias=None, weight=weight) | change
        with use_backend(backend), pytest.raises(error, match=text):
            norm_conv(**given)

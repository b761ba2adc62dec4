"""The bias of a convolution inside the norm after it: ``norm_act(..., x_bias=)``, and who asks.

Statistics and normalisation are of x + x_bias. Left out under the interpreter as too slow: fp16 but
for the cases with every option.
"""

from __future__ import annotations

import collections

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.kernels import space_conv_library
from fastvdm.layers.norm import Norm
from fastvdm.layers.resnet import PreNormResnetBlock, ResnetBlock
from fastvdm.ops import _call
from fastvdm.ops import conv_group_norm as conv_group_norm_ops
from fastvdm.ops import norm_act as ops
from fastvdm.ops import space_conv as conv_ops
from fastvdm.ops._call import launcher
from fastvdm.ops.conv_group_norm import conv_group_norm, norm_act, space_conv
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.runtime.config import use_backend
from fastvdm.testing import assert_parity, grads, make_exact_operand, opcheck_op

FRAME = {"kind": "group", "per_frame": True}
EVERYTHING = ("bias", "scale", "shift", "residual", "dropout_mask")
# name: x (B, F, H, W, C), tensors that are given, options
CASES = {
    "group": ((2, 3, 5, 7, 12), EVERYTHING, {"kind": "group", "groups": 4}),
    "group_frame": ((2, 3, 4, 5, 15), EVERYTHING, {**FRAME, "groups": 5}),
    "group_bare": ((1, 2, 5, 3, 16), (), {"kind": "group", "groups": 2, "act": False}),
    "one_group_a_channel": ((2, 1, 3, 4, 6), ("bias",), {"kind": "group", "groups": 6}),
    "one_pixel": ((2, 1, 1, 1, 24), ("bias",), {"kind": "group", "groups": 3}),
    "off_tile": ((1, 1, 33, 31, 3), ("bias", "shift"), {"kind": "group", "groups": 1}),
    "many_videos": ((37, 1, 2, 3, 4), ("bias", "scale"), {"kind": "group", "groups": 2}),
    "rms": ((2, 3, 5, 7, 17), EVERYTHING, {"kind": "rms"}),
    "rms_bare": ((1, 3, 7, 5, 48), (), {"kind": "rms"}),
    "layer": ((2, 3, 5, 7, 12), EVERYTHING, {"kind": "layer"}),
    "layer_bare": ((2, 1, 9, 5, 96), (), {"kind": "layer", "act": False}),
}  # fmt: skip
TENSORS = ("x", "weight", "bias", "scale", "shift", "residual", "x_bias")


def make_inputs(case, dtype, device, make=None):
    shape, given, options = case
    make = make or (lambda *s: torch.randn(s, dtype=torch.float64))
    b, c = shape[0], shape[-1]
    shapes = dict(x=shape, weight=(c,), bias=(c,), scale=(b, c), shift=(b, c), residual=shape)
    shapes["x_bias"] = (c,)
    wanted = {"x", "weight", "x_bias", *given}
    tensors = [make(*shapes[n]).to(device, dtype) if n in wanted else None for n in TENSORS]
    mask = (torch.rand(shape) > 0.25).to(device) if "dropout_mask" in given else None
    return tensors, {**options, "dropout_mask": mask}


def bind(options, backend):
    def call(x, weight, bias, scale, shift, residual, x_bias):
        with use_backend(backend):
            return norm_act(
                x, weight, bias, scale=scale, shift=shift, residual=residual, x_bias=x_bias,
                **options,
            )  # fmt: skip

    return call


def check(case, dtype, lane):
    tensors, options = make_inputs(case, dtype, lane[1])
    assert_parity(bind(options, lane[0]), bind(options, "reference"), tensors, names=TENSORS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype, lane):
    if dtype == torch.bfloat16 and lane == ("triton", "cpu"):
        pytest.skip("the interpreter truncates bf16")
    if dtype == torch.float16 and lane == ("triton", "cpu") and len(case[1]) < 5:
        pytest.skip("the interpreter is slow: fp16 with every option only")
    check(case, dtype, lane)


def test_chunks(device, monkeypatch):
    """The sums of several chunks, and a last chunk of one row."""
    shared = pytest.importorskip("fastvdm.kernels.norm_act.shared")
    for programs in (1, 7, 64):
        monkeypatch.setattr(shared, "programs", lambda device, warps, n=programs: n)
        case = ((1, 3, 11, 13, 7), ("bias", "scale"), {"kind": "group", "groups": 7})
        check(case, torch.float32, ("triton", device))
        case = ((1, 2, 11, 3, 40), ("bias", "scale"), {"kind": "layer"})
        check(case, torch.float32, ("triton", device))


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_reference_adds_it_first(kind):
    tensors, options = make_inputs(CASES["group_frame"], torch.float64, "cpu")
    x, w, b, scale, shift, residual, x_bias = tensors
    options |= {"kind": kind, "scale": scale, "shift": shift, "residual": residual}
    got = norm_act_ref(x, w, b, x_bias=x_bias, **options)
    torch.testing.assert_close(got, norm_act_ref(x + x_bias, w, b, **options))


@pytest.mark.parametrize("per_frame", [False, True])
def test_given_statistics(per_frame, lane):
    """Those of x + x_bias, as a producer that knows the bias would give them."""
    case = ((2, 3, 5, 7, 12), ("bias", "scale"), {"kind": "group", "groups": 6})
    tensors, options = make_inputs(case, torch.float32, lane[1])
    options["per_frame"] = per_frame
    rows = (tensors[0] + tensors[-1]).double().view(2, 3, 35, 6, 2)
    var, mean = torch.var_mean(rows, (2, 4) if per_frame else (1, 2, 4), correction=0)
    stats = [t.float().reshape(-1, 6) for t in (mean, (var + 1e-5).rsqrt())]
    dy = torch.randn(2, 3, 5, 7, 12, device=lane[1])
    own = grads(bind(options, lane[0]), tensors, dy)
    given = grads(bind({**options, "stats": stats}, lane[0]), tensors, dy)
    reference = grads(bind({**options, "stats": stats}, "reference"), tensors, dy)
    for a, b, c in zip(own[0] + own[1], given[0] + given[1], reference[0] + reference[1]):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(b, c, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["x", "x_bias", "both"])
def test_large_mean(where, lane):
    """1e4 ± 1 from x, from the bias, or cancelling between the two: one rounding at 1e4 is lost."""
    x = torch.randn(2, 3, 7, 9, 6, dtype=torch.float64)
    x_bias = torch.randn(6, dtype=torch.float64)
    x = (x + (1e4 if where != "x_bias" else 0)).to(lane[1], torch.float32)
    x_bias = (x_bias + {"x": 0, "x_bias": 1e4, "both": -1e4}[where]).to(lane[1], torch.float32)
    w = torch.ones(6, device=lane[1])
    options = dict(kind="group", groups=2, act=False)
    dy = torch.randn(x.shape, dtype=torch.float64).to(x)

    def run(x, w, x_bias):
        return norm_act(x, w, x_bias=x_bias, **options)

    with use_backend(lane[0]):
        (y,), (dx, _, dxb) = grads(run, (x, w, x_bias), dy)
    with use_backend("reference"):
        wide = tuple(t.double() for t in (x, w, x_bias))
        (ref,), (dx_ref, _, dxb_ref) = grads(run, wide, dy.double())
    half_ulp = torch.finfo(torch.float32).eps / 2 * 1e4
    assert (y.double() - ref).abs().max() < 1.5 * half_ulp
    assert (dx.double() - dx_ref).abs().max() < 5 * half_ulp
    assert (dxb.double() - dxb_ref).abs().max() < 5 * half_ulp * 2 * 3 * 7 * 9


@pytest.mark.parametrize("per_frame", [False, True])
def test_exact(per_frame, device, poison):
    """Integers and given statistics: bit for bit."""
    case = ((2, 3, 5, 7, 12), ("bias", "scale", "shift", "residual"), {})
    seeds = iter(range(100))
    make = lambda *s: make_exact_operand(s, seed=next(seeds))  # noqa: E731
    x, w, b, scale, shift, residual, x_bias = make_inputs(case, torch.float32, device, make)[0]
    n = 6 if per_frame else 2
    mean = make_exact_operand((n, 4), seed=98).to(device)
    rstd = 2.0 ** make_exact_operand((n, 4), high=1, seed=99).to(device)
    options = dict(kind="group", groups=4, per_frame=per_frame, act=False, stats=(mean, rstd))
    options |= dict(scale=scale, shift=shift, residual=residual)
    with use_backend("triton"):
        y = norm_act(x, w, b, x_bias=x_bias, **options)
        expected = norm_act(x + x_bias, w, b, **options)
    assert torch.equal(y, expected)


def test_exact_gradient(device):
    """±1 in equal numbers: every sum of the backward is exact, and dx sums to 0 over a group."""
    x = torch.ones(1, 2, 4, 8, 4, device=device)
    x[:, 1] = -1
    x_bias = torch.full((4,), 3.0, device=device)
    w = make_exact_operand((4,), seed=1).to(device)
    dy = make_exact_operand(x.shape, seed=3).to(device)

    def run(x, w, x_bias):
        return norm_act(x - 3, w, kind="group", groups=2, eps=0.0, act=False, x_bias=x_bias)

    with use_backend("triton"):
        (y,), (dx, _, dxb) = grads(run, (x, w, x_bias), dy)
    assert torch.equal(y, x * w)
    assert torch.equal(dxb, dx.sum((0, 1, 2, 3)))
    assert torch.equal(dxb.view(2, 2).sum(1), torch.zeros(2, device=device))


@pytest.mark.parametrize("case", ["group", "group_frame", "rms", "layer"])
def test_two_runs_are_bit_equal_and_nothing_is_left_unwritten(case, lane, poison):
    tensors, options = make_inputs(CASES[case], torch.float32, lane[1])
    fn = bind(options, lane[0])
    dy = torch.randn_like(fn(*tensors))
    first, second = grads(fn, tensors, dy), grads(fn, tensors, dy)
    for a, b in zip(first[0] + first[1], second[0] + second[1]):
        assert torch.isfinite(a).all() and torch.equal(a, b)


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_only_what_is_wanted(kind, device, monkeypatch):
    """The gradient of x_bias alone, and all but it; each in its own dtype."""
    asked = []

    def spy(stem, name, backend):
        def call(*args):
            asked.append(args[-3])
            return launcher(stem, name, backend)(*args)

        return call

    monkeypatch.setattr(_call, "launcher", spy)
    x = torch.randn(2, 1, 3, 5, 6, device=device).half()
    w, x_bias = torch.randn(6, device=device), torch.randn(6, device=device)
    dy = torch.randn_like(x)
    found = []
    for wanted in ((x, w), (x_bias,), (x, w, x_bias)):
        leaves = [t.detach().requires_grad_(any(t is v for v in wanted)) for t in (x, w, x_bias)]
        with use_backend("triton"):
            y = norm_act(leaves[0], leaves[1], kind=kind, groups=2, x_bias=leaves[2])
            y.backward(dy)
        assert asked[-1] == leaves[2].requires_grad
        assert all(t.grad is None or t.grad.dtype == t.dtype for t in leaves)
        found.append([t.grad for t in leaves])
    assert torch.equal(found[0][0], found[2][0]) and torch.equal(found[0][1], found[2][1])
    assert torch.equal(found[1][2], found[2][2])


@pytest.mark.parametrize("case", ["group", "rms_bare", "layer"])
def test_opcheck(case, device):
    tensors, options = make_inputs(CASES[case], torch.float32, device)
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    x, w, b, scale, shift, residual, x_bias = tensors
    kind = ops.NORM_KINDS[options["kind"]]
    settings = (options.get("groups", 1), False, 1e-5, True, "triton")
    mask = options["dropout_mask"]
    given = (x, None, x_bias, w, b, scale, shift, residual, mask, None, None, kind)
    opcheck_op(ops.norm_act_fwd, (*given, *settings))
    with torch.no_grad():
        y, mean, rstd = ops.norm_act_fwd(*given, *settings)
    stats = (mean, rstd) if kind == 0 else (None, None)
    detached = [None if t is None else t.detach() for t in given[:7]]
    for flags in ((True, True, True, True), (False, True, False, False)):
        torch.library.opcheck(
            ops.norm_act_bwd,
            (torch.randn_like(y), *detached, None, *stats, kind, *settings[:-1], *flags, "triton"),
        )  # fmt: skip


@pytest.mark.parametrize("case", ["group", "group_frame", "rms", "layer_bare"])
def test_gradcheck(case, device):
    _, given, options = CASES[case]
    small = ((1, 2, 1, 3, 4), given, {**options, "groups": 2})
    tensors, options = make_inputs(small, torch.float64, device)
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    fn = bind(options, "triton")

    def positional(*args):
        rest = iter(args)
        return fn(*(None if t is None else next(rest) for t in tensors))

    given = [t for t in tensors if t is not None]
    assert torch.autograd.gradcheck(positional, given, fast_mode=True)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_compile(kind, backend, device):
    """One graph for two frame counts, with the gradients of the eager call."""
    w, x_bias = torch.randn(8, device=device), torch.randn(8, device=device)

    def block(x: Tensor, w: Tensor, x_bias: Tensor) -> Tensor:
        return norm_act(x, w, kind=kind, groups=2, x_bias=x_bias, residual=x) * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with use_backend(backend):
        for frames in (3, 5):
            x = torch.randn(2, frames, 4, 7, 8, device=device)
            dy = torch.randn_like(x)
            got, expected = (grads(f, (x, w, x_bias), dy) for f in (compiled, block))
            for a, e in zip(got[0] + got[1], expected[0] + expected[1]):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_empty_batch(kind, lane):
    x = torch.randn(0, 3, 4, 5, 6, device=lane[1], requires_grad=True)
    w, x_bias = torch.ones(6, device=lane[1]), torch.ones(6, device=lane[1], requires_grad=True)
    with use_backend(lane[0]):
        norm_act(x, w, kind=kind, groups=2, x_bias=x_bias).sum().backward()
    assert torch.equal(x_bias.grad, torch.zeros(6, device=lane[1]))


def test_bad_inputs():
    x, w = torch.randn(2, 3, 4, 5, 6), torch.ones(6)
    with pytest.raises(ValueError, match="give x2 or x_bias"):
        norm_act(x, torch.ones(12), kind="rms", x2=x, x_bias=w)
    with pytest.raises(ValueError, match=r"x_bias must be \(6,\)"):
        norm_act(x, w, kind="rms", x_bias=torch.ones(5))
    with pytest.raises(TypeError, match="x_bias must be fp32"):
        norm_act(x, w, kind="rms", x_bias=torch.ones(6).long())


# --- who asks for it ------------------------------------------------------------------------------


class Ops(TorchDispatchMode):
    """Counts ops on activations by name."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if isinstance(args[0] if args else None, Tensor) and args[0].ndim == 5:
            self.seen[func.name().split("::")[1].split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def cuda_library(monkeypatch):
    """The choices of CUDA on a CPU: library convolutions without a bias, and norms in Triton."""
    for module in (space_conv_library, conv_group_norm_ops):
        monkeypatch.setattr(module, "adds_bias_apart", lambda x, kernel: kernel > 1)
    choose = conv_ops.select

    def of_library(*call):
        which = choose(*call)
        return which if which != "cpu" else "library" if call[-2] else "torch"  # of a pair

    monkeypatch.setattr(conv_ops, "select", of_library)
    monkeypatch.setattr(ops, "select", lambda *a: "triton")


def group(channels):
    return Norm("group", channels, groups=2)


BLOCKS = {  # name: (block, channels of x and x2)
    "peer": (lambda: ResnetBlock(6, 6, group, emb_dim=5), 6, 0),
    "peer_pair": (lambda: ResnetBlock(10, 6, group, emb_dim=5), 6, 4),
    "paper": (lambda: PreNormResnetBlock(6, 6, group, emb_dim=5), 6, 0),
    "paper_up": (lambda: PreNormResnetBlock(6, 6, group, emb_dim=5, resample="up"), 6, 0),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_no_bias_is_added_between_a_convolution_and_its_norm(name, cuda_library):
    """Each 3x3 or 4x4 that feeds a norm is a bias-free library call; no add is left but the one
    after the last convolution of the norm-first block, whose residual is an add as well."""
    make, channels, c2 = BLOCKS[name]
    block = make()
    x, emb = torch.randn(1, 2, 4, 6, channels), torch.randn(1, 5)
    x2 = torch.randn(1, 2, 4, 6, c2) if c2 else None
    with torch.no_grad(), Ops() as seen:
        block(x, emb, x2)
    assert seen.seen["add"] + seen.seen["add_"] == (2 if name.startswith("paper") else 0)


def test_the_count_sees_a_bias(cuda_library):
    """Negative control: the same convolution alone."""
    with torch.no_grad(), Ops() as seen:
        space_conv(torch.randn(1, 2, 4, 6, 6), torch.randn(8, 6, 3, 3), torch.randn(8))
    assert seen.seen["add"] == 1


def test_who_takes_the_bias(monkeypatch):
    """CUDA's library with a kernel larger than 1x1, and nobody else."""
    given = []

    def norm(y, *_, x_bias=None, **__):
        given.append(x_bias is not None)
        return y

    monkeypatch.setattr(conv_group_norm_ops, "norm_act", norm)

    def ask(kernel, upsample=None, pair=False, which="torch", device="cuda"):
        monkeypatch.setattr(
            conv_group_norm_ops, "adds_bias_apart", lambda x, k: device == "cuda" and k > 1
        )
        monkeypatch.setattr(conv_group_norm_ops, "choose", lambda *a: which)
        monkeypatch.setattr(conv_group_norm_ops, "convolve", lambda which, x, *a, **k: x)
        monkeypatch.setattr(conv_group_norm_ops, "space_conv_stats", lambda x, *a, **k: (x, x, x))
        x, x2 = torch.empty(1, 1, 4, 4, 6), torch.empty(1, 1, 4, 4, 2) if pair else None
        weight = torch.empty(8, 8 if pair else 6, kernel, kernel)
        conv_group_norm(x, weight, torch.empty(8), torch.empty(8), x2=x2, upsample=upsample)
        return given.pop()

    assert ask(3) and ask(3, pair=True, which="library") and ask(3, upsample="nearest")
    assert not ask(1) and not ask(3, device="cpu")
    for which in ("triton", "cpu", "reference"):
        assert not ask(3, which=which)
    assert not space_conv_library.adds_bias_apart(torch.empty(1, 1, 4, 4, 6), 3)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_the_same_with_the_bias_in_the_norm(name, cuda_library):
    """Output and every gradient, that of the biases included."""
    make, channels, c2 = BLOCKS[name]
    block = make()
    for p in block.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, emb = torch.randn(1, 2, 4, 6, channels), torch.randn(1, 5)
    x2 = torch.randn(1, 2, 4, 6, c2) if c2 else None
    found = []
    for backend in ("auto", "reference"):
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        with use_backend(backend), pytest.MonkeyPatch.context() as patch:
            if backend == "reference":
                patch.setattr(ops, "select", lambda *a: "reference")
            y = block(leaves[0], emb, x2)
        found.append((y, *torch.autograd.grad(y.square().mean(), leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_compile_of_both(cuda_library):
    """Convolution and norm in one graph, with the gradients of the eager call."""
    torch._dynamo.reset()
    w, b, g = torch.randn(6, 6, 3, 3) / 9, torch.randn(6), torch.randn(6)

    def block(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return conv_group_norm(x, w, b, g, groups=2, residual=x)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    inputs = (torch.randn(2, 4, 5, 7, 6), w, b, g)
    dy = torch.randn_like(inputs[0])
    got, expected = (grads(f, inputs, dy) for f in (compiled, block))
    for a, e in zip(got[0] + got[1], expected[0] + expected[1]):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


def test_saved_for_backward(cuda_library):
    """The bias-free output of the convolution: one tensor of its size, as without a bias."""
    x = torch.randn(1, 2, 4, 6, 6)
    w, b = torch.randn(8, 6, 3, 3, requires_grad=True), torch.randn(8, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        conv_group_norm(x, w, b, torch.ones(8), groups=2)
    large = [n for n in saved.values() if n >= 2 * 4 * 6 * 8 * 4]
    assert len(large) == 2  # the output, and the weight of 1728 bytes

"""space_conv, space_conv_transpose, space_conv_stats: parity, gradients, layout, compilation.

The interpreter lane is fp32, fp16 and fp64; bf16 runs on a GPU and, through the library, on a CPU.
Left out as too slow there: maps above 33x17 and widths above 64 with a 3x3 kernel on more than a
few pixels (the tile loops are the same).
"""

from __future__ import annotations

import collections
import functools

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.ops import _call
from fastvdm.ops import space_conv as ops
from fastvdm.ops._call import select
from fastvdm.ops.space_conv import space_conv, space_conv_stats, space_conv_transpose
from fastvdm.reference.space_conv import (
    group_stats_ref,
    space_conv_ref,
    space_conv_transpose_ref,
)
from fastvdm.runtime import dispatch
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.device import H100, pretend
from fastvdm.runtime.dispatch import FallbackError, explain
from fastvdm.runtime.extension import AMX
from fastvdm.testing import assert_close3, assert_parity, make_exact_operand, opcheck_op

GPU = torch.cuda.is_available()

# name: x (B, F, H, W, C), C2, Cout, kernel, options
CASES = {
    "rgb_in": ((2, 1, 5, 7, 3), 0, 17, 3, {}),
    "odd": ((1, 3, 9, 5, 17), 0, 48, 3, {"residual": True}),
    "one_pixel": ((2, 3, 1, 1, 6), 0, 5, 3, {}),
    "one_row": ((1, 2, 1, 9, 4), 0, 6, 3, {"residual": True}),
    "off_tile": ((1, 1, 33, 17, 8), 0, 3, 3, {}),
    "pair": ((2, 2, 3, 5, 17), 6, 9, 3, {"residual": True}),
    "pair_1x1": ((1, 2, 3, 5, 6), 17, 9, 1, {"residual": True}),
    "wide": ((1, 1, 2, 3, 96), 0, 192, 3, {}),
    "256": ((1, 1, 2, 2, 256), 0, 64, 3, {}),
    "1x1_wide": ((1, 2, 3, 5, 512), 0, 256, 1, {}),
    "7x7": ((1, 2, 5, 4, 3), 0, 8, 7, {}),
    "down": ((1, 2, 6, 10, 5), 0, 7, 4, {"stride": 2, "residual": True}),
    "down_odd": ((1, 2, 5, 7, 5), 0, 7, 4, {"stride": 2}),
    "down_3x3": ((1, 2, 5, 8, 5), 0, 7, 3, {"stride": 2}),
    "up": ((1, 2, 3, 5, 6), 0, 9, 3, {"upsample": "nearest", "residual": True}),
}
TMA_CASES = {  # widths that are multiples of 8; of 16 and even extents with stride 2
    "3x3": ((1, 3, 5, 7, 8), 0, 72, 3, {"residual": True}),
    "pair": ((2, 2, 3, 5, 24), 8, 16, 3, {}),
    "pair_1x1": ((1, 2, 3, 5, 8), 40, 16, 1, {"residual": True}),
    "one_pixel": ((2, 3, 1, 1, 16), 0, 8, 3, {}),
    "down": ((1, 2, 10, 14, 16), 0, 72, 4, {"stride": 2, "residual": True}),
    "down_pair": ((2, 1, 6, 4, 48), 32, 16, 4, {"stride": 2}),
    "down_3x3": ((1, 2, 6, 8, 32), 0, 16, 3, {"stride": 2}),
    "down_one_pixel": ((2, 1, 2, 2, 16), 0, 8, 4, {"stride": 2}),
}


def randn(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)


def output_shape(x, cout, kernel, stride, upsample):
    pad = kernel // 2 if kernel % 2 else 1
    size = [(2 * n if upsample else n) + 2 * pad - kernel for n in x[2:4]]
    return (*x[:2], *(n // stride + 1 for n in size), cout)


def make_case(case, dtype, device, exact=False):
    shape, c2, cout, kernel, options = case
    stride, upsample = options.get("stride", 1), options.get("upsample")

    def make(*s, seed, scale=1.0):
        if exact:
            return make_exact_operand(s, high=2, seed=seed, dtype=dtype).to(device)
        return randn(*s, dtype=dtype, device=device, scale=scale)

    fan = (shape[-1] + c2) * kernel * kernel
    inputs = [
        make(*shape, seed=1),
        make(cout, shape[-1] + c2, kernel, kernel, seed=2, scale=fan**-0.5),
        make(cout, seed=3),
        make(*shape[:-1], c2, seed=4) if c2 else None,
        make(*output_shape(shape, cout, kernel, stride, upsample), seed=5)
        if options.get("residual")
        else None,
    ]
    inputs[1] = inputs[1].contiguous(memory_format=torch.channels_last)

    def op(x, weight, bias, x2, residual):
        return space_conv(
            x, weight, bias, x2=x2, stride=stride, residual=residual, upsample=upsample
        )

    def ref(x, weight, bias, x2, residual):
        return space_conv_ref(x, weight, bias, x2, stride, residual, upsample)

    return op, ref, inputs


NAMES = ("x", "weight", "bias", "x2", "residual")


@pytest.fixture(autouse=True)
def _ieee_baseline():
    """cuDNN's fp32 convolutions are TF32 by default; ours are not, and the baseline should not."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def tma(monkeypatch, device):
    """The descriptor variant with small boxes, for whatever takes it."""
    kernels = pytest.importorskip("fastvdm.kernels.space_conv")
    if device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("tensor descriptors need sm_90")

    def pick(widths, grid, itemsize, tma):
        return kernels.ConvConfig(64, 32, 16, 4, 2, True, *kernels.pick_box(*grid, 32))

    monkeypatch.setattr(kernels, "pick_config", pick)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, device):
    op, ref, inputs = make_case(case, torch.float32, device)
    with use_backend("triton"):
        assert_parity(op, ref, inputs, names=NAMES)


@pytest.mark.parametrize("name", ["odd", "pair", "down", "up"])
@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_parity_16_bit(name, dtype, device):
    op, ref, inputs = make_case(CASES[name], dtype, device)
    with use_backend("triton"):
        assert_parity(op, ref, inputs, names=NAMES)


@pytest.mark.parametrize("case", TMA_CASES.values(), ids=TMA_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity_descriptors(case, dtype, device, tma):
    op, ref, inputs = make_case(case, dtype, device)
    with use_backend("triton"):
        assert_parity(op, ref, inputs, names=NAMES)


def test_descriptors_of_unaligned_weights(device, tma):
    """At an address that is not a multiple of 16 bytes, as in a flat buffer of parameters."""
    x = randn(1, 1, 4, 8, 16, dtype=torch.float16, device=device)
    flat = randn(8 * 9 * 16 + 3, dtype=torch.float16, device=device)
    weight = flat[3:].view(8, 3, 3, 16).permute(0, 3, 1, 2)
    assert weight.is_contiguous(memory_format=torch.channels_last) and weight.data_ptr() % 16
    with use_backend("triton"):
        y = space_conv(x, weight)
    wide = space_conv_ref(x.double(), weight.double())
    assert_close3(y, space_conv_ref(x, weight), wide)


@pytest.mark.parametrize("shape", [(1, 2, 3, 5, 6), (2, 1, 1, 1, 17)])
def test_transpose_parity(shape, device):
    inputs = randn(*shape, device=device), randn(shape[-1], 9, 4, 4, device=device)
    inputs = (*inputs, randn(9, device=device))
    with use_backend("triton"):
        assert_parity(space_conv_transpose, space_conv_transpose_ref, inputs)


def test_transpose_descriptors(device, tma, monkeypatch):
    """Forward through boxes of each phase, dgrad through boxes of each parity."""
    inputs = randn(1, 2, 3, 5, 16, device=device), randn(16, 32, 4, 4, device=device)
    with use_backend("triton"):
        assert_parity(space_conv_transpose, space_conv_transpose_ref, inputs)


@pytest.mark.parametrize(
    "size,channels,by_boxes",
    [((16, 32), 64, True), ((16, 31), 64, False), ((17, 32), 64, False), ((16, 32), 24, False)],
)
def test_a_stride_goes_by_descriptors_where_parities_split(size, channels, by_boxes, monkeypatch):
    """On sm_90, even extents and whole steps of channels; else by pointers."""
    kernels = pytest.importorskip("fastvdm.kernels.space_conv")
    asked = []

    class Asked(Exception):
        pass

    def pick(widths, grid, itemsize, tma):
        asked.append(tma)
        raise Asked

    monkeypatch.setattr(kernels, "pick_config", pick)
    x = torch.empty(1, 1, *size, channels, dtype=torch.float16)
    with pretend(H100), pytest.raises(Asked):
        kernels.space_conv_fwd(x, None, x.new_empty(32, channels, 4, 4), None, None, 2)
    assert asked == [by_boxes]


def test_steps_of_channels_stay_within_a_parity(device, monkeypatch):
    """48 channels in steps of 32 would run from even columns into odd ones: steps of 16."""
    kernels = pytest.importorskip("fastvdm.kernels.space_conv")
    config = kernels.ConvConfig(64, 32, 32, 4, 2, True, 4, 8)
    monkeypatch.setattr(kernels, "pick_config", lambda *a: config)
    x, weight = randn(1, 1, 8, 4, 48, device=device), randn(8, 48, 4, 4, device=device)
    with use_backend("triton"):
        y = space_conv(x, weight, stride=2)
    wide = space_conv_ref(x.double(), weight.double(), stride=2)
    assert_close3(y, space_conv_ref(x, weight, stride=2), wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["pair", "pair_1x1", "up", "down_odd", "wide"])
def test_library_parity(name, dtype):
    """What runs by default: the library's kernels composed without layout copies."""
    op, ref, inputs = make_case(CASES[name], dtype, "cpu")
    assert_parity(op, ref, inputs, names=NAMES)


@pytest.mark.parametrize("dtype,choice", [(torch.float32, "torch"), (torch.bfloat16, "library")])
def test_library_transpose_parity(dtype, choice):
    inputs = [randn(*s, dtype=dtype) for s in ((2, 1, 3, 5, 6), (6, 9, 4, 4), (9,))]
    chosen = select("space_conv_transpose", inputs[0].device, inputs[0], dtype)
    assert chosen == (choice if not AMX else "torch")
    assert_parity(space_conv_transpose, space_conv_transpose_ref, inputs)


EXACT = [(n, "pointers") for n in ("odd", "pair", "down_odd", "down_3x3", "up", "7x7", "one_row")]
EXACT += [(n, "descriptors") for n in ("odd", "pair", "7x7", "down")]


@pytest.mark.parametrize("name,variant", EXACT)
def test_exact(name, variant, device, request, poison):
    """Integer operands: every sum is exact, so forward and dgrad must be equal bit for bit."""
    case = CASES[name]
    if variant == "descriptors":
        request.getfixturevalue("tma")
        shape, c2, _, kernel, options = case
        case = ((*shape[:-1], 16 if name == "down" else 8), 16 if c2 else 0, 8, kernel, options)
    op, ref, inputs = make_case(case, torch.float32, device, exact=True)
    with use_backend("triton"):
        out, g = run_with_grads(op, inputs)
        again, g2 = run_with_grads(op, inputs)
    expected, g_ref = run_with_grads(ref, inputs)
    assert torch.equal(out, expected)
    assert torch.equal(out, again)
    for a, b, c in zip(g, g2, g_ref):
        assert torch.equal(a, c)
        assert torch.equal(a, b)


def run_with_grads(fn, inputs):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = fn(*leaves)
    dout = make_exact_operand(out.shape, high=2, seed=9).to(out)
    return out.detach(), torch.autograd.grad(out, [t for t in leaves if t is not None], dout)


def test_exact_transpose(device, poison):
    x = make_exact_operand((2, 1, 3, 5, 7), seed=1).to(device)
    weight = make_exact_operand((7, 4, 4, 4), seed=2).to(device)
    with use_backend("triton"):
        out, g = run_with_grads(space_conv_transpose, (x, weight))
    expected, g_ref = run_with_grads(space_conv_transpose_ref, (x, weight))
    assert torch.equal(out, expected)
    assert all(torch.equal(a, b) for a, b in zip(g, g_ref))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_no_images(backend, device):
    x, weight = randn(0, 2, 3, 5, 4, device=device), randn(6, 4, 3, 3, device=device)
    weight.requires_grad_()
    with use_backend(backend):
        y = space_conv(x, weight)
        y.sum().backward()
    assert y.shape == (0, 2, 3, 5, 6)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_non_contiguous_and_expanded(device):
    x = randn(1, 2, 6, 5, 3, device=device).transpose(2, 3)
    weight = randn(8, 3, 3, 3, device=device).flip(2).requires_grad_()
    results = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        with use_backend(backend):
            out = space_conv(leaf, weight)
        results.append((out, *torch.autograd.grad(out.sum(), (leaf, weight))))
        assert out.is_contiguous()
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["pointers", "descriptors"])
@pytest.mark.parametrize("groups,per_frame", [(1, False), (3, True), (3, False), (12, False)])
def test_statistics(groups, per_frame, variant, device, request):
    """Three tiles an image, the last one partial: 9x17 pixels against 128, or boxes of 32."""
    if variant == "descriptors":
        request.getfixturevalue("tma")
    x, weight = randn(2, 2, 9, 17, 8, device=device), randn(12, 8, 1, 1, device=device)
    with use_backend("triton"):
        y, mean, rstd = space_conv_stats(x, weight, groups=groups, per_frame=per_frame)
    expected = group_stats_ref(y.double(), groups, per_frame)
    assert mean.shape == rstd.shape == ((4 if per_frame else 2), groups)
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(rstd.double(), expected[1], rtol=2e-6, atol=0)


def test_statistics_leave_the_output_alone(device):
    _, ref, inputs = make_case(CASES["pair"], torch.float32, device, exact=True)
    x, weight, bias, x2, residual = inputs
    with use_backend("triton"):
        y, _, _ = space_conv_stats(x, weight, bias, groups=3, x2=x2, residual=residual)
    assert torch.equal(y, ref(*inputs))


def test_statistics_of_extreme_means(device):
    """1e4 +- 1: E[x^2] - E[x]^2 in fp32 would leave no digit of the variance. One ulp of a tile's
    mean is 1e-3 there, which alone moves the variance by some 1e-5."""
    x, weight = randn(1, 2, 16, 16, 4, device=device), torch.eye(4, device=device)[:, :, None, None]
    with use_backend("triton"):
        y, mean, rstd = space_conv_stats(x, weight, torch.full((4,), 1e4, device=device), groups=2)
    expected = group_stats_ref(y.double(), 2)
    torch.testing.assert_close(mean.double(), expected[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), expected[1], rtol=3e-5, atol=0)


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_statistics_carry_no_gradient(backend, device):
    x = randn(1, 2, 3, 4, 5, device=device).requires_grad_()
    weight = randn(6, 5, 3, 3, device=device)
    with use_backend(backend):
        y, mean, rstd = space_conv_stats(x, weight, groups=2)
    assert y.requires_grad and not mean.requires_grad and not rstd.requires_grad
    expected = torch.autograd.grad(space_conv_ref(x, weight).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


# --- upsampling ----------------------------------------------------------------------------------


def test_folded_weight_is_exact():
    """The transposed 4x4 kernel is the 3x3 one after nearest upsampling, gradients included."""
    weight = make_exact_operand((5, 3, 3, 3), seed=1).requires_grad_()
    x = make_exact_operand((1, 2, 4, 6, 3), seed=2)
    folded = space_conv_transpose_ref(x, ops.fold_upsample_weight(weight))
    expected = space_conv_ref(x, weight, upsample="nearest")
    assert torch.equal(folded, expected)
    dy = make_exact_operand(expected.shape, seed=3)
    g, g_ref = (torch.autograd.grad(y, weight, dy)[0] for y in (folded, expected))
    assert torch.equal(g, g_ref)


# --- torch.library -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "library"])
def test_opcheck(backend, device):
    leaf = functools.partial(randn, device=device)
    x, x2 = leaf(1, 2, 3, 5, 6).requires_grad_(), leaf(1, 2, 3, 5, 4).requires_grad_()
    weight, bias = leaf(7, 10, 3, 3).requires_grad_(), leaf(7).requires_grad_()
    residual = leaf(1, 2, 3, 5, 7).requires_grad_()
    opcheck_op(ops.space_conv_fwd, (x, x2, weight, bias, residual, 1, backend))
    if backend == "library":
        opcheck_op(ops.space_conv_fwd, (x, None, leaf(7, 6, 4, 4), None, None, 2, backend))
    dy, *saved = leaf(1, 2, 3, 5, 7), x.detach(), x2.detach(), weight.detach()
    opcheck_op(ops.space_conv_bwd, (dy, *saved, 1, True, False, True, False, backend))
    weight_t = leaf(6, 9, 4, 4).requires_grad_()
    opcheck_op(ops.space_conv_transpose_fwd, (x, weight_t, None, None, backend))
    args = leaf(1, 2, 6, 10, 9), x.detach(), weight_t.detach(), True, True, True
    opcheck_op(ops.space_conv_transpose_bwd, (*args, backend))
    if backend == "triton":
        args = (x, None, leaf(7, 6, 3, 3), None, None, 1, 7, True, 1e-5)
        opcheck_op(ops.space_conv_stats_fwd, (*args, backend))


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_gradcheck(backend, device):
    leaf = functools.partial(randn, device=device, dtype=torch.float64)
    x, x2 = leaf(1, 1, 2, 3, 2).requires_grad_(), leaf(1, 1, 2, 3, 1).requires_grad_()
    weight, bias = leaf(2, 3, 3, 3).requires_grad_(), leaf(2).requires_grad_()
    residual = leaf(1, 1, 2, 3, 2).requires_grad_()
    transposed = leaf(2, 1, 4, 4).requires_grad_()

    def pair(x, x2, weight, bias, residual):
        return space_conv(x, weight, bias, x2=x2, residual=residual)

    with use_backend(backend):
        torch.autograd.gradcheck(pair, (x, x2, weight, bias, residual), fast_mode=True)
        torch.autograd.gradcheck(space_conv_transpose, (x, transposed), fast_mode=True)
        small = leaf(2, 2, 3, 3).requires_grad_()
        up = functools.partial(space_conv, upsample="nearest")
        torch.autograd.gradcheck(up, (x, small), fast_mode=True)
    phases = ops.space_conv_transpose_fwd
    args = (x, transposed, None, residual.new_zeros(1, 1, 4, 6, 1).requires_grad_(), "library")
    torch.autograd.gradcheck(phases, args, fast_mode=True)


def test_second_derivative_raises(device):
    x = randn(1, 1, 3, 4, 2, device=device).requires_grad_()
    with use_backend("triton"):
        y = space_conv(x, randn(3, 2, 3, 3, device=device))
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_compiles_once_for_two_frame_counts(backend, device):
    torch._dynamo.reset()
    weight, weight2 = randn(6, 4, 3, 3, device=device), randn(8, 10, 1, 1, device=device)
    weight_t = randn(8, 5, 4, 4, device=device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def network(x, weight, weight2, weight_t):
        h = space_conv(x, weight)
        return space_conv_transpose(space_conv(h, weight2, x2=x, residual=None), weight_t)

    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for frames in (2, 3):
        leaves = [
            t.detach().clone().requires_grad_()
            for t in (randn(1, frames, 4, 5, 4, device=device), weight, weight2, weight_t)
        ]
        with use_backend(backend):
            out = compiled(*leaves)
            expected = network(*leaves)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        for a, b in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


# --- what runs -----------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Counts the aten calls and the elements that layout copies move."""

    COPIES = ("aten.clone", "aten.copy_", "aten._to_copy", "aten.contiguous", "aten.cat")

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.copied = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rsplit(".", 1)[0]
        out = func(*args, **(kwargs or {}))
        self.calls[name] += 1
        if name in self.COPIES:
            self.copied = max(self.copied, out.numel())
        return out


@pytest.mark.parametrize("kernel,stride", [(3, 1), (1, 1), (4, 2)])
def test_library_path_copies_no_layout(kernel, stride):
    x = randn(1, 2, 32, 16, 24).requires_grad_()
    weight = randn(8, 24, kernel, kernel).contiguous(memory_format=torch.channels_last)
    weight.requires_grad_()
    with Recorder() as seen:
        y = space_conv(x, weight, stride=stride)
        y.backward(torch.ones_like(y))
    assert y.is_contiguous() and x.grad.is_contiguous()
    # Not by strides: those of an extent of 1 are oneDNN's to choose, and change with its threads.
    assert weight.grad.is_contiguous(memory_format=torch.channels_last)
    assert seen.copied < min(x.numel(), y.numel())


def test_pair_is_never_kept_concatenated(monkeypatch):
    """Saved for the backward: the two sources themselves and the weight."""
    x, x2 = (randn(1, 2, 8, 6, c).requires_grad_() for c in (24, 40))
    weight = randn(8, 64, 3, 3).requires_grad_()
    saved, joined = [], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = space_conv(x, weight, x2=x2)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, x2, weight)}
    cat = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a, **k: joined.append(cat(*a, **k)) or joined[-1])
    y.sum().backward()
    assert [t.shape for t in joined] == [weight.shape]  # the halves of the weight's gradient


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_weights_skip_their_gradient(backend, transposed, device, monkeypatch):
    """Guidance: no weight gradient is computed, and ours needs no library call at all."""
    dtype = torch.float32
    if transposed and backend == "auto":  # elsewhere it is torch's own autograd
        device, dtype = "cpu", torch.bfloat16
    masks = []
    aten = torch.ops.aten.convolution_backward

    def spy(*args):
        masks.append(tuple(args[-1]))
        return aten(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    leaf = functools.partial(randn, device=device, dtype=dtype)
    x, x2 = (leaf(1, 2, 3, 5, c).requires_grad_() for c in (80, 6))
    choose = ops.select
    monkeypatch.setattr(ops, "select", lambda *a: "library" if choose(*a) == "cpu" else choose(*a))
    weight = leaf(*((80, 4, 4, 4) if transposed else (20, 86, 3, 3)))
    for frozen in (True, False):
        weight.requires_grad_(not frozen)
        masks.clear()
        with use_backend(backend):
            y = space_conv_transpose(x, weight) if transposed else space_conv(x, weight, x2=x2)
            y.sum().backward()
        sources = 1 if transposed else 2
        ours = backend == "triton"
        expected = [] if frozen and ours else [(not ours, not frozen, False)] * sources
        assert masks == expected
    assert x.grad is not None and weight.grad is not None


@pytest.mark.parametrize("backend", ["auto", "reference", "cpu", "triton"])
@pytest.mark.parametrize("upsample", [None, "nearest"])
def test_empty_batch(backend, upsample, device):
    x = torch.randn(0, 2, 3, 5, 4, device=device, requires_grad=True)
    weight = torch.randn(6, 4, 3, 3, device=device, requires_grad=True)
    with use_backend(backend, strict=False):
        y = ops.space_conv(x, weight, upsample=upsample)
        dx, dw = torch.autograd.grad(y.sum(), (x, weight))
    factor = 1 if upsample is None else 2
    assert y.shape == (0, 2, 3 * factor, 5 * factor, 6) and dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))


def test_choice_is_pinned():
    """No kernel that has not been measured on a GPU is the default there."""
    x = torch.empty(1, 1, 8, 8, 64, device="meta", dtype=torch.float16)
    calls = {
        f"{k} {pair}": ("space_conv", x, k, 1, pair, x.dtype) for k in (1, 3) for pair in (0, 1)
    }
    calls["transpose"] = ("space_conv_transpose", x, x.dtype)
    for op, *call in calls.values():
        assert isinstance(explain(op, *call)["triton"], dispatch.ByName)
        chosen, _ = _call.choose(op, torch.device("cuda"), tuple(call))
        assert chosen in ("library", "torch")
        huge = torch.empty(1, 1, 2**16, 2**16, 8, device="meta", dtype=x.dtype), *call[1:]
        chosen, lost = _call.choose(op, torch.device("cuda"), huge)
        assert chosen in ("library", "torch") and lost is None  # nobody asked for Triton
        if not GPU:  # by name, under the interpreter
            with use_backend("triton"):
                assert "int32" in _call.choose(op, torch.device("cpu"), huge)[1][2]
            with use_backend("triton"):
                assert select(op, torch.device("cpu"), *call) == "triton"
    with use_backend("reference"):
        assert select("space_conv", x.device, x, 3, 1, True, x.dtype) == "reference"


def test_fallback_names_its_reason():
    x, weight = randn(1, 1, 3, 4, 2), randn(3, 2, 3, 3)
    assert "3x3 at stride 1" in explain("space_conv", x, 3, 2, False, x.dtype)["cpu"]
    if not GPU:
        with use_backend("triton"), pytest.raises(FallbackError, match="truncates bf16"):
            space_conv(x.bfloat16(), weight.bfloat16())
    huge = torch.empty(1, 1, 2**16, 2**15, 1, device="meta")
    assert "int32" in explain("space_conv", huge, 3, 1, False, huge.dtype)["triton"]


@pytest.mark.parametrize("upsample", [None, "nearest"])
def test_autocast(upsample):
    x, weight, bias = randn(1, 2, 4, 6, 5), randn(7, 5, 3, 3), randn(7)
    x2 = None if upsample else randn(1, 2, 4, 6, 5)
    weight = weight if upsample else randn(7, 10, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = space_conv(x, weight, bias, x2=x2, upsample=upsample)
        ref = space_conv_ref(x, weight, bias, x2, upsample=upsample)
    assert y.dtype == ref.dtype == torch.bfloat16
    wide = space_conv_ref(
        *(None if t is None else t.double() for t in (x, weight, bias, x2)), upsample=upsample
    )
    assert_close3(y, ref, wide)


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"x": (2, 3, 4, 5)}, ValueError, "must be .B, F, H, W, C."),
        ({"x2": (1, 2, 4, 6, 1)}, ValueError, "x2 must be"),
        ({"weight": (7, 4, 3, 3)}, ValueError, "the input has 3"),
        ({"weight": (7, 3, 3, 1)}, ValueError, "square kernel"),
        ({"weight": (7, 3, 4, 4)}, ValueError, "4x4 with stride 2"),
        ({"bias": (6,)}, ValueError, r"bias must be \(7,\)"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2"),
        ({"residual": (1, 2, 4, 5, 6)}, ValueError, "residual must be"),
        ({"upsample": "bilinear"}, ValueError, "upsample must be"),
        ({"upsample": "nearest", "stride": 2}, ValueError, "upsample takes"),
        (
            {"residual": torch.zeros(1, 2, 4, 5, 7).half()},
            TypeError,
            "residual must be torch.float32",
        ),
        ({"dtype": torch.float64}, TypeError, "weight must be torch.float64"),
    ],
)
def test_bad_input(change, error, match):
    given = {"x": (1, 2, 4, 5, 3), "weight": (7, 3, 3, 3), "bias": (7,)} | change
    dtype = given.pop("dtype", torch.float32)
    kwargs = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
    kwargs["x"] = kwargs["x"].to(dtype)
    with pytest.raises(error, match=match):
        space_conv(**kwargs)
    with pytest.raises(ValueError, match="must be 4x4"):
        space_conv_transpose(torch.zeros(1, 2, 4, 5, 3), torch.zeros(3, 7, 3, 3))
    with pytest.raises(ValueError, match="groups must divide"):
        space_conv_stats(torch.zeros(1, 2, 4, 5, 3), torch.zeros(7, 3, 3, 3), groups=2)


def test_costs_against_the_flop_counter():
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.zeros(2, 3, 8, 6, 5), torch.zeros(7, 5, 4, 4)
    with FlopCounterMode(display=False) as counter:
        space_conv_ref(x, weight, stride=2)
    cost = ops.space_conv_cost(x.shape, weight.shape, stride=2, itemsize=4)
    assert cost.flops == counter.get_total_flops()
    assert cost.bytes == 4 * (x.numel() + weight.numel() + 2 * 3 * 4 * 3 * 7)
    plain = ops.space_conv_cost((2, 3, 16, 12, 5), (7, 5, 3, 3))
    folded = ops.space_conv_cost(x.shape, (7, 5, 3, 3), upsample="nearest")
    assert 9 * folded.flops == 4 * plain.flops
    transposed = ops.space_conv_transpose_cost(x.shape, (5, 7, 4, 4))
    assert transposed == folded

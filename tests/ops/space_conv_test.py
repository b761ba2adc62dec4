"""The convolutions, beside the suite: descriptors, statistics, Winograd, who takes a call."""

from __future__ import annotations

import collections
import functools

import pytest
import torch
import torch.nn.functional as F
from op_cases import ROWS, by_reference, check_parity, make
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.kernels import space_conv_library as library
from fastvdm.ops import _call, _space_conv
from fastvdm.ops import space_conv as ops
from fastvdm.ops._call import select
from fastvdm.ops.space_conv import (
    choose,
    space_conv,
    space_conv_cost,
    space_conv_stats,
    space_conv_transpose,
    space_conv_transpose_cost,
)
from fastvdm.reference.space_conv import (
    group_stats_ref,
    space_conv_ref,
    space_conv_transpose_ref,
)
from fastvdm.runtime import dispatch, extension
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.device import H100, pretend
from fastvdm.runtime.dispatch import FallbackError, explain
from fastvdm.runtime.extension import AMX, emulated
from fastvdm.testing import assert_close3, assert_parity, grads, make_exact_operand

GPU = torch.cuda.is_available()

TMA = {  # row, sizes: widths that are multiples of 8; of 16 and even extents with stride 2
    "3x3": ("plain", dict(B=1, F=3, H=5, W=7, C=8, N=72)),
    "pair": ("pair", dict(C=24, E=8, N=16, given=("x2", "bias"))),
    "pair_1x1": ("pair", dict(B=1, C=8, E=40, N=16, K=1)),
    "one_pixel": ("plain", dict(H=1, W=1, C=16, N=8, given=("bias",))),
    "down": ("down", dict(B=1, F=2, H=10, W=14, C=16, N=72, P=5, Q=7)),
    "down_3x3": ("down", dict(B=1, F=2, H=6, W=8, C=32, N=16, K=3, P=3, Q=4, given=())),
    "down_one_pixel": ("down", dict(F=1, H=2, W=2, C=16, N=8, P=1, Q=1, given=("bias",))),
}


def randn(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)


@pytest.mark.parametrize("row, sizes", TMA.values(), ids=TMA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_parity_descriptors(row, sizes, dtype, device, tma):
    with use_backend("triton"):
        check_parity(make(ROWS[f"space_conv/{row}"], dtype, device, sizes))


@pytest.mark.parametrize("row, sizes", [TMA[n] for n in ("3x3", "pair", "down")], ids=str)
def test_exact_descriptors(row, sizes, device, tma):
    """Integers, so forward and gradients are equal bit for bit."""
    case = make(ROWS[f"space_conv/{row}"], torch.float32, device, sizes, exact=True)
    tensors = list(case.tensors.values())
    with use_backend("triton"):
        dy = make_exact_operand(case.first(*tensors).shape, high=2, seed=9).to(device)
        found = grads(case.first, tensors, dy)
    expected = grads(by_reference(case.first), tensors, dy)
    for a, b in zip(found[0] + found[1], expected[0] + expected[1]):
        assert torch.equal(a, b)


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


def test_steps_of_channels_stay_within_a_parity(device, tma, monkeypatch):
    """48 channels in steps of 32 would run from even columns into odd ones: steps of 16."""
    kernels = pytest.importorskip("fastvdm.kernels.space_conv")
    config = kernels.ConvConfig(64, 32, 32, 4, 2, True, 4, 8)
    monkeypatch.setattr(kernels, "pick_config", lambda *a: config)
    x, weight = randn(1, 1, 8, 4, 48, device=device), randn(8, 48, 4, 4, device=device)
    with use_backend("triton"):
        y = space_conv(x, weight, stride=2)
    wide = space_conv_ref(x.double(), weight.double(), stride=2)
    assert_close3(y, space_conv_ref(x, weight, stride=2), wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_transpose_parity(dtype):
    """Of the implementation that a CPU takes by default."""
    inputs = [randn(*s, dtype=dtype) for s in ((2, 1, 3, 5, 6), (6, 9, 4, 4), (9,))]
    device = inputs[0].device
    expected = "library" if emulated(device, dtype) else "torch"
    if extension.reason_off() is None and dtype != torch.float16:
        expected = "torch" if AMX and dtype == torch.bfloat16 else "cpu"
    assert select("space_conv_transpose", device, inputs[0], dtype) == expected
    assert_parity(space_conv_transpose, space_conv_transpose_ref, inputs)


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
    case = make(ROWS["space_conv/pair"], torch.float32, device, exact=True)
    x, weight, bias, residual, x2 = case.tensors.values()
    with use_backend("triton"):
        y, _, _ = space_conv_stats(x, weight, bias, groups=3, x2=x2, residual=residual)
        assert torch.equal(y, case.first(*case.tensors.values()))


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


# --- Winograd in C++ -----------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [(3, 9, 7, 20, 0, 24), (2, 8, 8, 16, 5, 33), (1, 1, 1, 3, 0, 5), (1, 2, 17, 64, 64, 48)],
)
def test_conv3x3(isa, shape, dtype, m):
    """m = 2 errs no more than the direct sum; m = 4 is for 16-bit storage."""
    n, h, w, c, c2, out = shape
    x = torch.randn(n, h, w, c).to(dtype)
    x2 = torch.randn(n, h, w, c2).to(dtype) if c2 else None
    weight = (torch.randn(out, c + c2, 3, 3) / (9 * (c + c2)) ** 0.5).to(dtype)
    bias, residual = torch.randn(out), torch.randn(n, h, w, out).to(dtype)
    both = x if x2 is None else torch.cat([x, x2], -1)

    def conv(dt):
        y = F.conv2d(both.to(dt).permute(0, 3, 1, 2), weight.to(dt), bias.to(dt), padding=1)
        return y.permute(0, 2, 3, 1) + residual.to(dt)

    y = torch.ops.fastvdm_C.conv3x3_cpu(x, x2, weight, bias, residual, False, m)
    floor = 4e-6 if dtype == torch.float32 and m == 4 else None
    assert_close3(y, conv(torch.float32).to(dtype), conv(torch.float64), floor=floor)
    dy = torch.randn(n, h, w, out).to(dtype)
    dx = torch.ops.fastvdm_C.conv3x3_cpu(dy, None, weight, None, None, True, m)
    ref = [
        F.conv_transpose2d(dy.to(t).permute(0, 3, 1, 2), weight.to(t), padding=1).permute(
            0, 2, 3, 1
        )
        for t in (torch.float32, torch.float64)
    ]
    assert_close3(dx, ref[0].to(dtype), ref[1], floor=floor, name="dx")


def weight_gradient(dy, both, weight, dtype):
    """Of torch's own convolution, from (N, H, W, C)."""
    dy, both = (t.to(dtype).permute(0, 3, 1, 2) for t in (dy, both))
    return torch.ops.aten.convolution_backward(
        *(dy, both, weight.to(dtype), None, [1, 1], [1, 1], [1, 1]),
        *(False, [0, 0], 1, [False, True, False]),
    )[1]


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape",
    [
        *((3, 9, 7, 20, 0, 24), (2, 8, 8, 16, 5, 33), (1, 1, 1, 3, 0, 5), (1, 2, 17, 64, 64, 48)),
        *((2, 3, 5, 70, 24, 130), (2, 131, 127, 16, 0, 5)),  # several panels; several passes
    ],
)
def test_conv3x3_dw(isa, shape, dtype, m):
    """In any layout of the weight, in its dtype."""
    n, h, w, c, c2, out = shape
    x, dy = torch.randn(n, h, w, c).to(dtype), torch.randn(n, h, w, out).to(dtype)
    x2 = torch.randn(n, h, w, c2).to(dtype) if c2 else None
    both = x if x2 is None else torch.cat([x, x2], -1)
    weight = torch.empty(out, c + c2, 3, 3, dtype=dtype)
    base, wide = (weight_gradient(dy, both, weight, t) for t in (torch.float32, torch.float64))
    turned = weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for given in (weight, weight.contiguous(memory_format=torch.channels_last), turned):
        dw = torch.ops.fastvdm_C.conv3x3_dw_cpu(dy, x, x2, given, m)
        assert dw.stride() == given.stride()
        assert_close3(dw, base.to(dtype), wide, factor=3.0)
    if dtype == torch.bfloat16:  # unrounded: the error of the integers stays well below bf16's
        dw = torch.ops.fastvdm_C.conv3x3_dw_cpu(dy, x, x2, weight.float(), m)
        assert_close3(dw, base, wide, floor=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv3x3_dw_whatever_the_threads(isa, dtype):
    """With more threads than units of channels, the points are divided, too."""
    before = torch.get_num_threads()
    for shape, out in (((2, 131, 67, 16), 16), ((3, 9, 7, 70), 130)):
        x, dy = torch.randn(shape).to(dtype), torch.randn(*shape[:3], out).to(dtype)
        weight, found = torch.empty(out, shape[-1], 3, 3, dtype=dtype), []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(torch.ops.fastvdm_C.conv3x3_dw_cpu(dy, x, None, weight, 4))
        finally:
            torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv3x3_dw_not_a_number(isa, dtype, value):
    """In the filters of its channel, and in no other."""
    x, dy = torch.randn(2, 9, 7, 20).to(dtype), torch.randn(2, 9, 7, 24).to(dtype)
    weight = torch.empty(24, 20, 3, 3, dtype=dtype)
    for t, channel, bad in ((x, 17, (slice(None), 17)), (dy, 3, (3,))):
        given = t.clone()
        given[1, 4, 2, channel] = value
        both = (dy, given) if t is x else (given, x)
        dw = torch.ops.fastvdm_C.conv3x3_dw_cpu(*both, None, weight, 4)
        assert dw[bad].isnan().all()
        dw[bad] = 0
        assert dw.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_conv3x3_dw_of_any_range(isa, dtype):
    """Channels of very different size, and one of zeros: each filter keeps its digits."""
    sizes = 2.0 ** torch.arange(-90, 60, 10)
    sizes[-1] = 0
    x, dy = torch.randn(2, 9, 7, 15) * sizes, torch.randn(2, 9, 7, 17) * 2.0**-20
    x, dy, weight = x.to(dtype), dy.to(dtype), torch.empty(17, 15, 3, 3, dtype=dtype)
    dw = torch.ops.fastvdm_C.conv3x3_dw_cpu(dy, x, None, weight, 4)
    base, wide = (weight_gradient(dy, x, weight, t) for t in (torch.float32, torch.float64))
    for c in range(15):
        assert_close3(dw[:, c], base[:, c].to(dtype), wide[:, c], factor=3.0)


def test_who_makes_the_gradient_of_the_weight(monkeypatch):
    """The library that of few input channels."""
    asked = []
    launch = _space_conv.launcher
    monkeypatch.setattr(_space_conv, "launcher", lambda *a: asked.append(a[1]) or launch(*a))
    for channels in (15, 16):
        x = randn(1, 2, 3, 5, channels)
        weight = randn(8, channels, 3, 3).requires_grad_()
        if choose(x, weight) != "cpu":
            pytest.skip("the C++ kernels do not take it")
        asked.clear()
        space_conv(x, weight).sum().backward()
        assert ("space_conv_dw" in asked) == (channels == 16)


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
    # The halves of the weight's gradient; our kernel writes it whole.
    halves = [] if choose(x, weight, x2=x2) == "cpu" else [weight.shape]
    assert [t.shape for t in joined] == halves


@pytest.mark.parametrize("backend", ["triton", "auto"])
@pytest.mark.parametrize("transposed", [False, True])
def test_frozen_weights_skip_their_gradient(backend, transposed, device, monkeypatch):
    """Guidance: no weight gradient is computed, and ours needs no library call at all."""
    dtype = torch.float32
    if transposed and backend == "auto":  # elsewhere it is torch's own autograd
        device, dtype = "cpu", torch.bfloat16
        monkeypatch.setattr(_space_conv, "AMX", False)
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
    assert "are for 3x3" in explain("space_conv", x, 3, 2, False, x.dtype)["cpu"]
    if not GPU:
        with use_backend("triton"), pytest.raises(FallbackError, match="truncates bf16"):
            space_conv(x.bfloat16(), weight.bfloat16())
    huge = torch.empty(1, 1, 2**16, 2**15, 1, device="meta")
    assert "int32" in explain("space_conv", huge, 3, 1, False, huge.dtype)["triton"]


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"x": (2, 3, 4, 5)}, ValueError, "must be .B, F, H, W, C."),
        ({"weight": (7, 3, 3, 1)}, ValueError, "square kernel"),
        ({"weight": (7, 3, 4, 4)}, ValueError, "4x4 with stride 2"),
        ({"stride": 3}, ValueError, "stride must be 1 or 2"),
        ({"upsample": "bilinear"}, ValueError, "upsample must be"),
        ({"upsample": "nearest", "stride": 2}, ValueError, "upsample takes"),
    ],
)
def test_bad_input(change, error, match):
    given = {"x": (1, 2, 4, 5, 3), "weight": (7, 3, 3, 3), "bias": (7,)} | change
    kwargs = {k: torch.zeros(v) if isinstance(v, tuple) else v for k, v in given.items()}
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
    cost = space_conv_cost(x.shape, weight.shape, stride=2, itemsize=4)
    assert cost.flops == counter.get_total_flops()
    assert cost.bytes == 4 * (x.numel() + weight.numel() + 2 * 3 * 4 * 3 * 7)
    plain = space_conv_cost((2, 3, 16, 12, 5), (7, 5, 3, 3))
    folded = space_conv_cost(x.shape, (7, 5, 3, 3), upsample="nearest")
    assert 9 * folded.flops == 4 * plain.flops
    transposed = space_conv_transpose_cost(x.shape, (5, 7, 4, 4))
    assert transposed == folded


def test_emulated_gradient_of_an_fp32_weight_is_not_rounded(monkeypatch):
    monkeypatch.setattr(library, "emulated", lambda device, dtype: dtype == torch.bfloat16)
    dy, x = (randn(1, 2, 4, 4, c).bfloat16() for c in (6, 5))
    for kernel in (1, 3):
        weight = randn(6, 5, kernel, kernel)
        dx, _, dw, _ = library.space_conv_bwd(dy, x, None, weight, 1, True, False, True, False)
        assert dx.dtype == torch.bfloat16 and dw.dtype == torch.float32
        assert not torch.equal(dw, dw.bfloat16().float())
    dy = randn(1, 2, 8, 8, 6).bfloat16()
    dx, dw, _ = library.space_conv_transpose_bwd(dy, x, randn(5, 6, 4, 4), True, True, False)
    assert dx.dtype == torch.bfloat16 and not torch.equal(dw, dw.bfloat16().float())

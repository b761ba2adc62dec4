"""temporal_block: the Triton kernels (interpreted without a GPU) against torch.

fp64 and fp16 run through the fused kernel, fp32 is composed of the parts; bf16 runs on a GPU only:
the interpreter truncates it. Every option appears with every other at
least once below; products of options, widths and lengths add no branch and are left out.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from fastvdm.ops._call import select
from fastvdm.ops.temporal_block import (
    exceeds_registers,
    temporal_block,
    temporal_block_bwd,
    temporal_block_cost,
    temporal_block_fwd,
)
from fastvdm.reference.temporal_block import temporal_block_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import ByDesign, explain
from fastvdm.testing import assert_close3, assert_parity, make_exact_operand, opcheck_op

NAMES = (
    "x", "norm_weight", "qkv_weight", "out_weight", "norm_bias", "qkv_bias", "out_bias",
    "bias", "rel_k", "rel_v",
)  # fmt: skip
FULL = dict(biases=True, bias=True)
# b, f, h, w, c, heads, d; then the options
CASES = {
    "plain": dict(shape=(1, 5, 2, 3, 24), heads=2, d=16),
    "one_frame": dict(shape=(2, 1, 1, 3, 20), heads=1, d=20, **FULL),
    "rotary_focus": dict(shape=(3, 3, 1, 2, 20), heads=1, d=20, rotary=8, focus=True, **FULL),
    "shaw_images": dict(
        shape=(1, 7, 1, 5, 40), heads=2, d=16, tables=2, reach=9, rotary=16, images=2, **FULL
    ),
    "two_halves": dict(shape=(2, 17, 1, 1, 33), heads=2, d=24, tables=1, focus=True, images=3),
    "sixteen": dict(shape=(1, 16, 1, 3, 64), heads=1, d=32, rotary=32, bias=True),
    "wide": dict(shape=(1, 3, 1, 11, 136), heads=1, d=20, tables=1, **FULL),
    "wide_bias": dict(shape=(1, 3, 1, 11, 136), heads=1, d=20, rotary=8, **FULL),
    "wide_shaw": dict(shape=(1, 5, 1, 7, 136), heads=1, d=20, tables=1, biases=True),
    "shaw": dict(
        shape=(2, 7, 1, 5, 40), heads=2, d=16, tables=2, reach=9, focus=True, images=2, biases=True
    ),
    "between": dict(shape=(1, 24, 1, 1, 72), heads=1, d=16, images=24, focus=True, **FULL),
}


# On a GPU fp64 is the reference's, and fp16 takes its place where the dtype does not matter.
GPU = torch.cuda.is_available()
DTYPE = torch.float16 if GPU else torch.float64


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("auto" if GPU else "triton"):
        yield


def _inputs(case, dtype=DTYPE, device="cpu"):
    """Differentiable inputs in the order of NAMES, and the other keyword arguments."""
    generator = torch.Generator().manual_seed(3)
    b, f, _, _, c = case["shape"]
    heads, d, tables = case["heads"], case["d"], case.get("tables", 0)
    inner, reach = heads * d, case.get("reach", 2)

    def randn(*shape, wanted=True, scale=1.0, shift=0.0):
        if not wanted:
            return None
        t = torch.randn(shape, generator=generator, dtype=torch.float64) * scale + shift
        return t.to(device, dtype)

    biases = case.get("biases", False)
    inputs = [
        randn(*case["shape"], scale=2.0, shift=0.5),
        randn(c, scale=0.25, shift=1.0),
        randn(3 * inner, c, scale=2.0 * c**-0.5),  # sharp: a uniform softmax shows nothing
        randn(c, inner, scale=inner**-0.5),
        randn(c, wanted=biases, scale=0.25),
        randn(3 * inner, wanted=biases, scale=0.25),
        randn(c, wanted=biases, scale=0.25),
        randn(heads, f, f, wanted=case.get("bias", False)),
        randn(tables, 2 * reach + 1, d, wanted=tables > 0, scale=0.5),
        randn(tables, 2 * reach + 1, d, wanted=tables > 0, scale=0.5),
    ]
    options = dict(heads=heads, num_images=case.get("images", 0))
    if case.get("rotary"):
        angle = torch.arange(f)[:, None] * torch.linspace(1.0, 0.1, case["rotary"] // 2)
        options["rotary"] = torch.stack((angle.cos(), angle.sin())).to(device, torch.float32)
    if case.get("focus"):
        options["focus_mask"] = (torch.arange(b) % 2 == 1).to(device)
    return inputs, options


def _call(fn, options):
    def run(x, norm_weight, qkv_weight, out_weight, *rest):
        named = dict(zip(NAMES[4:], rest))
        return fn(x, norm_weight, qkv_weight, out_weight, **named, **options)

    return run


def _parity(case, dtype, device):
    inputs, options = _inputs(case, dtype, device)
    fused, reference = _call(temporal_block, options), _call(temporal_block_ref, options)
    assert_parity(fused, reference, inputs, names=NAMES)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, device, poison):
    _parity(case, torch.float64, device)


@pytest.mark.parametrize("name", ["rotary_focus", "shaw_images", "shaw", "wide_bias", "between"])
def test_parity_fp16(name, device, poison):
    _parity(CASES[name], torch.float16, device)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity_bf16(case, device):
    _parity(case, torch.bfloat16, device)


def test_mixed_precision(device):
    """As under autocast: an fp32 residual stream through 16-bit projections."""
    inputs, options = _inputs(CASES["plain"], torch.float32, device)
    inputs[2:4] = (t.half() for t in inputs[2:4])
    out = _call(temporal_block, options)(*inputs)
    assert out.dtype == torch.float32
    base = _call(temporal_block_ref, options)(*inputs)
    wide = _call(temporal_block_ref, options)(*(t if t is None else t.double() for t in inputs))
    assert_close3(out, base, wide)


def test_strides_and_expanded_gradient(device):
    inputs, options = _inputs(CASES["plain"], device=device)
    x = torch.stack((inputs[0], inputs[0]), dim=-1)[..., 0].detach()
    assert not x.is_contiguous()
    grads = {}
    for name, fn, dtype in (
        ("fused", temporal_block, torch.float16),
        ("plain", temporal_block_ref, torch.float16),
        ("wide", temporal_block_ref, torch.float64),
    ):
        leaf = x.to(dtype).requires_grad_()
        rest = [t if t is None else t.to(dtype) for t in inputs[1:]]
        (grads[name],) = torch.autograd.grad(_call(fn, options)(leaf, *rest).sum(), leaf)
    assert_close3(grads["fused"], grads["plain"], grads["wide"], factor=3.0)


def test_focused_frames_do_not_leak(device):
    inputs, options = _inputs(CASES["rotary_focus"], device=device)
    run = _call(temporal_block, options)
    before = run(*inputs)
    inputs[0][:, 1] += 1.0 + inputs[0][:, 1].square()
    after = run(*inputs)
    focused = options["focus_mask"]
    assert torch.equal(before[focused][:, ::2], after[focused][:, ::2])
    assert not torch.equal(before[~focused][:, 0], after[~focused][:, 0])


def test_images_do_not_leak(device):
    inputs, options = _inputs(CASES["shaw_images"], device=device)
    run = _call(temporal_block, options)
    before = run(*inputs)
    x = inputs[0].clone()
    x[:, 6] *= -3.0  # the second image
    after = run(x, *inputs[1:])
    assert torch.equal(before[:, :6], after[:, :6])
    x = inputs[0].clone()
    x[:, 2] *= -3.0  # a frame of the video
    after = run(x, *inputs[1:])
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, 0], after[:, 0])


def test_pixels_and_padding_do_not_leak(device):
    """NaN in one pixel stays there: neither a neighbour of the tile nor padding carries it."""
    inputs, options = _inputs(CASES["plain"], device=device)
    inputs[0][0, 2, 1, 1] = torch.nan
    out = _call(temporal_block, options)(*inputs)
    poisoned = torch.isnan(out).any(-1).any(1)[0]
    assert poisoned.nonzero().tolist() == [[1, 1]]


def test_exact(device):
    """Rows of +-1 normalise to themselves, 0/1 projections: every intermediate is an integer."""
    b, f, h, w, c, heads, d = 1, 3, 2, 5, 32, 2, 16
    x = make_exact_operand((b, f, h, w, c // 2), high=1, seed=1)
    x = torch.where(x == 0, 1.0, x)
    x = torch.cat((x, -x), dim=-1)  # mean 0, variance 1
    inner = heads * d
    select_rows = torch.randperm(c, generator=torch.Generator().manual_seed(5))
    v = torch.eye(c)[select_rows][:inner]
    qkv_weight = torch.cat((torch.zeros(2 * inner, c), v))
    out_weight = torch.eye(c)[:, select_rows][:, :inner] * 2
    # A bias that picks frame (i + 1) mod F: the softmax is exactly one-hot.
    bias = torch.full((heads, f, f), -1e4)
    for i in range(f):
        bias[:, i, (i + 1) % f] = 0.0
    args = (x, torch.ones(c), qkv_weight, out_weight)
    out = temporal_block(
        *(t.to(device) for t in args), heads=heads, bias=bias.to(device), eps=1e-12
    )
    expected = x + 2 * x.roll(-1, 1)[..., select_rows][..., select_rows.argsort()]
    assert torch.equal(out.cpu().float(), expected)


def test_masked_rows(device):
    """A row of nothing but -inf in the bias attends to nothing: y = x + out_bias there."""
    inputs, options = _inputs(CASES["one_frame"], device=device)
    inputs[7] = torch.full_like(inputs[7], -torch.inf)
    out = _call(temporal_block, options)(*inputs)
    assert torch.equal(out, inputs[0] + inputs[6])


@pytest.mark.parametrize("name", ["shaw_images", "wide"])
def test_deterministic(name, device):
    inputs, options = _inputs(CASES[name], torch.float16, device)
    runs = []
    for _ in range(2):
        leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
        out = _call(temporal_block, options)(*leaves)
        wanted = [t for t in leaves if t is not None]
        runs.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("width", [24, 72])
def test_frozen_weights(width, device, monkeypatch):
    """Guidance: dx is that of training, and no weight gradient is asked for or computed."""
    case = dict(CASES["plain"], shape=(1, 5, 2, 3, width), biases=True, bias=True)
    inputs, options = _inputs(case, device=device)
    leaves = [t if t is None else t.clone().requires_grad_() for t in inputs]
    out = _call(temporal_block, options)(*leaves)
    trained = torch.autograd.grad(out.square().sum(), [t for t in leaves if t is not None])[0]

    import fastvdm.kernels.temporal_block as kernels

    seen = []
    launch = kernels.temporal_block_bwd

    def spy(*args):
        result = launch(*args)
        seen.append((args[-5:], [tuple(g.shape) for g in result[1:]]))
        return result

    monkeypatch.setattr(kernels, "temporal_block_bwd", spy)
    x = inputs[0].clone().requires_grad_()
    (frozen,) = torch.autograd.grad(
        _call(temporal_block, options)(x, *inputs[1:]).square().sum(), x
    )
    assert seen == [((False,) * 5, [(0,)] * 9)]
    assert torch.equal(frozen, trained)


def test_gradcheck(device):
    case = dict(shape=(1, 3, 1, 1, 5), heads=1, d=4, tables=1, reach=1, rotary=2, images=1, **FULL)
    inputs, options = _inputs(case, torch.float64, device)
    inputs = [t.requires_grad_() for t in inputs]
    run = _call(temporal_block, options)
    assert torch.autograd.gradcheck(run, inputs, nondet_tol=0.0, fast_mode=True)


def _op_args(case, device):
    inputs, options = _inputs(case, device=device)
    x, norm_weight, qkv_weight, out_weight, norm_bias, qkv_bias, out_bias, *tables = inputs
    scale = case["d"] ** -0.5
    return (
        *(x, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias),
        *(options["heads"], 1e-5, *tables, options.get("rotary"), options.get("focus_mask")),
        *(options["num_images"], scale),
    )


def test_opcheck(device):
    case = dict(shape=(1, 3, 2, 4, 7), heads=1, d=5, tables=1, rotary=2, biases=True, bias=True)
    args = _op_args(case, device)
    leaves = [
        t.clone().requires_grad_() if isinstance(t, torch.Tensor) and i != 12 else t
        for i, t in enumerate(args)
    ]
    opcheck_op(temporal_block_fwd, (*leaves, "triton"))
    dy = torch.ones_like(args[0])
    for flags in ((True,) * 5, (False, True, False, False, True)):
        opcheck_op(temporal_block_bwd, (dy, *args, *flags, "triton"))


def test_compile_without_recompiling(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs, _ = _inputs(CASES["plain"], device=device)

    def run(x):
        return temporal_block(x, *inputs[1:4], heads=2)

    compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for frames in (6, 7, 9):  # extents that differ from every other: equal ones share a symbol
        x = torch.randn(1, frames, 2, 5, 24, device=device, dtype=DTYPE).requires_grad_()
        out = compiled(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        plain = run(x)
        assert torch.equal(out, plain)
        assert torch.equal(grad, torch.autograd.grad(plain.square().sum(), x)[0])
        counts.append(counter.frame_count)
    assert counts[1] == counts[2]


def test_double_backward_is_refused(device):
    inputs, options = _inputs(CASES["plain"], device=device)
    inputs[0].requires_grad_()
    out = _call(temporal_block, options)(*inputs)
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        grad.sum().backward()


PARTS = {
    "width": ((1, 3, 1, 2, 264), torch.float16),
    "length": ((1, 34, 1, 1, 24), torch.float16),
    "fp32": ((1, 3, 1, 2, 24), torch.float32),
    "together": ((1, 3, 1, 2, 24), torch.float16),
}


@pytest.mark.parametrize("shape, dtype", PARTS.values(), ids=PARTS)
def test_parts(shape, dtype, device):
    """What does not fit is composed of the parts, on the same backend, with no fallback."""
    case = dict(CASES["plain"], shape=shape, biases=True, bias=True, tables=1)
    inputs, options = _inputs(case, dtype, device)
    call = (inputs[0], inputs[2], 2, True, True)
    assert re.search("above|exceed", explain("temporal_block", *call)["triton"])
    _parity(case, dtype, device)
    with use_backend("triton", strict=True):
        assert select("temporal_block", inputs[0].device, *call) == "parts"


LIMITS = [  # frames, channels, heads' features, stream, options; fused?
    (16, 256, 32, torch.bfloat16, {}, True),
    (16, 256, 32, torch.float32, {}, False),
    (16, 256, 64, torch.bfloat16, {}, False),
    (16, 256, 32, torch.bfloat16, dict(tables=True), False),
    (17, 64, 32, torch.float32, {}, True),
    (17, 64, 64, torch.bfloat16, {}, False),
    (17, 72, 32, torch.bfloat16, {}, False),
    (16, 128, 64, torch.float32, dict(biased=True), True),
    (16, 128, 64, torch.float32, dict(tables=True), False),
    (16, 128, 64, torch.bfloat16, dict(tables=True), True),
    (16, 16, 16, torch.bfloat16, dict(tables=True, biased=True), False),
]


@pytest.mark.parametrize("frames, c, dim, dtype, options, fused", LIMITS)
def test_limits_of_the_registers(frames, c, dim, dtype, options, fused):
    x = torch.empty(0, frames, 1, 1, c, dtype=dtype)
    weight = torch.empty(3 * 2 * dim, c, dtype=torch.bfloat16)
    assert (exceeds_registers(x, weight, 2, **options) is None) == fused


def test_fp64_on_a_gpu_is_the_references():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, weight = (torch.empty(s, device="cuda", dtype=torch.float64) for s in ((1,) * 5, (3, 1)))
        reason = explain("temporal_block", x, weight, 1)["triton"]
        assert reason == "fp64 has no kernel" and isinstance(reason, ByDesign)
        assert explain("temporal_block", x.half(), weight.half(), 1)["triton"] is None


BAD = {
    "rank": (dict(x=(5, 2, 3, 24)), ValueError, "x must be"),
    "heads": (dict(heads=5), ValueError, "heads = 5"),
    "width": (dict(x=(1, 5, 2, 3, 25)), ValueError, "norm_weight must be"),
    "out": (dict(out_weight=(24, 31)), ValueError, "out_weight must be"),
    "bias": (dict(bias=(2, 5, 4)), ValueError, "bias must be"),
    "images": (dict(num_images=6), ValueError, "num_images"),
    "eps": (dict(eps=0.0), ValueError, "eps must be positive"),
    "dtype": (dict(x_dtype=torch.float32), TypeError, "fp64 only throughout"),
}


@pytest.mark.parametrize("change, error, text", BAD.values(), ids=BAD)
def test_bad_input(change, error, text):
    change = dict(change)
    inputs, options = _inputs(CASES["plain"], torch.float64)
    x, norm_weight, qkv_weight, out_weight = inputs[:4]
    if "x" in change:
        x = torch.zeros(change.pop("x"), dtype=x.dtype)
    if "out_weight" in change:
        out_weight = torch.zeros(change.pop("out_weight"), dtype=x.dtype)
    if "x_dtype" in change:
        x = x.to(change.pop("x_dtype"))
    if "bias" in change:
        change["bias"] = torch.zeros(change["bias"])
    with pytest.raises(error, match=text):
        temporal_block(x, norm_weight, qkv_weight, out_weight, **(options | change))


@pytest.mark.parametrize("dtype", [DTYPE, torch.float32], ids=["fused", "parts"])
def test_empty(dtype, device):
    inputs, options = _inputs(CASES["plain"], dtype, device)
    empty = inputs[0][:0].requires_grad_()
    weight = inputs[2].requires_grad_()
    out = temporal_block(empty, inputs[1], weight, inputs[3], **options)
    assert out.shape == empty.shape
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_cost():
    cost = temporal_block_cost((1, 16, 8, 8, 64), 8, 32, 2)
    rows = 16 * 64
    assert cost.bytes == 2 * (2 * rows * 64 + 4 * 64 * 256)
    assert cost.flops == 8 * rows * 64 * 256 + 4 * rows * 16 * 256


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [65535, 65536, 70001])
def test_many_pixels(pixels, device):
    """Batches of sequences that a grid axis other than x cannot hold."""
    case = dict(CASES["sixteen"], shape=(1, 16, 1, pixels, 64))
    inputs, options = _inputs(case, torch.bfloat16, device)
    out = _call(temporal_block, options)(*inputs)
    tail = [inputs[0][..., -7:, :], *inputs[1:]]
    base = _call(temporal_block_ref, options)(*tail)
    wide = _call(temporal_block_ref, options)(*(t if t is None else t.double() for t in tail))
    assert_close3(out[..., -7:, :], base, wide)

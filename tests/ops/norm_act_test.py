"""norm_act: parity, every gradient, statistics at large means, exactness, isolation, compilation.

Every case runs on the Triton kernels (under the interpreter without a GPU: fp32, fp16, fp64) and,
where the extension is built, on the C++ ones. Left out as too slow under the interpreter: maps of
more than a few thousand pixels; the chunking that they would show is forced by ``programs``.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from einops import rearrange

from fastvdm.ops import norm_act as ops
from fastvdm.ops._call import BODIES
from fastvdm.ops.conv_group_norm import norm_act
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import FallbackError, registered_ops
from fastvdm.testing import (
    assert_close3,
    assert_parity,
    cpu_isas,
    grads,
    make_exact_operand,
    opcheck_op,
)

GPU = torch.cuda.is_available()
FRAME = {"kind": "group", "per_frame": True}
EVERYTHING = ("bias", "scale", "shift", "residual", "dropout_mask")

# name: x (B, F, H, W, C), C2, tensors that are given, options
CASES = {
    "group": ((2, 3, 5, 7, 12), 0, EVERYTHING, {"kind": "group", "groups": 4}),
    "group_pair": ((2, 2, 3, 5, 17), 7, EVERYTHING, {"kind": "group", "groups": 3}),
    "group_frame": ((2, 3, 4, 5, 6), 9, EVERYTHING, {**FRAME, "groups": 5}),
    "group_frame_bare": ((1, 2, 5, 3, 16), 0, (), {**FRAME, "act": False}),
    "one_pixel": ((2, 1, 1, 1, 24), 0, ("bias",), {"kind": "group", "groups": 3}),
    "one_row": ((1, 1, 1, 9, 8), 0, ("scale",), {"kind": "group", "groups": 8}),
    "off_tile": ((1, 1, 33, 31, 3), 0, ("bias", "shift"), {"kind": "group", "groups": 3}),
    "many_videos": ((19, 1, 2, 3, 4), 0, ("bias", "scale"), {"kind": "group", "groups": 2}),
    "rms": ((2, 3, 5, 7, 17), 0, EVERYTHING, {"kind": "rms"}),
    "rms_pair": ((2, 2, 3, 5, 6), 17, EVERYTHING, {"kind": "rms"}),
    "rms_bare": ((1, 3, 7, 5, 48), 0, (), {"kind": "rms"}),
    "layer": ((2, 3, 5, 7, 12), 0, EVERYTHING, {"kind": "layer"}),
    "layer_pair": ((2, 2, 3, 5, 17), 6, ("bias", "shift"), {"kind": "layer"}),
    "layer_bare": ((2, 1, 9, 5, 96), 0, (), {"kind": "layer", "act": False}),
}  # fmt: skip
WIDTHS = [(3, 1), (17, 1), (48, 3), (64, 32), (96, 8), (192, 3), (256, 32), (512, 8)]
TENSORS = ("x", "weight", "bias", "scale", "shift", "residual", "x2")


def make_inputs(case, dtype, device, *, make=None):
    """The tensors of TENSORS, and the options of the case with its dropout mask."""
    shape, c2, given, options = case
    make = make or (lambda *s: torch.randn(s, dtype=torch.float64))
    b, c = shape[0], shape[-1] + c2
    shapes = dict(x=shape, weight=(c,), bias=(c,), scale=(b, c), shift=(b, c))
    shapes |= dict(residual=(*shape[:-1], c), x2=(*shape[:-1], c2))
    wanted = {"x", "weight", *given} | ({"x2"} if c2 else set())
    tensors = [make(*shapes[n]).to(device, dtype) if n in wanted else None for n in TENSORS]
    mask = None
    if "dropout_mask" in given:
        mask = (torch.rand(*shape[:-1], c) > 0.25).to(device)
    return tensors, {**options, "dropout_mask": mask}


def bind(fn, options, backend):
    def call(x, weight, bias, scale, shift, residual, x2):
        with use_backend(backend):
            return fn(
                x, weight, bias, scale=scale, shift=shift, residual=residual, x2=x2, **options
            )

    return call


def check(case, dtype, lane):
    tensors, options = make_inputs(case, dtype, lane[1])
    assert_parity(
        bind(norm_act, options, lane[0]), bind(norm_act, options, "reference"), tensors,
        names=TENSORS,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parity(case, dtype, lane):
    if dtype == torch.bfloat16 and lane == ("triton", "cpu"):
        pytest.skip("the interpreter truncates bf16")
    if dtype == torch.float16 and lane == ("triton", "cpu") and len(case[2]) < 5:
        pytest.skip("the interpreter is slow: fp16 with every option only")
    check(case, dtype, lane)


@pytest.mark.parametrize("channels, groups", WIDTHS)
def test_widths(channels, groups, lane):
    shape = (1, 2, 3, 5, channels)
    check((shape, 0, ("bias",), {"kind": "group", "groups": groups}), torch.float32, lane)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("channels, c2", [(3, 0), (64, 192), (512, 0), (48, 3)])
def test_row_widths(kind, channels, c2, lane):
    check(((2, 1, 3, 2, channels), c2, ("shift",), {"kind": kind}), torch.float32, lane)


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_reference_is_the_formula(kind):
    """The reference against the definition, written out, in fp64."""
    case = ((2, 3, 4, 5, 9), 3, EVERYTHING, {"kind": kind, "groups": 4, "per_frame": True})
    (x, w, b, scale, shift, residual, x2), options = make_inputs(case, torch.float64, "cpu")
    both = torch.cat([x, x2], -1)
    if kind == "group":
        rows = rearrange(both, "b f h w (g c) -> b f g (h w c)", g=4)
        z = (rows - rows.mean(-1, keepdim=True)) / (
            rows.var(-1, keepdim=True, correction=0) + 1e-5
        ) ** 0.5
        z = rearrange(z, "b f g (h w c) -> b f h w (g c)", h=4, w=5)
    elif kind == "rms":
        z = both / (both.square().sum(-1, keepdim=True) / 12) ** 0.5
    else:
        z = (both - both.mean(-1, keepdim=True)) / (
            both.var(-1, keepdim=True, correction=0) + 1e-5
        ) ** 0.5
    t = (z * w + b) * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
    expected = t / (1 + torch.exp(-t)) * options["dropout_mask"] + residual
    got = norm_act(x, w, b, scale=scale, shift=shift, residual=residual, x2=x2, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_reference_keeps_torch_on_its_channels_last_path():
    """GroupNorm of the reference copies nothing: torch's kernels see channels last and keep it."""
    x = torch.randn(2, 3, 8, 6, 16, requires_grad=True)
    dy = torch.randn_like(x)
    with torch.profiler.profile(record_shapes=True) as trace:
        norm_act_ref(x, torch.ones(16), kind="group", groups=4, act=False).backward(dy)
    copies = [
        e.name
        for e in trace.events()
        if e.name == "aten::copy_"
        and e.input_shapes[0]
        and torch.Size(e.input_shapes[0]).numel() > 999
    ]
    assert copies == []


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_mean(dtype, per_frame, lane):
    """1e4 ± 1: what is lost is the rounding of the mean, half an ulp of 1e4, and no more."""
    x = (torch.randn(2, 3, 7, 9, 6, dtype=torch.float64) + 1e4).to(lane[1], dtype)
    w = torch.ones(6, dtype=dtype, device=lane[1])
    options = dict(kind="group", groups=2, per_frame=per_frame, act=False)
    if dtype == torch.float64 and lane[0] == "cpu":
        pytest.skip("fp64 is the reference's on a CPU")
    dy = torch.randn(x.shape, dtype=torch.float64).to(x)
    with use_backend(lane[0]):
        (y,), (dx, _) = grads(lambda x, w: norm_act(x, w, **options), (x, w), dy)
    (ref,), (dx_ref, _) = grads(
        lambda x, w: norm_act_ref(x, w, **options), (x.double(), w.double()), dy.double()
    )
    half_ulp = torch.finfo(dtype).eps / 2 * 1e4
    assert (y.double() - ref).abs().max() < 1.5 * half_ulp
    assert (dx.double() - dx_ref).abs().max() < 5 * half_ulp
    with use_backend("reference"):
        assert (norm_act(x, w, **options).double() - ref).abs().max() < 1.5 * half_ulp


def test_outlier_first(lane):
    """A shift by the first pixel instead of a Welford mean would cancel here."""
    x = torch.randn(1, 2, 9, 7, 4, device=lane[1])
    x[0, 0, 0, 0] = 1e6
    w = torch.ones(4, device=lane[1])
    rest = x.double().clone()
    with use_backend(lane[0]):
        y = norm_act(x, w, kind="group", groups=4, act=False)
    ref = norm_act_ref(rest, w.double(), kind="group", groups=4, act=False)
    assert_close3(y, F.group_norm(x.permute(0, 4, 1, 2, 3), 4).permute(0, 2, 3, 4, 1), ref)


def test_constant_input(lane):
    """Variance 0: y is the offset, and the gradient is finite."""
    x = torch.full((2, 2, 3, 5, 6), 7.0, device=lane[1])
    w, b = torch.ones(6, device=lane[1]), torch.arange(6.0, device=lane[1])
    for kind in ("group", "layer"):
        with use_backend(lane[0]):
            (y,), (dx, *_) = grads(
                lambda x, w, b, kind=kind: norm_act(x, w, b, kind=kind, act=False),
                (x, w, b), torch.ones_like(x),
            )  # fmt: skip
        assert torch.equal(y, b.expand_as(y))
        assert dx.abs().max() < 1e-3


def test_zero_pixels(lane):
    """RMSNorm of an exact zero is 0, and its gradient that of the clamped norm."""
    x = torch.randn(1, 2, 3, 5, 8, dtype=torch.float64)
    x[0, 1] = 0
    check_zero = bind(norm_act, {"kind": "rms", "eps": 1e-3}, lane[0])
    reference = bind(norm_act, {"kind": "rms", "eps": 1e-3}, "reference")
    tensors = [x.float().to(lane[1]), torch.randn(8, device=lane[1]), *[None] * 5]
    assert_parity(check_zero, reference, tensors, names=TENSORS)


# --- exactness, bits, isolation -------------------------------------------------------------------


def test_exact(lane):
    """Integers and given statistics: no rounding anywhere, so every index error shows."""
    case = ((2, 3, 5, 7, 9), 3, ("bias", "scale", "shift", "residual"), {})
    tensors, _ = make_inputs(case, torch.float32, lane[1], make=make_exact_operand_like())
    mean = make_exact_operand((6, 4), seed=8).to(lane[1])
    rstd = 2.0 ** make_exact_operand((6, 4), high=1, seed=9).to(lane[1])
    mask = make_exact_operand((2, 3, 5, 7, 12), seed=10).to(lane[1])
    x, w, b, scale, shift, residual, x2 = tensors
    with use_backend(lane[0]):
        y = norm_act(
            x, w, b, kind="group", groups=4, per_frame=True, scale=scale, shift=shift, act=False,
            residual=residual, dropout_mask=mask, x2=x2, stats=(mean, rstd),
        )  # fmt: skip
    both = torch.cat([x, x2], -1)
    wide = lambda t: t.repeat_interleave(3, -1).view(2, 3, 1, 1, 12)  # noqa: E731
    film = lambda t: t[:, None, None, None]  # noqa: E731
    z = (both - wide(mean)) * wide(rstd) * w + b
    assert torch.equal(y, (z * (1 + film(scale)) + film(shift)) * mask + residual)


def make_exact_operand_like():
    seeds = iter(range(100))
    return lambda *s: make_exact_operand(s, seed=next(seeds))


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_statistics(groups, lane):
    """±1 in equal numbers: mean 0, variance 1 and every sum of the backward are exact."""
    x = torch.ones(1, 2, 4, 9, 6, device=lane[1])
    x[:, 1] = -1
    w = make_exact_operand((6,), seed=1).to(lane[1])
    b = make_exact_operand((6,), seed=2).to(lane[1])
    dy = make_exact_operand(x.shape, seed=3).to(lane[1])

    def run(x, w, b):
        return norm_act(x, w, b, kind="group", groups=groups, eps=0.0, act=False)

    with use_backend(lane[0]):
        (y,), (_, dw, db) = grads(run, (x, w, b), dy)
    assert torch.equal(y, x * w + b)
    assert torch.equal(dw, (dy * x).sum((0, 1, 2, 3)))
    assert torch.equal(db, dy.sum((0, 1, 2, 3)))


@pytest.mark.parametrize("case", ["group_pair", "group_frame", "rms_pair", "layer"])
def test_two_runs_are_bit_equal_and_nothing_is_left_unwritten(case, lane, poison):
    tensors, options = make_inputs(CASES[case], torch.float32, lane[1])
    fn = bind(norm_act, options, lane[0])
    dy = torch.randn_like(fn(*tensors))
    first, second = grads(fn, tensors, dy), grads(fn, tensors, dy)
    for a, b in zip(first[0] + first[1], second[0] + second[1]):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.isfinite(a).all() and torch.equal(a, b)


def test_frames_do_not_touch_each_other(lane):
    case = (
        (2, 3, 5, 7, 6),
        6,
        ("bias", "scale"),
        {"kind": "group", "groups": 3, "per_frame": True},
    )
    tensors, options = make_inputs(case, torch.float32, lane[1])
    fn = bind(norm_act, options, lane[0])
    before = fn(*tensors)
    tensors[0] = tensors[0].clone()
    tensors[0][:, 1] *= 100
    after = fn(*tensors)
    assert torch.equal(before[:, ::2], after[:, ::2]) and not torch.equal(before, after)


def test_videos_do_not_depend_on_the_batch(lane):
    """The same video alone and among others gives the same result."""
    case = ((3, 2, 5, 7, 12), 0, (), {"kind": "group", "groups": 4})
    tensors, options = make_inputs(case, torch.float32, lane[1])
    fn = bind(norm_act, options, lane[0])
    together = fn(*tensors)
    alone = fn(tensors[0][1:2], *tensors[1:])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-6, atol=1e-6)


def test_chunks(device, monkeypatch):
    """More and fewer chunks than tiles, and a last chunk of one row: the same within rounding."""
    shared = pytest.importorskip("fastvdm.kernels.norm_act.shared")
    for programs in (1, 7, 64):
        monkeypatch.setattr(shared, "programs", lambda device, warps, n=programs: n)
        case = ((1, 3, 11, 13, 5), 2, ("bias", "scale"), {"kind": "group", "groups": 7})
        check(case, torch.float32, ("triton", device))
        case = ((1, 2, 11, 3, 40), 0, ("bias", "scale"), {"kind": "layer"})
        check(case, torch.float32, ("triton", device))


# --- statistics from elsewhere, strides, dtypes ---------------------------------------------------


@pytest.mark.parametrize("per_frame", [False, True])
def test_given_statistics(per_frame, lane):
    """The producer's statistics give the same result and the same gradients."""
    case = ((2, 3, 5, 7, 8), 4, ("bias", "scale"), {"kind": "group", "groups": 6})
    tensors, options = make_inputs(case, torch.float32, lane[1])
    options["per_frame"] = per_frame
    rows = rearrange(
        torch.cat([tensors[0], tensors[-1]], -1).double(), "b f h w (g c) -> b f g (h w) c", g=6
    )
    var, mean = torch.var_mean(rows, (3, 4) if per_frame else (1, 3, 4), correction=0)
    stats = [t.float().reshape(-1, 6) for t in (mean, (var + 1e-5).rsqrt())]
    dy = torch.randn(2, 3, 5, 7, 12, device=lane[1])
    own = grads(bind(norm_act, options, lane[0]), tensors, dy)
    given = grads(bind(norm_act, {**options, "stats": stats}, lane[0]), tensors, dy)
    for a, b in zip(own[0] + own[1], given[0] + given[1]):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["lane", "reference"])
def test_statistics_of_a_larger_video(backend, lane):
    """Half a video with the statistics of the whole is half of the normalised whole."""
    x = torch.randn(2, 4, 3, 5, 8, device=lane[1]) * torch.arange(1.0, 5).view(1, 4, 1, 1, 1)
    w, b = torch.randn(2, 8, device=lane[1])
    rows = x.double().view(2, -1, 4, 2)
    var, mean = torch.var_mean(rows, (1, 3), correction=0)
    stats = mean.float(), (var + 1e-5).rsqrt().float()
    options = dict(kind="group", groups=4)
    with use_backend("reference"):
        whole = norm_act(x.double(), w.double(), b.double(), **options)
    with use_backend(lane[0] if backend == "lane" else backend):
        half = norm_act(x[:, :2], w, b, stats=stats, **options)
    torch.testing.assert_close(half.double(), whole[:, :2], rtol=1e-5, atol=1e-5)


def test_strides(lane):
    """Any strides of x and dy; scale and shift as the halves of one projection."""
    case = ((2, 3, 4, 5, 6), 0, ("bias", "scale", "shift"), {"kind": "group", "groups": 3})
    (x, w, b, *_), options = make_inputs(case, torch.float32, lane[1])
    film = torch.randn(2, 12, device=lane[1])
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not turned.is_contiguous()
    leaves = [t.requires_grad_() for t in (turned, w, b, film)]

    def run(backend):
        with use_backend(backend):
            y = norm_act(turned, w, b, scale=film[:, :6], shift=film[:, 6:], **options)
        return y, *torch.autograd.grad(y.sum(), leaves)  # the gradient of a sum has strides 0

    for a, b in zip(run(lane[0]), run("reference")):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["group", "rms"])
def test_wide_parameters(kind, lane):
    """fp16 activations with fp32 parameters, as under autocast: each gradient in its own dtype."""
    case = ((2, 3, 4, 5, 6), 0, EVERYTHING, {"kind": kind, "groups": 3})
    tensors, options = make_inputs(case, torch.float32, lane[1])
    for i in (0, 3, 5):
        tensors[i] = tensors[i].half()
    fn = bind(norm_act, options, lane[0])
    assert fn(*tensors).dtype == torch.float16
    (_,), found = grads(fn, tensors, torch.ones(2, 3, 4, 5, 6, device=lane[1]))
    assert [t.dtype for t in found if t is not None] == [t.dtype for t in tensors if t is not None]
    assert_parity(fn, bind(norm_act, options, "reference"), tensors, names=TENSORS)


def test_autocast(lane):
    """The norm keeps the dtype of its input and brings the other streams to it."""
    x, w = torch.randn(1, 2, 3, 5, 6, device=lane[1]).half(), torch.ones(6, device=lane[1])
    residual = torch.randn(1, 2, 3, 5, 6, device=lane[1])
    with use_backend(lane[0]), torch.autocast(lane[1], torch.float16):
        y = norm_act(x, w, kind="rms", residual=residual)
    assert y.dtype == torch.float16
    with pytest.raises(TypeError, match="residual must be torch.float16"):
        norm_act(x, w, kind="rms", residual=residual)


def test_frozen_parameters(lane, monkeypatch):
    """Guidance wants dx alone: no other gradient is asked of the kernel."""
    asked = []

    def spy(name):
        body = BODIES[name]
        monkeypatch.setitem(
            BODIES, name, lambda *args: asked.append((name, args[-5:-1])) or body(*args)
        )

    spy("norm_act_fwd"), spy("norm_act_bwd")
    x, w = torch.randn(1, 2, 3, 5, 6, device=lane[1]), torch.randn(6, device=lane[1])
    for kind in ops.NORM_KINDS:
        for first, second in ((True, False), (False, True)):
            x.requires_grad_(first), w.requires_grad_(second)
            with use_backend(lane[0]):
                y = norm_act(x, w, kind=kind)
            y.sum().backward()
            assert asked[-1] == ("norm_act_bwd", (first, False, second, False))
    with torch.no_grad(), use_backend(lane[0]):
        asked.clear()
        norm_act(x, w, kind="group")
    assert [name for name, _ in asked] == ["norm_act_fwd"]


def test_saved_for_backward(device):
    """x and the statistics, and nothing of the size of x besides."""
    x = torch.randn(2, 3, 7, 9, 16, device=device, requires_grad=True)
    film = torch.randn(2, 32, device=device, requires_grad=True)
    w = torch.ones(16, device=device, requires_grad=True)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with use_backend("triton"), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm_act(x, w, kind="group", groups=4, scale=film[:, :16], shift=film[:, 16:], residual=x)
    assert sum(saved.values()) <= x.numel() * 4 + 4 * (2 * 2 * 4 + film.numel() + 16)


# --- the op ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["group_pair", "rms_bare", "layer_pair"])
@pytest.mark.parametrize(
    "lane", ["triton", *(f"cpu-{isa}" for isa in cpu_isas()[:1])], indirect=True
)
def test_opcheck(case, lane):
    tensors, options = make_inputs(CASES[case], torch.float32, lane[1])
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    x, w, b, scale, shift, residual, x2 = tensors
    kind = ops.NORM_KINDS[options["kind"]]
    settings = (options.get("groups", 1), False, 1e-5, options.get("act", True))
    opcheck_op(
        ops.norm_act_fwd,
        (x, x2, None, w, b, scale, shift, residual, options["dropout_mask"], None, None, kind,
         *settings, lane[0]),
    )  # fmt: skip
    with torch.no_grad():
        y, mean, rstd = ops.norm_act_fwd(
            x, x2, None, w, b, scale, shift, residual, None, None, None, kind, *settings, lane[0]
        )
        stats = (mean, rstd) if kind == 0 else (None, None)
        for need_dx, *need in ((True, True, True), (True, False, False), (False, True, False)):
            torch.library.opcheck(
                ops.norm_act_bwd,
                (torch.randn_like(y), *(None if t is None else t.detach() for t in
                 (x, x2, None, w, b, scale, shift)), None, *stats, kind, *settings, need_dx, False,
                 *need, lane[0]),
            )  # fmt: skip


@pytest.mark.parametrize("case", ["group_pair", "group_frame_bare", "rms_pair", "layer_pair"])
def test_gradcheck(case, device):
    _, c2, given, options = CASES[case]
    small = ((1, 2, 1, 3, 4), 2 if c2 else 0, given, {**options, "groups": 2})
    tensors, options = make_inputs(small, torch.float64, device)
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    fn = bind(norm_act, options, "triton")
    given = [t for t in tensors if t is not None]

    def positional(*args):
        rest = iter(args)
        return fn(*(None if t is None else next(rest) for t in tensors))

    assert torch.autograd.gradcheck(positional, given, fast_mode=True)


def test_second_derivative(lane):
    x, w = torch.randn(1, 1, 3, 2, 4, device=lane[1], requires_grad=True), torch.ones(4).to(lane[1])
    with use_backend(lane[0]):
        (dx,) = torch.autograd.grad(norm_act(x, w, kind="rms").sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no double backward"):
            dx.sum().backward()
    with use_backend("reference"):
        for kind in ops.NORM_KINDS:
            y = norm_act(x.double(), w.double(), kind=kind)
            (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            assert torch.autograd.grad(dx.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_compile(kind, backend, device):
    """One graph, the same numbers, and no new one for another number of frames."""
    w, b = torch.randn(8, device=device), torch.randn(8, device=device)

    def block(x, film, w, b):
        y = norm_act(x, w, b, kind=kind, groups=2, scale=film[:, :8], shift=film[:, 8:], residual=x)
        return y * 2

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend=counter)
    with use_backend(backend):
        for frames in (3, 5):
            x = torch.randn(2, frames, 4, 7, 8, device=device)
            film = torch.randn(2, 16, device=device)
            dy = torch.randn_like(x)
            got = grads(compiled, (x, film, w, b), dy)
            expected = grads(block, (x, film, w, b), dy)
            for a, e in zip(got[0] + got[1], expected[0] + expected[1]):
                torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_empty_batch(kind, lane):
    x = torch.randn(0, 3, 4, 5, 6, device=lane[1], requires_grad=True)
    w = torch.ones(6, device=lane[1], requires_grad=True)
    with use_backend(lane[0]):
        y = norm_act(x, w, kind=kind, groups=2, scale=torch.ones(0, 6, device=lane[1]))
        y.sum().backward()
    assert y.shape == x.shape and x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_residual_alone_is_trained(lane, monkeypatch):
    """Its gradient is that of y; no kernel runs for it."""
    monkeypatch.setitem(BODIES, "norm_act_bwd", None)
    x, residual = torch.randn(2, 1, 2, 3, 5, 6, device=lane[1])
    residual.requires_grad_()
    with use_backend(lane[0]):
        y = norm_act(x, torch.ones(6, device=lane[1]), kind="group", residual=residual)
    dy = torch.randn_like(y)
    assert torch.equal(torch.autograd.grad(y, residual, dy)[0], dy)


def test_bad_inputs():
    x, w = torch.randn(2, 3, 4, 5, 6), torch.ones(6)
    bad = [
        (ValueError, "x must be", dict(x=x[0])),
        (TypeError, "x must be fp32", dict(x=x.long())),
        (ValueError, "kind must be", dict(kind="batch")),
        (ValueError, "groups must divide the 6", dict(groups=4)),
        (ValueError, "groups must divide", dict(groups=0)),
        (ValueError, r"weight must be \(6,\)", dict(weight=torch.ones(5))),
        (ValueError, r"bias must be \(6,\)", dict(bias=torch.ones(6, 1))),
        (ValueError, r"scale must be \(2, 6\)", dict(scale=torch.ones(6))),
        (ValueError, "residual must be", dict(residual=x[:1])),
        (ValueError, "dropout_mask must be", dict(dropout_mask=x[..., :1])),
        (ValueError, "x2 must be", dict(x2=x[:, :1])),
        (ValueError, r"weight must be \(12,\)", dict(x2=x)),
        (TypeError, "residual must be torch.float32", dict(residual=x.double())),
        (TypeError, "weight must be a tensor, got NoneType", dict(weight=None)),
        (TypeError, "bias must be a tensor, got float", dict(bias=0.5)),
        (TypeError, "scale must be fp32", dict(scale=torch.ones(2, 6).long())),
        (ValueError, "detach", dict(dropout_mask=torch.ones_like(x).requires_grad_())),
        (ValueError, "eps must be", dict(eps=-1.0)),
        (ValueError, "must not be empty", dict(x=x[:, :0])),
        (ValueError, "stats are for kind", dict(kind="rms", stats=(w, w))),
        (ValueError, r"mean must be \(2, 1\)", dict(stats=(w, w))),
        (TypeError, "mean must be fp32", dict(stats=[torch.ones(2, 1).double()] * 2)),
    ]
    for error, text, change in bad:
        arguments = dict(x=x, weight=w, kind="group") | change
        with pytest.raises(error, match=text):
            norm_act(**arguments)


def test_fallback_names_its_reason(device):
    assert "norm_act" in registered_ops()
    x, w = torch.randn(1, 1, 1, 1, 5000, device=device), torch.ones(5000, device=device)
    with use_backend("triton"):
        with pytest.raises(FallbackError, match="5000 channels"):
            norm_act(x, w, kind="rms")
        norm_act(x, w, kind="group", groups=4)
    with use_backend("triton", strict=False), pytest.warns(UserWarning, match="5000 channels"):
        norm_act(x, w, kind="rms")


def test_cost():
    x = torch.empty(1, 2, 4, 4, 8, dtype=torch.float16)
    size = x.numel() * 2
    assert ops.norm_act_cost(x, kind="group").bytes == 3 * size
    assert ops.norm_act_cost(x, kind="group", stats=True, residual=True).bytes == 3 * size
    assert ops.norm_act_cost(x, kind="rms", c2=8).bytes == 2 * 2 * size
    assert ops.norm_act_cost(x, kind="group", backward=True).bytes == 5 * size


def test_half_of_the_statistics_or_an_odd_mask_is_refused():
    x, w = torch.randn(2, 1, 3, 4, 6), torch.ones(6)
    mean = torch.zeros(2, 2)
    for stats in ((mean, None), (mean,)):
        with pytest.raises(ValueError, match="stats must be"):
            norm_act(x, w, kind="group", groups=2, stats=stats)
    with pytest.raises(TypeError, match="dropout_mask must be fp32.*uint8, got torch.int32"):
        norm_act(x, w, kind="layer", dropout_mask=torch.ones_like(x).int())

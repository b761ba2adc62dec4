"""norm_act, beside the suite: large means, exactness, isolation, chunks, given statistics.

The chunking that large maps would show under the interpreter is forced by ``programs``.
"""

from __future__ import annotations

import importlib

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from einops import rearrange
from op_cases import ROWS, check_parity, make

from fastvdm.ops import norm_act as ops
from fastvdm.ops._call import BODIES
from fastvdm.ops.conv_group_norm import norm_act
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.device import INTERPRETED
from fastvdm.runtime.dispatch import FallbackError, registered_ops
from fastvdm.testing import (
    assert_close3,
    grads,
    make_exact_operand,
)


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_reference_is_the_formula(kind):
    """The reference against the definition, written out, in fp64."""
    options = dict(kind=kind, groups=4, per_frame=True)
    case = make(ROWS["norm_act/group"], torch.float64, "cpu", options)
    x, w, b, scale, shift, residual = case.tensors.values()
    if kind == "group":
        rows = rearrange(x, "b f h w (g c) -> b f g (h w c)", g=4)
        z = (rows - rows.mean(-1, keepdim=True)) / (
            rows.var(-1, keepdim=True, correction=0) + 1e-5
        ) ** 0.5
        z = rearrange(z, "b f g (h w c) -> b f h w (g c)", h=5, w=4)
    elif kind == "rms":
        z = x / (x.square().sum(-1, keepdim=True) / 12) ** 0.5
    else:
        z = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5) ** 0.5
    t = (z * w + b) * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
    expected = t / (1 + torch.exp(-t)) * case.rest["dropout_mask"] + residual
    got = case.first(*case.tensors.values())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ops.NORM_KINDS)
def test_reference_adds_it_first(kind):
    case = make(ROWS["norm_act/group_x_bias"], torch.float64, "cpu", dict(kind=kind))
    x, w, b, scale, shift, residual, x_bias = case.tensors.values()
    options = case.rest | {"scale": scale, "shift": shift, "residual": residual}
    got = norm_act_ref(x, w, b, x_bias=x_bias, **options)
    torch.testing.assert_close(got, norm_act_ref(x + x_bias, w, b, **options))


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


@pytest.mark.parametrize("where", ["x", "x_bias", "both"])
def test_large_mean_of_a_bias(where, lane):
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
    case = make(ROWS["norm_act/rms"], torch.float32, lane[1], dict(eps=1e-3, given=()))
    case.tensors["x"][0, 1] = 0
    with use_backend(lane[0]):
        check_parity(case)


def test_sigmoid_ends(isa):
    """SiLU far out: no NaN, x above and 0 below; a NaN in the input stays."""
    x = torch.tensor([-1e30, -200.0, -88.5, 0.0, 88.5, 200.0, 1e30, float("nan")])
    x = x.view(1, 1, 1, 1, 8)
    one, mean = torch.ones(8), torch.zeros(1, 8)
    y = norm_act(x, one, kind="group", groups=8, stats=(mean, torch.ones(1, 8)))
    expected = F.silu(x.double())
    assert torch.isnan(y[..., 7]).all()
    torch.testing.assert_close(y[..., :7].double(), expected[..., :7], rtol=1e-6, atol=1e-8)


# --- exactness, bits, isolation -------------------------------------------------------------------


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


def test_exact_gradient_of_a_bias(device):
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


def test_frames_do_not_touch_each_other(lane):
    options = dict(C=6, E=6, groups=3, per_frame=True)
    case = make(ROWS["norm_act/group_pair"], torch.float32, lane[1], options)
    x, *rest = case.tensors.values()
    moved = x.clone()
    moved[:, 1] *= 100
    with use_backend(lane[0]):
        before, after = case.first(x, *rest), case.first(moved, *rest)
    assert torch.equal(before[:, ::2], after[:, ::2]) and not torch.equal(before, after)


def test_videos_do_not_depend_on_the_batch(lane):
    """The same video alone and among others gives the same result."""
    case = make(ROWS["norm_act/group"], torch.float32, lane[1], dict(given=()))
    x, weight = case.tensors.values()
    with use_backend(lane[0]):
        together, alone = case.first(x, weight), case.first(x[1:], weight)
    torch.testing.assert_close(together[1:], alone, rtol=1e-6, atol=1e-6)


def test_chunks(device, monkeypatch):
    """More and fewer chunks than tiles, and a last chunk of one row: the same within rounding."""
    shared = pytest.importorskip("fastvdm.kernels.norm_act.shared")
    for programs in (1, 7, 64):
        monkeypatch.setattr(shared, "programs", lambda *_, n=programs: n)
        for row, sizes in {
            "group_pair": dict(B=1, H=11, W=13, C=5, E=2, groups=7),
            "group_x_bias": dict(B=1, H=11, W=13, C=7, groups=7),
            "group": dict(B=1, H=11, W=13, C=75, groups=3),
            "group_frame": dict(B=1, F=3, H=11, W=13, C=64, groups=16),
            "layer": dict(B=1, F=2, H=11, W=3, C=40),
            "layer_x_bias": dict(B=1, F=2, H=11, W=3, C=40),
        }.items():
            with use_backend("triton"):
                check_parity(make(ROWS[f"norm_act/{row}"], torch.float32, device, sizes))


@pytest.mark.parametrize("value", [1e6, float("nan"), float("inf")])
def test_outlier_in_one_of_many_chunks(value, device, monkeypatch):
    """The variance does not cancel, whichever chunk it is in, and a NaN stays one."""
    shared = pytest.importorskip("fastvdm.kernels.norm_act.shared")
    stats = importlib.import_module("fastvdm.kernels.norm_act.stats")
    monkeypatch.setattr(stats, "WHOLE_VALUES", 0)
    monkeypatch.setattr(shared, "programs", lambda *_: 64)
    for chunk in (0, 5):
        x = torch.randn(1, 80, 16, 16, 16, device=device)
        x[0, 2 * chunk, ..., :8] += value
        w = torch.ones(16, device=device)
        absent = (None,) * 7  # from bias to rstd
        rest = 0, 2, False, 1e-5, False, "triton"
        y, mean, rstd = ops.norm_act_fwd(x, None, None, w, *absent, *rest)
        wide = x.double().unflatten(-1, (2, 8))
        var, centre = torch.var_mean(wide, (1, 2, 3, 5), correction=0)
        expected = centre, (var + 1e-5).rsqrt()
        for found, ref in zip((mean, rstd), expected):
            assert torch.equal(found.isnan(), ref.isnan() | (ref == 0) | ref.isinf())
            good = ~found.isnan()
            torch.testing.assert_close(found.double()[good], ref[good], rtol=1e-6, atol=1e-6)
        assert torch.equal(y.isnan()[..., ::8], mean.isnan().expand(*y.shape[:-1], 2))


@pytest.mark.parametrize("launches", [1, 2, 3])
@pytest.mark.parametrize("row", ["group", "group_x_bias"])
def test_small_groups(row, launches, device, monkeypatch):
    """A group in one launch, in two, and in three, as where no program holds whole groups, in rows
    of 32 bytes: one tile, several, a part of one."""
    stats = pytest.importorskip("fastvdm.kernels.norm_act.stats")
    for name in ("WHOLE_VALUES", "WIDEST_GROUP")[: launches - 1]:
        monkeypatch.setattr(stats, name, 0)
    norm = importlib.import_module("fastvdm.kernels.norm_act")
    made = []

    def group_stats(*args):
        made.append(stats.group_stats(*args))
        return made[-1]

    monkeypatch.setattr(norm, "group_stats", group_stats)
    for sizes in (
        dict(B=1, F=3, H=19, W=23, C=16, groups=2),
        dict(B=2, F=2, H=5, W=7, C=33, groups=3, per_frame=True),
        dict(B=1, F=1, H=1, W=2, C=8, groups=1),
        dict(B=1, F=1, H=16, W=16, C=64, groups=2),  # tiles that are full
        dict(B=2, F=1, H=3, W=5, C=96, groups=8),
    ):
        case = make(ROWS[f"norm_act/{row}"], torch.float32, device, sizes)
        x, given = case.tensors["x"], sizes.get("per_frame", False)
        assert stats.is_small(x, None, sizes["groups"], given) == (launches == 1)
        with use_backend("triton"):
            check_parity(case)
    # one is not called, two leave the chunks to the last, three have merged them
    assert bool(made) == (launches > 1) and {p is None for *_, p in made} <= {launches == 3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_frame", [False, True])
def test_large_mean_in_16_bits(dtype, per_frame, lane):
    """100 ± 1, rounded to the dtype: the error stays that of torch."""
    if dtype == torch.bfloat16 and lane[0] == "triton" and INTERPRETED:
        pytest.skip("the interpreter truncates bf16")
    x = (torch.randn(2, 3, 7, 9, 16, dtype=torch.float64) + 100).to(lane[1], dtype)
    w, b = torch.randn(2, 16, dtype=torch.float64).to(lane[1], dtype)
    dy = torch.randn(x.shape, dtype=torch.float64).to(x)

    def run(x, w, b):
        return norm_act(x, w, b, kind="group", groups=2, per_frame=per_frame)

    with use_backend(lane[0]):
        got = grads(run, (x, w, b), dy)
    with use_backend("reference"):
        same = grads(run, (x, w, b), dy)
        wide = grads(run, (x.double(), w.double(), b.double()), dy.double())
    for found in zip(*(y + given for y, given in (got, same, wide))):
        assert_close3(*found)


# --- statistics from elsewhere, strides, dtypes ---------------------------------------------------


@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("row", ["group", "group_x_bias"])
def test_given_statistics(row, per_frame, lane):
    """The producer's statistics, of x + x_bias, give the same result and the same gradients."""
    case = make(ROWS[f"norm_act/{row}"], torch.float32, lane[1], dict(per_frame=per_frame))
    tensors = list(case.tensors.values())
    x = tensors[0].double() + case.tensors.get("x_bias", tensors[0].new_zeros(()))
    rows = rearrange(x, "b f h w (g c) -> b f g (h w) c", g=4)
    var, mean = torch.var_mean(rows, (3, 4) if per_frame else (1, 3, 4), correction=0)
    dy = torch.randn_like(tensors[0])
    with use_backend(lane[0]):
        own = grads(case.first, tensors, dy)
        case.rest["stats"] = [t.float().reshape(-1, 4) for t in (mean, (var + 1e-5).rsqrt())]
        given = grads(case.first, tensors, dy)
    for a, b in zip(own[0] + own[1], given[0] + given[1]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


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
        (ValueError, "kind must be", dict(kind="batch")),
        (ValueError, "groups must divide the 6", dict(groups=4)),
        (ValueError, "groups must divide", dict(groups=0)),
        (ValueError, r"weight must be \(12,\)", dict(x2=x)),
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
    with pytest.raises(ValueError, match="give x2 or x_bias"):
        norm_act(x, torch.ones(12), kind="rms", x2=x, x_bias=w)
    with pytest.raises(TypeError, match="dropout_mask must be fp32.*uint8, got torch.int32"):
        norm_act(x, w, kind="layer", dropout_mask=torch.ones_like(x).int())

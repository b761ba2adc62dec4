"""norm_conv, beside the suite: descriptors, exactness, what is kept and computed, who takes it."""

from __future__ import annotations

import pytest
import torch
from op_cases import ROWS, by_reference, check_parity, make

from fastvdm.ops._call import BODIES, select
from fastvdm.ops.conv_group_norm import norm_conv
from fastvdm.ops.space_conv import space_conv_stats
from fastvdm.reference.norm_act import norm_act_ref
from fastvdm.reference.space_conv import group_stats_ref, space_conv_ref
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import INTERPRETED, explain
from fastvdm.testing import assert_parity, make_exact_operand

TMA = {  # widths that are multiples of 8
    "video": dict(B=1, H=5, W=7, C=24, N=40),
    "frames": dict(B=1, F=3, C=24, N=16, per_frame=True),
    "one_pixel": dict(H=1, W=1, C=24, N=8, given=("norm_bias",)),
}


def case_of(device="cpu", dtype=torch.float32, **edge):
    return make(ROWS["norm_conv/video"], dtype, device, edge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", TMA.values(), ids=TMA)
def test_parity_descriptors(sizes, dtype, device, tma):
    with use_backend("triton"):
        check_parity(case_of(device, dtype, **sizes))


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_reference_is_the_two_ops(per_frame):
    case = case_of(dtype=torch.float64, per_frame=per_frame)
    x, nw, nb, scale, shift, weight, bias, residual = case.tensors.values()
    options = dict(kind="group", groups=4, scale=scale, shift=shift, per_frame=per_frame)
    expected = space_conv_ref(norm_act_ref(x, nw, nb, **options), weight, bias, None, 1, residual)
    torch.testing.assert_close(by_reference(case.first)(*case.tensors.values()), expected)


@pytest.mark.parametrize("variant", ["pointers", "descriptors"])
def test_exact(variant, device, request, poison):
    """Integers, and rstd a power of two: bit for bit. The padding stays 0 although the norm makes
    something of a 0."""
    if variant == "descriptors":
        request.getfixturevalue("tma")
    case = make(
        ROWS["norm_conv/video"], torch.float32, device,
        dict(W=7, C=16, N=8, act=False, per_frame=True), exact=True,
    )  # fmt: skip
    mean = make_exact_operand((4, 4), seed=98).to(device)
    rstd = 2.0 ** make_exact_operand((4, 4), high=1, seed=99).to(device)
    case.rest["stats"] = mean, rstd
    tensors = list(case.tensors.values())
    with use_backend("triton"):
        found, again = case.first(*tensors), case.first(*tensors)
    assert torch.equal(found, by_reference(case.first)(*tensors)) and torch.equal(found, again)


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


def test_nothing_is_made_for_frozen_weights(device, monkeypatch):
    """Guidance: the normalised activation is made again for a weight gradient, and only for it."""
    made = []
    forward = BODIES["norm_act_fwd"]
    monkeypatch.setitem(BODIES, "norm_act_fwd", lambda *a: made.append(1) or forward(*a))
    case = case_of(device, act=False, given=())
    for trained, count in (("x", 0), ("norm_weight", 0), ("weight", 1)):
        leaves = [t.detach().requires_grad_(n == trained) for n, t in case.tensors.items()]
        made.clear()
        with use_backend("triton"):
            case.first(*leaves).sum().backward()
        assert len(made) == count
        assert [n for n, t in zip(case.tensors, leaves) if t.grad is not None] == [trained]


def test_saved_for_backward(device):
    """x, and nothing else of its size: the activation is not kept."""
    case = case_of(device, C=42, N=20, K=1)
    leaves = [t.requires_grad_() for t in case.tensors.values()]
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), use_backend("triton"):
        case.first(*leaves)
    large = {t.data_ptr() for t in saved if t.numel() >= leaves[0].numel()}
    assert large == {leaves[0].data_ptr()}


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
    case = case_of()
    for backend in ("auto", "reference"):
        with use_backend(backend):
            case.first(*case.tensors.values())
    assert explain("norm_conv")["cpu"] == "no kernel for this op"


def test_autocast_reaches_every_operand_of_the_product(monkeypatch):
    """The interpreter would multiply two types; a compiled kernel does not."""
    seen = []
    body = BODIES["norm_conv_fwd"]

    def spy(*args):
        seen.extend(args[i].dtype for i in (0, 7, 8, 9))  # x, weight, bias, residual
        return body(*args)

    monkeypatch.setitem(BODIES, "norm_conv_fwd", spy)
    case = case_of(per_frame=True)
    x, *rest = case.tensors.values()
    with use_backend("triton"), torch.autocast("cpu", torch.float16):
        case.first(x.half(), *rest)
    assert seen == [torch.float16] * 4


@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_bad_inputs(backend):
    x, w, weight = torch.randn(2, 3, 4, 5, 6), torch.ones(6), torch.randn(7, 6, 3, 3)
    stats = torch.ones(2, 2, 3).unbind()
    bad = [
        (ValueError, "groups must divide the 6", dict(stats=torch.ones(2, 2, 4).unbind())),
        (ValueError, r"mean must be \(6, 3\)", dict(per_frame=True)),
        (TypeError, "mean must be fp32", dict(stats=[torch.ones(2, 3).double()] * 2)),
        (ValueError, "weight must be 4-D", dict(weight=torch.tensor(1.0))),
        (ValueError, r"stats must be \(mean, rstd\)", dict(stats=(None, stats[1]))),
        (ValueError, r"stats must be \(mean, rstd\)", dict(stats=(stats[0], None))),
        (ValueError, r"stats must be \(mean, rstd\)", dict(stats=torch.ones(2))),
    ]
    for error, text, change in bad:
        given = dict(x=x, stats=stats, norm_weight=w, norm_bias=None, weight=weight) | change
        with use_backend(backend), pytest.raises(error, match=text):
            norm_conv(**given)

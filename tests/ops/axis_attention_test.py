"""axis_attention, beside the suite: strides, exactness, isolation; large batches on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from op_cases import ROWS, Case, by_reference, check_parity, make
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastvdm import use_backend
from fastvdm.kernels import axis_attention_library as library
from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.kernels.limits import SPACE, TIME
from fastvdm.layers.position import rotary_table
from fastvdm.ops.axis_attention import axis_attention, axis_attention_cost, merged
from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.runtime.dispatch import OPS, ByName, FallbackError, explain
from fastvdm.testing import assert_close3, grads, make_exact_operand, max_error

ONLINE = pytest.mark.parametrize("online", [False, True], ids=["one_tile", "online"])


def case_of(row: str, device: str, dtype: torch.dtype = torch.float32, **edge) -> Case:
    return make(ROWS[f"axis_attention/{row}"], dtype, device, edge)


@pytest.mark.parametrize("size", [(15, 19), pytest.param((32, 32), marks=pytest.mark.gpu)])
def test_many_tiles(size, device) -> None:
    """Three tiles of queries and five of keys, none of them full at the end; 1024 on a GPU. In
    fp16, whose tiles are larger: a quarter of the interpreter's work."""
    h, w = size
    with use_backend("triton"):
        check_parity(case_of("long_space", device, torch.float16, F=1, H=h, W=w, A=1))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [16, 24, 64, 300])
def test_bfloat16(n, d, device) -> None:
    check_parity(case_of("all", device, torch.bfloat16, B=2, F=n, H=3, W=5, D=d))
    check_parity(case_of("long_space", device, torch.bfloat16, B=2, F=3, H=n, W=2, D=d))


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [65535, 65536, 70001])
def test_any_batch(pixels, device) -> None:
    check_parity(case_of("time", device, B=1, F=3, H=1, W=pixels, A=1, given=("bias",)))


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("length", [6, 34], ids=["one_tile", "online"])
def test_any_strides(axis, length, lane, poison) -> None:
    f, w = (length, 2) if axis == "time" else (2, length)

    def attend(qkv, bias):
        return axis_attention(qkv, axis=axis, bias=bias)

    whole = torch.randn(3, f, 1, w, 3, 3, 40, device=lane[1])
    for qkv in (
        whole[:1, :, :, :, :, 1:, 8:24],  # heads and features of a wider buffer
        whole[::2, :, :, :, :, :1, :16],  # every second video
        whole[:1, :, :, :, :, :1, :16].expand(2, -1, -1, -1, -1, -1, -1),
        whole[1:, ..., :1, :16].transpose(1, 3) if axis == "time" else whole[1:, ..., :1, 1:32:2],
    ):
        n = n_of(qkv, axis)
        bias = torch.randn(qkv.shape[5], n, n, device=lane[1])
        tensors = [qkv, bias.transpose(1, 2)]
        with use_backend(lane[0]):
            out, got = grads(attend, tensors, [ones(qkv)])
        ref, expected = grads(by_reference(attend), tensors, [ones(qkv)])
        torch.testing.assert_close(out[0], ref[0], atol=1e-5, rtol=1e-4)
        for a, e in zip(got, expected):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


def ones(qkv: Tensor) -> Tensor:
    """An expanded seed, as sum() makes it."""
    return torch.ones((), device=qkv.device).expand(*qkv.shape[:4], *qkv.shape[5:])


def n_of(qkv: Tensor, axis: str) -> int:
    return qkv.shape[1] if axis == "time" else qkv.shape[2] * qkv.shape[3]


def test_reads_a_view_without_a_copy(device) -> None:
    qkv = torch.randn(2, 3, 2, 2, 3, 2, 40, device=device)[..., 8:24]
    assert merged(qkv) and not qkv.is_contiguous()
    assert not merged(qkv.transpose(2, 3))


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("length", [5, 35], ids=["one_tile", "online"])
def test_exact_integers(axis, length, device, poison) -> None:
    """Logits of 0 or -inf: p is a power of two over four equal keys, so every sum is exact."""
    f, w = (length, 2) if axis == "time" else (2, length)
    b = 2 if length < 32 else 1
    v = make_exact_operand((b, f, 1, w, 1, 3, 16)).to(device)
    qkv = torch.cat((torch.zeros_like(v), torch.zeros_like(v), v), dim=4)
    seen = torch.arange(length, device=device)
    far = (seen[:, None] + 4 * torch.arange(3, device=device)[:, None, None] - seen) % length
    bias = torch.zeros(3, length, length, device=device).masked_fill(far >= 4, -torch.inf)
    dout = make_exact_operand((b, f, 1, w, 3, 16), seed=1).to(device)

    def attend(qkv, bias):
        return axis_attention(qkv, axis=axis, bias=bias)

    with use_backend("triton"):
        (out,), (dqkv, dbias) = grads(attend, [qkv, bias], [dout])
    wide = [qkv.double(), bias.double()]
    (ref,), (dqkv_ref, dbias_ref) = grads(by_reference(attend), wide, [dout])
    assert torch.equal(out.double(), ref)
    assert torch.equal(dqkv.double(), dqkv_ref)
    assert torch.equal(dbias.double(), dbias_ref)


@ONLINE
def test_fully_masked_rows_are_zero(online, lane) -> None:
    frames = dict(F=34) if online else dict(F=5, W=3)
    case = case_of("time", lane[1], H=1, B=1, A=1, given=("bias",), **frames)
    case.tensors["bias"][:, 3] = -torch.inf
    case.tensors["bias"][:, 1, 2:] = -torch.inf
    with use_backend(lane[0]):
        check_parity(case)
        qkv, bias = case.tensors.values()
        (out,), (dqkv, dbias) = grads(case.first, [qkv, bias], [ones(qkv)])
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    assert dqkv.isfinite().all() and torch.equal(dbias[:, 3], torch.zeros_like(dbias[:, 3]))


@ONLINE
@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e12])
def test_a_row_of_finite_masks_is_uniform(low, online, lane) -> None:
    """Other libraries mask with finfo.min. Added to any logit it stays itself: a query with all its
    keys masked sees them alike, as in torch, and one with a key left sees that one."""
    frames = dict(F=34) if online else dict(F=5, W=3)
    case = case_of("time", lane[1], H=1, B=1, A=1, given=("bias",), **frames)
    case.tensors["bias"][:, 3] += low
    case.tensors["bias"][:, 1, 2:] += low
    qkv, bias = case.tensors.values()
    with use_backend(lane[0]):
        (out,), found = grads(case.first, [qkv, bias], [ones(qkv)])
    wide = [t.double() for t in (qkv, bias)]
    plain, exact = (
        grads(by_reference(case.first), [*given], [ones(given[0])]) for given in ((qkv, bias), wide)
    )
    assert_close3(out[:, 3], qkv[:, :, :, :, 2].mean(1), wide[0][:, :, :, :, 2].mean(1))
    for a, b, c in zip((out, *found), (*plain[0], *plain[1]), (*exact[0], *exact[1])):
        assert_close3(a, b, c, factor=3.0)


def test_one_frame_is_v(lane) -> None:
    case = case_of("time", lane[1], F=1)
    with use_backend(lane[0]):
        out = case.first(*case.tensors.values())
    assert torch.equal(out, case.tensors["qkv"][:, :, :, :, 2])


def moved(case: Case, at: tuple, value: float) -> list[Tensor]:
    qkv, *rest = case.tensors.values()
    qkv = qkv.clone()
    qkv[at] = value
    return [qkv, *rest]


def seed_at(out: Tensor, frame: int) -> Tensor:
    seed = torch.zeros_like(out)
    seed[:, frame] = 1
    return seed


@ONLINE
@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_focus_mask_isolates_frames(online, value, lane) -> None:
    # One sequence a program online, so that more of them show nothing new.
    sizes = dict(F=36, W=1) if online else dict(F=6)
    given = ("bias", "rel_v", "focus_mask")
    case = case_of("all", lane[1], B=2, A=1, given=given, **sizes)
    case.rest["focus_mask"] = torch.tensor([True, False], device=lane[1])
    rest = [i for i in range(sizes["F"]) if i != 3]
    with use_backend(lane[0]):
        before = case.first(*case.tensors.values())
        after = case.first(*moved(case, (0, 3), value))
        (_,), (dqkv, *_) = grads(case.first, list(case.tensors.values()), [seed_at(before, 3)])
    assert torch.equal(before[0, rest], after[0, rest])
    assert torch.equal(before[1], after[1])
    assert not dqkv[0, rest].any()


@ONLINE
@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_joint_mask_isolates_images(online, value, lane) -> None:
    sizes = dict(F=40, W=1, A=1) if online else dict(F=7)
    given = ("bias", "rel_v", "rotary")
    case = case_of("all", lane[1], B=2, given=given, num_images=3, **sizes)
    frames = sizes["F"]
    rest = [i for i in range(frames) if i != frames - 2]
    with use_backend(lane[0]):
        before = case.first(*case.tensors.values())
        after = case.first(*moved(case, (slice(None), -2), value))  # one of the images
        seed = seed_at(before, frames - 2)
        (_,), (dqkv, *_) = grads(case.first, list(case.tensors.values()), [seed])
        changed = case.first(*moved(case, (slice(None), 0), value))  # a frame of the video
    assert torch.equal(before[:, rest], after[:, rest])
    assert not dqkv[:, rest].any()
    assert torch.equal(before[:, -3:], changed[:, -3:])


def test_pixels_and_videos_do_not_mix(lane) -> None:
    """Several pixels share a tile; a NaN in one stays there."""
    given = ("bias", "rel_k", "rel_v", "rotary")
    case = case_of("all", lane[1], B=2, F=3, H=2, W=3, given=given)
    with use_backend(lane[0]):
        before = case.first(*case.tensors.values())
        after = case.first(*moved(case, (0, 1, 1, 1), float("nan")))
    hit = torch.zeros(2, 2, 3, dtype=torch.bool)
    hit[0, 1, 1] = True
    assert torch.equal((before != after).any(-1).any(-1).any(1).cpu(), hit)


def test_rotary_turns_the_peers_pairs() -> None:
    """Scores depend on the distance alone, and the first R features turn as complex numbers."""
    x = torch.randn(1, 1, 1, 1, 5, 8, dtype=torch.float64)
    table = rotary_table(5, 6, torch.device("cpu"))
    from fastvdm.reference.axis_attention import rotate

    turned = rotate(x, table)
    pairs_ = torch.view_as_complex(x[..., :6].unflatten(-1, (3, 2)))
    phase = torch.complex(table[0].double(), table[1].double())
    expected = torch.view_as_real(pairs_ * phase).flatten(-2)
    torch.testing.assert_close(turned[..., :6], expected)
    assert torch.equal(turned[..., 6:], x[..., 6:])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"axis": "height"}, ValueError),
        ({"qkv": (2, 3, 4, 5, 2, 2, 8)}, ValueError),
        ({"rel_k": torch.zeros(2, 4, 8)}, ValueError),
        ({"rel_v": torch.zeros(3, 5, 8)}, ValueError),
        ({"rotary": torch.zeros(2, 3, 5)}, ValueError),
        ({"rotary": torch.zeros(2, 3, 2, dtype=torch.float64)}, TypeError),
        ({"focus_mask": torch.zeros(3, dtype=torch.bool)}, ValueError),
        ({"focus_mask": torch.zeros(2)}, TypeError),
        ({"axis": "space", "focus_mask": torch.zeros(2, dtype=torch.bool)}, ValueError),
        ({"axis": "space", "num_images": 1}, ValueError),
        ({"num_images": 4}, ValueError),
        ({"num_images": -1}, ValueError),
    ],
)
def test_bad_input_is_named(change, error) -> None:
    arguments: dict = {"axis": "time", **change}
    qkv = torch.zeros(arguments.pop("qkv", (2, 3, 4, 5, 3, 2, 8)))
    with pytest.raises(error, match="must|needs"):
        axis_attention(qkv, **arguments)


def test_wide_heads_fall_back_with_a_reason(device) -> None:
    qkv = torch.randn(1, 3, 1, 2, 3, 1, 144, device=device)
    with use_backend("triton"), pytest.raises(FallbackError, match="head dim 144"):
        axis_attention(qkv, axis="time")
    assert "144" in explain("axis_attention", qkv)["triton"]


@pytest.mark.parametrize("sizes", [dict(H=0), dict(F=0)], ids=str)
def test_empty_axes(sizes, device) -> None:
    case = case_of("time", device, given=("bias",), **sizes)
    qkv, bias = case.tensors.values()
    with use_backend("triton"):
        (out,), (dqkv, dbias) = grads(case.first, [qkv, bias], [ones(qkv)])
    assert out.shape == (*qkv.shape[:4], *qkv.shape[5:]) and dqkv.shape == qkv.shape
    assert not dbias.any()


def test_cost() -> None:
    forward = axis_attention_cost((2, 16, 8, 8, 3, 8, 32), 2, "time")
    rows = 2 * 16 * 64 * 8
    assert forward == (4 * rows * 16 * 32, 4 * rows * 32 * 2)
    backward = axis_attention_cost((2, 16, 8, 8, 3, 8, 32), 2, "time", bias=True, backward=True)
    assert backward == (10 * rows * 16 * 32, 7 * rows * 32 * 2 + 2 * 8 * 256 * 4)


# --- torch's fused attention, the default over space without gradients ---------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("view", ["dense", "heads", "frames", "pixels"])
def test_torchs_own_agrees(view, dtype):
    """On views too, whatever torch has for this device behind the call."""
    qkv = torch.randn(2, 3, 9, 8, 3, 4, 16).to(dtype)
    if view == "heads":
        qkv = qkv[..., 1:, :]
    elif view != "dense":
        qkv = qkv.transpose(1, 2) if view == "frames" else qkv.transpose(2, 3)
    ref = by_reference(lambda x: axis_attention(x, axis="space", sm_scale=0.3))
    out = library.by_torch(qkv, SPACE, None, 0.3)
    assert out.is_contiguous()
    assert_close3(out, ref(qkv), ref(qkv.double()))
    compiled = torch.compile(library.by_torch, fullgraph=True, backend="aot_eager")
    assert_close3(compiled(qkv, SPACE, None, 0.3), ref(qkv), ref(qkv.double()))


@pytest.mark.parametrize("which", ["torch", "xformers"])
def test_finite_masks_stay_finite_in_bf16(which, monkeypatch):
    """finfo.min of fp32 rounds to -inf in bf16."""
    ops = SimpleNamespace(memory_efficient_attention=efficient_attention)
    monkeypatch.setattr(library, "require", lambda module, extra: ops)
    qkv, bias = torch.randn(1, 6, 1, 2, 3, 2, 136).bfloat16(), torch.zeros(2, 6, 6)
    bias[:, 1], bias[:, 2, 2:] = torch.finfo(torch.float32).min, -torch.inf
    call = library.by_torch if which == "torch" else library.by_xformers
    wide = [axis_attention_ref(t, axis="time", bias=bias) for t in (qkv, qkv.double())]
    assert_close3(call(qkv, TIME, bias, 136**-0.5), *wide)


def efficient_attention(q, k, v, attn_bias=None, scale=None):
    """In the place of xformers': its layout, (batch, N, heads, D), and what it refuses."""
    if attn_bias is not None:
        assert attn_bias.shape == (len(q), q.shape[2], q.shape[1], k.shape[1])
        assert attn_bias.dtype == q.dtype and attn_bias.stride(-2) % 8 == 0
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    call = torch.nn.functional.scaled_dot_product_attention
    out = call(q, k, v, attn_mask=attn_bias, scale=scale)
    return out.transpose(1, 2)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("axis", ["space", "time"])
@pytest.mark.parametrize("which", ["torch", "xformers"])
def test_wide_heads_in_kernels_of_others(which, axis, biased, monkeypatch):
    ops = SimpleNamespace(memory_efficient_attention=efficient_attention)
    monkeypatch.setattr(library, "require", lambda module, extra: ops)
    qkv, code = torch.randn(2, 6, 3, 4, 3, 2, 136), {"space": SPACE, "time": TIME}[axis]
    n = 12 if axis == "space" else 6
    bias = torch.randn(2, n, n) if biased else None
    run = library.by_torch if which == "torch" else library.by_xformers
    inputs = [qkv] if bias is None else [qkv, bias]
    dy = torch.randn(2, 6, 3, 4, 2, 136)

    def plain(x: Tensor, b: Tensor | None = None) -> Tensor:
        return axis_attention_ref(x, axis=axis, bias=b, sm_scale=0.2)

    expected = grads(plain, inputs, dy)
    found = grads(lambda x, b=None: run(x, code, b, 0.2), inputs, dy)
    for got, ref in zip(sum(found, ()), sum(expected, ())):
        torch.testing.assert_close(got, ref, rtol=1e-4, atol=1e-4)


def test_torchs_own_counts_as_ours():
    """Behind the call torch's counter knows all that a GPU may run, and no kernel for CPUs."""
    shape = (1, 2, 9, 8, 3, 4, 16)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        library.by_torch(torch.randn(shape), SPACE, None, 0.25)
    assert counter.get_total_flops() == axis_attention_cost(shape, 4, "space").flops


def test_who_runs_attention_over_space(monkeypatch):
    """On a GPU by default: torch in 16 bits without options and gradients, else ours; ours by
    name."""

    def chosen(*, axis=SPACE, dtype=torch.bfloat16, size=(1, 2, 16, 16, 3, 4, 64), **given):
        with FakeTensorMode():
            qkv = torch.empty(size, dtype=dtype, device="cuda")
        call = (qkv, axis, AttentionOptions(**given))
        return [name for name, why in OPS["axis_attention"].implementations(*call) if not why]

    bias = torch.zeros(4, 256, 256)
    assert chosen() == ["cpu", "torch"]
    wide = dict(size=(1, 2, 16, 16, 3, 4, 136))
    assert chosen(**wide) == chosen(**wide, bias=bias, axis=TIME) == ["torch"]
    monkeypatch.setattr(library, "HAS_XFORMERS", True)
    assert chosen(**wide, bias=bias) == ["xformers", "torch"]
    assert chosen(**wide, rotary=bias) == []
    for other in (
        dict(axis=TIME), dict(dtype=torch.float32), dict(bias=bias), dict(rel_k=bias),
        dict(rotary=bias), dict(size=(1, 2, 8, 8, 3, 4, 64)), dict(size=(64, 64, 9, 9, 3, 16, 8)),
        dict(size=(1, 2, 16, 16, 3, 4, 36)),
    ):  # fmt: skip
        assert chosen(**other) == ["cpu", "triton"], other
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen() == ["cpu", "triton"]
    finally:
        torch.use_deterministic_algorithms(False)
    with FakeTensorMode():
        needs = torch.empty(1, 2, 16, 16, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
    by_name = dict(OPS["axis_attention"].implementations(needs, SPACE, AttentionOptions()))
    assert isinstance(by_name["triton"], ByName)


# --- the C++ kernels alone -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharp_attention_and_negative_controls(isa, dtype):
    """q and k times 4: the softmax picks. Without the bias, with it transposed or without rotary
    the output must be far off, so that parity above is evidence."""
    qkv = torch.randn(1, 16, 2, 3, 3, 4, 32)
    qkv[..., :2, :, :] *= 4
    qkv, bias = qkv.to(dtype), torch.randn(4, 16, 16) * 4
    turn = rotary_table(16, 32, torch.device("cpu"))
    with use_backend("reference"):
        ref = axis_attention(qkv.double(), axis="time", bias=bias.double(), rotary=turn)
        base = axis_attention(qkv, axis="time", bias=bias, rotary=turn)
    with use_backend("cpu", strict=True):
        assert_close3(axis_attention(qkv, axis="time", bias=bias, rotary=turn), base, ref)
        wrong = [
            axis_attention(qkv, axis="time", rotary=turn),
            axis_attention(qkv, axis="time", bias=bias.transpose(1, 2), rotary=turn),
            axis_attention(qkv, axis="time", bias=bias),
        ]
    for out in wrong:
        assert max_error(out, ref) > 0.2


@pytest.mark.parametrize("pixels", [65535, 70001])
def test_many_sequences(pixels):
    """B*H*W past 65535; frame 0 attends to itself, so its output is v."""
    qkv = make_exact_operand((1, 1, 1, pixels, 3, 1, 8))
    assert torch.equal(axis_attention(qkv, axis="time"), qkv[..., 2, :, :])

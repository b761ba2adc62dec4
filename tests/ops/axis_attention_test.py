"""axis_attention: parity with plain torch, isolation, determinism, compile, rejection of bad input.

Left out: the product of shapes, types and options. Each option runs alone, in every pair and with
all others on the one-tile kernel and on the online-softmax kernel; each length and head dimension
runs once. bf16 and B*H*W beyond 65535 need a GPU: the interpreter has no bf16 and takes
milliseconds a program.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastvdm import use_backend
from fastvdm.layers.position import T5RelativeBias, rotary_table
from fastvdm.ops import axis_attention as op
from fastvdm.ops.axis_attention import axis_attention, axis_attention_cost
from fastvdm.reference.axis_attention import axis_attention_ref
from fastvdm.runtime.dispatch import FallbackError, explain
from fastvdm.testing import assert_parity, grads, make_exact_operand, opcheck_op

OPTIONS = ("bias", "rel_k", "rel_v", "rotary", "focus_mask", "num_images", "sm_scale")
SHORT = (2, 7, 3, 2, 2, 16)  # (B, F, H, W, heads, D): 7 of 16 rows of the tile
LONG = (2, 37, 1, 1, 2, 16)  # two tiles of 32, the second one partial
NAMES = ("qkv", "bias", "rel_k", "rel_v")


class Call(NamedTuple):
    """Differentiable inputs in the order of NAMES, and the rest by keyword."""

    inputs: list[Tensor | None]
    rest: dict


def make(
    shape: tuple[int, ...],
    axis: str = "time",
    options: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    shared: bool = False,
) -> Call:
    b, f, h, w, heads, d = shape
    n = f if axis == "time" else h * w
    tables = 1 if shared else heads
    qkv = torch.randn(b, f, h, w, 3, heads, d)
    bias = torch.randn(heads, n, n) if "bias" in options else None
    rel_k = torch.randn(tables, 5, d) if "rel_k" in options else None  # clipped at distance 2
    rel_v = torch.randn(heads, 2 * n + 3, d) if "rel_v" in options else None  # never clipped
    inputs = [None if t is None else t.to(device, dtype) for t in (qkv, bias, rel_k, rel_v)]
    rest: dict = {"axis": axis}
    if "rotary" in options:
        rest["rotary"] = rotary_table(n, max(2, d // 4 * 2), torch.device(device))
    if "focus_mask" in options:
        rest["focus_mask"] = (torch.arange(b) % 2 == 1).to(device)
    if "num_images" in options:
        rest["num_images"] = max(1, f // 3)
    if "sm_scale" in options:
        rest["sm_scale"] = 0.3
    return Call(inputs, rest)


def of(function, rest: dict):
    return lambda qkv, bias=None, rel_k=None, rel_v=None: function(
        qkv, bias=bias, rel_k=rel_k, rel_v=rel_v, **rest
    )


def backend_of(qkv: Tensor) -> str:
    """On a GPU fp64 is the reference's."""
    return "auto" if qkv.is_cuda and qkv.dtype == torch.float64 else "triton"


def parity(call: Call) -> None:
    with use_backend(backend_of(call.inputs[0])):
        assert_parity(
            of(axis_attention, call.rest), of(axis_attention_ref, call.rest), call.inputs,
            names=NAMES,
        )  # fmt: skip


PAIRS = [pytest.param(pair, id="+".join(pair)) for pair in itertools.combinations(OPTIONS, 2)]


@pytest.mark.parametrize("options", [(), *itertools.combinations(OPTIONS, 1), OPTIONS])
def test_options_one_tile(options, device, poison) -> None:
    parity(make(SHORT, options=options, device=device))


@pytest.mark.parametrize("options", PAIRS)
def test_pairs_one_tile(options, device, poison) -> None:
    parity(make((2, 3, 1, 3, 2, 20), options=options, device=device, shared=True))


@pytest.mark.parametrize("options", [(), *itertools.combinations(OPTIONS[:4], 1), OPTIONS])
def test_options_online(options, device, poison) -> None:
    parity(make(LONG, options=options, device=device, shared=True))


@pytest.mark.parametrize("options", PAIRS)
def test_pairs_online(options, device, poison) -> None:
    if {*options} & {"focus_mask", "num_images"}:
        parity(make((2, 34, 1, 1, 1, 20), options=options, device=device))
    else:
        parity(make((1, 1, 5, 7, 1, 20), "space", options, device=device))


@pytest.mark.parametrize(
    ("n", "d"),
    [(1, 16), (2, 32), (3, 48), (7, 64), (16, 128), (17, 40), (24, 96), (64, 32), (100, 16)],
)
def test_lengths_and_head_dims(n, d, device, poison) -> None:
    parity(make((1, n, 1, 2 if n < 64 else 1, 1, d), options=("bias",), device=device))
    if n < 64:
        parity(make((2, 3, 1, n, 1, d), "space", ("bias",), device=device))


@pytest.mark.parametrize("size", [(15, 19), pytest.param((32, 32), marks=pytest.mark.gpu)])
def test_many_tiles(size, device, poison) -> None:
    """Three tiles of queries and five of keys, none of them full at the end; 1024 on a GPU. In
    fp16, whose tiles are larger: a quarter of the interpreter's work."""
    parity(make((1, 1, *size, 1, 16), "space", ("bias",), dtype=torch.float16, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])  # fp64 on a GPU: the reference
@pytest.mark.parametrize("shape", [SHORT, LONG], ids=["one_tile", "online"])
def test_types(shape, dtype, device, poison) -> None:
    options = ("bias", "rel_k", "rel_v", "rotary")
    parity(make(shape, options=options, dtype=dtype, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("d", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [16, 24, 64, 300])
def test_bfloat16(n, d, device) -> None:
    parity(make((2, n, 3, 5, 2, d), options=OPTIONS, dtype=torch.bfloat16, device=device))
    parity(make((2, 3, n, 2, 2, d), "space", ("bias",), dtype=torch.bfloat16, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("pixels", [65535, 65536, 70001])
def test_any_batch(pixels, device) -> None:
    parity(make((1, 3, 1, pixels, 1, 16), options=("bias",), device=device))


@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("length", [6, 34], ids=["one_tile", "online"])
def test_any_strides(axis, length, device, poison) -> None:
    f, w = (length, 2) if axis == "time" else (2, length)
    whole = torch.randn(3, f, 1, w, 3, 3, 40, device=device)
    for qkv in (
        whole[:1, :, :, :, :, 1:, 8:24],  # heads and features of a wider buffer
        whole[::2, :, :, :, :, :1, :16],  # every second video
        whole[:1, :, :, :, :, :1, :16].expand(2, -1, -1, -1, -1, -1, -1),
        whole[1:, ..., :1, :16].transpose(1, 3) if axis == "time" else whole[1:, ..., :1, 1:32:2],
    ):
        n = n_of(qkv, axis)
        bias = torch.randn(qkv.shape[5], n, n, device=device)
        call = Call([qkv, bias.transpose(1, 2), None, None], {"axis": axis})
        with use_backend("triton"):
            out, got = grads(of(axis_attention, call.rest), [qkv, call.inputs[1]], [ones(qkv)])
        ref, expected = grads(of(axis_attention_ref, call.rest), [qkv, call.inputs[1]], [ones(qkv)])
        torch.testing.assert_close(out[0], ref[0], atol=1e-5, rtol=1e-4)
        for a, e in zip(got, expected):
            torch.testing.assert_close(a, e, atol=1e-5, rtol=1e-4)


def n_of(qkv: Tensor, axis: str) -> int:
    return qkv.shape[1] if axis == "time" else qkv.shape[2] * qkv.shape[3]


def ones(qkv: Tensor) -> Tensor:
    """An expanded seed, as sum() makes it."""
    return torch.ones((), device=qkv.device).expand(*qkv.shape[:4], *qkv.shape[5:])


def test_reads_a_view_without_a_copy(device) -> None:
    qkv = torch.randn(2, 3, 2, 2, 3, 2, 40, device=device)[..., 8:24]
    assert op.merged(qkv) and not qkv.is_contiguous()
    assert not op.merged(qkv.transpose(2, 3))


@pytest.mark.parametrize("shape", [(2, 3, 1, 2, 2, 4), (1, 33, 1, 1, 1, 3)])
def test_gradcheck_through_the_kernels(shape, device) -> None:
    call = make(shape, options=OPTIONS, dtype=torch.float64, device=device)
    inputs = [t.requires_grad_() for t in call.inputs]
    with use_backend(backend_of(inputs[0])):
        assert torch.autograd.gradcheck(of(axis_attention, call.rest), inputs, fast_mode=True)


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
    with use_backend("triton"):
        (out,), (dqkv, dbias) = grads(of(axis_attention, {"axis": axis}), [qkv, bias], [dout])
    (ref,), (dqkv_ref, dbias_ref) = grads(
        of(axis_attention_ref, {"axis": axis}), [qkv.double(), bias.double()], [dout]
    )
    assert torch.equal(out.double(), ref)
    assert torch.equal(dqkv.double(), dqkv_ref)
    assert torch.equal(dbias.double(), dbias_ref)


@pytest.mark.parametrize("shape", [(1, 5, 1, 2, 1, 16), (1, 34, 1, 1, 1, 16)])
def test_fully_masked_rows_are_zero(shape, device, poison) -> None:
    call = make(shape, options=("bias",), device=device)
    with torch.no_grad():
        call.inputs[1][:, 3] = -torch.inf
        call.inputs[1][:, 1, 2:] = -torch.inf
    parity(call)
    with use_backend("triton"):
        (out,), (dqkv, dbias, *_) = grads(
            of(axis_attention, call.rest), call.inputs, [ones(call.inputs[0])]
        )
    assert torch.equal(out[:, 3], torch.zeros_like(out[:, 3]))
    assert dqkv.isfinite().all() and torch.equal(dbias[:, 3], torch.zeros_like(dbias[:, 3]))


def test_one_frame_is_v(device, poison) -> None:
    call = make((2, 1, 3, 2, 2, 16), options=("bias", "rotary"), device=device)
    with use_backend("triton"):
        out = of(axis_attention, call.rest)(*call.inputs)
    assert torch.equal(out, call.inputs[0][:, :, :, :, 2])


@pytest.mark.parametrize("frames", [6, 36], ids=["one_tile", "online"])
@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_focus_mask_isolates_frames(frames, value, device) -> None:
    # One sequence a program online, so that more of them show nothing new.
    more = (2, 2) if frames < 32 else (1, 1)
    call = make((2, frames, 1, *more, 16), options=("bias", "rel_v"), device=device)
    call.rest["focus_mask"] = torch.tensor([True, False], device=device)
    moved = call.inputs[0].clone()
    moved[0, 3] = value
    rest = [i for i in range(frames) if i != 3]
    with use_backend("triton"):
        function = of(axis_attention, call.rest)
        before, after = function(*call.inputs), function(moved, *call.inputs[1:])
        (_,), (dqkv, *_) = grads(function, call.inputs, [seed_at(before, 3)])
    assert torch.equal(before[0, rest], after[0, rest])
    assert torch.equal(before[1], after[1])
    assert not dqkv[0, rest].any()


@pytest.mark.parametrize("frames", [7, 40], ids=["one_tile", "online"])
@pytest.mark.parametrize("value", [1e4, float("nan")])
def test_joint_mask_isolates_images(frames, value, device) -> None:
    shape = (2, frames, 1, 2, 2, 16) if frames < 32 else (2, frames, 1, 1, 1, 16)
    call = make(shape, options=("bias", "rel_v", "rotary"), device=device)
    call.rest["num_images"] = 3
    moved = call.inputs[0].clone()
    moved[:, -2] = value  # one of the images
    rest = [i for i in range(frames) if i != frames - 2]
    with use_backend("triton"):
        function = of(axis_attention, call.rest)
        before, after = function(*call.inputs), function(moved, *call.inputs[1:])
        (_,), (dqkv, *_) = grads(function, call.inputs, [seed_at(before, frames - 2)])
        video = call.inputs[0].clone()
        video[:, 0] = value  # a frame of the video
        changed = function(video, *call.inputs[1:])
    assert torch.equal(before[:, rest], after[:, rest])
    assert not dqkv[:, rest].any()
    assert torch.equal(before[:, -3:], changed[:, -3:])


def test_pixels_and_videos_do_not_mix(device) -> None:
    """Several pixels share a tile; a NaN in one stays there."""
    call = make((2, 3, 2, 3, 2, 16), options=("bias", "rel_k", "rel_v", "rotary"), device=device)
    moved = call.inputs[0].clone()
    moved[0, 1, 1, 1] = float("nan")
    with use_backend("triton"):
        function = of(axis_attention, call.rest)
        before, after = function(*call.inputs), function(moved, *call.inputs[1:])
    hit = torch.zeros(2, 2, 3, dtype=torch.bool)
    hit[0, 1, 1] = True
    changed = (before != after).any(-1).any(-1).any(1).cpu()
    assert torch.equal(changed, hit)


def seed_at(out: Tensor, frame: int) -> Tensor:
    seed = torch.zeros_like(out)
    seed[:, frame] = 1
    return seed


def test_all_frames_are_images(device, poison) -> None:
    call = make(SHORT, options=("bias", "rel_v"), device=device)
    call.rest["num_images"] = SHORT[1]
    parity_of_unused = call._replace(inputs=[call.inputs[0], None, None, call.inputs[3]])
    parity(parity_of_unused)
    with use_backend("triton"):
        _, (_, dbias, *_) = grads(
            of(axis_attention, call.rest), call.inputs, [ones(call.inputs[0])]
        )
    assert not dbias.any()


@pytest.mark.parametrize("shape", [SHORT, LONG], ids=["one_tile", "online"])
def test_two_runs_give_the_same_bits(shape, device) -> None:
    call = make(shape, options=OPTIONS, device=device)
    dout = torch.randn(*shape, device=device)
    with use_backend("triton"):
        runs = [grads(of(axis_attention, call.rest), call.inputs, [dout]) for _ in range(2)]
    for a, b in zip((*runs[0][0], *runs[0][1]), (*runs[1][0], *runs[1][1])):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(1, 5, 1, 2, 2, 16), (1, 33, 1, 1, 2, 16)])
def test_frozen_inputs_have_no_gradient(shape, device, poison) -> None:
    """Freezing some inputs changes no bit of the other gradients."""
    call = make(shape, options=OPTIONS[:4], device=device)
    with use_backend("triton"):
        _, full = grads(of(axis_attention, call.rest), call.inputs, [ones(call.inputs[0])])
    for frozen in [(0,), (1, 2, 3), (0, 1, 3)]:
        leaves = [t.detach().requires_grad_(i not in frozen) for i, t in enumerate(call.inputs)]
        with use_backend("triton"):
            of(axis_attention, call.rest)(*leaves).sum().backward()
        for i, (leaf, expected) in enumerate(zip(leaves, full)):
            if i in frozen:
                assert leaf.grad is None
            else:
                assert torch.equal(leaf.grad, expected), (frozen, NAMES[i])


@pytest.mark.parametrize("shape", [(2, 5, 1, 3, 4, 16), (1, 34, 2, 1, 4, 16)])
def test_opcheck(shape, device) -> None:
    call = make(shape, options=OPTIONS, device=device)
    qkv, bias, rel_k, rel_v = (t.requires_grad_() for t in call.inputs)
    rest = call.rest
    opcheck_op(
        op.axis_attention_fwd,
        (qkv, op.TIME, bias, rel_k, rel_v, rest["rotary"], rest["focus_mask"])
        + (rest["num_images"], rest["sm_scale"], "triton"),
    )


@pytest.mark.parametrize("frames", [(3, 4, 6), (33, 35, 38)], ids=["one_tile", "online"])
def test_compiles_without_recompiling(frames, device) -> None:
    """fullgraph forward and backward; after two frame counts no third compilation."""
    torch._dynamo.reset()
    bias_of = T5RelativeBias(2).to(device)

    def layer(qkv: Tensor) -> Tensor:
        n = qkv.shape[1]
        table = rotary_table(n, 8, qkv.device)
        return axis_attention(qkv, axis="time", bias=bias_of(n, qkv.device), rotary=table) * 2

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    counter = torch._dynamo.testing.CompileCounter()
    watched = torch.compile(layer, backend=counter, fullgraph=True)
    for i, f in enumerate(frames):
        w = 2 if f < 32 else 1
        qkv = torch.randn(1, f, 1, w, 3, 2, 16, device=device)
        with use_backend("triton"):
            seed = torch.randn(1, f, 1, w, 2, 16, device=device)
            (out,), (dqkv,) = grads(compiled, [qkv], [seed])
            (ref,), (dqkv_ref,) = grads(layer, [qkv], [seed])
            watched(qkv)
        torch.testing.assert_close(out, ref)
        torch.testing.assert_close(dqkv, dqkv_ref)
        if i == 1:
            compilations = counter.frame_count
    assert counter.frame_count == compilations


def test_double_backward_is_refused(device) -> None:
    qkv = torch.randn(1, 3, 1, 2, 3, 1, 16, device=device, requires_grad=True)
    with use_backend("triton"):
        (dqkv,) = torch.autograd.grad(
            axis_attention(qkv, axis="time").square().sum(), qkv, create_graph=True
        )
        with pytest.raises(RuntimeError, match="no double backward"):
            dqkv.sum().backward()
    with use_backend("reference"):
        (dqkv,) = torch.autograd.grad(
            axis_attention(qkv, axis="time").square().sum(), qkv, create_graph=True
        )
        dqkv.square().sum().backward()
    assert qkv.grad is not None and qkv.grad.isfinite().all()


def test_forward_mode_is_the_references(device) -> None:
    """Tangents, which a custom op would drop without a word."""
    qkv, tangent = torch.randn(2, 1, 3, 1, 2, 3, 1, 16, device=device)
    with use_backend("triton"):
        out, got = torch.func.jvp(lambda x: axis_attention(x, axis="time"), (qkv,), (tangent,))
    ref, expected = torch.func.jvp(lambda x: axis_attention_ref(x, axis="time"), (qkv,), (tangent,))
    assert torch.equal(out, ref) and torch.equal(got, expected)


def test_autocast(device) -> None:
    call = make(SHORT, options=("bias", "rel_k"), device=device)
    kind = torch.device(device).type
    with use_backend("triton"), torch.autocast(kind, dtype=torch.float16):
        out = of(axis_attention, call.rest)(*call.inputs)
    half = [call.inputs[0].half(), call.inputs[1], call.inputs[2].half()]
    with use_backend("triton"):
        expected = of(axis_attention, call.rest)(*half)
    assert out.dtype == torch.float16 and torch.equal(out, expected)


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


def test_wrong_kernels_are_rejected(device) -> None:
    """The harness sees a key too many, a lost bias gradient and a transposed bias."""
    call = make(SHORT, options=("bias",), device=device)
    reference = of(axis_attention_ref, call.rest)

    def late(qkv: Tensor, bias: Tensor, *_) -> Tensor:
        return reference(qkv, torch.nn.functional.pad(bias[:, :, 1:], (0, 1)))

    wrong = {
        "transposed bias": lambda qkv, bias, *_: reference(qkv, bias.transpose(1, 2)),
        "lost gradient": lambda qkv, bias, *_: reference(qkv, bias.detach() + 0 * bias),
        "shifted bias": late,
    }
    for function in wrong.values():
        with pytest.raises(AssertionError):
            assert_parity(function, reference, call.inputs, names=NAMES)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"axis": "height"}, ValueError),
        ({"qkv": (2, 3, 4, 5, 2, 2, 8)}, ValueError),
        ({"qkv": torch.int32}, TypeError),
        ({"bias": torch.zeros(2, 3, 4)}, ValueError),
        ({"bias": torch.zeros(2, 3, 3, dtype=torch.long)}, TypeError),
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
        ({"bias": torch.zeros(2, 3, 3, device="meta")}, ValueError),
    ],
)
def test_bad_input_is_named(change, error) -> None:
    arguments: dict = {"axis": "time", **change}
    qkv = arguments.pop("qkv", (2, 3, 4, 5, 3, 2, 8))
    made = torch.zeros(qkv) if isinstance(qkv, tuple) else torch.zeros(2, 3, 4, 5, 3, 2, 8).to(qkv)
    with pytest.raises(error, match="must|needs"):
        axis_attention(made, **arguments)


def test_wide_heads_fall_back_with_a_reason(device) -> None:
    qkv = torch.randn(1, 3, 1, 2, 3, 1, 144, device=device)
    with use_backend("triton"), pytest.raises(FallbackError, match="head dim 144"):
        axis_attention(qkv, axis="time")
    assert "144" in explain("axis_attention", qkv)["triton"]


@pytest.mark.parametrize("shape", [(0, 3, 2, 2, 2, 16), (2, 3, 0, 2, 2, 16), (2, 0, 2, 2, 2, 16)])
def test_empty_input(shape, device) -> None:
    call = make(shape, options=("bias",), device=device)
    with use_backend("triton"):
        (out,), (dqkv, dbias, *_) = grads(
            of(axis_attention, call.rest), call.inputs, [torch.zeros(*shape, device=device)]
        )
    assert out.shape == shape and dqkv.shape == call.inputs[0].shape and not dbias.any()


def test_cost() -> None:
    forward = axis_attention_cost((2, 16, 8, 8, 3, 8, 32), 2, "time")
    rows = 2 * 16 * 64 * 8
    assert forward == (4 * rows * 16 * 32, 4 * rows * 32 * 2)
    backward = axis_attention_cost((2, 16, 8, 8, 3, 8, 32), 2, "time", bias=True, backward=True)
    assert backward == (10 * rows * 16 * 32, 7 * rows * 32 * 2 + 2 * 8 * 256 * 4)

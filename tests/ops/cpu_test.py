"""The C++ CPU backend: each op against the reference on every instruction set this machine has.

This is the lane where bf16 parity is real without a GPU. Left out for time: the product of options
with dtypes (each option appears at least once per instruction set, in fp32 and bf16; fp16 differs
only in its loads and stores and is checked once per op).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.temporal_block import temporal_block
from fastvdm.runtime import extension
from fastvdm.runtime.config import use_backend
from fastvdm.testing import (
    assert_close3,
    assert_parity,
    cpu_isas,
    make_exact_operand,
    max_error,
    use_cpu_isa,
)

pytestmark = pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"no C++ extension: {extension.reason_off()}"
)
DTYPES = [torch.float32, torch.bfloat16]


def _reference(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor | None) -> Tensor:
        with use_backend("reference"):
            return fn(*args)

    return run


def _parity(fn, inputs, names: str) -> None:
    with use_backend("cpu", strict=True):
        assert_parity(fn, _reference(fn), inputs, names=names.split())


def rotary(n: int, r: int) -> Tensor:
    angle = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(r // 2) / (r // 2))
    return torch.stack((angle.cos(), angle.sin()))


# --- norm_act ------------------------------------------------------------------------------------

NORMS = {  # kind, groups, per_frame, C, C2, dropout mask
    "group_pair": ("group", 4, False, 24, 8, "float"),
    "group_frame_odd": ("group", 3, True, 21, 0, None),
    "rms": ("rms", 1, False, 40, 0, "bool"),
    "layer_pair_odd": ("layer", 1, False, 64, 17, None),
    "layer_narrow": ("layer", 1, False, 5, 0, None),
}


def _norm_case(case: str, dtype: torch.dtype):
    kind, groups, per_frame, c, c2, mask = NORMS[case]
    shape, total = (2, 3, 5, 7), c + c2
    x = (torch.randn(*shape, c) * 2 + 1).to(dtype)
    x2 = torch.randn(*shape, c2).to(dtype) if c2 else None
    dropout = torch.rand(*shape, total) > 0.2 if mask else None
    if mask == "float":
        dropout = dropout.float() / 0.8

    def fn(x, x2, w, b, scale, shift, residual):
        return norm_act(
            x, w, b, kind=kind, groups=groups, per_frame=per_frame, scale=scale, shift=shift,
            residual=residual, dropout_mask=dropout, x2=x2,
        )  # fmt: skip

    inputs = [x, x2, torch.randn(total), torch.randn(total), torch.randn(2, total)]
    return fn, [*inputs, torch.randn(2, total), torch.randn(*shape, total).to(dtype)]


@pytest.mark.parametrize("case", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_act(isa, case, dtype):
    fn, inputs = _norm_case(case, dtype)
    _parity(fn, inputs, "x x2 weight bias scale shift residual")


def test_group_norm_far_from_zero(isa):
    """A mean 1e4 deviations away costs no more digits than the subtraction itself."""
    x = torch.randn(1, 2, 24, 24, 16) + 1e4
    y = norm_act(x, torch.ones(16), kind="group", groups=4, act=False)
    with use_backend("reference"):
        ref = norm_act(x.double(), torch.ones(16).double(), kind="group", groups=4, act=False)
    assert max_error(y, ref) < 1e-4


def test_sigmoid_ends(isa):
    """SiLU far out: no NaN, x above and 0 below; a NaN in the input stays."""
    x = torch.tensor([-1e30, -200.0, -88.5, 0.0, 88.5, 200.0, 1e30, float("nan")])
    x = x.view(1, 1, 1, 1, 8)
    one, mean = torch.ones(8), torch.zeros(1, 8)
    y = norm_act(x, one, kind="group", groups=8, stats=(mean, torch.ones(1, 8)))
    expected = F.silu(x.double())
    assert torch.isnan(y[..., 7]).all()
    torch.testing.assert_close(y[..., :7].double(), expected[..., :7], rtol=1e-6, atol=1e-8)


# --- axis_attention and temporal_block -----------------------------------------------------------

ATTENTION = {  # B, F, H, W, heads, D, axis, options
    "peer": (2, 16, 3, 5, 4, 32, "time", dict(bias=True, rotary=32)),
    "shaw_shared": (1, 7, 2, 3, 3, 24, "time", dict(rotary=8, rel_k=3, rel_v=2)),
    "shaw_images": (2, 9, 1, 4, 2, 40, "time", dict(bias=True, rel_k=20, rel_v=20, per_head=True, images=3)),  # noqa: E501
    "focus_images": (3, 24, 1, 2, 2, 64, "time", dict(focus=True, rotary=32, rel_k=2, rel_v=4, images=8)),  # noqa: E501
    "long": (1, 64, 1, 3, 2, 32, "time", dict(bias=True, rotary=32)),
    "space": (2, 3, 6, 7, 2, 32, "space", dict(bias=True)),
    "space_shaw": (1, 2, 9, 8, 3, 16, "space", dict(rotary=8, rel_k=3, rel_v=5)),
    "one": (1, 1, 2, 3, 1, 5, "time", dict(bias=True)),
    "only_images": (1, 17, 2, 3, 2, 33, "time", dict(bias=True, images=17)),
}  # fmt: skip


def _attention_options(case: str, dtype: torch.dtype):
    b, f, h, w, heads, d, axis, o = ATTENTION[case]
    n, tables = f if axis == "time" else h * w, heads if o.get("per_head") else 1
    tensors = [
        torch.randn(heads, n, n) * 2 if "bias" in o else None,
        torch.randn(tables, 2 * o["rel_k"] + 1, d).to(dtype) if "rel_k" in o else None,
        torch.randn(tables, 2 * o["rel_v"] + 1, d).to(dtype) if "rel_v" in o else None,
    ]
    rest = dict(
        rotary=rotary(n, o["rotary"]) if "rotary" in o else None,
        focus_mask=torch.arange(b) % 2 == 1 if "focus" in o else None,
        num_images=o.get("images", 0),
    )
    return tensors, rest


@pytest.mark.parametrize("case", ATTENTION)
@pytest.mark.parametrize("dtype", DTYPES)
def test_axis_attention(isa, case, dtype):
    b, f, h, w, heads, d, axis, _ = ATTENTION[case]
    tensors, rest = _attention_options(case, dtype)
    qkv = (torch.randn(b, f, h, w, 3, heads, d) * 2).to(dtype)

    def fn(qkv, bias, rel_k, rel_v):
        return axis_attention(qkv, axis=axis, bias=bias, rel_k=rel_k, rel_v=rel_v, **rest)

    _parity(fn, [qkv, *tensors], "qkv bias rel_k rel_v")


BLOCK_WIDTHS = {"peer": 64, "shaw_shared": 20, "shaw_images": 48, "focus_images": 33, "long": 16,
                "one": 5, "only_images": 16}  # fmt: skip


@pytest.mark.parametrize("case", BLOCK_WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_temporal_block(isa, case, dtype):
    b, f, h, w, heads, d, _, _ = ATTENTION[case]
    c, inner = BLOCK_WIDTHS[case], heads * d
    tensors, rest = _attention_options(case, dtype)
    biases = case.startswith("shaw")

    def maybe(n):
        return torch.randn(n).to(dtype) if biases else None

    inputs = [
        (torch.randn(b, f, h, w, c) * 1.5).to(dtype),
        torch.randn(c),
        torch.randn(c) if biases else None,
        (torch.randn(3 * inner, c) * 2 / c**0.5).to(dtype),
        maybe(3 * inner),
        (torch.randn(c, inner) / inner**0.5).to(dtype),
        maybe(c),
        *tensors,
    ]

    def fn(x, nw, nb, qw, qb, ow, ob, bias, rel_k, rel_v):
        return temporal_block(
            x, nw, qw, ow, heads=heads, norm_bias=nb, qkv_bias=qb, out_bias=ob, bias=bias,
            rel_k=rel_k, rel_v=rel_v, **rest,
        )  # fmt: skip

    _parity(fn, inputs, "x nw nb qw qb ow ob bias rel_k rel_v")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sharp_attention_and_negative_controls(isa, dtype):
    """q and k times 4: the softmax picks. Without the bias, with it transposed or without rotary
    the output must be far off, so that parity above is evidence."""
    qkv = torch.randn(1, 16, 2, 3, 3, 4, 32)
    qkv[..., :2, :, :] *= 4
    qkv, bias, turn = qkv.to(dtype), torch.randn(4, 16, 16) * 4, rotary(16, 32)
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


def test_masked_by_bias(isa):
    """-inf masks exactly: a poisoned key is not seen, and a row without keys gives zeros."""
    qkv = torch.randn(1, 5, 1, 2, 3, 2, 16)
    qkv[:, 3, :, :, 1] = 1e20  # key of frame 3
    bias = torch.zeros(2, 5, 5)
    bias[:, :, 3] = -torch.inf
    bias[:, 4] = -torch.inf
    out = axis_attention(qkv, axis="time", bias=bias)
    rest = [0, 1, 2, 4]
    short = axis_attention(
        qkv[:, rest].contiguous(), axis="time", bias=bias[:, rest][:, :, rest].contiguous()
    )
    assert (out[:, 4] == 0).all()
    torch.testing.assert_close(out[:, :3], short[:, :3], rtol=1e-6, atol=1e-6)


def test_strided_qkv(isa):
    """A slice of a wider projection is read by its strides."""
    wide = torch.randn(2, 6, 2, 3, 3, 5, 24)
    view = wide[:, ::2, :, :, :, 1:4, :16]
    out = axis_attention(view, axis="time")
    torch.testing.assert_close(out, axis_attention(view.contiguous(), axis="time"), rtol=0, atol=0)


@pytest.mark.parametrize("pixels", [65535, 70001])
def test_many_sequences(pixels):
    """B*H*W past 65535; frame 0 attends to itself, so its output is v."""
    qkv = make_exact_operand((1, 1, 1, pixels, 3, 1, 8))
    assert torch.equal(axis_attention(qkv, axis="time"), qkv[..., 2, :, :])


# --- linear_attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharp", [1, 8])
@pytest.mark.parametrize(
    "shape", [(1, 2, 12, 11, 4, 32), (2, 3, 5, 7, 3, 24), (1, 2, 1, 1, 2, 40), (1, 1, 9, 16, 1, 64)]
)
def test_linear_attention(isa, shape, sharp, dtype):
    """``sharp``: k grows along the pixels, so the running maximum moves in every chunk."""
    b, f, h, w, heads, d = shape
    qkv = torch.randn(b, f, h, w, 3, heads, d) * sharp
    if sharp > 1:
        qkv[..., 1, :, :] += torch.linspace(-12, 12, h * w).view(h, w, 1, 1)
    _parity(linear_attention, [qkv.to(dtype)], "qkv")


def test_linear_attention_needs_no_bound(isa):
    """Logits of ±300: exp of them overflows without the running maximum."""
    qkv = torch.randn(1, 1, 9, 9, 3, 2, 16)
    qkv[..., 1, :, :] *= 100
    with use_backend("reference"):
        ref = linear_attention(qkv.double())
    assert max_error(linear_attention(qkv), ref) < 1e-4


# --- the 3x3 convolution -------------------------------------------------------------------------


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
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


# --- properties of all of them -------------------------------------------------------------------


def _all_ops(dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Outputs and gradients of every op, for comparisons between runs."""
    generator = torch.Generator().manual_seed(1)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, w, b = leaf(2, 5, 6, 7, 24), leaf(24), leaf(24)
    qkv, bias = leaf(2, 5, 6, 7, 3, 2, 16), leaf(2, 5, 5)
    qw, ow = leaf(96, 24).mul(0.2).detach(), leaf(24, 32).mul(0.2).detach()
    qw, ow = qw.requires_grad_(), ow.requires_grad_()
    found = []
    for out, leaves in (
        (norm_act(x, w, b, kind="group", groups=4), (x, w, b)),
        (norm_act(x, w, kind="rms"), (x, w)),
        (axis_attention(qkv, axis="time", bias=bias), (qkv, bias)),
        (linear_attention(qkv), (qkv,)),
        (temporal_block(x, w, qw, ow, heads=2, bias=bias), (x, w, qw, ow, bias)),
    ):
        found.append((out.detach(), *torch.autograd.grad(out.float().square().mean(), leaves)))
    return found


def _same(a, b) -> bool:
    return all(torch.equal(s, t) for left, right in zip(a, b) for s, t in zip(left, right))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_same_bits_for_any_number_of_threads(isa, dtype):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = _all_ops(dtype), _all_ops(dtype)
        torch.set_num_threads(2)
        two = _all_ops(dtype)
    finally:
        torch.set_num_threads(before)
    assert all(torch.isfinite(t).all() for ts in one for t in ts)
    assert _same(one, again)
    assert _same(one, two)


def test_asking_what_there_is_changes_nothing():
    """FASTVDM_CPU_ISA stays in force; so does a choice inside another."""
    best, lowest = cpu_isas()[0], cpu_isas()[-1]
    with use_cpu_isa(lowest):
        cpu_isas()
        with use_cpu_isa(best):
            assert torch.ops.fastvdm_C.cpu_isa() == best
        assert torch.ops.fastvdm_C.cpu_isa() == lowest


def test_instruction_sets_agree():
    results = {}
    for name in cpu_isas():
        with use_cpu_isa(name):
            results[name] = _all_ops(torch.float32)
    best = results.pop(next(iter(results)))
    for other in results.values():
        for left, right in zip(best, other):
            for a, b in zip(left, right):
                assert max_error(a, b) < 2e-5


def test_empty_batch():
    qkv = torch.empty(0, 4, 2, 3, 3, 2, 16)
    assert axis_attention(qkv, axis="time").shape == (0, 4, 2, 3, 2, 16)
    assert linear_attention(qkv).shape == (0, 4, 2, 3, 2, 16)
    x = torch.empty(0, 4, 2, 3, 16)
    y = temporal_block(x, torch.ones(16), torch.zeros(96, 16), torch.zeros(16, 32), heads=2)
    assert y.shape == x.shape


def test_bad_input_raises_before_memory_is_touched():
    """The launchers check what the public functions promise them."""
    ops = torch.ops.fastvdm_C
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.linear_attention_fwd_cpu(torch.zeros(1, 2, 3, 4, 3, 2, 8).transpose(2, 3), 1.0)
    with pytest.raises(RuntimeError, match="fp32, bf16 and fp16"):
        ops.linear_attention_fwd_cpu(torch.zeros(1, 1, 2, 2, 3, 1, 8, dtype=torch.int32), 1.0)
    with pytest.raises(RuntimeError, match="channels"):
        ops.conv3x3_cpu(
            torch.zeros(1, 4, 4, 8), None, torch.zeros(8, 9, 3, 3), None, None, False, 2
        )
    with pytest.raises(RuntimeError, match="elements"):
        ops.axis_attention_fwd_cpu(
            torch.zeros(1, 4, 2, 2, 3, 2, 8),
            1,
            torch.zeros(2, 3, 3),
            None,
            None,
            None,
            None,
            0,
            1.0,
        )
    with pytest.raises(RuntimeError, match="cpu isa"):
        extension.set_cpu_isa("sse9")


def _in_worker(index: int) -> Tensor:
    qkv = make_exact_operand((1, 4, 2, 3, 3, 2, 16), seed=index)
    return linear_attention(qkv)


class _Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return _in_worker(index)


def test_forked_dataloader_workers():
    """Ops ran in the parent, then run in forked workers, whose thread pool is gone."""
    expected = torch.stack([_in_worker(i) for i in range(4)])
    loader = torch.utils.data.DataLoader(
        _Items(), batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=1800
    )
    found = torch.cat(list(loader))
    assert torch.equal(found, expected)


def test_environment_variable_forces_the_path():
    code = (
        "from fastvdm.runtime import extension; import torch; print(torch.ops.fastvdm_C.cpu_isa())"
    )
    for name in ("portable", "sse9"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**__import__("os").environ, "FASTVDM_CPU_ISA": name},
        )
        if name == "portable":
            assert done.stdout.strip() == name, done.stderr
        else:
            assert done.returncode != 0 and "FASTVDM_CPU_ISA" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF symbols")
def test_only_stable_symbols():
    """What the library wants from torch is its C interface alone, so one build serves 2.11 and
    later, and only one OpenMP runtime (torch's) is in the process."""
    from pathlib import Path

    library = next(Path(extension.__file__).parents[1].glob("_C*.so"))
    try:
        names = subprocess.run(
            ["nm", "-D", "--undefined-only", str(library)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
    except FileNotFoundError:
        pytest.skip("no nm on this machine")
    wanted = [n for n in names if len(n) > 1]
    bad = [n for n in wanted if "c10" in n or n.startswith("_ZN2at") or n.startswith("_ZN5torch")]
    bad += [n for n in wanted if n.startswith(("GOMP_", "omp_", "Py"))]
    assert not bad, bad
    # In a process of its own: packages that other tests import bring runtimes of their own.
    code = (
        "import torch, fastvdm; x = torch.ones(512, 64); "
        "torch.ops.fastvdm_C.linear_fwd_cpu(x, x, None); print(open('/proc/self/maps').read())"
    )
    maps = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    runtimes = {line.split()[-1] for line in maps if "gomp" in line.rsplit("/", 1)[-1]}
    assert len(runtimes) <= 1, runtimes

"""The harness must reject wrong kernels: each defect below is one that real kernels had."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastvdm import testing


def softmax_matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.softmax(a, -1) @ b


def never_writes(a: Tensor, b: Tensor) -> Tensor:
    return torch.empty(a.shape[0], b.shape[1], dtype=a.dtype)


def truncated_k(a: Tensor, b: Tensor) -> Tensor:
    k = a.shape[1] // 8 * 8
    return torch.softmax(a, -1)[:, :k] @ b[:k]


def half_accumulator(a: Tensor, b: Tensor) -> Tensor:
    p, out = torch.softmax(a, -1), torch.zeros(a.shape[0], b.shape[1], dtype=torch.float16)
    for k in range(a.shape[1]):
        out += (p[:, k : k + 1] * b[k]).half()
    return out.to(a.dtype)


def last_row_missed(a: Tensor, b: Tensor) -> Tensor:
    out = softmax_matmul(a, b).clone()
    out[-1] = out[-2]
    return out


def unmasked_padding(a: Tensor, b: Tensor) -> Tensor:
    padded = torch.cat((a, torch.zeros(a.shape[0], 1, dtype=a.dtype)), 1)
    return torch.softmax(padded, -1)[:, :-1] @ b


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        p = torch.softmax(a, -1)
        ctx.save_for_backward(p, b)
        return p @ b

    @staticmethod
    def backward(ctx, dy):
        p, b = ctx.saved_tensors
        dp = dy @ b.T
        return p * dp, p.T @ dy  # without the row sum of the softmax's derivative


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(5, 19).to(dtype) * 4, torch.randn(19, 7).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_accepts_the_right_one(dtype):
    testing.assert_parity(softmax_matmul, softmax_matmul, inputs(dtype), names=("a", "b"))


@pytest.mark.parametrize(
    "wrong", [truncated_k, half_accumulator, last_row_missed, unmasked_padding, WrongGradient.apply]
)
def test_rejects(wrong):
    with pytest.raises(AssertionError, match=r"error .* > limit|expected"):
        testing.assert_parity(wrong, softmax_matmul, inputs(), names=("a", "b"))


class Cancels(torch.autograd.Function):
    """x + bias, of which a norm of one channel a group makes a bias with the gradient 0; here that
    gradient is ``share`` of the size of its terms."""

    @staticmethod
    def forward(ctx, x, bias, share):
        ctx.share = share
        return x + bias - (x + bias).mean()

    @staticmethod
    def backward(ctx, dy):
        dx = dy - dy.mean()
        return dx, ctx.share * dx.abs().sum().to(dy.dtype), None


def centred(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias - (x + bias).mean()


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1.2e-7), (torch.bfloat16, 2e-6)])
def test_what_cancels_is_measured_by_its_terms(dtype, unit):
    """A sum that is 0 may keep the rounding of what was summed: half of it passes in either dtype,
    a hundred times as much does not, and a share that is no rounding is an error."""
    given = torch.randn(5, 19).to(dtype), torch.randn(()).to(dtype)
    for share, right in ((unit / 8, True), (100 * unit, False), (0.01, False)):

        def op(x, bias, share=share):
            return Cancels.apply(x, bias, share)

        if right:
            testing.assert_parity(op, centred, given, names=("x", "bias"))
        else:
            with pytest.raises(AssertionError, match="dbias"):
                testing.assert_parity(op, centred, given, names=("x", "bias"))


def test_sizes_of_sums():
    """Of dot products with and without cancellation: about the root of the sum of squares."""
    x, w = torch.randn(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    dout = torch.ones((), dtype=torch.float64)
    for vector in (x.abs(), x - x.mean()):
        out, dx, dw = testing.sizes_of_sums(torch.dot, (vector, w), dout)
        assert 0.2 < out / vector.norm() < 6
        assert 0.5 < dx < 8 and 0.5 < dw / vector.abs().max() < 8


def test_sizes_of_sums_have_the_partial_sums_of_a_product():
    """Five times the rounding of the operands alone at 300 terms."""
    a, b = (torch.randn(*s, dtype=torch.float64) for s in ((8, 300), (300, 8)))
    dout = torch.ones(8, 8, dtype=torch.float64)
    terms = testing.sizes_of_sums(lambda a, b: (a[:, :, None] * b).sum(1), (a, b), dout)
    assert 2 < testing.sizes_of_sums(torch.mm, (a, b), dout)[0] / terms[0] < 10


def test_rejects_what_is_never_written():
    a, b = inputs()
    with testing.poison_empty():
        out = never_writes(a, b)
    with pytest.raises(AssertionError, match="100 %"):
        testing.assert_close3(out, softmax_matmul(a, b), softmax_matmul(a.double(), b.double()))


def test_poison_reaches_every_way_to_allocate():
    with testing.poison_empty():
        x = torch.zeros(2)
        made = (
            torch.empty(3),
            torch.empty_like(x),
            x.new_empty(3),
            torch.empty_strided((3,), (2,)),
        )
        assert all(t.isnan().all() for t in made)
        assert torch.empty(2, dtype=torch.int32).tolist() == [2**31 - 1] * 2
    assert torch.empty_like(x).shape == (2,)


def test_exact_operands_show_an_index_error():
    a = testing.make_exact_operand((5, 19), seed=1)
    b = testing.make_exact_operand((19, 7), seed=2)
    assert torch.equal(a @ b, (a.double() @ b.double()).float())
    assert not torch.equal(a @ b, a @ b.roll(1, 0))


def test_failure_says_where():
    ref = torch.zeros(3, 4, dtype=torch.float64)
    ref[0, 0] = 1.0
    out = ref.float()
    out[2, 1] = 0.5
    with pytest.raises(AssertionError, match=r"dx.*\(2, 1\) got 0.5, expected 0;.*8.33 %"):
        testing.assert_close3(out, ref.float(), ref, name="dx")
    with pytest.raises(AssertionError, match="shape"):
        testing.assert_close3(out[:2], ref.float(), ref)
    with pytest.raises(AssertionError, match="dtype"):
        testing.assert_close3(out.half(), ref.float(), ref)


def test_opcheck_refuses_a_cube():
    with pytest.raises(ValueError, match="differ"):
        testing.opcheck_op(torch.ops.aten.add.Tensor, (torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)))


def test_opcheck_finds_a_lying_fake():
    @torch.library.custom_op("fastvdm_test::transposed", mutates_args=())
    def op(x: Tensor) -> Tensor:
        return x.T.contiguous()

    op.register_fake(torch.empty_like)
    torch.library.opcheck(op, (torch.zeros(4, 4),))  # a square hides it
    with pytest.raises(Exception, match=r"(?i)shape|size|stride"):
        testing.opcheck_op(op, (torch.zeros(3, 5),))

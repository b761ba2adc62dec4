"""The 3x3 convolution of bf16 in fixed point (csrc/cpu/space_conv_fixed.h): what scaling by the
norms of rows must survive. Shapes and gradients are the suite's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastvdm.runtime import extension
from fastvdm.testing import cpu_isas, use_cpu_isa

ISAS = [isa for isa in cpu_isas() if isa in ("avx512_bf16", "amx")]
pytestmark = pytest.mark.skipif(
    not ISAS, reason=f"no bf16 products here: {extension.reason_off() or cpu_isas()}"
)
BF16 = torch.bfloat16


def conv(x: Tensor, weight: Tensor, tile: int = 4, turned: bool = False) -> Tensor:
    return torch.ops.fastvdm_C.conv3x3_cpu(x, None, weight, None, None, turned, tile)


def exact(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv2d(x.double().permute(0, 3, 1, 2), weight.double(), padding=1)
    return y.permute(0, 2, 3, 1)


def error(y: Tensor, expected: Tensor) -> float:
    """Root mean square, relative to that of what is expected."""
    return float((y.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.fixture(params=ISAS, autouse=True)
def isa(request):
    with use_cpu_isa(request.param):
        yield request.param


@pytest.mark.parametrize("channels, bound", [(64, 2.0e-3), (256, 2.3e-3), (1024, 3.5e-3)])
def test_error_is_near_that_of_rounding_the_output(channels, bound):
    """Rounding to bf16 alone is 1.7e-3."""
    torch.manual_seed(0)
    x = F.silu(torch.randn(2, 8, 8, channels)).to(BF16)
    weight = (torch.randn(64, channels, 3, 3) / (9 * channels) ** 0.5).to(BF16)
    assert error(conv(x, weight), exact(x, weight)) < bound


@pytest.mark.parametrize("x_scale, scale", [
    (1e-38, 1), (1e-32, 1), (1e-12, 1), (1e12, 1), (1e25, 1), (1e36, 1e-2),
    (1e-10, 1e19), (1e-20, 1e20), (1e25, 1e-30),
])  # fmt: skip
def test_any_magnitude(x_scale, scale):
    """Of tiles and of weights, though the squares of the smallest and the largest leave fp32."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 9, 7, 24) * x_scale, torch.randn(20, 24, 3, 3) * scale
    x, weight = x.to(BF16), weight.to(BF16)
    y, expected = conv(x, weight).double(), exact(x, weight)
    bound = 4e-3 if x_scale > 1e-37 else 0.1  # subnormal: few bits are left
    assert float((y - expected).norm() / expected.norm()) < bound


def test_rows_have_their_own_scales():
    """Beside a tile 1e4 times as large, and in an output channel of weights 1e4 times as small."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 8, 32)
    x[:, 4:] *= 1e4
    weight = torch.randn(32, 32, 3, 3)
    weight[::2] *= 1e-4
    x, weight = x.to(BF16), weight.to(BF16)
    y, expected = conv(x, weight), exact(x, weight)
    for rows in (slice(0, 3), slice(5, 8)):
        for outputs in (slice(0, None, 2), slice(1, None, 2)):
            part = (slice(None), rows, slice(None), outputs)
            assert error(y[part], expected[part]) < 3e-3


@pytest.mark.parametrize("outlier", [1.0, 100.0, 1e4])
def test_outlier_channels(outlier):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 8, 128), torch.randn(32, 128, 3, 3)
    x[..., 5] *= outlier
    x, weight = x.to(BF16), weight.to(BF16)
    assert error(conv(x, weight), exact(x, weight)) < 3e-3


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e3, 1e5])
def test_a_large_channel_that_the_weights_suppress(scale):
    """What is left of the sum is smaller than the rounding of such a row."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 16, 16, 64), torch.randn(64, 64, 3, 3)
    x[..., 0] *= scale
    weight[:, 0] /= scale
    x, weight = x.to(BF16), weight.to(BF16)
    assert error(conv(x, weight), exact(x, weight)) < 8e-3
    weight[:, 0] = 0
    assert error(conv(x, weight), exact(x, weight)) < 8e-3


@pytest.mark.parametrize("scale", [1e2, 1e3, 1e4])
def test_a_large_pixel_does_not_drown_its_neighbours(scale):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 16, 16, 64), torch.randn(64, 64, 3, 3)
    x[0, 5, 5] *= scale
    x, weight = x.to(BF16), weight.to(BF16)
    y, expected = conv(x, weight).double(), exact(x, weight)
    far = torch.ones(16, 16, dtype=torch.bool)
    far[4:7, 4:7] = False
    assert error(y[0, far], expected[0, far]) < 1e-2
    assert error(y[0, ~far], expected[0, ~far]) < 3e-3


@pytest.mark.parametrize("mean", [10.0, 100.0, 1e4])
def test_weights_that_take_the_mean_out(mean):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 16, 16, 64) + mean, torch.randn(64, 64, 3, 3)
    x, weight = x.to(BF16), (weight - weight.mean(1, keepdim=True)).to(BF16)
    assert error(conv(x, weight), exact(x, weight)) < 8e-3


def test_no_sum_leaves_32_bits():
    """Rows that are parallel: the sum is the product of the norms, all terms of one sign."""
    x, weight = torch.ones(1, 12, 12, 2048), torch.ones(16, 2048, 3, 3)
    x, weight = x.to(BF16), weight.to(BF16)
    assert torch.equal(
        conv(x, weight)[:, 1:-1, 1:-1], torch.full((1, 10, 10, 16), 18432.0).to(BF16)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(bad):
    x, weight = torch.randn(1, 8, 8, 16).to(BF16), torch.randn(16, 16, 3, 3).to(BF16)
    x[0, 1, 1, 3] = bad
    y = conv(x, weight)
    assert not torch.isfinite(y[0, :3, :3]).any()
    assert torch.isfinite(y[0, 4:, 4:]).all()
    x[0, 1, 1, 3] = 0
    weight[5, 7, 1, 1] = bad
    y = conv(x, weight)
    assert not torch.isfinite(y[..., 5]).any()
    assert torch.isfinite(y[..., :5]).all() and torch.isfinite(y[..., 6:]).all()


def test_zeros_are_zeros():
    x, weight = torch.zeros(1, 8, 8, 16).to(BF16), torch.randn(16, 16, 3, 3).to(BF16)
    assert not conv(x, weight).any()
    assert not conv(torch.randn(1, 8, 8, 16).to(BF16), torch.zeros_like(weight)).any()
    weight[3] = 0
    assert not conv(torch.randn(1, 8, 8, 16).to(BF16), weight)[..., 3].any()


@pytest.mark.parametrize("tile", [2, 4])
def test_the_gradient_of_the_input(tile):
    torch.manual_seed(0)
    dy, weight = torch.randn(2, 9, 6, 40).to(BF16), torch.randn(40, 24, 3, 3).to(BF16)
    expected = exact(dy, weight.transpose(0, 1).flip(2, 3))
    assert error(conv(dy, weight, tile, turned=True), expected) < 3e-3

"""norm → FiLM → SiLU → 3x3 + residual with given statistics: one launch against two.

Providers: as it is dispatched (``norm_act``, then the library convolves); the two Triton ops; the
norm in the Triton convolution's prologue. Which of them is the default on a GPU is for this to say.
bf16 on a GPU; on a CPU the first one alone, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import bench_cases, shape
from harness import Contest, Provider, Unavailable, runner
from torch import Tensor

from fastvdm import use_backend
from fastvdm.ops._cost import Cost
from fastvdm.ops.conv_group_norm import norm_act, norm_conv, space_conv
from fastvdm.ops.norm_act import norm_act_cost
from fastvdm.ops.space_conv import space_conv_cost
from fastvdm.reference.space_conv import group_stats_ref
from fastvdm.runtime import dispatch

PROVIDERS = ("fastvdm", "fastvdm-triton", "fastvdm-triton-prologue")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3"))


def contest(case: str, device: str, train: bool = False) -> Contest:
    s, gpu = shape(case, device), device.startswith("cuda")
    dtype, c = torch.bfloat16 if gpu else torch.float32, s.channels

    def make(*dims: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(dims)).to(device, dtype)

    weight = make(c, c, 3, 3, gain=(9 * c) ** -0.5).contiguous(memory_format=torch.channels_last)
    x, dy = make(*s.x_shape), make(*s.x_shape) if train else None
    stats = group_stats_ref(x, s.groups)
    inputs = [x, make(c), make(c), make(s.batch, c), make(s.batch, c), weight, make(c)]

    def two(x: Tensor, g: Tensor, h: Tensor, scale: Tensor, shift: Tensor, *conv: Tensor) -> Tensor:
        film = dict(scale=scale, shift=shift)
        y = norm_act(x, g, h, kind="group", groups=s.groups, stats=stats, **film)
        return space_conv(y, *conv, residual=x)

    def one(x: Tensor, g: Tensor, h: Tensor, scale: Tensor, shift: Tensor, *conv: Tensor) -> Tensor:
        return norm_conv(x, stats, g, h, *conv, scale=scale, shift=shift, residual=x)

    def torch_only(x: Tensor, *p: Tensor) -> Tensor:
        g, h, scale, shift, weight, bias = p
        y = F.group_norm(x.flatten(1, 3).transpose(1, 2), s.groups, g, h).transpose(1, 2)
        y = y.view(x.shape) * (1 + scale[:, None, None, None]) + shift[:, None, None, None]
        y = F.conv2d(F.silu(y).flatten(0, 1).permute(0, 3, 1, 2), weight, bias, padding=1)
        return y.permute(0, 2, 3, 1).reshape(x.shape) + x

    def triton(fn: Callable[..., Tensor]) -> Callable[[], Any]:
        if not gpu or (off := dispatch.explain("norm_conv")["triton"]):
            raise Unavailable(off if gpu else "the Triton kernels run on a GPU")

        def call(*given: Tensor) -> Tensor:
            with use_backend("triton"):
                return fn(*given)

        return runner(call, inputs, dy)

    def cost(dtype: torch.dtype) -> list[Cost]:
        """Of one launch: x read and y written once, the residual read."""
        conv = space_conv_cost(s.x_shape, (c, c, 3, 3), residual=True, itemsize=dtype.itemsize)
        meta = torch.empty(s.x_shape, dtype=dtype, device="meta")
        found = [Cost(conv.flops + norm_act_cost(meta, kind="group").flops, conv.bytes)]
        return found + [conv, conv, norm_act_cost(meta, kind="group", backward=True)] * train

    wide = torch.float64 if gpu or case == "tiny" else torch.float32
    builds = (
        lambda: runner(two, inputs, dy),
        lambda: triton(two),
        lambda: triton(one),
    )
    tolerance = (6e-2 if train else 3e-2) if gpu else 1e-4
    return Contest(
        reference=lambda: runner(torch_only, [t.to(wide) for t in inputs], dy)(),
        providers={n: Provider(b, tolerance, dtype) for n, b in zip(PROVIDERS, builds)},
        cost=cost,
        device=device,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_forward(race, case, provider):
    race(contest, case, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_training(race, case, provider):
    race(contest, case, provider, train=True)

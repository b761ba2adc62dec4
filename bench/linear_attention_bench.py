"""linear_attention at the levels of the peer's network: the core from packed qkv to out.

Providers: the peer's two einsums on its layout, converted from and to ours; plain torch; the same
compiled; ours. bf16 on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import bench_cases, shape
from einops import rearrange
from harness import Contest, Provider, compiled, cost_of, need_kernel, runner
from torch import Tensor

from fastvdm.ops.linear_attention import linear_attention, linear_attention_cost
from fastvdm.reference.linear_attention import linear_attention_ref

PROVIDERS = ("peer", "torch", "compiled", "fastvdm")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3"))


def peer(qkv: Tensor) -> Tensor:
    """As in the peer's ``SpatialLinearAttention``, on 'b heads d pixels'."""
    h = qkv.shape[2]
    q, k, v = rearrange(qkv, "b f h w three n d -> three (b f) n d (h w)").unbind(0)
    q, k = q.softmax(dim=-2) * q.shape[-2] ** -0.5, k.softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    out = torch.einsum("bhde,bhdn->bhen", context, q)
    return rearrange(out, "(b f) n d (h w) -> b f h w n d", b=qkv.shape[0], h=h)


def contest(case: str, device: str, train: bool = False) -> Contest:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    s = shape(case, device)
    qkv = torch.randn(s.qkv_shape).to(device, dtype)
    dy = torch.randn(*s.qkv_shape[:4], s.heads, s.head_dim).to(device, dtype) if train else None
    info: dict[str, Any] = {}

    def ours() -> Callable[[], Any]:
        need_kernel("linear_attention", device)
        return runner(linear_attention, (qkv,), dy)

    builds: dict[str, Callable[[], Any]] = {
        "peer": lambda: runner(peer, (qkv,), dy),
        "torch": lambda: runner(linear_attention_ref, (qkv,), dy),
        "compiled": lambda: runner(compiled(linear_attention_ref, info), (qkv,), dy),
        "fastvdm": ours,
    }
    wide = torch.float64 if case == "tiny" else torch.float32
    return Contest(
        reference=lambda: runner(linear_attention_ref, (qkv.to(wide),), dy)(),
        providers={
            name: Provider(build, 4e-2 if gpu else 1e-4, dtype, info if name == "compiled" else {})
            for name, build in builds.items()
        },
        cost=lambda dtype: cost_of(linear_attention_cost, s.qkv_shape, dtype.itemsize, train=train),
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

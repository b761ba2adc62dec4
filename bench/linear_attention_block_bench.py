"""linear_attention_block at the levels of a U-Net: norm, qkv, linear attention, out, residual.

Providers: the peer's arithmetic on its layout, from and to ours; plain torch; that compiled; the
block of its parts; ours, which is an op of CPUs: on a GPU the block is its parts. On a GPU in bf16,
on a CPU in fp32. Training asks for every gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calls import bench_cases, shape
from einops import rearrange
from harness import Contest, Provider, compiled, grads_of, need_kernel
from torch import Tensor

from fastvdm.ops._cost import Cost
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_attention_block import linear_attention_block, linear_attention_block_cost
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.reference.linear_attention_block import linear_attention_block_ref

PROVIDERS = ("peer", "torch", "compiled", "parts", "fastvdm")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3"))


def peer_layout(x: Tensor, gamma: Tensor, qkv_w: Tensor, out_w: Tensor, heads: int) -> Tensor:
    """The peer's arithmetic on (B, C, F, H, W): channel norm, '(b f) c h w', 1x1 convolutions."""
    mean = x.mean(1, keepdim=True)
    var = x.var(1, unbiased=False, keepdim=True)
    h = (x - mean) / (var + 1e-5).sqrt() * gamma.view(1, -1, 1, 1, 1)
    h = rearrange(h, "b c f h w -> (b f) c h w")
    q, k, v = torch.nn.functional.conv2d(h, qkv_w[:, :, None, None]).chunk(3, dim=1)
    q, k, v = (rearrange(t, "b (n d) h w -> b n d (h w)", n=heads) for t in (q, k, v))
    q, k = q.softmax(dim=-2) * q.shape[-2] ** -0.5, k.softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    out = torch.einsum("bhde,bhdn->bhen", context, q)
    out = rearrange(out, "b n d (h w) -> b (n d) h w", h=x.shape[3])
    out = torch.nn.functional.conv2d(out, out_w[:, :, None, None])
    return x + rearrange(out, "(b f) c h w -> b c f h w", b=x.shape[0])


def contest(case: str, device: str, train: bool = False) -> Contest:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    s = shape(case, device)
    inner = s.heads * s.head_dim
    raw = (
        torch.randn(s.x_shape),
        1 + 0.1 * torch.randn(s.channels),
        torch.randn(3 * inner, s.channels) * s.channels**-0.5,
        torch.randn(s.channels, inner) * inner**-0.5,
    )
    inputs = tuple(t.to(device, dtype) for t in raw)
    dy = torch.randn(s.x_shape).to(device, dtype)
    info: dict[str, Any] = {}

    def runner(fn: Callable[..., Tensor], args: tuple = inputs) -> Callable[[], Any]:
        if train:
            return grads_of(fn, args, dy.to(args[0].dtype))

        def run() -> Tensor:
            with torch.no_grad():
                return fn(*args)

        return run

    def peer(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor) -> Tensor:
        y = peer_layout(x.permute(0, 4, 1, 2, 3).contiguous(), g, wq, wo, s.heads)
        return y.permute(0, 2, 3, 4, 1)

    def plain(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor) -> Tensor:
        return linear_attention_block_ref(x, g, wq, wo, heads=s.heads)

    def parts(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor) -> Tensor:
        qkv = norm_linear(x, g, wq).unflatten(-1, (3, s.heads, s.head_dim))
        return linear_residual(x, linear_attention(qkv).flatten(-2), wo, None)

    def fused(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor) -> Tensor:
        return linear_attention_block(x, g, wq, wo, heads=s.heads)

    def composed() -> Callable[[], Any]:
        need_kernel("linear_attention", device)
        return runner(parts)

    def ours() -> Callable[[], Any]:
        need_kernel("linear_attention_block", device)
        return runner(fused)

    def reference() -> Any:
        wide = torch.float64 if case == "tiny" else torch.float32
        return runner(plain, tuple(t.to(wide) for t in inputs))()

    def cost(dtype: torch.dtype) -> Cost:
        args = (s.x_shape, s.heads, s.head_dim, dtype.itemsize)
        forward = linear_attention_block_cost(*args)
        if not train:
            return forward
        backward = linear_attention_block_cost(*args, backward=True)
        return Cost(forward.flops + backward.flops, forward.bytes + backward.bytes)

    builds: dict[str, Callable[[], Any]] = {
        "peer": lambda: runner(peer),
        "torch": lambda: runner(plain),
        "compiled": lambda: runner(compiled(plain, info)),
        "parts": composed,
        "fastvdm": ours,
    }
    return Contest(
        reference=reference,
        providers={
            name: Provider(build, 4e-2 if gpu else 1e-4, dtype, info if name == "compiled" else {})
            for name, build in builds.items()
        },
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

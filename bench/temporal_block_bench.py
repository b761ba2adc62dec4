"""temporal_block at the levels of a U-Net: norm, qkv, attention over the frames, out, residual.

Providers: the peer's arithmetic on its layout, from and to ours; plain torch; that compiled; the
block of its fused parts; ours. With the T5 bias and rotary of the peer's network. On a GPU in bf16,
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

from fastvdm.layers.position import rotary_table
from fastvdm.ops import temporal_block as op
from fastvdm.ops._cost import Cost
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_linear import norm_linear
from fastvdm.reference.temporal_block import temporal_block_ref

PROVIDERS = ("peer", "torch", "compiled", "parts", "fastvdm")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3"))


def peer_layout(
    x: Tensor, gamma: Tensor, qkv_w: Tensor, out_w: Tensor, bias: Tensor, rotary: Tensor, heads: int
) -> Tensor:
    """The peer's arithmetic on (B, C, F, H, W): channel norm, 'b (h w) f c' and back."""
    mean = x.mean(1, keepdim=True)
    var = x.var(1, unbiased=False, keepdim=True)
    h = (x - mean) / (var + 1e-5).sqrt() * gamma.view(1, -1, 1, 1, 1)
    h = rearrange(h, "b c f h w -> b (h w) f c")
    q, k, v = (
        rearrange(t, "... f (n d) -> ... n f d", n=heads) for t in (h @ qkv_w.T).chunk(3, dim=-1)
    )
    cos, sin = (t.repeat_interleave(2, dim=-1).to(q.dtype) for t in rotary)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.stack((-t[..., 1::2], t[..., ::2]), dim=-1).flatten(-2)
        return t * cos + turned * sin

    sim = rotate(q * q.shape[-1] ** -0.5) @ rotate(k).mT + bias
    out = (sim - sim.amax(-1, keepdim=True).detach()).softmax(-1) @ v
    out = rearrange(out, "... n f d -> ... f (n d)") @ out_w.T
    return x + rearrange(out, "b (h w) f c -> b c f h w", h=x.shape[3])


def contest(case: str, device: str, train: bool = False) -> Contest:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    s = shape(case, device)
    inner = s.heads * s.head_dim
    x = torch.randn(s.x_shape)
    gamma = 1 + 0.1 * torch.randn(s.channels)
    qkv_w, out_w = torch.randn(3 * inner, s.channels), torch.randn(s.channels, inner)
    bias = torch.randn(s.heads, s.frames, s.frames)
    inputs = tuple(
        t.to(device, dtype) for t in (x, gamma, qkv_w * s.channels**-0.5, out_w * inner**-0.5, bias)
    )
    dy = torch.randn(s.x_shape).to(device, dtype)
    rotary = rotary_table(s.frames, s.head_dim, torch.device(device))
    info: dict[str, Any] = {}

    def runner(fn: Callable[..., Tensor], args: tuple = inputs) -> Callable[[], Any]:
        if train:
            return grads_of(fn, args, dy.to(args[0].dtype))

        def run() -> Tensor:
            with torch.no_grad():
                return fn(*args)

        return run

    def peer(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, b: Tensor) -> Tensor:
        y = peer_layout(x.permute(0, 4, 1, 2, 3).contiguous(), g, wq, wo, b, rotary, s.heads)
        return y.permute(0, 2, 3, 4, 1)

    def plain(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, b: Tensor) -> Tensor:
        return temporal_block_ref(x, g, wq, wo, heads=s.heads, bias=b, rotary=rotary)

    def parts(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, b: Tensor) -> Tensor:
        qkv = norm_linear(x, g, wq).unflatten(-1, (3, s.heads, s.head_dim))
        out = axis_attention(qkv, axis="time", bias=b, rotary=rotary)
        return linear_residual(x, out.flatten(-2), wo)

    def fused(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, b: Tensor) -> Tensor:
        return op.temporal_block(x, g, wq, wo, heads=s.heads, bias=b, rotary=rotary)

    def ours() -> Callable[[], Any]:
        need_kernel("temporal_block", device)
        return runner(fused)

    def composed() -> Callable[[], Any]:
        need_kernel("axis_attention", device)
        return runner(parts)

    def reference() -> Any:
        wide = torch.float64 if case == "tiny" else torch.float32
        return runner(plain, tuple(t.to(wide) for t in inputs))()

    def cost(dtype: torch.dtype) -> Cost:
        args = (s.x_shape, s.heads, s.head_dim, dtype.itemsize)
        forward = op.temporal_block_cost(*args)
        if not train:
            return forward
        backward = op.temporal_block_cost(*args, backward=True)
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

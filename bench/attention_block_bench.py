"""The attention blocks at the levels of a U-Net: norm, qkv, attention, out, residual.

Attention over time has the T5 bias and rotary embedding of the peer's network; linear attention is
over the pixels of a frame. Providers: the peer's arithmetic on its layout, converted from and to
ours; plain torch; the same compiled; the block in parts; ours (on a GPU it is run in parts if no
kernel can hold it). bf16 on a GPU, fp32 on a CPU. Training computes every gradient.
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

from fastvdm.layers.position import rotary_table
from fastvdm.ops.attention_block import AttentionOptions, attention_block
from fastvdm.ops.axis_attention import axis_attention
from fastvdm.ops.linear import linear
from fastvdm.ops.linear_attention import linear_attention
from fastvdm.ops.linear_attention_block import linear_attention_block_cost
from fastvdm.ops.linear_residual import linear_residual
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.temporal_block import temporal_block_cost
from fastvdm.reference.attention_block import attention_block_ref

TESTED = (
    "attention_block",
    "temporal_block",
    "linear_attention_block",
)  # if tests of these fail, nothing is timed
PROVIDERS = ("peer", "torch", "compiled", "parts", "fastvdm")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3"))
CORES = ("time", "linear")


def peer_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """The peer's channel norm of (B, C, F, H, W)."""
    mean = x.mean(1, keepdim=True)
    var = x.var(1, unbiased=False, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt() * gamma.view(1, -1, 1, 1, 1)


def peer_time(
    x: Tensor, gamma: Tensor, qkv_w: Tensor, out_w: Tensor, bias: Tensor, rotary: Tensor, heads: int
) -> Tensor:
    """'b (h w) f c' and back."""
    h = rearrange(peer_norm(x, gamma), "b c f h w -> b (h w) f c")
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


def peer_linear(x: Tensor, gamma: Tensor, qkv_w: Tensor, out_w: Tensor, heads: int) -> Tensor:
    """'(b f) c h w' and 1x1 convolutions."""
    h = rearrange(peer_norm(x, gamma), "b c f h w -> (b f) c h w")
    q, k, v = torch.nn.functional.conv2d(h, qkv_w[:, :, None, None]).chunk(3, dim=1)
    q, k, v = (rearrange(t, "b (n d) h w -> b n d (h w)", n=heads) for t in (q, k, v))
    q, k = q.softmax(dim=-2) * q.shape[-2] ** -0.5, k.softmax(dim=-1)
    context = torch.einsum("bhdn,bhen->bhde", k, v)
    out = torch.einsum("bhde,bhdn->bhen", context, q)
    out = rearrange(out, "b n d (h w) -> b (n d) h w", h=x.shape[3])
    out = torch.nn.functional.conv2d(out, out_w[:, :, None, None])
    return x + rearrange(out, "(b f) c h w -> b c f h w", b=x.shape[0])


def contest(case: str, device: str, core: str, train: bool = False) -> Contest:
    gpu, over_time = device.startswith("cuda"), core == "time"
    dtype = torch.bfloat16 if gpu else torch.float32
    s = shape(case, device)
    raw = [
        torch.randn(s.x_shape),
        1 + 0.1 * torch.randn(s.channels),
        torch.randn(3 * s.inner, s.channels) * s.channels**-0.5,
        torch.randn(s.channels, s.inner) * s.inner**-0.5,
    ]
    if over_time:
        raw.append(torch.randn(s.heads, s.frames, s.frames))  # the bias
    inputs = [t.to(device, dtype) for t in raw]
    dy = torch.randn(s.x_shape).to(device, dtype) if train else None
    rotary = rotary_table(s.frames, s.head_dim, torch.device(device))
    info: dict[str, Any] = {}

    def options(bias: tuple[Tensor, ...]) -> dict[str, Any]:
        return dict(bias=bias[0], rotary=rotary) if over_time else {}

    def peer(x: Tensor, *weights: Tensor) -> Tensor:
        x = x.permute(0, 4, 1, 2, 3).contiguous()
        if over_time:
            return peer_time(x, *weights, rotary, s.heads).permute(0, 2, 3, 4, 1)
        return peer_linear(x, *weights, s.heads).permute(0, 2, 3, 4, 1)

    def plain(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, *bias: Tensor) -> Tensor:
        return attention_block_ref(x, g, wq, wo, core=core, heads=s.heads, **options(bias))

    def parts(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, *bias: Tensor) -> Tensor:
        normed = norm_act(x, g, kind="layer", act=False)
        qkv = linear(normed, wq).unflatten(-1, (3, s.heads, s.head_dim))
        if over_time:
            out = axis_attention(qkv, axis="time", **options(bias))
        else:
            out = linear_attention(qkv)
        return linear_residual(x, out.flatten(-2), wo)

    def fused(x: Tensor, g: Tensor, wq: Tensor, wo: Tensor, *bias: Tensor) -> Tensor:
        given = AttentionOptions(**options(bias))
        return attention_block(x, g, wq, wo, core=core, heads=s.heads, options=given)

    def with_kernel(op: str, fn: Callable[..., Tensor]) -> Callable[[], Any]:
        need_kernel(op, device)
        return runner(fn, inputs, dy)

    attention = "axis_attention" if over_time else "linear_attention"
    builds: dict[str, Callable[[], Any]] = {
        "peer": lambda: runner(peer, inputs, dy),
        "torch": lambda: runner(plain, inputs, dy),
        "compiled": lambda: runner(compiled(plain, info), inputs, dy),
        "parts": lambda: with_kernel(attention, parts),
        "fastvdm": lambda: with_kernel("attention_block", fused),
    }
    wide = torch.float64 if case == "tiny" else torch.float32
    cost = temporal_block_cost if over_time else linear_attention_block_cost
    return Contest(
        reference=lambda: runner(plain, [t.to(wide) for t in inputs], dy)(),
        providers={
            name: Provider(build, 4e-2 if gpu else 1e-4, dtype, info if name == "compiled" else {})
            for name, build in builds.items()
        },
        cost=lambda dtype: cost_of(
            cost, s.x_shape, s.heads, s.head_dim, dtype.itemsize, train=train
        ),
        device=device,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", CASES)
def test_forward(race, case, core, provider):
    race(contest, case, provider, core=core)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", CASES)
def test_training(race, case, core, provider):
    race(contest, case, provider, core=core, train=True)

"""axis_attention at the levels of a U-Net: the core from packed qkv to out, forward and training.

Every provider starts from the packed (B, F, H, W, 3, heads, D) that one projection writes and ends
in (B, F, H, W, heads, D), so it pays for the permutes that it needs. Providers: the peer's einsum;
SDPA (its own choice and, on a GPU, each of its backends); compiled FlexAttention with the bias in
score_mod; xformers' memory-efficient attention with a bias tensor; ours. Training includes the
gradient of the bias. bf16 on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import bench_cases, shape
from einops import rearrange
from harness import Contest, Provider, Unavailable, compiled, cost_of, need_kernel, runner
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastvdm.ops._cost import Cost
from fastvdm.ops.axis_attention import axis_attention, axis_attention_cost
from fastvdm.reference.axis_attention import axis_attention_ref

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PROVIDERS = ("peer", "sdpa", *SDPA, "flex", "xformers", "fastvdm")
CASES = bench_cases("tiny", "l2", "ucf-8", full=("l0", "l1", "ucf-32", "ucf-16", "t2v128-32"))
KINDS = ("time", "time+bias", "space", "space+bias")

_TO_HEADS = {
    "time": "b f h w three n d -> three (b h w) n f d",
    "space": "b f h w three n d -> three (b f) n (h w) d",
}
_BACK = {
    "time": "(b h w) n f d -> b f h w n d",
    "space": "(b f) n (h w) d -> b f h w n d",
}

Core = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def on_heads(core: Core, axis: str, contiguous: bool = False) -> Callable[..., Tensor]:
    """Run ``core`` on (batch, heads, N, D), between the permutes that it needs."""

    def run(qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        b, f, h, w = qkv.shape[:4]
        parts = rearrange(qkv, _TO_HEADS[axis]).unbind(0)
        q, k, v = (t.contiguous() for t in parts) if contiguous else parts
        return rearrange(core(q, k, v, bias), _BACK[axis], b=b, f=f, h=h, w=w)

    return run


def einsum(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """As in the peer's ``Attention``."""
    sim = torch.einsum("bnid,bnjd->bnij", q * q.shape[-1] ** -0.5, k)
    sim = sim if bias is None else sim + bias
    sim = sim - sim.amax(dim=-1, keepdim=True).detach()
    return torch.einsum("bnij,bnjd->bnid", sim.softmax(dim=-1), v)


def sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def one_sdpa(backend: SDPBackend) -> Core:
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, bias)

    return run


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    if bias is None:
        return flex_attention(q, k, v)

    def add(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[head, i, j]

    return flex_attention(q, k, v, score_mod=add)


def xformers(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    full = None if bias is None else bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return memory_efficient_attention(q, k, v, attn_bias=full).transpose(1, 2)


def contest(case: str, device: str, kind: str, train: bool = False) -> Contest:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    axis, _, with_bias = kind.partition("+")
    s = shape(case, device)
    n = s.frames if axis == "time" else s.height * s.width
    qkv = torch.randn(s.qkv_shape).to(device, dtype)
    bias = torch.randn(s.heads, n, n).to(device, dtype) if with_bias else None
    dy = torch.randn(*s.qkv_shape[:4], s.heads, s.head_dim).to(device, dtype) if train else None
    inputs = (qkv, bias)
    info: dict[str, Any] = {}

    def backend(which: SDPBackend) -> Callable[[], Any]:
        if not gpu and which != SDPBackend.MATH:
            raise Unavailable("a CUDA backend")
        run = runner(on_heads(one_sdpa(which), axis), inputs, dy)
        try:
            run()
        except RuntimeError as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        return run

    def flexed() -> Callable[[], Any]:
        if not gpu:
            raise Unavailable("FlexAttention has no backward on a CPU")
        return runner(compiled(on_heads(flex, axis, contiguous=True), info), inputs, dy)

    def with_xformers() -> Callable[[], Any]:
        if not gpu:
            raise Unavailable("xformers needs a GPU")
        return runner(on_heads(xformers, axis), inputs, dy)

    def ours() -> Callable[[], Any]:
        need_kernel("axis_attention", device)
        return runner(lambda x, b: axis_attention(x, axis=axis, bias=b), inputs, dy)

    def reference() -> Any:
        wide = torch.float64 if case == "tiny" else torch.float32
        given = [None if t is None else t.to(wide) for t in inputs]
        return runner(lambda x, b: axis_attention_ref(x, axis=axis, bias=b), given, dy)()

    builds: dict[str, Callable[[], Any]] = {
        "peer": lambda: runner(on_heads(einsum, axis), inputs, dy),
        "sdpa": lambda: runner(on_heads(sdpa, axis), inputs, dy),
        **{name: lambda which=which: backend(which) for name, which in SDPA.items()},
        "flex": flexed,
        "xformers": with_xformers,
        "fastvdm": ours,
    }

    def cost(dtype: torch.dtype) -> Cost:
        args = (s.qkv_shape, dtype.itemsize, axis)
        return cost_of(axis_attention_cost, *args, bias=bias is not None, train=train)

    return Contest(
        reference=reference,
        providers={
            name: Provider(build, 4e-2 if gpu else 1e-4, dtype, info if name == "flex" else {})
            for name, build in builds.items()
        },
        cost=cost,
        device=device,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_forward(race, case, kind, provider):
    race(contest, case, provider, kind=kind)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_training(race, case, kind, provider):
    race(contest, case, provider, kind=kind, train=True)

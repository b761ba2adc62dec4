"""Convolution with GroupNorm and what follows: the norm alone, the fused op, a residual block.

Providers: the peer's way (Conv3d 1x3x3 and GroupNorm on (B, C, F, H, W)) in NCDHW and in
channels_last_3d; Conv2d in channels_last on B*F images with GroupNorm on a view; all eager, the
last one and NCDHW also compiled; ours as dispatched. bf16 on a GPU, fp32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import Shape, bench_cases, shape
from harness import Contest, Provider, compiled, runner
from torch import Tensor

from fastvdm.ops._cost import Cost
from fastvdm.ops.conv_group_norm import conv_group_norm, norm_act
from fastvdm.ops.norm_act import norm_act_cost
from fastvdm.ops.space_conv import space_conv_cost

PROVIDERS = ("conv3d", "conv3d-cl", "conv2d-cl", "conv3d-compiled", "conv2d-cl-compiled", "fastvdm")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3"))
Inputs = Sequence[Tensor]


def make_inputs(s: Shape, part: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """x; then weight, bias, norm weight, norm bias, scale, shift of each op; the norm alone has no
    convolution."""
    c = s.channels

    def make(*dims: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(dims)).to(device, dtype)

    inputs = [make(*s.x_shape)]
    for _ in range(2 if part == "block" else 1):
        if part != "norm":
            weight = make(c, c, 3, 3, gain=(9 * c) ** -0.5)
            inputs += [weight.contiguous(memory_format=torch.channels_last), make(c)]
        inputs += [make(c), make(c), make(s.batch, c), make(s.batch, c)]
    return inputs


def ours(part: str, groups: int) -> Callable[..., Tensor]:
    def norm(x: Tensor, g: Tensor, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return norm_act(x, g, h, kind="group", groups=groups, scale=scale, shift=shift, residual=x)

    def fused(x: Tensor, *p: Tensor, residual: Tensor | None = None) -> Tensor:
        w, b, g, h, scale, shift = p
        residual = x if residual is None else residual
        return conv_group_norm(
            x, w, b, g, h, groups=groups, scale=scale, shift=shift, residual=residual
        )

    def block(x: Tensor, *p: Tensor) -> Tensor:
        return fused(fused(x, *p[:6]), *p[6:], residual=x)

    return {"norm": norm, "fused": fused, "block": block}[part]


def theirs(part: str, groups: int, axes: int) -> Callable[..., Tensor]:
    """The same in torch, on (B, C, F, H, W) (``axes`` 3) or, through views, on (B*F, C, H, W)."""

    def norm(x: Tensor, *p: Tensor, residual: Tensor | None = None) -> Tensor:
        g, h, scale, shift = p
        residual = x if residual is None else residual
        if axes == 3:
            y = F.group_norm(x, groups, g, h)
            scale, shift = (t[:, :, None, None, None] for t in (scale, shift))
        else:
            b, f, height, width, c = x.shape
            y = F.group_norm(x.reshape(b, -1, width, c).permute(0, 3, 1, 2), groups, g, h)
            y = y.permute(0, 2, 3, 1).reshape(x.shape)
            scale, shift = (t[:, None, None, None] for t in (scale, shift))
        return F.silu(y * (1 + scale) + shift) + residual

    def fused(x: Tensor, *p: Tensor, residual: Tensor | None = None) -> Tensor:
        residual = x if residual is None else residual
        if axes == 3:
            y = F.conv3d(x, p[0], p[1], padding=(0, 1, 1))
        else:
            y = F.conv2d(x.flatten(0, 1).permute(0, 3, 1, 2), p[0], p[1], padding=1)
            y = y.permute(0, 2, 3, 1).reshape(x.shape)
        return norm(y, *p[2:], residual=residual)

    def block(x: Tensor, *p: Tensor) -> Tensor:
        return fused(fused(x, *p[:6]), *p[6:], residual=x)

    return {"norm": norm, "fused": fused, "block": block}[part]


def to_3d(inputs: Inputs, memory_format: torch.memory_format) -> list[Tensor]:
    """(B, F, H, W, C) → (B, C, F, H, W) and 3x3 kernels → 1x3x3, in the given memory format."""
    moved = []
    for t in inputs:
        if t.ndim == 5:
            moved.append(t.permute(0, 4, 1, 2, 3).contiguous(memory_format=memory_format))
        elif t.ndim == 4:
            moved.append(t.unsqueeze(2).contiguous(memory_format=memory_format))
        else:
            moved.append(t)
    return moved


def from_3d(t: Tensor) -> Tensor:
    if t.ndim != 5:
        return t
    return t.squeeze(2) if t.shape[2:] == (1, 3, 3) else t.permute(0, 2, 3, 4, 1)


def cost(s: Shape, part: str, dtype: torch.dtype, train: bool) -> list[Cost]:
    """One ``Cost`` per launch; at best, statistics come from the convolution's epilogue."""
    x = torch.empty(s.x_shape, dtype=dtype, device="meta")
    given = part != "norm"
    costs = [norm_act_cost(x, kind="group", stats=given, residual=True)]
    if train:
        costs.append(norm_act_cost(x, kind="group", backward=True))
    if part != "norm":
        c = s.channels
        one = space_conv_cost(s.x_shape, (c, c, 3, 3), itemsize=dtype.itemsize)
        costs += [one] * (3 if train else 1)
    return costs * (2 if part == "block" else 1)


def contest(case: str, device: str, part: str, train: bool = False) -> Contest:
    s, gpu = shape(case, device), device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    inputs = make_inputs(s, part, device, dtype)
    dy = torch.randn(s.x_shape).to(device, dtype) if train else None
    infos: dict[str, dict[str, Any]] = {"conv3d-compiled": {}, "conv2d-cl-compiled": {}}

    def three(memory_format: torch.memory_format, info: dict[str, Any] | None = None) -> Any:
        fn = theirs(part, s.groups, 3)
        given, seed = to_3d(inputs, memory_format), None
        if dy is not None:
            (seed,) = to_3d([dy], memory_format)
        run = runner(fn if info is None else compiled(fn, info, dynamic=False), given, seed)

        def back() -> Any:
            out = run()
            return from_3d(out) if isinstance(out, Tensor) else [from_3d(t) for t in out]

        return back

    def two(info: dict[str, Any] | None = None) -> Callable[[], Any]:
        fn = theirs(part, s.groups, 2)
        return runner(fn if info is None else compiled(fn, info, dynamic=False), inputs, dy)

    builds: dict[str, Callable[[], Callable[[], Any]]] = {
        "conv3d": lambda: three(torch.contiguous_format),
        "conv3d-cl": lambda: three(torch.channels_last_3d),
        "conv2d-cl": two,
        "conv3d-compiled": lambda: three(torch.contiguous_format, infos["conv3d-compiled"]),
        "conv2d-cl-compiled": lambda: two(infos["conv2d-cl-compiled"]),
        "fastvdm": lambda: runner(ours(part, s.groups), inputs, dy),
    }
    tolerance = (6e-2 if train else 3e-2) if gpu else 1e-4

    def reference() -> Any:  # fp64 at the largest levels takes minutes on two cores
        wide = torch.float64 if gpu or case == "tiny" else torch.float32
        given = [t.to(wide) for t in inputs]
        return runner(theirs(part, s.groups, 2), given, dy)()

    return Contest(
        reference=reference,
        providers={
            name: Provider(build, tolerance, dtype, infos.get(name, {}))
            for name, build in builds.items()
        },
        cost=lambda dtype: cost(s, part, dtype, train),
        device=device,
    )


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_norm(race, case, provider):
    race(contest, case, provider, part="norm")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_norm_training(race, case, provider):
    race(contest, case, provider, part="norm", train=True)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_fused(race, case, provider):
    race(contest, case, provider, part="fused")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_block(race, case, provider):
    race(contest, case, provider, part="block")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES)
def test_block_training(race, case, provider):
    race(contest, case, provider, part="block", train=True)

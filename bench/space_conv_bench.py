"""The convolutions of a U-Net level, forward and with gradients.

Providers: three ways to write a 1x3x3 convolution in PyTorch (Conv3d as in the peer, Conv3d in
channels_last_3d, Conv2d in channels_last on B*F images), each with bias and residual; ours as
dispatched; ours by the Triton kernel, on a GPU, a measurement that the dispatch still needs. bf16
on a GPU with cudnn.benchmark, fp32 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import bench_cases, shape
from harness import Contest, Provider, Unavailable, compiled, runner
from torch import Tensor

from fastvdm import use_backend
from fastvdm.ops._cost import Cost
from fastvdm.ops.space_conv import (
    space_conv,
    space_conv_cost,
    space_conv_transpose,
    space_conv_transpose_cost,
)
from fastvdm.reference.space_conv import space_conv_ref, space_conv_transpose_ref
from fastvdm.runtime import dispatch

PROVIDERS = ("conv3d", "conv3d-cl", "conv2d-cl", "conv2d-cl-compiled", "fastvdm", "fastvdm-triton")
CASES = bench_cases("tiny", "l1", full=("l0", "l2", "l3", "ucf-32"))
KINDS = ("3x3", "1x1", "pair", "upsample", "down", "transpose")


@dataclass(frozen=True)
class Job:
    """One convolution of a level: its inputs and the options of ``space_conv``."""

    inputs: tuple[Tensor | None, ...]  # x, weight, bias, x2, residual; channels last
    options: dict[str, Any]
    transposed: bool = False

    @property
    def stride(self) -> int:
        return self.options.get("stride", 1)


def make_job(case: str, kind: str, device: str, dtype: torch.dtype) -> Job:
    s = shape(case, device)
    c, size = s.channels, (s.height, s.width)
    kernel = {"1x1": 1, "down": 4, "transpose": 4}.get(kind, 3)
    scale = {"upsample": 2, "transpose": 2, "down": 0.5}.get(kind, 1)
    wide = 2 * c if kind == "pair" else c

    def make(*dims: int, gain: float = 1.0) -> Tensor:
        return (gain * torch.randn(dims)).to(device, dtype)

    weight = make(c, wide, kernel, kernel, gain=(wide * kernel**2) ** -0.5)
    out = (*s.x_shape[:2], *(int(n * scale) for n in size), c)
    inputs = (
        make(*s.x_shape),
        weight.contiguous(memory_format=torch.channels_last),
        make(c),
        make(*s.x_shape) if kind == "pair" else None,
        make(*out) if kind in ("3x3", "1x1", "pair") else None,
    )
    options = {"down": {"stride": 2}, "upsample": {"upsample": "nearest"}}.get(kind, {})
    return Job(inputs, options, kind == "transpose")


def ours(job: Job, backend: str = "auto") -> Callable[..., Tensor]:
    def run(
        x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        with use_backend(backend):
            if job.transposed:
                return space_conv_transpose(x, weight, bias)
            return space_conv(x, weight, bias, x2=x2, residual=residual, **job.options)

    return run


def conv2d(job: Job) -> Callable[..., Tensor]:
    def run(
        x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        if job.transposed:
            return space_conv_transpose_ref(x, weight, bias)
        return space_conv_ref(
            x, weight, bias, x2, job.stride, residual, job.options.get("upsample")
        )

    return run


def conv3d(job: Job) -> Callable[..., Tensor]:
    """As in the peer; inputs (B, C, F, H, W) and weights (., ., 1, k, k)."""

    def run(
        x: Tensor, weight: Tensor, bias: Tensor, x2: Tensor | None, residual: Tensor | None
    ) -> Tensor:
        kernel = weight.shape[-1]
        pad = (0, *(kernel // 2 - 1 + kernel % 2,) * 2)
        if job.transposed:
            return F.conv_transpose3d(x, weight, bias, stride=(1, 2, 2), padding=pad)
        if x2 is not None:
            x = torch.cat([x, x2], dim=1)
        if "upsample" in job.options:
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        y = F.conv3d(x, weight, bias, stride=(1, job.stride, job.stride), padding=pad)
        return y if residual is None else y + residual

    return run


def to_conv3d(
    inputs: Sequence[Tensor | None], memory_format: torch.memory_format
) -> list[Tensor | None]:
    """The inputs of ``ours`` converted for ``conv3d``, in the given memory format."""
    moved = []
    for t in inputs:
        if t is None or t.ndim == 1:
            moved.append(t)
        else:
            t = t.permute(0, 4, 1, 2, 3) if t.ndim == 5 else t.unsqueeze(2)
            moved.append(t.contiguous(memory_format=memory_format))
    return moved


def back(y: Tensor | Sequence[Tensor]) -> Any:
    """The result of ``conv3d`` in the form of ``ours``: views. A weight's fifth axis is 1."""
    if not isinstance(y, Tensor):
        return [back(t) for t in y]
    if y.ndim < 5:
        return y
    return y.squeeze(2) if y.shape[2:5] in WEIGHTS else y.permute(0, 2, 3, 4, 1)


WEIGHTS = [torch.Size([1, k, k]) for k in (1, 3, 4)]


def cost(case: str, kind: str, device: str, dtype: torch.dtype, passes: int) -> Cost:
    job = make_job(case, kind, "meta", dtype)
    x, weight, _, x2, residual = job.inputs
    dims = (*x.shape[:-1], x.shape[-1] * (1 if x2 is None else 2))
    dims = shape(case, device).batch, *dims[1:]
    if job.transposed:
        one = space_conv_transpose_cost(dims, weight.shape, itemsize=dtype.itemsize)
    else:
        one = space_conv_cost(
            dims, weight.shape, residual=residual is not None, itemsize=dtype.itemsize,
            **job.options,
        )  # fmt: skip
    return Cost(passes * one.flops, passes * one.bytes)


def contest(case: str, device: str, kind: str, train: bool = False) -> Contest:
    gpu = device.startswith("cuda")
    dtype = torch.bfloat16 if gpu else torch.float32
    torch.backends.cudnn.benchmark = gpu
    job = make_job(case, kind, device, dtype)
    info: dict[str, Any] = {}
    dy = None
    if train:
        with torch.no_grad():
            dy = torch.randn_like(conv2d(job)(*job.inputs))

    def three(memory_format: torch.memory_format) -> Callable[[], Any]:
        inputs = to_conv3d(job.inputs, memory_format)
        run = runner(conv3d(job), inputs, *to_conv3d([dy], memory_format))
        return lambda: back(run())

    def triton() -> Callable[[], Any]:
        if not gpu or (off := dispatch.explain("space_conv")["triton"]):
            raise Unavailable(off if gpu else "the Triton kernel runs on a GPU")
        return runner(ours(job, "triton"), job.inputs, dy)

    tolerance = 3e-2 if gpu else 1e-4
    builds = {
        "conv3d": lambda: three(torch.contiguous_format),
        "conv3d-cl": lambda: three(torch.channels_last_3d),
        "conv2d-cl": lambda: runner(conv2d(job), job.inputs, dy),
        "conv2d-cl-compiled": lambda: runner(compiled(conv2d(job), info), job.inputs, dy),
        "fastvdm": lambda: runner(ours(job), job.inputs, dy),
        "fastvdm-triton": triton,
    }

    def reference() -> Any:  # fp64 at the largest levels takes minutes on two cores
        wide = torch.float64 if gpu or case == "tiny" else torch.float32
        return runner(conv2d(job), [None if t is None else t.to(wide) for t in job.inputs], dy)()

    return Contest(
        reference=reference,
        providers={
            name: Provider(build, tolerance, dtype, info if "compiled" in name else {})
            for name, build in builds.items()
        },
        cost=lambda dtype: cost(case, kind, device, dtype, 3 if train else 1),
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

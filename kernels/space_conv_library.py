"""``space_conv`` by torch's own kernels (cuDNN, oneDNN, BLAS); the launchers are named as Triton's.

All of them take channels-last views of (B, F, H, W, C), so no layout is ever converted. 16-bit
types that a CPU can only emulate are computed in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvdm.runtime.extension import emulated


def padding_of(kernel: int) -> int:
    return kernel // 2 if kernel % 2 else kernel // 2 - 1


def images(x: Tensor) -> Tensor:
    """View (B, F, H, W, C) as (B*F, C, H, W) in channels_last."""
    return x.flatten(0, 1).permute(0, 3, 1, 2)


def video(y: Tensor, x: Tensor) -> Tensor:
    """View (B*F, C, H, W) in channels_last as (B, F, H, W, C) with B and F of x. It is a copy only
    if the library returned another layout, which it may for C == 1."""
    y = y.permute(0, 2, 3, 1).contiguous()
    return y.view(*x.shape[:2], *y.shape[1:])


def like(t: Tensor, pattern: Tensor) -> Tensor:
    """``t`` with the strides of ``torch.empty_like(pattern)``, which the fakes promise."""
    out = torch.empty_like(pattern)
    return t if t.stride() == out.stride() and t.dtype == out.dtype else out.copy_(t)


def _in_fp32(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in fp32 if the machine only emulates the dtype of the first argument. The first
    result has that dtype too."""

    def cast(t: Any, wrong: torch.dtype, right: torch.dtype) -> Any:
        return t.to(right) if isinstance(t, Tensor) and t.dtype == wrong else t

    @functools.wraps(launcher)
    def call(x: Tensor, *rest: Any) -> Any:
        if not emulated(x.device, x.dtype):
            return launcher(x, *rest)
        with torch.autocast("cpu", enabled=False):
            found = launcher(*(cast(t, x.dtype, torch.float32) for t in (x, *rest)))
        if isinstance(found, Tensor):
            return found.to(x.dtype)
        return cast(found[0], torch.float32, x.dtype), *found[1:]  # see ``like``

    return call


def adds_bias_apart(x: Tensor, kernel: int) -> bool:
    """Whether the bias of a convolution takes an extra pass. On CUDA a 1x1 convolution of stride 1
    is a GEMM, whose epilogue adds it. For larger kernels cuDNN would add it in an unvectorised pass
    (sgl-project/sglang#38650), so it gets none, and a norm that follows adds it as ``x_bias``."""
    return x.is_cuda and kernel > 1


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """One-source convolution, differentiable through torch's own autograd.

    On CUDA a 1x1 is a GEMM. On a CPU oneDNN's convolution takes both, with the bias: F.linear takes
    1.1-3.4x its time for a 1x1 with bias (forward, 64-1024 channels, fp32 and bf16; 0.8-1.3x with
    gradients; Xeon, one thread, 2026-11).
    """
    kernel = weight.shape[-1]
    if x.is_cuda and kernel == 1 and stride == 1:
        return F.linear(x, weight.flatten(1), bias)
    inside = None if adds_bias_apart(x, kernel) else bias
    y = F.conv2d(images(x), weight, inside, stride=stride, padding=padding_of(kernel))
    y = video(y, x)
    return y if bias is None or inside is not None else y + bias.to(y.dtype)


def conv_transpose2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """4x4, stride 2, padding 1; differentiable through torch's own autograd."""
    inside = None if adds_bias_apart(x, weight.shape[-1]) else bias
    y = video(F.conv_transpose2d(images(x), weight, inside, stride=2, padding=1), x)
    return y if bias is None or inside is not None else y + bias.to(y.dtype)


def _traced() -> bool:
    """Whether ``fastvdm.export`` is tracing this into a functional graph."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


@_in_fp32
def space_conv_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
) -> Tensor:
    """With two sources a 1x1 adds a second GEMM to the first. A larger kernel concatenates: this
    takes 0.95-1.1x the time of two convolutions (Xeon, one thread, fp32, 64-256 channels), rounds
    once instead of three times, and the copy is not kept."""
    if x2 is None:
        y = conv2d(x, weight, bias, stride)
    elif weight.shape[-1] == 1 and stride == 1:
        c1 = x.shape[-1]
        y = conv2d(x, weight[:, :c1], bias, stride)
        rows, flat = x2.reshape(-1, x2.shape[-1]), weight[:, c1:].flatten(1)
        flat_y = y.view(-1, y.shape[-1])
        if _traced():
            y = torch.addmm(flat_y, rows, flat.t()).view(y.shape)
        else:  # cuBLAS adds in place; otherwise it would add into a copy
            flat_y.addmm_(rows, flat.t())
    else:
        y = conv2d(torch.cat([x, x2], dim=-1), weight, bias, stride)
    return y if residual is None else y + residual


def _beside(dy: Tensor, weight: Tensor, values: bool = True) -> Tensor:
    """The weight in the dtype of dy; without its values if only its shape is needed."""
    if weight.dtype == dy.dtype:
        return weight
    return weight.to(dy.dtype) if values else torch.empty_like(weight, dtype=dy.dtype)


@_in_fp32
def _source_grads(
    dy: Tensor, x: Tensor, weight: Tensor, stride: int, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_dx or need_dw):
        return None, None
    if weight.shape[-1] == 1 and stride == 1:
        rows = dy.flatten(0, -2)
        dx = dy @ _beside(dy, weight).flatten(1) if need_dx else None
        dw = (rows.t() @ x.flatten(0, -2))[:, :, None, None] if need_dw else None
        return dx, dw
    pad = padding_of(weight.shape[-1])
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *(images(dy), images(x), _beside(dy, weight, need_dx)),
        *(None, [stride] * 2, [pad] * 2, [1, 1]),
        *(False, [0, 0], 1, [need_dx, need_dw, False]),
    )
    return (video(dx, x) if need_dx else None), dw


def space_conv_bwd(
    dy: Tensor,
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    stride: int,
    need_dx: bool,
    need_dx2: bool,
    need_dw: bool,
    need_db: bool,
    dx_of: Callable[[Tensor, Tensor], Tensor] | None = None,
    dw_of: Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Each source is handled with its own slice of the weight: no concatenation, contiguous
    gradients. ``dx_of(dy, weight)`` may be another backend's gradient of a source, and
    ``dw_of(dy, x, x2, weight)`` that of the weight, which may be fp32 with 16-bit tensors."""
    c1 = x.shape[-1]
    whole = dw_of(dy, x, x2, weight) if dw_of is not None and need_dw else None
    by_source = need_dw and whole is None

    def grads(
        source: Tensor, part: Tensor, need_source: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        if dx_of is None or not need_source:
            return _source_grads(dy, source, part, stride, need_source, by_source)
        return dx_of(dy, part), _source_grads(dy, source, part, stride, False, by_source)[1]

    dx, dw = grads(x, weight[:, :c1], need_dx)
    dx2 = None
    if x2 is not None:
        dx2, dw2 = grads(x2, weight[:, c1:], need_dx2)
        dw = torch.cat([dw, dw2], dim=1) if dw is not None and dw2 is not None else None
    dw = whole if whole is not None else dw
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0) if dx2 is None else dx2,
        dy.new_empty(0) if dw is None else like(dw, weight),
        dy.flatten(0, -2).sum(0) if need_db else dy.new_empty(0),
    )


@_in_fp32
def space_conv_transpose_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    y = conv_transpose2d(x, weight, bias)
    return y if residual is None else y + residual


@_in_fp32
def _transpose_grads(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_dx or need_dw):
        return None, None
    dx, dw, _ = torch.ops.aten.convolution_backward(
        *(images(dy), images(x), _beside(dy, weight, need_dx), None, [2, 2], [1, 1], [1, 1]),
        *(True, [0, 0], 1, [need_dx, need_dw, False]),
    )
    return (video(dx, x) if need_dx else None), dw


def space_conv_transpose_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dw = _transpose_grads(dy, x, weight, need_dx, need_dw)
    return (
        dy.new_empty(0) if dx is None else dx,
        dy.new_empty(0) if dw is None else like(dw, weight),
        dy.flatten(0, -2).sum(0) if need_db else dy.new_empty(0),
    )

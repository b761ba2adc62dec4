"""The operators of ``space_conv``, their gradients, and which implementation takes a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvdm.kernels import space_conv_library as library
from fastvdm.ops._call import launcher
from fastvdm.ops._op import backward_of, op
from fastvdm.runtime.device import INTERPRETED
from fastvdm.runtime.dispatch import ByDefault, ByDesign, ByName, Implementations, implementations
from fastvdm.runtime.extension import AMX, emulated

# --- ops -----------------------------------------------------------------------------------------


def out_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    batch, frames, height, width, _ = x.shape
    kernel = weight.shape[-1]
    pad = library.padding_of(kernel)
    height, width = ((n + 2 * pad - kernel) // stride + 1 for n in (height, width))
    return batch, frames, height, width, weight.shape[0]


def _dx_of(x: Tensor, weight: Tensor, stride: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The C++ kernel for the gradient of x, given dy and the weight of its channels, or None."""
    kernel = weight.shape[-1]
    if kernel == 3 and stride == 1:
        return launcher("space_conv", "space_conv_dx", "cpu")
    if kernel == 1 and stride == 1:
        conv = launcher("space_conv", "space_conv_fwd", "cpu")
        return lambda dy, part: conv(dy, None, part.transpose(0, 1), None, None, 1)
    # With an odd size no output depends on the last row or column.
    if (kernel, stride) != (4, 2) or x.shape[2] % 2 or x.shape[3] % 2:
        return None
    up = launcher("space_conv_transpose", "space_conv_transpose_fwd", "cpu")
    return lambda dy, part: up(dy, part, None, None)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """In C++ the kernels are Winograd's. With few input channels the library computes the gradient
    of the weight: it takes 0.4-0.7x their time for 4 channels, 0.6-1.2x for 8, 0.9-2.2x for 16,
    1.6-3.9x for 64 and more (one thread of an EPYC Zen 4, fp32 and bf16, torch 2.13, November
    2026)."""
    *given, backend = args
    if backend == "cpu":
        _, x, _, weight, stride, *_ = args
        given.append(_dx_of(x, weight, stride))
        if weight.shape[-1] == 3 and stride == 1 and weight.shape[1] >= 16:
            given.append(launcher("space_conv", "space_conv_dw", "cpu"))
        return library.space_conv_bwd(*given)
    return launcher("space_conv", "space_conv_bwd", backend)(*given)


@op(
    "space_conv",
    backward="dy x x2 weight stride",
    grads="x:dx x2:dx2 weight:dw bias:db",
    residual="residual",
    strided="weight",
    laid_out="weight",
    backward_body=_backward,
)
def space_conv_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    backend: str,
) -> Tensor:
    """y, contiguous. The inputs are contiguous except the weight; its gradient has its strides. In
    C++ the weight may be fp32 with 16-bit inputs; its gradient then is fp32 too."""
    return x.new_empty(out_shape(x, weight, stride))


space_conv_bwd = backward_of(space_conv_fwd)


@op(
    "space_conv",
    outputs="y mean rstd",
    backward="dy x x2 weight stride",
    grads="x:dx x2:dx2 weight:dw bias:db",
    residual="residual",
    strided="weight",
    shares=space_conv_bwd,
)
def space_conv_stats_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    groups: int,
    per_frame: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd). The op that consumes the statistics differentiates through them."""
    y = x.new_empty(out_shape(x, weight, stride))
    shape = (x.shape[0] * (x.shape[1] if per_frame else 1), groups)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


def _transpose_backward(*args: Any) -> tuple[Tensor, ...]:
    """In C++: a convolution of stride 2 for the gradient of x; the library for the weight's."""
    *given, backend = args
    if backend == "cpu":
        dy, x, weight, need_dx, need_dw, need_db = given
        _, *others = library.space_conv_transpose_bwd(dy, x, weight, False, need_dw, need_db)
        conv = launcher("space_conv", "space_conv_fwd", "cpu")
        return conv(dy, None, weight, None, None, 2) if need_dx else dy.new_empty(0), *others
    return launcher("space_conv", "space_conv_transpose_bwd", backend)(*given)


@op(
    "space_conv",
    backward="dy x weight",
    grads="x:dx weight:dw bias:db",
    residual="residual",
    strided="weight",
    laid_out="weight",
    backward_body=_transpose_backward,
)
def space_conv_transpose_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str
) -> Tensor:
    batch, frames, height, width, _ = x.shape
    return x.new_empty(batch, frames, 2 * height, 2 * width, weight.shape[1])


space_conv_transpose_bwd = backward_of(space_conv_transpose_fwd)

# --- which implementation ------------------------------------------------------------------------


def _by_triton(x: Tensor, kernel: int, dtype: torch.dtype) -> str:
    """Why the Triton kernels do not take this call, with products in ``dtype``, by default."""
    if dtype == torch.bfloat16 and INTERPRETED:
        return ByDefault("the Triton interpreter truncates bf16")
    if max(x.shape[2] * x.shape[3], kernel * x.shape[3] * x.shape[4]) >= 2**31:
        return ByDefault(f"images of {tuple(x.shape[2:])}; offsets inside one are int32")
    return ByName("not measured against cuDNN: it has not run on a GPU")


_ONE_CALL = "one call of torch's own does it"


def _examples(device: torch.device) -> dict[str, tuple]:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    x = torch.empty(1, 1, 8, 8, 8, device=device)
    return {
        f"{kernel}x{kernel} at stride {stride} in {name}": (x, kernel, stride, False, dtype)
        for kernel, stride in ((1, 1), (3, 1), (4, 2))  # what the networks have
        for name, dtype in types.items()
    }


@implementations(
    "space_conv", "space_conv_fwd", "space_conv_dx", "space_conv_dw", examples=_examples
)
def _(x: Tensor, kernel: int, stride: int, pair: bool, dtype: torch.dtype) -> Implementations:
    """ "library" is a composition behind our op; "torch" is one call under torch's autograd.

    A pair of sources keeps no concatenated copy for the backward and takes 0.95-1.1x the time of
    one call (forward, 16 frames of 8x8 to 32x32; Xeon with AVX-512, one thread, torch 2.13,
    November 2026). The C++ kernel of a 4x4 takes 0.8-1.05x the time of oneDNN, which copies its
    weight every time, and 0.9-1.05x for a pair (EPYC Zen 4, AVX2 and AVX-512, fp32 and bf16).
    """
    if (kernel, stride) not in ((1, 1), (3, 1), (4, 2)) or (kernel == 1 and not pair):
        yield "cpu", ByDesign("its kernels are for 3x3, for 4x4 at stride 2, for 1x1 of a pair")
    elif kernel == 4 and dtype not in (torch.float32, torch.bfloat16):
        yield "cpu", ByDesign(f"oneDNN is faster in {dtype}, in fp32 if need be")
    elif dtype not in (torch.float32, torch.bfloat16, torch.float16):
        yield "cpu", ByDefault(f"{dtype} is not a type of its kernels")
    elif AMX and dtype == torch.bfloat16:
        # AMX tiles multiply bf16 sixteen times as fast as fp32, so direct bf16 sums are faster.
        yield "cpu", ByDesign("oneDNN multiplies bf16 in AMX")
    else:
        yield "cpu", None
    yield "triton", _by_triton(x, kernel, dtype)
    yield "library", None if pair or emulated(x.device, dtype) else _ONE_CALL
    yield "torch", None


def _transpose_examples(device: torch.device) -> dict[str, tuple]:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    x = torch.empty(1, 1, 8, 8, 8, device=device)
    return {name: (x, dtype) for name, dtype in types.items()}


@implementations("space_conv_transpose", "space_conv_transpose_fwd", examples=_transpose_examples)
def _(x: Tensor, dtype: torch.dtype) -> Implementations:
    """The C++ kernel takes 0.9-1.15x the time of oneDNN in fp32 at 64-256 channels and half of it
    with few channels (one thread of an EPYC Zen 4 with AVX2 or AVX-512, torch 2.13, November 2026).
    That excludes new memory for the output, which oneDNN allocates at every call."""
    if dtype not in (torch.float32, torch.bfloat16):
        yield "cpu", ByDesign(f"oneDNN is faster in {dtype}, in fp32 if need be")
    elif AMX and dtype == torch.bfloat16:
        yield "cpu", ByDesign("oneDNN multiplies bf16 in AMX")
    else:
        yield "cpu", None
    yield "triton", _by_triton(x, 4, dtype)
    yield "library", None if emulated(x.device, dtype) else _ONE_CALL
    yield "torch", None

"""``space_conv``: convolutions of every frame, and their up- and downsampling.

y = conv2d([x, x2], weight) + bias + residual on every frame of (B, F, H, W, C). The caller never
concatenates the two sources of a skip connection. ``upsample="nearest"`` doubles H and W first; it
is folded into the weight, so the upsampled tensor is never made and 5/9 of the multiplications are
saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastvdm.kernels import space_conv_library as library
from fastvdm.ops._call import (
    autocast_dtype,
    cast,
    check_tensors,
    launcher,
    run,
    select,
    wrong_form,
)
from fastvdm.ops._check import check_video
from fastvdm.ops._cost import Cost, flops, flops_of_launcher
from fastvdm.ops._op import backward_of, op
from fastvdm.ops.space_conv_ends import bias_residual, fold_upsample_weight
from fastvdm.reference.space_conv import group_stats_ref, space_conv_ref, space_conv_transpose_ref
from fastvdm.runtime.device import INTERPRETED
from fastvdm.runtime.dispatch import ByDefault, ByDesign, ByName, Implementations, implementations
from fastvdm.runtime.extension import AMX, emulated

# --- ops -----------------------------------------------------------------------------------------


def _out_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
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
    return x.new_empty(_out_shape(x, weight, stride))


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
    y = x.new_empty(_out_shape(x, weight, stride))
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


def by_triton(x: Tensor, kernel: int, dtype: torch.dtype) -> str:
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
    yield "triton", by_triton(x, kernel, dtype)
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
    yield "triton", by_triton(x, 4, dtype)
    yield "library", None if emulated(x.device, dtype) else _ONE_CALL
    yield "torch", None


# --- public functions ----------------------------------------------------------------------------


def check_conv(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    residual: Tensor | None = None,
    upsample: str | None = None,
    *,
    transposed: bool = False,
) -> None:
    """Check all arguments of ``space_conv``, or of ``space_conv_transpose`` if ``transposed``.

    Raises:
        ValueError: a shape, device or option does not fit.
        TypeError: a dtype does not fit.
    """
    if getattr(x, "ndim", 0) != 5:
        check_video(x)
    if getattr(weight, "ndim", 0) != 4 or weight.shape[2] != weight.shape[3]:
        raise wrong_form("weight", weight, "4-D with a square kernel")
    out, takes, kernel, _ = weight.shape
    if transposed:
        out, takes = takes, out
    *video, height, width, channels = x.shape
    if x2 is not None:
        if getattr(x2, "ndim", 0) != 5:
            check_video(x2, "x2")
        check_tensors(x, ("x2", x2, (*video, height, width, x2.shape[-1])), same=("x2",))
        channels += x2.shape[-1]
    if takes != channels:
        raise ValueError(
            f"weight {tuple(weight.shape)} takes {takes} channels, the input has {channels}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    if kernel % 2 == 0 and (kernel, stride) != (4, 2):
        raise ValueError(f"an even kernel must be 4x4 with stride 2, got {kernel} and {stride}")
    if upsample not in (None, "nearest"):
        raise ValueError(f'upsample must be None or "nearest", got {upsample!r}')
    if upsample is not None and (kernel != 3 or stride != 1 or x2 is not None):
        raise ValueError("upsample takes a 3x3 kernel, stride 1 and one source")
    if min(height, width) < (2 if kernel == 4 and not transposed else 1):
        raise ValueError(f"x {tuple(x.shape)} is too small for {kernel}x{kernel}, stride {stride}")
    check_tensors(
        x, ("x", x, x.shape), ("weight", weight, weight.shape),
        ("bias", bias, (out,)), same=("weight", "bias"),
    )  # fmt: skip
    if residual is not None:
        shape = _out_shape(x, weight, stride)
        if upsample is not None:
            shape = (*shape[:2], 2 * shape[2], 2 * shape[3], shape[4])
        check_tensors(x, ("residual", residual, shape), same=("residual",))


def choose(
    x: Tensor,
    weight: Tensor,
    stride: int = 1,
    x2: Tensor | None = None,
    upsample: str | None = None,
) -> str:
    """The implementation that takes this call."""
    dtype = autocast_dtype(x)
    if upsample is not None:
        return select("space_conv_transpose", x.device, x, dtype)
    return select("space_conv", x.device, x, weight.shape[-1], stride, x2 is not None, dtype)


def _cast(which: str, x: Tensor, x2: Tensor | None, weight: Tensor, *ends: Tensor | None) -> list:
    """Convert the tensors as autocast does, except the weight of the C++ kernels: they take any
    dtype and cache its packed form while it stays the same tensor."""
    tensors = cast(autocast_dtype(x), x, x2, None if which == "cpu" else weight, *ends)
    if which == "cpu":
        tensors[2] = weight
    return tensors


def convolve(
    which: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x2: Tensor | None = None,
    stride: int = 1,
    residual: Tensor | None = None,
    upsample: str | None = None,
) -> Tensor:
    """``space_conv`` with checked arguments, by the implementation ``which``."""
    if which == "reference":
        return space_conv_ref(x, weight, bias, x2, stride, residual, upsample)
    if x.is_cuda and which != "triton":  # one pass adds the terms that cuDNN does not
        outside = bias if library.adds_bias_apart(x, weight.shape[-1]) else None
        if outside is not None or residual is not None:
            inside = None if outside is not None else bias
            y = convolve(which, x, weight, inside, x2, stride, None, upsample)
            return bias_residual(y, outside, residual)
    if upsample is not None:
        return _transpose(which, x, fold_upsample_weight(weight), bias, residual)
    if which == "torch":
        y = library.conv2d(x, weight, bias, stride)
        return y if residual is None else y + residual.to(y.dtype)
    tensors = _cast(which, x, x2, weight, bias, residual)
    return run(space_conv_fwd, *tensors, stride, which)


def space_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    stride: int = 1,
    residual: Tensor | None = None,
    upsample: str | None = None,
) -> Tensor:
    """conv2d of every frame: y = conv2d([x, x2], weight) + bias + residual.

    Args:
        x: (B, F, H, W, C1), contiguous.
        weight: (Cout, C1 + C2, k, k), preferably ``torch.channels_last``. Odd k: padding k // 2;
            4x4: stride 2, padding 1.
        bias: (Cout,), or None.
        x2: (B, F, H, W, C2), further input channels (a skip connection), or None.
        stride: 1 or 2.
        residual: added to the output; shaped like it.
        upsample: "nearest" doubles H and W before a 3x3 kernel. It is computed on the small input
            with summed weights; the result is equal up to rounding.

    Returns:
        (B, F, Ho, Wo, Cout), contiguous, in the dtype of x, or of autocast if it is on.

    Raises:
        ValueError: a shape or option does not fit; raised before any launch.
        TypeError: a dtype does not fit; raised before any launch.
    """
    check_conv(x, x2, weight, bias, stride, residual, upsample)
    which = choose(x, weight, stride, x2, upsample)
    return convolve(which, x, weight, bias, x2, stride, residual, upsample)


def space_conv_stats(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    per_frame: bool = False,
    eps: float = 1e-5,
    x2: Tensor | None = None,
    stride: int = 1,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``space_conv`` and the GroupNorm statistics of its output, for ``norm_act(..., stats=)``.

    The other arguments are those of ``space_conv``.

    Args:
        groups: number of groups; divides Cout.
        per_frame: take the statistics of each frame alone.
        eps: added to the variance.

    Returns:
        y; mean and rstd = 1 / sqrt(var + eps) of the stored y, both (B, groups), or (B*F, groups)
        per frame, in fp32 (fp64 for fp64). They have no gradient: the norm that takes them
        differentiates through them itself.

    Raises:
        ValueError: as in ``space_conv``, or ``groups`` does not divide Cout.
        TypeError: as in ``space_conv``.
    """
    check_conv(x, x2, weight, bias, stride, residual, None)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} channels, got {groups}")
    which = choose(x, weight, stride, x2)
    if which == "triton":
        tensors = cast(autocast_dtype(x), x, x2, weight, bias, residual)
        return run(space_conv_stats_fwd, *tensors, stride, groups, per_frame, eps, which)
    y = convolve(which, x, weight, bias, x2, stride, residual)
    return y, *group_stats_ref(y.detach(), groups, per_frame, eps)


def _transpose(
    which: str, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    if which in ("reference", "torch"):
        by = space_conv_transpose_ref if which == "reference" else library.conv_transpose2d
        y = by(x, weight, bias)
        return y if residual is None else y + residual.to(y.dtype)
    x, _, weight, bias, residual = _cast(which, x, None, weight, bias, residual)
    return run(space_conv_transpose_fwd, x, weight, bias, residual, which)


def space_conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed 4x4 convolution of every frame with stride 2 and padding 1; H and W double.

    Args:
        x: (B, F, H, W, Cin), contiguous.
        weight: (Cin, Cout, 4, 4), torch's layout of a transposed convolution.
        bias: (Cout,), or None.

    Returns:
        (B, F, 2H, 2W, Cout), contiguous.

    Raises:
        ValueError: a shape does not fit; raised before any launch.
        TypeError: a dtype does not fit; raised before any launch.
    """
    check_conv(x, None, weight, bias, 2, transposed=True)
    if weight.shape[-1] != 4:
        raise ValueError(f"the transposed kernel must be 4x4, got {tuple(weight.shape)}")
    which = select("space_conv_transpose", x.device, x, autocast_dtype(x))
    if x.is_cuda and bias is not None and which in ("library", "torch"):
        return bias_residual(_transpose(which, x, weight, None, None), bias)
    return _transpose(which, x, weight, bias, None)


# --- costs ---------------------------------------------------------------------------------------


def space_conv_cost(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    *,
    stride: int = 1,
    upsample: str | None = None,
    residual: bool = False,
    itemsize: int = 2,
) -> Cost:
    """FLOPs and least bytes of one forward; x_shape counts the channels of both sources.

    An upsampling counts the folded FLOPs, 4/9 of the plain ones. dgrad and wgrad take as many FLOPs
    each.
    """
    batch, frames, height, width, cin = x_shape
    cout, _, kernel, _ = weight_shape
    pad = library.padding_of(kernel)
    ho, wo = ((n + 2 * pad - kernel) // stride + 1 for n in (height, width))
    taps, weights = kernel * kernel, kernel * kernel * cin * cout
    if upsample == "nearest":
        ho, wo, taps, weights = 2 * ho, 2 * wo, 4, 16 * cin * cout
    pixels = batch * frames * ho * wo
    values = batch * frames * height * width * cin + weights + pixels * cout * (1 + residual)
    return Cost(2 * pixels * cin * cout * taps, itemsize * values)


def space_conv_transpose_cost(
    x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *, itemsize: int = 2
) -> Cost:
    """FLOPs and least bytes of one forward: every output pixel depends on 2x2 inputs."""
    batch, frames, height, width, cin = x_shape
    cout = weight_shape[1]
    pixels = batch * frames * 4 * height * width
    values = pixels // 4 * cin + 16 * cin * cout + pixels * cout
    return Cost(2 * pixels * cin * cout * 4, itemsize * values)


@flops(space_conv_fwd, space_conv_stats_fwd)
def _(*, x, x2, weight, stride, **_):
    return space_conv_cost((*x[:-1], x[-1] + (0 if x2 is None else x2[-1])), weight, stride=stride)


@flops(space_conv_bwd)
def _(*, x, x2, weight, stride, need_dx, need_dx2, need_dw, **_):
    sources = [(x, need_dx + need_dw)] + ([] if x2 is None else [(x2, need_dx2 + need_dw)])
    return sum(n * space_conv_cost(s, weight, stride=stride).flops for s, n in sources)


@flops(space_conv_transpose_fwd)
def _(*, x, weight, **_):
    return space_conv_transpose_cost(x, weight)


@flops(space_conv_transpose_bwd)
def _(*, x, weight, need_dx, need_dw, **_):
    return (need_dx + need_dw) * space_conv_transpose_cost(x, weight).flops


@flops_of_launcher("space_conv_dx_cpu")
def _(*, dy, weight, **_):
    return space_conv_cost(dy, (weight[1], weight[0], *weight[2:]))


@flops_of_launcher("space_conv_dw_cpu")
def _(*, dy, weight, **_):
    return space_conv_cost((*dy[:-1], weight[1]), weight)


@flops_of_launcher("conv3x3_dw_cpu")
def _(*, dy, weight, **_):
    return space_conv_cost((dy[0], 1, *dy[1:-1], weight[1]), weight)


@flops_of_launcher("conv3x3_cpu")
def _(*, x, x2, weight, turned, **_):
    # Images are (N, H, W, C). A turned weight gives the gradient of x, with as many FLOPs.
    shape = (x[0], 1, *x[1:-1], weight[0] if turned else weight[1])
    return space_conv_cost(shape, (weight[1] if turned else weight[0], *weight[1:]))

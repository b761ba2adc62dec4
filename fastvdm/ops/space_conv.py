"""The conv side of ``conv_group_norm``: convolutions of every frame, their up- and downsampling.

y = conv2d([x, x2], weight) + bias + residual on every frame of (B, F, H, W, C); the two sources of
a skip connection are never concatenated by the caller. ``upsample="nearest"`` doubles H and W
first: folded, the upsampled tensor is never made and 5/9 of the multiplications vanish.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvdm.kernels import space_conv_library as library
from fastvdm.ops._cost import Cost, flops, flops_of_launcher
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.ops.linear import emulated
from fastvdm.reference.space_conv import (
    group_stats_ref,
    space_conv_ref,
    space_conv_transpose_ref,
)
from fastvdm.runtime import dispatch

STEM = "space_conv"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# --- which implementation ------------------------------------------------------------------------


def choose_conv(
    kind: str, channels: int, device: str, dtype: torch.dtype, backend: str | None = None
) -> str:
    """The implementation of one call: "aten", "library", "triton" or "reference".

    kind is "conv", "pair" (two sources), "transpose" or "upsample". "aten" is one library call
    under torch's autograd, "library" the composition in ``space_conv_library.py``, "triton"
    our implicit GEMM. ``backend`` overrides the configured one; no row depends on ``channels``
    yet.

    | device | kind                | choice  | why                                                 |
    |--------|---------------------|---------|-----------------------------------------------------|
    | cuda   | conv                | aten    | cuDNN channels-last. NOT MEASURED against ours: the |
    |        |                     |         | Triton kernel has not run on a GPU, so it is taken  |
    |        |                     |         | only by name (FASTVDM_BACKEND=triton)               |
    | cuda   | pair                | library | the same reason                                     |
    | cuda   | transpose, upsample | aten    | the same reason                                     |
    | cpu    | conv                | aten    | oneDNN                                              |
    | cpu    | pair                | library | no concatenated copy kept for backward; 0.95-1.1x   |
    | cpu    | transpose, upsample | aten    | not bf16: 0.27-0.94x the time of four phases        |
    |        |                     | library | bf16: 0.36x at 64 channels, 0.6x at 128, 1.06x at   |
    |        |                     |         | 256 (oneDNN without AMX)                            |
    | cpu    | the same, with AMX  | aten    | NOT MEASURED                                        |

    CPU rows: Xeon with AVX-512, without AMX, one thread, torch 2.13, November 2026; time relative
    to the other choice, forward, 16 frames of 8x8 to 32x32.
    """
    backend = backend or dispatch.backend_in_force()
    if backend in ("reference", "triton"):
        return backend
    if kind == "pair":
        return "library"
    if kind in ("transpose", "upsample") and device == "cpu":
        return "library" if dtype == torch.bfloat16 and not library.AMX else "aten"
    return "aten"


def unsupported(
    backend: str, x: Tensor, weight: Tensor, dtype: torch.dtype | None = None
) -> str | None:
    """Why ``backend`` cannot take this call, computed in ``dtype`` (default: x's), or None."""
    dtype = dtype or x.dtype
    if backend != "triton":
        return "no kernel for this op"
    if dtype not in _FLOATS:
        return f"dtype {dtype}"
    if dtype == torch.bfloat16 and dispatch.INTERPRET:
        return "the Triton interpreter truncates bf16"
    if max(x.shape[2] * x.shape[3], weight.shape[-1] * x.shape[3] * x.shape[4]) >= 2**31:
        return f"images of {tuple(x.shape[2:])}; offsets inside one are int32"
    return None


def _implementation(op: str, kind: str, x: Tensor, weight: Tensor, stride: int = 1) -> str:
    dtype = dispatch.autocast_dtype(x)
    choice = choose_conv(kind, x.shape[-1], x.device.type, dtype)
    if choice == "aten" and (
        emulated(x.device, dtype)
        or (kind == "conv" and library.has_own_kernel(x.device, weight, stride, dtype))
    ):
        choice = "library"  # which hands it to the C++ backend, or computes in fp32
    if choice == "triton":
        return dispatch.select(op, x.device, x, weight, dtype)
    return choice


def bias_is_apart(kind: str, x: Tensor, weight: Tensor) -> bool:
    """Whether this convolution, of ``kind`` as in ``choose_conv``, would add its bias in a pass of
    its own, so that a norm behind it had better take the bias: only the library's does, on CUDA."""
    choice = choose_conv(kind, x.shape[-1], x.device.type, x.dtype)
    return choice in ("aten", "library") and library.adds_bias_apart(x, weight.shape[-1])


def _launchers(backend: str):
    return library if backend == "library" else dispatch.launchers(STEM, backend)


# --- ops -----------------------------------------------------------------------------------------


def _out_shape(x: Tensor, weight: Tensor, stride: int) -> tuple[int, ...]:
    batch, frames, height, width, _ = x.shape
    kernel = weight.shape[-1]
    pad = library.padding_of(kernel)
    height, width = ((n + 2 * pad - kernel) // stride + 1 for n in (height, width))
    return batch, frames, height, width, weight.shape[0]


def _or_empty(t: Tensor, wanted: bool, shape: tuple[int, ...] | None = None) -> Tensor:
    if not wanted:
        return t.new_empty(0)
    return torch.empty_like(t) if shape is None else t.new_empty(shape)


@define
def space_conv_fwd(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: int,
    backend: str,
) -> Tensor:
    return _launchers(backend).space_conv_fwd(x, x2, weight, bias, residual, stride)


@fake(space_conv_fwd)
def _(x, x2, weight, bias, residual, stride, backend):
    return x.new_empty(_out_shape(x, weight, stride))


@define
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
    return _launchers(backend).space_conv_stats_fwd(
        x, x2, weight, bias, residual, stride, groups, per_frame, eps
    )


@fake(space_conv_stats_fwd)
def _(x, x2, weight, bias, residual, stride, groups, per_frame, eps, backend):
    y = x.new_empty(_out_shape(x, weight, stride))
    shape = (x.shape[0] * (x.shape[1] if per_frame else 1), groups)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return y, x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


@define
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launchers(backend).space_conv_bwd(
        dy, x, x2, weight, stride, need_dx, need_dx2, need_dw, need_db
    )


@fake(space_conv_bwd)
def _(dy, x, x2, weight, stride, need_dx, need_dx2, need_dw, need_db, backend):
    return (
        _or_empty(x, need_dx, tuple(x.shape)),
        _or_empty(x, need_dx2, None if x2 is None else tuple(x2.shape)),
        _or_empty(weight, need_dw),
        _or_empty(dy, need_db, (weight.shape[0],)),
    )


@define
def space_conv_transpose_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str
) -> Tensor:
    return _launchers(backend).space_conv_transpose_fwd(x, weight, bias, residual)


@fake(space_conv_transpose_fwd)
def _(x, weight, bias, residual, backend):
    batch, frames, height, width, _ = x.shape
    return x.new_empty(batch, frames, 2 * height, 2 * width, weight.shape[1])


@define
def space_conv_transpose_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, need_db: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _launchers(backend).space_conv_transpose_bwd(dy, x, weight, need_dx, need_dw, need_db)


@fake(space_conv_transpose_bwd)
def _(dy, x, weight, need_dx, need_dw, need_db, backend):
    return (
        _or_empty(x, need_dx, tuple(x.shape)),
        _or_empty(weight, need_dw),
        _or_empty(dy, need_db, (weight.shape[1],)),
    )


def _save(ctx, inputs, output):
    x, x2, weight, _bias, _residual, stride, *_rest, backend = inputs
    ctx.save_for_backward(x, x2, weight)
    ctx.stride, ctx.backend, ctx.inputs = stride, backend, len(inputs)
    if isinstance(output, tuple):  # the consumer's backward differentiates through the statistics
        ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, dy, *_stats):
    x, x2, weight = ctx.saved_tensors
    need_dx, need_dx2, need_dw, need_db, need_dres = ctx.needs_input_grad[:5]
    dx = dx2 = dw = db = None
    if need_dx or need_dx2 or need_dw or need_db:
        dx, dx2, dw, db = space_conv_bwd(
            dy, x, x2, weight, ctx.stride, need_dx, need_dx2, need_dw, need_db, ctx.backend
        )
    return (
        dx if need_dx else None,
        dx2 if need_dx2 else None,
        dw if need_dw else None,
        db if need_db else None,
        dy if need_dres else None,
        *(None,) * (ctx.inputs - 5),
    )


autograd(space_conv_fwd, _backward, setup_context=_save)
autograd(space_conv_stats_fwd, _backward, setup_context=_save)
no_double_backward(space_conv_bwd)


def _save_transpose(ctx, inputs, output):
    x, weight, _bias, _residual, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward_transpose(ctx, dy):
    x, weight = ctx.saved_tensors
    need_dx, need_dw, need_db, need_dres = ctx.needs_input_grad[:4]
    dx = dw = db = None
    if need_dx or need_dw or need_db:
        dx, dw, db = space_conv_transpose_bwd(dy, x, weight, need_dx, need_dw, need_db, ctx.backend)
    return (
        dx if need_dx else None,
        dw if need_dw else None,
        db if need_db else None,
        dy if need_dres else None,
        None,
    )


autograd(space_conv_transpose_fwd, _backward_transpose, setup_context=_save_transpose)
no_double_backward(space_conv_transpose_bwd)

dispatch.register(
    "space_conv",
    stem=STEM,
    names=("space_conv_fwd", "space_conv_bwd"),
    unsupported=unsupported,
    backends=("triton",),
)
dispatch.register(
    "space_conv_transpose",
    stem=STEM,
    names=("space_conv_transpose_fwd", "space_conv_transpose_bwd"),
    unsupported=unsupported,
    backends=("triton",),
)


# --- public functions ----------------------------------------------------------------------------


def _check(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    in_axis: int,
) -> None:
    if x.ndim != 5:
        raise ValueError(f"x must be (B, F, H, W, C), got {x.ndim} dimensions: {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if x2 is not None and x2.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"x2 must be {tuple(x.shape[:-1])} + (C2,), the extents of x; got {tuple(x2.shape)}"
        )
    if weight.ndim != 4 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be 4-D with a square kernel, got {tuple(weight.shape)}")
    channels = x.shape[-1] + (0 if x2 is None else x2.shape[-1])
    if weight.shape[in_axis] != channels:
        raise ValueError(
            f"weight {tuple(weight.shape)} takes {weight.shape[in_axis]} channels, "
            f"the input has {channels}"
        )
    out = weight.shape[1 - in_axis]
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias must be ({out},), got {tuple(bias.shape)}")
    others = {"x2": x2, "weight": weight, "bias": bias, "residual": residual}
    for name, t in others.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} is on {t.device}, x on {x.device}")
        if t.dtype != x.dtype and not dispatch.autocast_on(x.device.type):
            raise TypeError(f"{name} is {t.dtype}, x is {x.dtype}")


def check_conv(
    x: Tensor,
    x2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    residual: Tensor | None,
    upsample: str | None,
) -> None:
    _check(x, x2, weight, bias, residual, in_axis=1)
    kernel = weight.shape[-1]
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride}")
    if kernel % 2 == 0 and (kernel, stride) != (4, 2):
        raise ValueError(f"an even kernel must be 4x4 with stride 2, got {kernel} and {stride}")
    if upsample not in (None, "nearest"):
        raise ValueError(f'upsample must be None or "nearest", got {upsample!r}')
    if upsample is not None and (kernel != 3 or stride != 1 or x2 is not None):
        raise ValueError("upsample takes a 3x3 kernel, stride 1 and one source")
    expected = _out_shape(x, weight, stride)
    if upsample is not None:
        expected = (*expected[:2], 2 * expected[2], 2 * expected[3], expected[4])
    if min(expected[2:4]) < 1:
        raise ValueError(f"x {tuple(x.shape)} is too small for {kernel}x{kernel}, stride {stride}")
    if residual is not None and residual.shape != expected:
        raise ValueError(f"residual must be {expected}, the output; got {tuple(residual.shape)}")


def cast(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """To the dtype that autocast asks for, as torch does to the inputs of its own convolutions."""
    dtype = dispatch.autocast_dtype(x)
    return tuple(None if t is None else t.to(dtype) for t in (x, *others))


def _fold_axis(w: Tensor, axis: int) -> Tensor:
    # Taps of the transposed kernel: [w2, w1 + w2, w0 + w1, w0].
    w0, w1, w2 = w.unbind(axis)
    return torch.stack([w2, w1 + w2, w0 + w1, w0], dim=axis)


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """3x3 kernel after nearest x2 → the equal 4x4 stride-2 transposed kernel (Cin, Cout, 4, 4).

    Output row 2i+a of the upsampled convolution reads input rows (i-1, i, i) for a = 0 and
    (i, i, i+1) for a = 1, so taps on the same row add up. Summed in fp32; differentiable.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    folded = _fold_axis(_fold_axis(wide, 2), 3).transpose(0, 1)
    return folded.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def space_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    x2: Tensor | None = None,
    stride: int = 1,
    residual: Tensor | None = None,
    upsample: str | None = None,
    fold: bool = True,
) -> Tensor:
    """conv2d of every frame: y = conv2d([x, x2], weight) + bias + residual.

    Args:
        x: (B, F, H, W, C1), contiguous.
        weight: (Cout, C1 + C2, k, k), best in ``torch.channels_last``. k odd: padding k // 2;
            4x4: stride 2, padding 1.
        bias: (Cout,).
        x2: (B, F, H, W, C2), further input channels: the skip connection, not concatenated.
        stride: 1 or 2.
        residual: like the output, added to it.
        upsample: "nearest" doubles H and W before a 3x3 kernel.
        fold: compute that on the small input with summed weights (equal but for rounding);
            False makes the upsampled tensor.

    Returns:
        (B, F, Ho, Wo, Cout), contiguous, in x's dtype (autocast's where it is on).

    Raises:
        ValueError, TypeError: a shape, dtype or option that does not fit, before any launch.
    """
    check_conv(x, x2, weight, bias, stride, residual, upsample)
    if upsample is not None:
        if dispatch.backend_in_force() == "reference":
            return space_conv_ref(x, weight, bias, None, 1, residual, upsample)
        if fold:
            return _transpose(x, fold_upsample_weight(weight), bias, residual, "upsample")
        x = library.upsample_nearest(x)
    kind = "conv" if x2 is None else "pair"
    backend = _implementation("space_conv", kind, x, weight, stride)
    if backend == "reference":
        return space_conv_ref(x, weight, bias, x2, stride, residual)
    if backend == "aten":
        y = library.conv2d(x, weight, bias, stride)
        return y if residual is None else y + residual.to(y.dtype)
    inputs = cast(x, x2, weight, bias, residual)
    return space_conv_fwd(*inputs, stride, backend)


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

    Returns:
        y; mean and rstd = 1 / sqrt(var + eps), both (B, groups) or, per frame, (B*F, groups), in
        fp32 (fp64 for fp64), of y as it is stored. They carry no gradient: the norm that takes
        them differentiates through them itself.

    Raises:
        ValueError, TypeError: as ``space_conv``; groups must divide Cout.
    """
    check_conv(x, x2, weight, bias, stride, residual, None)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"groups must divide the {weight.shape[0]} channels, got {groups}")
    kind = "conv" if x2 is None else "pair"
    backend = _implementation("space_conv", kind, x, weight)
    if backend == "triton":
        inputs = cast(x, x2, weight, bias, residual)
        return space_conv_stats_fwd(*inputs, stride, groups, per_frame, eps, backend)
    y = space_conv(x, weight, bias, x2=x2, stride=stride, residual=residual)
    return y, *group_stats_ref(y.detach(), groups, per_frame, eps)


def _transpose(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, kind: str
) -> Tensor:
    backend = _implementation("space_conv_transpose", kind, x, weight)
    if backend in ("reference", "aten"):
        if backend == "reference":
            y = space_conv_transpose_ref(x, weight, bias)
        else:
            y = library.conv_transpose2d(x, weight, bias)
        return y if residual is None else y + residual.to(y.dtype)
    return space_conv_transpose_fwd(*cast(x, weight, bias, residual), backend)


def space_conv_transpose(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transposed 4x4 convolution of every frame, stride 2, padding 1: H and W double.

    Args:
        x: (B, F, H, W, Cin), contiguous.
        weight: (Cin, Cout, 4, 4), torch's layout of a transposed convolution.
        bias: (Cout,).

    Returns:
        (B, F, 2H, 2W, Cout), contiguous.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, before any launch.
    """
    _check(x, None, weight, bias, None, in_axis=0)
    if weight.shape[-1] != 4:
        raise ValueError(f"the transposed kernel must be 4x4, got {tuple(weight.shape)}")
    return _transpose(x, weight, bias, None, "transpose")


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

    Of the folded upsample the folded FLOPs, 4/9 of the plain ones. dgrad and wgrad cost the same
    FLOPs each.
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
    """FLOPs and least bytes of one forward: every output pixel sees 2x2 inputs."""
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


@flops_of_launcher("conv3x3_cpu")
def _(*, x, x2, weight, turned, **_):
    # Of images (N, H, W, C). The turned one is the gradient of x, as many FLOPs.
    shape = (x[0], 1, *x[1:-1], weight[0] if turned else weight[1])
    return space_conv_cost(shape, (weight[1] if turned else weight[0], *weight[1:]))

"""``space_conv``: convolutions of every frame, and their up- and downsampling.

y = conv2d([x, x2], weight) + bias + residual on every frame of (B, F, H, W, C). The caller never
concatenates the two sources of a skip connection. ``upsample="nearest"`` doubles H and W first; it
is folded into the weight, so the upsampled tensor is never made and 5/9 of the multiplications are
saved.
"""

from __future__ import annotations

from torch import Tensor

from fastvdm.kernels import space_conv_library as library
from fastvdm.ops._call import autocast_dtype, cast, check_tensors, run, select, wrong_form
from fastvdm.ops._check import check_video
from fastvdm.ops._cost import Cost, flops, flops_of_launcher
from fastvdm.ops._space_conv import (
    out_shape,
    space_conv_bwd,
    space_conv_fwd,
    space_conv_stats_fwd,
    space_conv_transpose_bwd,
    space_conv_transpose_fwd,
)
from fastvdm.ops.space_conv_ends import bias_residual, fold_upsample_weight
from fastvdm.reference.space_conv import group_stats_ref, space_conv_ref, space_conv_transpose_ref


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
        shape = out_shape(x, weight, stride)
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

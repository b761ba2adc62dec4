"""The operations before and after torch's own convolutions on a GPU, each in one launch:
``fold_upsample_weight`` before, ``bias_residual`` after.

Under torch.compile and on a CPU they are sums in plain torch: the compiler fuses them into one
kernel, and oneDNN adds the bias itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._call import check_tensors, run, select, wrong_form
from fastvdm.ops._cost import flops
from fastvdm.ops._op import backward_of, op
from fastvdm.runtime.dispatch import ByDesign, Implementations, implementations


def _bias_gradient(dy: Tensor, need_bias: bool, backend: str) -> Tensor:
    return dy.flatten(0, -2).sum(0) if need_bias else dy.new_empty(0)


@op(
    "space_conv_ends",
    backward="dy",
    grads="bias:bias",
    residual="y residual",
    backward_body=_bias_gradient,
)
def bias_residual_fwd(
    y: Tensor, bias: Tensor | None, residual: Tensor | None, backend: str
) -> Tensor:
    """y (..., C) + bias (C,) + residual, like y; summed in fp32 and rounded once."""
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _fold_gradient(dy: Tensor, weight: Tensor, need_weight: bool, backend: str) -> Tensor:
    """The transpose of the fold, computed in fp32."""
    if not need_weight:
        return weight.new_empty(0)
    wide = dy if dy.dtype == torch.float64 else dy.float()
    wide = _unfold_axis(_unfold_axis(wide.transpose(0, 1), 2), 3)
    return torch.empty_like(weight).copy_(wide)


def _unfold_axis(g: Tensor, axis: int) -> Tensor:
    g0, g1, g2, g3 = g.unbind(axis)
    return torch.stack([g2 + g3, g1 + g2, g0 + g1], dim=axis)


@op(
    "space_conv_ends",
    backward="dy weight",
    grads="weight:weight",
    strided="weight",
    laid_out="weight",
    backward_body=_fold_gradient,
)
def fold_upsample_weight_fwd(weight: Tensor, backend: str) -> Tensor:
    """(Cin, Cout, 4, 4), channels last, from (Cout, Cin, 3, 3)."""
    cout, cin, _, _ = weight.shape
    return torch.empty(
        (cin, cout, 4, 4), dtype=weight.dtype, device=weight.device,
        memory_format=torch.channels_last,
    )  # fmt: skip


def _example(device: torch.device) -> dict[str, tuple]:
    return {"any": ()}


_COMPILED = ByDesign("torch's compiler makes one kernel of the sums and what stands around them")


def _ends() -> Implementations:
    yield "triton", _COMPILED if torch.compiler.is_compiling() else None
    yield "torch", None


for _op, _launcher in (
    ("bias_residual", "bias_residual_fwd"),
    ("fold_upsample_weight", "fold_upsample_weight_fwd"),
):
    implementations(_op, _launcher, backends=("triton",), examples=_example)(_ends)


def bias_residual(y: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """y + bias + residual, rounded once if one kernel computes it.

    Args:
        y: (..., C), contiguous.
        bias: (C,), or None.
        residual: like y, or None.

    Returns:
        A tensor like y.

    Raises:
        ValueError: a shape or a device does not fit; raised before any launch.
        TypeError: a dtype does not fit; raised before any launch.
    """
    if getattr(y, "ndim", 0) < 1:
        raise wrong_form("y", y, "(..., C)")
    shape = tuple(y.shape)
    check_tensors(
        y, ("y", y, shape), ("bias", bias, shape[-1:]), ("residual", residual, shape), beside="y"
    )
    if select("bias_residual", y.device) == "triton":
        return run(bias_residual_fwd, y, bias, residual, "triton")
    for t in (bias, residual):
        y = y if t is None else y + t.to(y.dtype)
    return y


def fold_upsample_weight(weight: Tensor) -> Tensor:
    """Fold nearest x2 upsampling into a 3x3 kernel: returns the equal 4x4 stride-2 transposed one.

    Output row 2i+a of the upsampled convolution reads input rows (i-1, i, i) for a = 0 and
    (i, i, i+1) for a = 1, so taps on the same row add up. Summed in fp32; differentiable.

    Args:
        weight: (Cout, Cin, 3, 3).

    Returns:
        (Cin, Cout, 4, 4).

    Raises:
        ValueError: the shape does not fit.
        TypeError: it is not a tensor, or not floating point.
    """
    if getattr(weight, "ndim", 0) != 4 or tuple(weight.shape[2:]) != (3, 3):
        raise wrong_form("weight", weight, "(Cout, Cin, 3, 3)")
    check_tensors(weight, ("weight", weight, weight.shape))
    if select("fold_upsample_weight", weight.device) == "triton":
        return run(fold_upsample_weight_fwd, weight, "triton")
    wide = weight if weight.dtype == torch.float64 else weight.float()
    folded = _fold_axis(_fold_axis(wide, 2), 3).transpose(0, 1)
    return folded.to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _fold_axis(w: Tensor, axis: int) -> Tensor:
    # Taps of the transposed kernel: [w2, w1 + w2, w0 + w1, w0].
    w0, w1, w2 = w.unbind(axis)
    return torch.stack([w2, w1 + w2, w0 + w1, w0], dim=axis)


@flops(
    bias_residual_fwd, fold_upsample_weight_fwd, backward_of(bias_residual_fwd),
    backward_of(fold_upsample_weight_fwd),
)  # fmt: skip
def _(**_):
    return 0

"""``conv_group_norm``: a per-frame convolution, then norm → FiLM → SiLU → + residual.

It takes two launches: the convolution, and one kernel that reads its output once and writes the
result once. The input, the convolution's output and the statistics are saved for the backward; the
normalised activation is recomputed. The parts are re-exported from here.
"""

from __future__ import annotations

from torch import Tensor

from fastvdm.kernels.space_conv_library import adds_bias_apart
from fastvdm.ops.norm_act import norm_act
from fastvdm.ops.space_conv import (
    check_conv,
    choose,
    convolve,
    space_conv,
    space_conv_stats,
    space_conv_transpose,
)

__all__ = ["conv_group_norm", "norm_act", "space_conv", "space_conv_transpose"]


def conv_group_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None = None,
    *,
    kind: str = "group",
    groups: int = 8,
    per_frame: bool = False,
    eps: float | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
    residual: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    x2: Tensor | None = None,
    upsample: str | None = None,
) -> Tensor:
    """norm_act(space_conv(x, weight, bias, x2=x2, upsample=upsample), norm_weight, ...).

    This is the block of Ho et al. 2020 (Denoising Diffusion Probabilistic Models, App. B), applied
    to every frame.

    Args:
        x: (B, F, H, W, C1).
        weight: (Cout, C1 + C2, k, k), k odd; stride 1.
        bias: (Cout,), or None. It is added by the convolution, or by the norm if the convolution
            would need an extra pass for it.
        norm_weight: (Cout,).
        norm_bias: (Cout,), or None.
        kind: as in ``norm_act``.
        groups: as in ``norm_act``.
        per_frame: as in ``norm_act``.
        eps: as in ``norm_act``.
        scale: (B, Cout), as in ``norm_act``.
        shift: (B, Cout), as in ``norm_act``.
        act: as in ``norm_act``.
        residual: added to the result; shaped like it.
        dropout_mask: shaped like the result, as in ``norm_act``.
        x2: (B, F, H, W, C2), further input channels after those of x.
        upsample: "nearest" doubles H and W before a 3x3 kernel.

    Returns:
        (B, F, H, W, Cout), or with 2H, 2W; contiguous, in the dtype of the convolution's output.

    Raises:
        ValueError: as in ``space_conv`` and ``norm_act``.
        TypeError: as in ``space_conv`` and ``norm_act``.
    """
    check_conv(x, x2, weight, bias, 1, None, upsample)
    which = choose(x, weight, 1, x2, upsample)
    x_bias, stats = None, None
    if bias is not None and which in ("library", "torch") and adds_bias_apart(x, weight.shape[-1]):
        x_bias, bias = bias, None
    # The epilogue of the Triton kernel computes the statistics at no cost.
    if which == "triton" and kind == "group" and upsample is None:
        y, *stats = space_conv_stats(
            x, weight, bias, x2=x2, groups=groups, per_frame=per_frame,
            eps=1e-5 if eps is None else eps,
        )  # fmt: skip
    else:
        y = convolve(which, x, weight, bias, x2, upsample=upsample)
    return norm_act(
        y, norm_weight, norm_bias, kind=kind, groups=groups, per_frame=per_frame, eps=eps,
        scale=scale, shift=shift, act=act, residual=residual, dropout_mask=dropout_mask,
        stats=stats, x_bias=x_bias,
    )  # fmt: skip

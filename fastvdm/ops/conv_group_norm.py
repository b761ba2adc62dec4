"""``conv_group_norm``: a per-frame convolution, then norm → FiLM → SiLU → + residual.

The heart of the network in two launches: the convolution, and one read and one write for all that
follows it. Saved for the backward are the input, the convolution's output and the statistics; the
normalised activation is recomputed. The parts are re-exported from here.
"""

from __future__ import annotations

from torch import Tensor

from fastvdm.ops.norm_act import default_eps, norm_act
from fastvdm.ops.norm_conv import norm_conv
from fastvdm.ops.space_conv import (
    bias_is_apart,
    check_conv,
    choose_conv,
    space_conv,
    space_conv_stats,
    space_conv_transpose,
)

__all__ = ["conv_group_norm", "norm_act", "norm_conv", "space_conv", "space_conv_transpose"]


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

    The block of Ho et al. 2020 (Denoising Diffusion Probabilistic Models, App. B), on every frame.

    Args:
        x, x2: (B, F, H, W, C1), (B, F, H, W, C2): convolved side by side along the channels.
        weight: (Cout, C1 + C2, k, k), k odd; stride 1. bias: (Cout,), added where it is cheapest:
            by the convolution, or by the norm where the convolution needs a pass of its own for it.
        norm_weight, norm_bias: (Cout,). scale, shift: (B, Cout).
        residual, dropout_mask: as the result.
        upsample: "nearest" doubles H and W before a 3x3 kernel.
        The rest as in ``norm_act``.

    Returns:
        (B, F, H, W, Cout), or 2H, 2W, contiguous, in the dtype of the convolution's output.

    Raises:
        ValueError, TypeError: as ``space_conv`` and ``norm_act``.
    """
    stats = None
    job = "upsample" if upsample is not None else "conv" if x2 is None else "pair"
    x_bias = bias if bias is not None and bias_is_apart(job, x, weight) else None
    if x_bias is not None:
        check_conv(x, x2, weight, bias, 1, None, upsample)  # nobody else sees this bias as one
        bias = None
    epilogue = choose_conv(job, x.shape[-1], x.device.type, x.dtype)
    # Triton's epilogue has the statistics for nothing
    if kind == "group" and epilogue == "triton" and upsample is None:
        y, *stats = space_conv_stats(
            x, weight, bias, x2=x2, groups=groups, per_frame=per_frame,
            eps=default_eps(kind) if eps is None else eps,
        )  # fmt: skip
    else:
        y = space_conv(x, weight, bias, x2=x2, upsample=upsample)
    return norm_act(
        y, norm_weight, norm_bias, kind=kind, groups=groups, per_frame=per_frame, eps=eps,
        scale=scale, shift=shift, act=act, residual=residual, dropout_mask=dropout_mask,
        stats=stats, x_bias=x_bias,
    )  # fmt: skip

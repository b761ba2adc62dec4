"""What every op asks of its tensors before anything is launched, in one wording."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.runtime.dispatch import autocast_on

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_tensors(
    x: Tensor,
    *wanted: tuple[str, Tensor | None, tuple[int, ...]],
    beside: str = "x",
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    same: tuple[str, ...] = (),
) -> None:
    """Of each (name, tensor or None, shape): the shape, the device of ``x``, one of ``dtypes``.
    Those named in ``same`` have the dtype of ``x``; under autocast all but fp64 mix.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype does not fit.
    """
    device, dtype = x.device, x.dtype
    for name, t, shape in wanted:
        if t is None:
            continue
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(t.shape)}")
        if t.device != device:
            raise ValueError(f"{name} must be on {device} like {beside}, got {t.device}")
        if t.dtype not in dtypes:
            raise TypeError(f"{name} must be {_listed(dtypes)}, got {t.dtype}")
        if t.dtype != dtype and name in same and not _mix(t, x):
            raise TypeError(f"{name} must be {dtype} like {beside}, got {t.dtype}")


def _mix(a: Tensor, b: Tensor) -> bool:
    """Whether autocast brings the two to one dtype."""
    return torch.float64 not in (a.dtype, b.dtype) and autocast_on(a.device.type)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    short = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    short |= {torch.float64: "fp64", torch.int32: "int32", torch.int64: "int64", torch.bool: "bool"}
    short |= {torch.uint8: "uint8"}
    *most, last = (short[d] for d in dtypes)
    return f"{', '.join(most)} or {last}" if most else last


def check_video(x: Tensor, name: str = "x") -> None:
    """A floating-point (B, F, H, W, C)."""
    if x.ndim != 5:
        raise ValueError(f"{name} must be (B, F, H, W, C), got {tuple(x.shape)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be {_listed(FLOATS)}, got {x.dtype}")


def check_projection(
    x: Tensor, name: str, weight: Tensor, *others: tuple[str, Tensor | None]
) -> None:
    """The residual stream ``x`` has the dtype of the projection ``weight``, or is fp32 over a
    16-bit one; the others have its dtype. Under autocast all but fp64 mix.

    Raises:
        TypeError: one has another.
    """
    dtype = weight.dtype
    if x.dtype != dtype:
        if torch.float64 in (x.dtype, dtype):
            raise TypeError(f"fp64 only throughout: x is {x.dtype}, {name} {dtype}")
        if x.dtype != torch.float32 and not _mix(x, weight):
            raise TypeError(
                f"x is {x.dtype}, {name} {dtype}: outside autocast only an fp32 x may differ"
            )
    for other, t in others:
        if t is not None and t.dtype != dtype and not _mix(t, weight):
            raise TypeError(f"{other} must be {dtype} like {name}, got {t.dtype}")


def check_eps(eps: float) -> None:
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")


def check_block(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    eps: float,
) -> None:
    """What the attention blocks ask of their norm and projections: x (B, F, H, W, C), the norm
    (C,), qkv (3 * heads * D, C), out (C, heads * D).

    Raises:
        ValueError, TypeError: the first that does not fit.
    """
    if x.ndim != 5:
        check_video(x)
    channels = x.shape[4]
    if qkv_weight.ndim != 2 or heads < 1 or qkv_weight.shape[0] % (3 * heads):
        raise ValueError(
            f"qkv_weight must be (3 * heads * D, C) with heads = {heads}, "
            f"got {tuple(qkv_weight.shape)}"
        )
    features = qkv_weight.shape[0]
    check_tensors(
        x,
        ("x", x, tuple(x.shape)),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        ("qkv_weight", qkv_weight, (features, channels)),
        ("qkv_bias", qkv_bias, (features,)),
        ("out_weight", out_weight, (channels, features // 3)),
        ("out_bias", out_bias, (channels,)),
    )
    if not eps > 0:
        check_eps(eps)
    check_projection(
        x, "qkv_weight", qkv_weight,
        ("out_weight", out_weight), ("qkv_bias", qkv_bias), ("out_bias", out_bias),
    )  # fmt: skip
    if out_weight.dtype != qkv_weight.dtype:  # under autocast, too
        raise TypeError(
            f"out_weight must be {qkv_weight.dtype} like qkv_weight, got {out_weight.dtype}"
        )

"""Checks that several ops make before a launch, with the same messages."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.kernels.attention_options import AttentionOptions
from fastvdm.ops._call import FLOATS, check_tensors, listed, mix, wrong_form


def check_video(x: Tensor, name: str = "x") -> None:
    """Check for a floating-point video (B, F, H, W, C)."""
    if getattr(x, "ndim", 0) != 5:
        raise wrong_form(name, x, "(B, F, H, W, C)")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be {listed(FLOATS)}, got {x.dtype}")


def check_projection(
    x: Tensor, name: str, weight: Tensor, *others: tuple[str, Tensor | None]
) -> None:
    """Check that the residual stream ``x`` has the dtype of the projection ``weight``, or is fp32
    with a 16-bit weight. The others must have the weight's dtype. Autocast may mix all but fp64.

    Raises:
        TypeError: a dtype does not fit.
    """
    dtype = weight.dtype
    if x.dtype != dtype:
        if torch.float64 in (x.dtype, dtype):
            raise TypeError(f"fp64 only throughout: x is {x.dtype}, {name} {dtype}")
        if x.dtype != torch.float32 and not mix(x, weight):
            raise TypeError(
                f"x is {x.dtype}, {name} {dtype}: outside autocast only an fp32 x may differ"
            )
    for other, t in others:
        if t is not None and t.dtype != dtype and not mix(t, weight):
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
    """Check the norm and the projections of an attention block: x (B, F, H, W, C), the norm (C,),
    qkv (3 * heads * D, C), out (C, heads * D).

    Raises:
        ValueError: a shape, a device or ``eps`` does not fit.
        TypeError: a dtype does not fit.
    """
    if getattr(x, "ndim", 0) != 5:
        check_video(x)
    channels = x.shape[4]
    rank = getattr(qkv_weight, "ndim", 0)
    if rank != 2 or heads < 1 or qkv_weight.shape[0] % (3 * heads):
        raise wrong_form("qkv_weight", qkv_weight, f"(3 * heads * D, C) with heads = {heads}")
    features = qkv_weight.shape[0]
    check_tensors(
        x,
        ("x", x, x.shape),
        ("norm_weight", norm_weight, (channels,)),
        ("norm_bias", norm_bias, (channels,)),
        ("qkv_weight", qkv_weight, (features, channels)),
        ("qkv_bias", qkv_bias, (features,)),
        ("out_weight", out_weight, (channels, features // 3)),
        ("out_bias", out_bias, (channels,)),
    )
    check_eps(eps)
    check_projection(
        x, "qkv_weight", qkv_weight,
        ("out_weight", out_weight), ("qkv_bias", qkv_bias), ("out_bias", out_bias),
    )  # fmt: skip
    if out_weight.dtype != qkv_weight.dtype:  # an error under autocast too
        raise TypeError(
            f"out_weight must be {qkv_weight.dtype} like qkv_weight, got {out_weight.dtype}"
        )


def check_options(
    qkv_like: Tensor,
    shape: tuple[int, ...],
    axis: str,
    options: AttentionOptions,
    low: torch.dtype,
    beside: str = "x",
) -> AttentionOptions:
    """Check the options of softmax attention against the ``shape`` (B, F, H, W, 3, heads, D) of
    qkv, a tensor that ``attention_block`` may not have, and the device of ``qkv_like``. Returns
    them with the Shaw tables in ``low``, the dtype of the products.

    Raises:
        ValueError: a shape, a device or a combination is wrong.
        TypeError: a dtype is wrong, or ``options`` is of another type.
    """
    if not isinstance(options, AttentionOptions):
        raise TypeError(f"options must be AttentionOptions, got {type(options).__name__}")
    bias, rel_k, rel_v, rotary, focus_mask, num_images = options
    b, f, h, w, _, heads, d = shape
    n = f if axis == "time" else h * w
    if bias is not None:
        check_tensors(qkv_like, ("bias", bias, (heads, n, n)), beside=beside)
    for name, table in (("rel_k", rel_k), ("rel_v", rel_v)):
        if table is None:
            continue
        rank = getattr(table, "ndim", 0)
        if rank != 3 or table.shape[0] not in (1, heads) or table.shape[1] % 2 == 0:
            raise wrong_form(name, table, f"(1 or {heads}, 2R+1, {d})")
        check_tensors(qkv_like, (name, table, (*table.shape[:2], d)), beside=beside)
    if rotary is not None:
        if getattr(rotary, "ndim", 0) != 3 or not 0 < 2 * rotary.shape[-1] <= d:
            raise wrong_form("rotary", rotary, f"(2, {n}, R/2) with R in 2..{d}")
        shape = (2, n, rotary.shape[-1])
        check_tensors(qkv_like, ("rotary", rotary, shape), beside=beside, dtypes=(torch.float32,))
    if focus_mask is not None:
        if axis != "time":
            raise ValueError("focus_mask needs axis='time'")
        check_tensors(
            qkv_like, ("focus_mask", focus_mask, (b,)), beside=beside, dtypes=(torch.bool,)
        )
    if num_images:
        if axis != "time":
            raise ValueError("num_images needs axis='time'")
        if not 0 <= num_images <= f:
            raise ValueError(f"num_images must be within 0..{f} frames, got {num_images}")
    if rel_k is None and rel_v is None:
        return options
    rel_k = None if rel_k is None else rel_k.to(low)
    return options._replace(rel_k=rel_k, rel_v=None if rel_v is None else rel_v.to(low))

"""Linear attention over the pixels of each frame: contract, torch.library op, autograd.

    q' = sm_scale * softmax_D(q),  k' = softmax_N(k),  ctx = k'ᵀ v,  out = q' ctx

with N = H*W pixels, once per frame and head (Shen et al. 2021, arXiv 1812.01243). The backward is
    dctx = q'ᵀ dout,   dq' = dout ctxᵀ,   dk' = v dctxᵀ,   dv = k' dctx,
and because k' sums to one over the pixels, the row sum of its softmax gradient is
    Σ_n k'[n,d] dk'[n,d] = Σ_e ctx[d,e] dctx[d,e],
so neither direction passes over the frame more than twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.runtime.dispatch import ByDesign, autocast_dtype, launchers, register, select

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_MAX_DIM = 128


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@define
def linear_attention_fwd(
    qkv: Tensor, sm_scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, F, H, W, heads, D); k_lse (B, F, heads, D) = log Σ_n exp k; ctx (B, F, heads, D, D)
    with its rows the features of k. The last two in fp32 (fp64 for fp64)."""
    return launchers("linear_attention", backend).linear_attention_fwd(qkv, sm_scale)


@fake(linear_attention_fwd)
def _(qkv: Tensor, sm_scale: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    b, f, h, w, _, heads, d = qkv.shape
    acc = _acc(qkv.dtype)
    return (
        qkv.new_empty((b, f, h, w, heads, d)),
        qkv.new_empty((b, f, heads, d), dtype=acc),
        qkv.new_empty((b, f, heads, d, d), dtype=acc),
    )


@define
def linear_attention_bwd(
    dout: Tensor, qkv: Tensor, k_lse: Tensor, ctx: Tensor, sm_scale: float, backend: str
) -> Tensor:
    """dqkv, packed and contiguous as ``qkv``."""
    return launchers("linear_attention", backend).linear_attention_bwd(
        dout, qkv, k_lse, ctx, sm_scale
    )


@fake(linear_attention_bwd)
def _(
    dout: Tensor, qkv: Tensor, k_lse: Tensor, ctx: Tensor, sm_scale: float, backend: str
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    qkv, sm_scale, backend = inputs
    _, k_lse, context = output
    ctx.save_for_backward(qkv, k_lse, context)
    ctx.mark_non_differentiable(k_lse, context)
    ctx.set_materialize_grads(False)  # else zeros are made for those two
    ctx.sm_scale, ctx.backend = sm_scale, backend


def _backward(ctx, dout, _dk_lse, _dcontext):
    if dout is None:
        return None, None, None
    qkv, k_lse, context = ctx.saved_tensors
    dqkv = linear_attention_bwd(dout.contiguous(), qkv, k_lse, context, ctx.sm_scale, ctx.backend)
    return dqkv, None, None


autograd(linear_attention_fwd, _backward, setup_context=_save)
no_double_backward(linear_attention_bwd)


def unsupported(backend: str, qkv: Tensor) -> str | None:
    """Why ``backend`` cannot take this call; None when it can."""
    d = qkv.shape[-1]
    if d > _MAX_DIM:
        return f"head dim {d} is above {_MAX_DIM}"
    if backend == "triton" and qkv.dtype in (torch.float32, torch.float64) and d > 64:
        return f"{qkv.dtype} with head dim {d} above 64: the backward exceeds shared memory"
    if backend == "cpu" and qkv.dtype == torch.float64:
        return ByDesign("fp64 runs on the torch reference")
    return None


register(
    "linear_attention",
    stem="linear_attention",
    names=("linear_attention_fwd", "linear_attention_bwd"),
    unsupported=unsupported,
    backends=("triton", "cpu"),
)


def linear_attention(qkv: Tensor, *, sm_scale: float | None = None) -> Tensor:
    """Linear attention over the H*W pixels of each frame.

    Args:
        qkv: (B, F, H, W, 3, heads, D), the packed output of one projection; copied if it is not
            contiguous. fp32, fp16, bf16 or fp64.
        sm_scale: factor on softmax_D(q); D**-0.5 by default.

    Returns:
        (B, F, H, W, heads, D) in the dtype of ``qkv`` (of autocast, where it is on).

    Raises:
        ValueError: wrong rank or axis 4 is not 3.
        TypeError: dtype not among the four.
    """
    if qkv.ndim != 7 or qkv.shape[4] != 3:
        raise ValueError(f"qkv must be (B, F, H, W, 3, heads, D), got {tuple(qkv.shape)}")
    if qkv.dtype not in _DTYPES:
        raise TypeError(f"qkv must be fp32, fp16, bf16 or fp64, got {qkv.dtype}")
    qkv = qkv.to(autocast_dtype(qkv))
    scale = qkv.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    backend = select("linear_attention", qkv.device, qkv)
    if backend == "reference":
        return linear_attention_ref(qkv, sm_scale=scale)
    return linear_attention_fwd(qkv.contiguous(), scale, backend)[0]


def linear_attention_cost(shape: tuple[int, ...], itemsize: int, *, backward: bool = False) -> Cost:
    """Of one call on ``qkv`` of this shape; ``backward`` counts the backward alone.

    Forward: q, k, v read and out written once, two products. Backward: q, k, v, dout read and
    dq, dk, dv written once, four products.
    """
    b, f, h, w, _, heads, d = shape
    rows = b * f * h * w * heads
    if backward:
        return Cost(flops=8 * rows * d * d, bytes=7 * rows * d * itemsize)
    return Cost(flops=4 * rows * d * d, bytes=4 * rows * d * itemsize)


@flops(linear_attention_fwd)
def _(*, qkv, **_):
    return linear_attention_cost(qkv, 4)


@flops(linear_attention_bwd)
def _(*, qkv, **_):
    return linear_attention_cost(qkv, 4, backward=True)

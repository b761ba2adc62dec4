"""Linear attention over the pixels of each frame: contract, torch.library op, autograd.

    q' = sm_scale * softmax_D(q),  k' = softmax_N(k),  ctx = k'ᵀ v,  out = q' ctx

with N = H*W pixels, once per frame and head (Shen et al. 2021, arXiv 1812.01243). The backward is
    dctx = q'ᵀ dout,   dq' = dout ctxᵀ,   dk' = v dctxᵀ,   dv = k' dctx,
and because k' sums to one over the pixels, the row sum of its softmax gradient is
    Σ_n k'[n,d] dk'[n,d] = Σ_e ctx[d,e] dctx[d,e],
so forward and backward each pass over the frame at most twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvdm.ops._call import autocast_dtype, check_tensors, run, select, wrong_form
from fastvdm.ops._cost import Cost, flops
from fastvdm.ops._op import backward_of, op
from fastvdm.reference.linear_attention import linear_attention_ref
from fastvdm.runtime.dispatch import FP64, Implementations, implementations

_MAX_DIM = 128


@op(
    "linear_attention",
    outputs="out k_lse ctx",
    backward="dout qkv k_lse ctx sm_scale",
    grads="qkv!",
)
def linear_attention_fwd(
    qkv: Tensor, sm_scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, F, H, W, heads, D); k_lse (B, F, heads, D) = log Σ_n exp k; ctx (B, F, heads, D, D),
    whose rows are the features of k. k_lse and ctx are in fp32 (fp64 for fp64)."""
    b, f, h, w, _, heads, d = qkv.shape
    acc = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    return (
        qkv.new_empty((b, f, h, w, heads, d)),
        qkv.new_empty((b, f, heads, d), dtype=acc),
        qkv.new_empty((b, f, heads, d, d), dtype=acc),
    )


linear_attention_bwd = backward_of(linear_attention_fwd)


@implementations(
    "linear_attention", "linear_attention_fwd", "linear_attention_bwd",
    examples=lambda device: {"fp32": (torch.empty(1, 1, 1, 1, 3, 1, 32, device=device),)},
)  # fmt: skip
def _(qkv: Tensor) -> Implementations:
    d, dtype = qkv.shape[-1], qkv.dtype
    wide = f"head dim {d} is above {_MAX_DIM}" if d > _MAX_DIM else None
    yield "cpu", wide or (FP64 if dtype == torch.float64 else None)
    if wide is None and d > 64 and dtype in (torch.float32, torch.float64):
        wide = f"{dtype} with head dim {d} above 64: the backward exceeds shared memory"
    yield "triton", wide


def linear_attention(qkv: Tensor, *, sm_scale: float | None = None) -> Tensor:
    """Linear attention over the H*W pixels of each frame (Shen et al. 2021, arXiv 1812.01243).

    Args:
        qkv: (B, F, H, W, 3, heads, D), the packed output of one projection, fp32, fp16, bf16 or
            fp64; copied if it is not contiguous.
        sm_scale: factor on softmax_D(q); D**-0.5 by default.

    Returns:
        (B, F, H, W, heads, D) in the dtype of ``qkv``, or of autocast if it is on.

    Raises:
        ValueError: the rank is wrong, or axis 4 is not 3.
        TypeError: the dtype is not one of the four.
    """
    if getattr(qkv, "ndim", 0) != 7 or qkv.shape[4] != 3:
        raise wrong_form("qkv", qkv, "(B, F, H, W, 3, heads, D)")
    check_tensors(qkv, ("qkv", qkv, qkv.shape))
    qkv = qkv.to(autocast_dtype(qkv))
    scale = qkv.shape[-1] ** -0.5 if sm_scale is None else float(sm_scale)
    which = select("linear_attention", qkv.device, qkv)
    if which == "reference":
        return linear_attention_ref(qkv, sm_scale=scale)
    return run(linear_attention_fwd, qkv, scale, which)[0]


def linear_attention_cost(shape: tuple[int, ...], itemsize: int, *, backward: bool = False) -> Cost:
    """The cost of one call on ``qkv`` of this shape; ``backward`` counts the backward alone.

    Forward: reads q, k, v and writes out once; two products. Backward: reads q, k, v, dout and
    writes dq, dk, dv once; four products.
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

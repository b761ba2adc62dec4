"""``linear``: torch's own, except for 16-bit types on a CPU that has no 16-bit arithmetic.

There oneDNN emulates: a bf16 product costs three times the fp32 one (64 → 768 features over 65536
rows, Xeon with AVX-512 but without bf16 instructions, 2026-11). The kernel of ``csrc/cpu/linear``
keeps the 16-bit storage and multiplies in fp32 in the L2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvdm import _ext
from fastvdm.config import get_config
from fastvdm.dispatch import autocast_dtype, launchers
from fastvdm.ops.cost import Cost
from fastvdm.ops.define import autograd, define, fake, no_double_backward

# Asked once, so that dynamo traces a comparison of constants.
_EMULATED = tuple(
    dtype
    for dtype in (torch.bfloat16, torch.float16)
    if _ext.has_launcher("linear_fwd_cpu")
    and not torch.ops.fastvdm_C.cpu_has_native(dtype == torch.bfloat16)
)


def emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``dtype`` on ``device`` is a type that the library can only emulate, and the C++
    backend, which does better, is there."""
    return device.type == "cpu" and dtype in _EMULATED and get_config().backend in ("auto", "cpu")


@define
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """y (..., N) = x (..., K) weight (N, K)ᵀ + bias."""
    return launchers("linear", backend).linear_fwd(x, weight, bias)


@fake(linear_fwd)
def _(x, weight, bias, backend):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@define
def linear_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), of shape (0,) where not wanted; sums over rows in fp32."""
    dx = dw = db = dy.new_empty(0)
    if need_dx:
        dx = launchers("linear", backend).linear_dx(dy, weight)
    rows = dy.flatten(0, -2).float() if need_dw or need_db else dy
    if need_dw:
        with torch.autocast("cpu", enabled=False):
            dw = (rows.t() @ x.flatten(0, -2).float()).to(weight.dtype)
    if need_db:
        db = rows.sum(0).to(dy.dtype)
    return dx, dw if need_dw else dy.new_empty(0), db if need_db else dy.new_empty(0)


@fake(linear_bwd)
def _(dy, x, weight, need_dx, need_dw, need_db, backend):
    return (
        dy.new_empty(x.shape if need_dx else (0,)),
        dy.new_empty(weight.shape if need_dw else (0,)),
        dy.new_empty((weight.shape[0],) if need_db else (0,)),
    )


def _save(ctx, inputs, output):
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    x, weight = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    found = linear_bwd(dy.contiguous(), x, weight, *need, ctx.backend)
    return *(g if n else None for g, n in zip(found, need)), None


autograd(linear_fwd, _backward, setup_context=_save)
no_double_backward(linear_bwd)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., N) = x (..., K) weight (N, K)ᵀ + bias (N,), as ``torch.nn.functional.linear``."""
    dtype = autocast_dtype(x)
    if not emulated(x.device, dtype):
        return F.linear(x, weight, bias)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"weight {tuple(weight.shape)} does not take {x.shape[-1]} features")
    return linear_fwd(
        x.to(dtype).contiguous(), weight.to(dtype), None if bias is None else bias.to(dtype), "cpu"
    )


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``; the same parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear_cost(rows: int, k: int, n: int, itemsize: int) -> Cost:
    """Of one forward call: x and the weight read, y written."""
    return Cost(flops=2 * rows * k * n, bytes=(rows * (k + n) + k * n) * itemsize)

"""``linear``: torch's own, except for 16-bit types on a CPU that has no 16-bit arithmetic.

There oneDNN emulates: a bf16 product costs three times the fp32 one (64 → 768 features over 65536
rows, Xeon with AVX-512 but without bf16 instructions, 2026-11). The kernel of ``csrc/cpu/linear``
keeps the 16-bit storage and multiplies in fp32 in the L2. By name, FASTVDM_BACKEND=cpu, it takes
every call, fp32 too, on any machine.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvdm.ops._cost import Cost, flops, flops_of_launcher
from fastvdm.ops._op import autograd, define, fake, no_double_backward
from fastvdm.runtime import extension
from fastvdm.runtime.config import get_config
from fastvdm.runtime.dispatch import (
    ByDesign,
    autocast_dtype,
    autocast_on,
    backend_in_force,
    launchers,
    register,
    select,
)

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Asked once, so that dynamo traces a comparison of constants.
_EMULATED = tuple(
    dtype
    for dtype in (torch.bfloat16, torch.float16)
    if extension.has_launcher("linear_fwd_cpu")
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
    rows = dy.reshape(-1, dy.shape[-1]).float() if need_dw or need_db else dy
    if need_dw:
        with torch.autocast("cpu", enabled=False):
            dw = (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
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


def unsupported(backend: str, x: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` is not taken for this call, computed in ``dtype`` (default: x's), or None.
    By name it takes every type that its kernel has, whatever the machine."""
    dtype = dtype or x.dtype
    if dtype not in _DTYPES:
        return ByDesign(f"{dtype} is not a type of its kernels: torch's own product is taken")
    if dtype not in _EMULATED and get_config().backend != backend:
        return ByDesign(f"{dtype} is not emulated on this machine: torch's own product is taken")
    return None


register(
    "linear",
    stem="linear",
    names=("linear_fwd", "linear_dx"),
    unsupported=unsupported,
    backends=("cpu",),
)


def _validate(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or min(weight.shape) < 1:
        raise ValueError(f"weight must be (N, K), got {tuple(weight.shape)}")
    n, k = weight.shape
    if x.ndim < 1 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}), got {tuple(x.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"bias must be {(n,)}, got {tuple(bias.shape)}")
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{name} must be on {x.device} like x, got {t.device}")
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {t.dtype}")
        if t.dtype != x.dtype and (
            torch.float64 in (t.dtype, x.dtype) or not autocast_on(x.device.type)
        ):
            raise TypeError(f"{name} is {t.dtype}, x is {x.dtype}")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., N) = x (..., K) weight (N, K)ᵀ + bias (N,), as ``torch.nn.functional.linear``.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: not floating point or, outside autocast, not all of one dtype.
    """
    if is_traceable_wrapper_subclass(weight):  # quantised or distributed: it knows torch's own ops
        return F.linear(x, weight, bias)
    _validate(x, weight, bias)
    dtype = autocast_dtype(x)
    if x.device.type != "cpu" or backend_in_force() not in ("auto", "cpu"):
        return F.linear(x, weight, bias)
    if select("linear", x.device, x, dtype) == "reference":
        return F.linear(x, weight, bias)
    x, weight = x.to(dtype).contiguous(), weight.to(dtype)
    return linear_fwd(x, weight, None if bias is None else bias.to(dtype).contiguous(), "cpu")


class Linear(nn.Linear):
    """``nn.Linear`` through ``linear``; the same parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear_cost(rows: int, k: int, n: int, itemsize: int) -> Cost:
    """Of one forward call: x and the weight read, y written. Each gradient is as many FLOPs."""
    return Cost(flops=2 * rows * k * n, bytes=(rows * (k + n) + k * n) * itemsize)


@flops(linear_fwd)
def _(*, x, weight, **_):
    return linear_cost(prod(x[:-1]), weight[1], weight[0], 4)


@flops(linear_bwd)
def _(*, x, weight, need_dx, need_dw, **_):
    return (need_dx + need_dw) * linear_cost(prod(x[:-1]), weight[1], weight[0], 4).flops


@flops_of_launcher("linear_dx_cpu")
def _(*, dy, weight, **_):
    return linear_cost(prod(dy[:-1]), weight[0], weight[1], 4)

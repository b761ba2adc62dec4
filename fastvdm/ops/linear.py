"""``linear``: torch's own, except for 16-bit types on a CPU that has no 16-bit arithmetic.

On such a CPU oneDNN emulates them: a bf16 product takes three times as long as an fp32 one (64 →
768 features over 65536 rows, Xeon with AVX-512 but without bf16 instructions, 2026-11). The kernel
in ``csrc/cpu/linear_kernel.cpp`` keeps 16-bit storage and multiplies in fp32 in the L2 cache. With
FASTVDM_BACKEND=cpu it also takes fp32, and runs on any machine.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastvdm.ops._call import (
    autocast_dtype,
    cast,
    check_tensors,
    launcher,
    run,
    select,
    wrong_form,
)
from fastvdm.ops._cost import Cost, flops, flops_of_launcher
from fastvdm.ops._op import backward_of, op
from fastvdm.runtime.dispatch import ByDefault, ByName, Implementations, implementations
from fastvdm.runtime.extension import EMULATED


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    need_dx: bool,
    need_dw: bool,
    need_db: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The launcher computes the gradient of x; torch computes the sums over rows, in fp32."""
    dx = launcher("linear", "linear_dx", backend)(dy, weight) if need_dx else dy.new_empty(0)
    rows = dy.reshape(-1, dy.shape[-1]).float() if need_dw or need_db else dy
    dw, db = dy.new_empty(0), dy.new_empty(0)
    if need_dw:
        with torch.autocast("cpu", enabled=False):
            dw = (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
    if need_db:
        db = rows.sum(0).to(dy.dtype)
    return dx, dw, db


@op(
    "linear",
    backward="dy x weight",
    grads="x:dx weight:dw bias:db",
    strided="weight",
    backward_body=_backward,
)
def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """y (..., N) = x (..., K) weight (N, K)ᵀ + bias."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


linear_bwd = backward_of(linear_fwd)


def _examples(device: torch.device) -> dict[str, tuple]:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {name: (dtype,) for name, dtype in types.items()}


@implementations("linear", "linear_fwd", "linear_dx", backends=("cpu",), examples=_examples)
def _(dtype: torch.dtype) -> Implementations:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        yield "cpu", ByDefault(f"{dtype} is not a type of its kernels")
    elif dtype not in EMULATED:
        yield "cpu", ByName(f"{dtype} is not emulated on this machine")
    else:
        yield "cpu", None
    yield "torch", None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., N) = x (..., K) weight (N, K)ᵀ + bias (N,), as ``torch.nn.functional.linear``.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,), or None.

    Raises:
        ValueError: a shape or a device does not fit.
        TypeError: a dtype is not floating point or, outside autocast, the dtypes differ.
    """
    if is_traceable_wrapper_subclass(weight):  # quantised or distributed: supports torch's ops only
        return F.linear(x, weight, bias)
    if getattr(weight, "ndim", 0) != 2 or min(weight.shape) < 1:
        raise wrong_form("weight", weight, "(N, K)")
    n, k = weight.shape
    if getattr(x, "ndim", 0) < 1 or x.shape[-1] != k:
        raise wrong_form("x", x, f"(..., {k})")
    check_tensors(
        x, ("x", x, x.shape), ("weight", weight, (n, k)), ("bias", bias, (n,)),
        same=("weight", "bias"),
    )  # fmt: skip
    dtype = autocast_dtype(x)
    which = select("linear", x.device, dtype)
    if which in ("torch", "reference"):
        return F.linear(x, weight, bias)
    return run(linear_fwd, *cast(dtype, x, weight, bias), which)


class Linear(nn.Linear):
    """``nn.Linear`` that calls ``linear``; it has the same parameters and state_dict."""

    def forward(self, input: Tensor) -> Tensor:
        """``linear`` of the input (..., in_features) → (..., out_features)."""
        return linear(input, self.weight, self.bias)


def linear_cost(rows: int, k: int, n: int, itemsize: int) -> Cost:
    """One forward call: reads x and the weight, writes y. Each gradient takes as many FLOPs."""
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

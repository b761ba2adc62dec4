"""The checks that every kernel must pass; used by the tests and, before timing, by benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastvdm.runtime import extension
from fastvdm.runtime.config import CPU_ISAS

# Smallest error that counts, relative to the largest reference value: a few ulps of the dtype, so
# that an exact baseline does not demand an exact result.
_FLOOR = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
# Error of one operation inside a kernel, relative to its operands: an ulp of the accumulator. For a
# 16-bit result kernels may use shorter polynomials, as long as these have fp32 accuracy.
_INSIDE = {
    torch.float64: torch.finfo(torch.float64).eps,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.float16: _FLOOR[torch.float32],
    torch.bfloat16: _FLOOR[torch.float32],
}
_NUDGE = 2.0**-24  # half an ulp of fp32; in fp64 the response to it is linear to 8 digits


def max_error(out: Tensor, ref: Tensor) -> float:
    """max |out - ref| / max |ref|, in fp64; inf if ``out`` is not finite where ``ref`` is."""
    out, ref = out.detach().double(), ref.detach().double()
    if out.numel() == 0:
        return 0.0
    error = (out - ref).abs()
    error[torch.isnan(error)] = float("inf")
    return (error.max() / ref.abs().max().clamp_min(1e-30)).item()


def assert_close3(
    out: Tensor,
    baseline: Tensor,
    ref64: Tensor,
    *,
    factor: float = 2.0,
    name: str = "out",
    floor: float | None = None,
    summed: Callable[[], float] | None = None,
) -> None:
    """Three-way tolerance: the error of ``out`` may be ``factor`` times that of ``baseline``.

    The criterion is that of flash-attention's tests. Gradients use ``factor=3``.

    Args:
        out: the result to check.
        baseline: the result of plain torch in the dtype of ``out``.
        ref64: the result of plain torch in fp64.
        factor: allowed ratio of the errors.
        name: name for the error message.
        floor: smallest error that counts, relative to the largest reference value.
        summed: returns the size of the terms that add up to ``ref64``, as in ``sizes_of_sums``. It
            is called only if ``out`` fails otherwise: where terms cancel, their rounding errors
            remain, however small the result is.

    Raises:
        AssertionError: with the worst index, both values and the share of bad elements.
    """
    if out.shape != ref64.shape:
        raise AssertionError(f"{name}: shape {tuple(out.shape)}, expected {tuple(ref64.shape)}")
    if out.dtype != baseline.dtype:
        raise AssertionError(f"{name}: dtype {out.dtype}, expected {baseline.dtype}")
    if out.numel() == 0:
        return
    o, b, r = (t.detach().to(out.device, torch.float64) for t in (out, baseline, ref64))
    scale = r.abs().max().clamp_min(1e-30)
    # The floor grows with factor: a single draw of plain torch's error varies fivefold by seed.
    smallest = (_FLOOR[out.dtype] * factor / 2 if floor is None else floor) * scale
    limit = torch.maximum(factor * (b - r).abs().max(), smallest)
    error = (o - r).abs()
    bad = ~(error <= limit)  # NaN counts as bad
    if bad.any() and summed is not None:
        limit = limit.clamp_min(factor / 2 * _INSIDE[out.dtype] * summed())
        bad = ~(error <= limit)
    if not bad.any():
        return
    ranked = torch.where(torch.isnan(error), torch.inf, error)
    index = tuple(int(i) for i in torch.unravel_index(ranked.argmax(), error.shape))
    raise AssertionError(
        f"{name}: {tuple(out.shape)} {out.dtype}: at {index} got {o[index].item():.9g}, expected "
        f"{r[index].item():.9g}; error {error[index].item():.3g} > limit {limit.item():.3g}; "
        f"{100 * bad.double().mean().item():.3g} % of the elements are bad"
    )


def make_exact_operand(
    shape: Sequence[int], *, high: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Small integers in [-high, high]. Sums of their products are exact, so the comparison is
    ``torch.equal`` and an index error cannot hide inside a tolerance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-high, high + 1, tuple(shape), generator=generator).to(dtype)


@contextmanager
def poison_empty() -> Iterator[None]:
    """Fill the results of ``torch.empty`` and its relatives with NaN (integers: their maximum).

    This reveals elements of an output that a kernel does not write.
    """

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            t = make(*args, **kwargs)
            if t.is_floating_point():
                t.fill_(float("nan"))
            elif t.dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
                t.fill_(torch.iinfo(t.dtype).max)
            return t

        return call

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poisoned(torch.empty_strided)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield


def opcheck_op(op: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> None:
    """``torch.library.opcheck`` with all four tests. Use asymmetric shapes: a fake that swaps two
    axes passes on a cube."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.ndim > 2 and len(set(arg.shape)) < arg.ndim - 1:
            raise ValueError(f"opcheck wants extents that differ, got {tuple(arg.shape)}")
    torch.library.opcheck(op, tuple(args), kwargs or {})


def grads(
    fn: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor | None],
    douts: Sequence[Tensor] | Tensor,
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """Outputs of ``fn(*inputs)`` and the gradient of each floating-point input (others: None)."""
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for t in inputs
    ]
    out = fn(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    seeds = douts if isinstance(douts, (tuple, list)) else (douts,)
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    found = iter(
        torch.autograd.grad(
            outs, wanted, [s.to(o.dtype) for s, o in zip(seeds, outs)], allow_unused=True
        )
    )
    result = tuple(
        next(found) if isinstance(t, Tensor) and t.requires_grad else None for t in leaves
    )
    return tuple(o.detach() for o in outs), result


_aten = torch.ops.aten
_PRODUCTS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm)


class _Nudged(TorchDispatchMode):
    """Changes every fp64 operand of every op by ``_NUDGE`` of itself, up or down at random.

    A product of matrices also rounds each of its K partial sums. If they are added one by one, as
    in most kernels, that amounts to sqrt(K / 12) of the operands' rounding (uniform errors of sums
    that grow as a random walk). A library that adds in blocks has smaller errors, in some shapes on
    some CPUs, so a run of it does not show them.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def nudge(self, t: Tensor, by: float) -> Tensor:
        if t.dtype != torch.float64:
            return t
        up = torch.randint(0, 2, t.shape, generator=self.generator, dtype=torch.float64)
        return t * (1 + by * (2 * up - 1).to(t.device))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or func._schema.is_mutable):
            by = _NUDGE
            if func.overloadpacket in _PRODUCTS:
                by *= math.sqrt(1 + args[-1].shape[-2] / 12)
            args = tree_map_only(Tensor, partial(self.nudge, by=by), args)
        return func(*args, **(kwargs or {}))


def sizes_of_sums(
    ref: Callable[..., Tensor], wide: Sequence[Tensor | None], dout: Tensor
) -> list[float]:
    """The size of the terms that add up to the output of ``ref`` and to each of its gradients.

    Where terms cancel, max |ref| is not that size: the bias before a norm with one channel per
    group has the gradient 0 = Σ dx. The size is measured by Monte Carlo arithmetic (Parker, "Monte
    Carlo Arithmetic", 1997): every operand of every op in the fp64 run, forward and backward, is
    changed by a relative 2^-24 with a random sign (those of matrix products by more, ``_Nudged``).
    The size is the largest change of the result in three runs, divided by 2^-24. Changing only the
    inputs would not work: a result that is 0 for all inputs does not change with them.
    """
    (out,), gradients = grads(ref, wide, dout)
    exact = [out, *gradients]
    sizes = [0.0] * len(exact)
    for seed in range(3):
        with _Nudged(seed):
            (out,), gradients = grads(ref, wide, dout)
        for i, (t, e) in enumerate(zip((out, *gradients), exact)):
            if t is not None and e is not None and t.numel():
                change = (t - e).abs()[torch.isfinite(e)]
                sizes[i] = max(sizes[i], change.nan_to_num(0.0).amax().item() / _NUDGE)
    return sizes


def assert_parity(
    fn: Callable[..., Tensor],
    ref: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    *,
    names: Sequence[str] | None = None,
    seed: int = 0,
    forward_factor: float = 2.0,
    grad_factor: float = 3.0,
) -> None:
    """Compare the output and every gradient of ``fn`` with ``ref`` in the same dtype and in fp64,
    by ``assert_close3``; where terms cancel, relative to their size (``sizes_of_sums``)."""
    names = names or [f"input{i}" for i in range(len(inputs))]
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    with torch.no_grad():
        shape = ref(*wide).shape
    generator = torch.Generator().manual_seed(seed)
    device = next(t.device for t in inputs if isinstance(t, Tensor))
    dout = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    (out,), g = grads(fn, inputs, dout)
    (base,), g_base = grads(ref, inputs, dout)
    (ref64,), g_ref = grads(ref, wide, dout)
    sizes: list[float] = []

    def size(i: int) -> float:
        if not sizes:
            sizes.extend(sizes_of_sums(ref, wide, dout))
        return sizes[i]

    assert_close3(out, base, ref64, factor=forward_factor, summed=partial(size, 0))
    for i, (name, a, b, r) in enumerate(zip(names, g, g_base, g_ref), 1):
        if (a is None) != (r is None):
            raise AssertionError(f"d{name}: {'missing' if a is None else 'unexpected'} gradient")
        if a is not None and b is not None and r is not None:
            assert_close3(a, b, r, factor=grad_factor, name=f"d{name}", summed=partial(size, i))


def cpu_isas() -> list[str]:
    """The instruction sets that this machine and this build of the C++ backend run, best first."""
    if extension.reason_off() is not None:
        return []
    found, before = [], torch.ops.fastvdm_C.cpu_isa()
    for name in CPU_ISAS[1:]:
        try:
            found.append(extension.set_cpu_isa(name))
        except RuntimeError:
            continue
    extension.set_cpu_isa(before)
    return found


@contextmanager
def use_cpu_isa(name: str) -> Iterator[None]:
    """Run the C++ backend on one instruction set inside the block, then on the previous one.

    Raises:
        RuntimeError: the extension is off, or this machine or build has no such path.
    """
    before = extension.reason_off() or torch.ops.fastvdm_C.cpu_isa()
    extension.set_cpu_isa(name)
    try:
        yield
    finally:
        extension.set_cpu_isa(before)

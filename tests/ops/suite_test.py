"""Every public op against every check: the rows are those of ``op_cases.py``.

    python tests/ops/matrix.py [-k norm_act]    runs it and prints the matrix op x check

"cpu" is the C++ kernels, on each instruction set of this machine where that says more, "triton" the
Triton kernels: on a GPU, emulated (tests/ptxemu), or interpreted. Where an op has no kernel of a
backend, what takes the call is checked in its place. Each test is a cell, or an edge of the first
one.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from matrix import matrix
from op_cases import ROWS, Case, Row, by_reference, check_parity, make
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm.ops._call import BODIES
from fastvdm.runtime.config import use_backend
from fastvdm.runtime.dispatch import registered_ops
from fastvdm.testing import (
    assert_close3,
    cpu_isas,
    make_exact_operand,
    max_error,
    opcheck_op,
    poison_empty,
    use_cpu_isa,
)

GPU = torch.cuda.is_available()
EMULATED = "FASTVDM_EMULATE" in os.environ
COMPILED = GPU or EMULATED  # Triton's kernels; else they are interpreted
FP32, FP16, BF16, FP64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


class Lane(NamedTuple):
    """A backend, and the instruction set of the C++ one."""

    backend: str
    isa: str = ""

    @property
    def device(self) -> str:
        return "cuda" if GPU and self.backend == "triton" else "cpu"

    def __str__(self) -> str:
        return f"{self.backend}_{self.isa}" if self.isa else self.backend


class Cell(NamedTuple):
    name: str
    lane: Lane

    @property
    def row(self) -> Row:
        return ROWS[self.name]

    @property
    def dtype(self) -> torch.dtype:
        """Of every check but parity."""
        if self.lane.backend == "cpu" or (COMPILED and self.row.dtype == FP64):
            return FP32
        return self.row.dtype

    def case(self, edge: dict | None = None, **how) -> Case:
        return make(self.row, how.pop("dtype", self.dtype), self.lane.device, edge, **how)


def seed_of(y: Tensor) -> Tensor:
    """A gradient of y."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(y.shape, generator=generator, dtype=FP64).to(y)


def outputs_and_grads(
    case: Case, tensors=None, dy: Tensor | None = None, wanted: tuple[int, ...] | None = None
) -> list[Tensor]:
    """All outputs, then the gradient of the first with respect to each tensor (``wanted``: of their
    places), where there is one."""
    tensors = list(case.tensors.values()) if tensors is None else tensors
    if not case.row.gradient:
        return list(case(*tensors))
    leaves = [
        t.detach().requires_grad_(wanted is None or i in wanted) for i, t in enumerate(tensors)
    ]
    out = case(*leaves)
    dy = seed_of(out[0]) if dy is None else dy.expand(out[0].shape)
    found = torch.autograd.grad(out[0], [t for t in leaves if t.requires_grad], dy)
    return [*(t.detach() for t in out), *found]


@functools.cache
def first(cell: Cell) -> tuple[Tensor, ...]:
    """What the other runs are held to; with NaN in whatever was not written."""
    with poison_empty():
        return tuple(outputs_and_grads(cell.case()))


def assert_same(found, expected, close: bool = False) -> None:
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"result {i}"
        if close:
            size = b.abs().max().item() if b.numel() else 0.0
            tolerance = {FP64: 1e-9}.get(b.dtype, 1e-4)
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(size, 1e-3))
        else:
            assert torch.equal(a, b), f"result {i}: {max_error(a, b):.2g}"


# -- the checks -----------------------------------------------------------------------------------


def parity(cell: Cell, dtype: torch.dtype, edge: str = "") -> None:
    """Outputs and every gradient, by the three-way tolerance."""
    edges = cell.row.edges | cell.row.cpu_edges | cell.row.tiles
    sizes = edges[edge] if edge else None
    check_parity(cell.case(sizes, dtype=dtype))


def mixed(cell: Cell) -> None:
    """Tensors of 16 bits beside fp32, as under autocast; each gradient in its own dtype."""
    low = BF16 if cell.lane.backend == "cpu" or COMPILED else FP16
    check_parity(cell.case(dtype=low, narrow=cell.row.mixed))


def poison(cell: Cell) -> None:
    """Everything is written."""
    assert all(t.isfinite().all() for t in first(cell))


def exact(cell: Cell) -> None:
    """Integers: every sum is exact, so that no index error hides in a tolerance."""
    case = cell.case(dtype=FP32, exact=True)
    with poison_empty():
        y = case(*case.tensors.values())[0]
        dy = make_exact_operand(y.shape, high=2, seed=9).to(y)
        found = outputs_and_grads(case, dy=dy)
    wide = [t.double() for t in case.tensors.values()]
    given = "stats" in case.rest
    if given:
        case.rest["stats"] = [t.double() for t in case.rest["stats"]]
    with use_backend("reference"):
        expected = outputs_and_grads(case, wide, dy.double())
    # Statistics that were given are not those of x: there only y is exact, in halves, and the
    # reference takes the way over its own, which round.
    for a, b in zip(found, expected[:1] if given else expected):
        assert torch.equal(a.double(), (2 * b).round() / 2)


def bit_equal(cell: Cell) -> None:
    """Two runs give the same bits."""
    assert_same(outputs_and_grads(cell.case()), first(cell))


def threads(cell: Cell) -> None:
    """So does any number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 3)
        found = outputs_and_grads(cell.case())
    finally:
        torch.set_num_threads(before)
    assert_same(found, first(cell))


def strides(cell: Cell) -> None:
    """Any: elements apart, and a memory in which the last but one axis is the innermost."""
    case = cell.case()
    apart = [torch.stack((t, t), -1)[..., 0] for t in case.tensors.values()]
    turned = [
        t.movedim(-3, -1).contiguous().movedim(-1, -3) if t.ndim > 2 else t.t().contiguous().t()
        for t in case.tensors.values()
    ]
    both = [a if t.ndim < 2 else b for t, a, b in zip(case.tensors.values(), apart, turned)]
    # One run of the interpreter.
    for tensors in (apart, turned) if cell.lane.isa else (both,):
        assert_same(outputs_and_grads(case, tensors), first(cell), close=True)


def expanded_dy(cell: Cell) -> None:
    """The gradient of a sum has strides of 0."""
    case, one = cell.case(), first(cell)[0].new_ones(())
    found = outputs_and_grads(case, dy=one.expand(first(cell)[0].shape))
    with use_backend("reference"):
        expected = outputs_and_grads(case, dy=one.expand(first(cell)[0].shape))
    assert_same(found, expected, close=True)


def empty(cell: Cell) -> None:
    """A batch of none: outputs of its shape, gradients of 0."""
    case = cell.case(dict(B=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of statistics over nothing
        dy = torch.ones((), dtype=cell.dtype, device=cell.lane.device)  # as of a sum
        found = outputs_and_grads(case, dy=dy)
        shapes = [t.shape for t in by_reference(case)(*case.tensors.values())]
    assert [t.shape for t in found[: len(shapes)]] == shapes
    for t, g in zip(case.tensors.values(), found[len(shapes) :]):
        assert g.shape == t.shape and g.dtype == t.dtype and not g.any()


def each_alone(cell: Cell) -> None:
    """Each gradient is that of all of them: to the bit in C++, and to a few roundings where there
    is a compiled kernel for what is wanted, which may contract other products."""
    case = cell.case()
    count = len(case.tensors)
    outputs = len(first(cell)) - count
    # Under the interpreter every second of them, to save runs.
    alone = (
        [(i,) for i in range(count)] if cell.lane.isa else [range(0, count, 2), range(1, count, 2)]
    )
    for wanted in filter(len, alone):
        found = outputs_and_grads(case, wanted=tuple(wanted))[outputs:]
        for i, g in zip(wanted, found, strict=True):
            expected = first(cell)[outputs + i]
            most = 0.0
            if COMPILED and not cell.lane.isa and expected.numel():
                most = 8 * torch.finfo(g.dtype).eps * expected.abs().max()
            assert (g - expected).abs().le(most).all(), list(case.tensors)[i]


class Ops(TorchDispatchMode):
    """The calls of our ops, and of torch's gradient of a convolution: (op, arguments, results)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastvdm" or func is torch.ops.aten.convolution_backward.default:
            self.calls.append((func, args, out if isinstance(out, tuple | list) else (out,)))
        return out


def frozen(cell: Cell) -> None:
    """Guidance trains nothing: no gradient is computed but that of x."""
    case = cell.case()
    with Ops() as seen:
        outputs_and_grads(case, wanted=(0,))
    for func, _, results in seen.calls:
        if "_bwd" in func.name() or func.namespace == "aten":
            made = [t for t in results if t is not None and t.numel()]
            # The sources of a norm share one pass.
            assert len(made) <= 1 + ("x2" in case.tensors), (func, len(made))


def no_grad(cell: Cell) -> None:
    """The same bits without and with a graph; and no graph."""
    case = cell.case()
    with torch.no_grad():
        found = case(*(t.detach().requires_grad_() for t in case.tensors.values()))
    assert not any(t.requires_grad for t in found)
    assert_same(found, first(cell)[: len(found)])


def inference_mode(cell: Cell) -> None:
    with torch.inference_mode():
        case = cell.case()
        found = case(*case.tensors.values())
    assert_same(found, first(cell)[: len(found)])


def autocast(cell: Cell) -> None:
    """The dtype and the error of plain torch; gradients in the dtype of their tensors."""
    case, low = cell.case(dtype=FP32), BF16 if cell.lane.backend == "cpu" or COMPILED else FP16
    leaves = [t.requires_grad_(cell.row.gradient) for t in case.tensors.values()]
    with torch.autocast(cell.lane.device, low):
        found = case(*leaves)
        plain = by_reference(case)(*(t.detach() for t in leaves))
    wide = by_reference(case)(*(t.detach().double() for t in leaves))
    if cell.row.gradient:
        gradients = torch.autograd.grad(found[0], leaves, seed_of(found[0]))
        assert all(g.dtype == FP32 and g.isfinite().all() for g in gradients)
    for a, b, c in zip(found, plain, wide):
        assert_close3(a, b, c)


def second_backward(cell: Cell) -> None:
    """Refused in plain words, or right; never silently wrong."""
    case, dtype = cell.case(), cell.dtype

    def twice(leaves):
        y = case(*leaves)[0]
        once = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in once), leaves)

    def leaves_of(dtype):
        return [t.detach().to(dtype).requires_grad_() for t in case.tensors.values()]

    try:
        found = twice(leaves_of(dtype))
    except RuntimeError as error:
        assert "double backward" in str(error)
        return
    with use_backend("reference"):
        for a, b in zip(found, twice(leaves_of(FP64))):
            assert max_error(a, b) < 1e-3


def no_backward(cell: Cell) -> None:
    """An op without a gradient says so."""
    case = cell.case()
    with pytest.raises(RuntimeError, match="use_backend"):
        case(*(t.requires_grad_() for t in case.tensors.values()))[0].sum().backward()


def fullgraph(cell: Cell) -> None:
    """One graph, the same for another number of frames, with what the eager call gives. (Of a float
    by default, as eps is, dynamo first makes an input, and then compiles once more.)"""
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call = cell.case()

    def run(named, rest):
        out = call.row.fn(**named, **rest)
        return out if isinstance(out, tuple) else (out,)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    # Of no other extent: dynamo takes equal sizes for one.
    for frames in (11, 13) if cell.row.sizes["F"] < 32 else (41, 43):
        case = cell.case(dict(F=frames))
        case.rest |= {} if "stats" in case.rest else case.row.derived(case.tensors, case.rest)
        found = []
        for fn in (compiled, run):
            leaves = {
                n: t.detach().requires_grad_(cell.row.gradient) for n, t in case.tensors.items()
            }
            out = fn(leaves, case.rest)
            g = ()
            if cell.row.gradient:
                g = torch.autograd.grad(out[0], list(leaves.values()), seed_of(out[0]))
            found.append([*(t.detach() for t in out), *g])
        assert_same(*found, close=True)
        counts.append(counter.frame_count)
    assert counts in ([1, 1], [2, 2])


def opcheck(cell: Cell) -> None:
    """``torch.library.opcheck`` of every op that the call and its backward run."""
    case = cell.case()
    with Ops() as seen:
        outputs_and_grads(case)
        if cell.row.gradient and cell.lane.isa:
            outputs_and_grads(case, wanted=(0,))
    ours = [(func, args) for func, args, _ in seen.calls if func.namespace == "fastvdm"]
    # Traced once an op: elsewhere only what the launchers return.
    quick = cell.name not in TRACED or (cell.lane.backend == "triton" and "cpu" in cell.row.kernels)
    for func, args in ours:
        trained = cell.row.gradient and func.name().endswith("_fwd")
        leaves = [
            t.detach().clone(memory_format=torch.preserve_format).requires_grad_(
                trained and t.is_floating_point() and i not in _untrained(func)
            ) if isinstance(t, Tensor) else t
            for i, t in enumerate(args)
        ]  # fmt: skip
        if quick:
            torch.library.opcheck(func, leaves, test_utils=("test_schema", "test_faketensor"))
        else:
            opcheck_op(func, leaves)


def _untrained(func) -> set[int]:
    """Floating-point arguments that have no gradient."""
    beside = ("dropout_mask", "mean", "rstd", "rotary")
    return {i for i, a in enumerate(func._schema.arguments) if a.name in beside}


def gradcheck(cell: Cell) -> None:
    """Finite differences through the kernels, in fp64."""
    case = cell.case(dtype=FP64)
    leaves = [t.requires_grad_() for t in case.tensors.values()]
    assert torch.autograd.gradcheck(case.first, leaves, fast_mode=True)


def transforms(cell: Cell) -> None:
    """jvp, vmap and the gradients of each sample are the reference's: a kernel would drop them."""
    from torch.func import grad, jvp, vmap

    case = cell.case(dtype=FP32)
    x, *rest = case.tensors.values()
    tangent, samples = torch.randn_like(x), torch.stack((x, 2 * x, -x))

    def fn(x):
        return case.first(x, *rest)

    def all_of_them():
        loss = grad(lambda x: fn(x).square().mean())
        return *jvp(fn, (x,), (tangent,)), vmap(loss)(samples), vmap(fn)(samples)

    found = all_of_them()
    assert_same(found, by_reference(all_of_them)())
    assert found[1].abs().max() > 1e-3


def not_a_number(cell: Cell) -> None:
    """A NaN, as CPUs write it and as GPUs do, or an infinity in x: those of the reference in every
    result. Minimum and maximum instructions return one operand where the other is NaN."""
    # The reference in fp32: products of torch's in bf16 differ by the CPU (AMX has 0 times inf).
    of_gpu = torch.tensor(-1, dtype=torch.int32).view(FP32)
    values = (math.nan, of_gpu, math.inf, -math.inf)[:: 1 if cell.lane.isa else 2]
    for dtype in (FP32, BF16, FP16) if cell.lane.isa else (BF16,):
        case = cell.case(dtype=dtype)
        # Beyond the features that it turns C++ turns them by 0, and 0 times inf is NaN.
        case.rest.pop("rotary", None)
        # Small, so that no probability is 0 in the reference's 16 bits, where 0 times inf is NaN.
        x, *rest = (t / 4 for t in case.tensors.values())
        at = [tuple(n // 2 for n in x.shape), tuple(n - 1 for n in x.shape)]
        if x.ndim == 7:  # q, k and v
            at += [(*at[0][:4], i, *at[0][5:]) for i in (0, 2)]
        for place in at:
            for value in values:
                tensors = [x.clone(), *rest]
                tensors[0][place] = value
                found = outputs_and_grads(case, tensors)
                with use_backend("reference"):
                    expected = outputs_and_grads(case, [t.float() for t in tensors])
                for i, (a, b) in enumerate(zip(found, expected)):
                    said = f"{value} at {place}, {dtype}: result {i}"
                    assert torch.equal(a.isnan(), b.isnan()), said
                    assert torch.equal(a.isinf(), b.isinf()), said


def large(cell: Cell) -> None:
    """x near the largest number of fp16, whose squares and products are beyond it: what fits into
    fp16 is right, and the gradient of x finite. (Not right: where products cancel, it has the
    rounding of the terms.)"""
    case = cell.case(dtype=FP16)
    tensors = list(case.tensors.values())
    tensors[0] = tensors[0] * (2.0**14 / tensors[0].abs().max().item())
    with poison_empty():
        *found, gradient = outputs_and_grads(case, tensors, wanted=(0,))
    assert gradient.isfinite().all()
    exact = by_reference(case)(*(t.double() for t in tensors))
    for i, (a, b) in enumerate(zip(found, exact, strict=True)):
        fits = b.abs() < torch.finfo(FP16).max
        assert fits.any()
        assert (a - b)[fits].abs().max() <= 0.02 * b[fits].abs().max(), f"output {i}"


def wrong(cell: Cell, error, text: str, change: Callable[[str, Tensor], object]) -> None:
    """The call with each tensor changed in turn fails with this error, before anything runs."""
    case = cell.case()
    for i, (name, t) in enumerate(case.tensors.items()):
        tensors: list = list(case.tensors.values())
        changed = change(name, t)
        if changed is None:
            continue
        tensors[i] = changed
        # A composition hands its norm the weight that it calls norm_weight.
        said = f"(norm_)?{name.removeprefix('norm_')}"
        with pytest.raises(error, match=text.format(said)):
            case.row.fn(**dict(zip(case.tensors, tensors)), **_rest(case))


def _rest(case: Case) -> dict:
    return case.rest | ({} if "stats" in case.rest else case.row.derived(case.tensors, case.rest))


def wrong_sizes(cell: Cell) -> None:
    def longer(name, t):
        # D may be any where nothing else has it.
        return None if name == "qkv" else t.new_zeros((*t.shape[:-1], t.shape[-1] + 1))

    def flatter(name, t):
        return None if (cell.row.op, name) == ("linear", "x") else t[0]

    for change in (longer, flatter):
        wrong(cell, ValueError, "must|takes|has", change)


def integers(cell: Cell) -> None:
    wrong(cell, TypeError, "must|is torch", lambda n, t: t.int())


def another_device(cell: Cell) -> None:
    x = next(iter(cell.row.tensors))
    wrong(cell, ValueError, "^{} must be on", lambda n, t: None if n == x else t.to("meta"))


def no_tensor(cell: Cell) -> None:
    """None where a tensor is needed, a number in the place of any."""
    needed = set(cell.row.tensors) - cell.row.optional()
    wrong(cell, TypeError, "^{} must be a tensor, got ", lambda n, t: 0.5)
    case = cell.case()
    given = {**case.tensors, **_rest(case)}
    beside = [n for n, t in case.rest.items() if isinstance(t, Tensor)]
    for name, value in (*((n, None) for n in needed), *((n, 0.5) for n in beside)):
        said = (
            "[a-z_]+'s slot" if name.endswith("slot") else f"(norm_)?{name.removeprefix('norm_')}"
        )
        with pytest.raises(TypeError, match=f"^{said} must be a tensor, got "):
            case.row.fn(**given | {name: value})


def another_dtype(cell: Cell) -> None:
    """A tensor of another dtype: the same result dtype, or a refusal, as without kernels."""
    case = cell.case(dtype=FP32)

    def outcome(tensors):
        try:
            return case.row.fn(**dict(zip(case.tensors, tensors)), **_rest(case))
        except TypeError as error:
            return str(error)

    for i in range(len(case.tensors)):
        for dtype in (FP16, FP64)[: 2 if cell.lane.isa else 1]:
            tensors = list(case.tensors.values())
            tensors[i] = tensors[i].to(dtype)
            with use_backend(cell.lane.backend, strict=False), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fp64 is the reference's
                found = outcome(tensors)
            expected = by_reference(outcome)(tensors)
            for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (found, expected))):
                kinds = [t.dtype if isinstance(t, Tensor) else t for t in (a, b)]
                assert kinds[0] == kinds[1], f"{list(case.tensors)[i]} in {dtype}"


def cost(cell: Cell) -> None:
    """torch's FLOP counter sees the products of the forward."""
    from torch.utils.flop_counter import FlopCounterMode

    case, counts = cell.case(), []
    for fn in (case, by_reference(case)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            fn(*case.tensors.values())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


CHECKS: dict[str, Callable[[Cell], None]] = {
    f.__name__: f
    for f in (
        parity, mixed, poison, exact, bit_equal, threads, strides, expanded_dy, empty, each_alone,
        frozen, no_grad, inference_mode, autocast, second_backward, no_backward, fullgraph,
        opcheck, gradcheck, transforms, not_a_number, large, wrong_sizes, integers, another_device,
        no_tensor, another_dtype, cost,
    )
}  # fmt: skip
# What is arithmetic, so that another instruction set may do it wrong.
ON_EACH_ISA = ("parity", "mixed", "exact", "bit_equal", "threads", "not_a_number", "large")
BACKENDS = ("triton",) if EMULATED else ("cpu", "triton")


def reason(name: str, check: str, backend: str) -> str | None:
    """Why a cell has no test."""
    row = ROWS[name]
    for key in (check, f"{check}-{backend}"):
        if key in row.without:
            return row.without[key]
    if backend not in row.kernels and backend == "triton":
        return "no Triton kernel"
    if check == "no_backward" and row.gradient:
        return "it has a gradient"
    if check == "fullgraph" and backend == "triton" and "cpu" in row.kernels:
        return "the graph of the C++ lane but for a name: ops are opaque"
    if check == "mixed" and not row.mixed:
        return "one dtype throughout, or autocast's"
    if check == "gradcheck" and (backend == "cpu" or COMPILED):
        return "fp64 is the reference's there"
    if check == "bit_equal" and backend == "triton" and not COMPILED:
        return "the interpreter runs one program after the other"
    own = backend in row.kernels
    if check == "threads" and not (own and backend == "cpu"):
        return "of the C++ kernels"
    if check == "not_a_number" and not (own and (backend == "cpu" or COMPILED)):
        return "of compiled kernels"
    return None


def lanes(check: str, name: str, backend: str) -> list[Lane]:
    if backend == "triton":
        return [Lane("triton")]
    own = "cpu" in ROWS[name].kernels
    return [Lane("cpu", isa) for isa in cpu_isas()[: None if own and check in ON_EACH_ISA else 1]]


def dtypes(cell: Cell, edge: str) -> tuple[torch.dtype, ...]:
    """Of parity. The interpreter truncates bf16; fp16 is emulated."""
    if cell.lane.backend == "cpu":
        return (FP32, BF16) if edge else (FP32, BF16, FP16)
    if COMPILED:
        return (FP32, FP16, BF16)
    return (cell.row.dtype,)


# The first row of each function: a graph does not depend on what an op is given.
TRACED = {(row.op, row.function): name for name, row in reversed(ROWS.items())}.values()
# What is of an op and not of who runs it: where C++ has shown it, once is enough. gradcheck is of
# the kernels, whose gradients are parity's, too.
OF_THE_OP = (
    "second_backward", "no_grad", "inference_mode", "another_dtype", "wrong_sizes", "integers",
    "another_device", "no_tensor", "cost", "transforms",
)  # fmt: skip


def slow(name: str, check: str, backend: str) -> bool:
    """Part of ``make test-all`` alone, emulated of ``make emulate-gpu``, but for parity in bf16. On
    a GPU nothing takes long."""
    if EMULATED:
        return True
    if GPU or (backend == "cpu" and check != "fullgraph"):
        return False
    if check == "fullgraph":
        return backend == "triton" or name not in TRACED
    if check in ("gradcheck", "large"):
        return True
    return check in OF_THE_OP and "cpu" in ROWS[name].kernels


def cells() -> Iterator:
    for name, row in ROWS.items():
        for check in CHECKS:
            for backend in BACKENDS:
                if reason(name, check, backend) is not None:
                    continue
                for lane in lanes(check, name, backend):
                    cell = Cell(name, lane)
                    label = f"{name}-{check}-{lane}"
                    if check != "parity":
                        marks = [pytest.mark.slow] * slow(name, check, backend)
                        yield pytest.param(cell, CHECKS[check], {}, id=label, marks=marks)
                        continue
                    own = row.cpu_edges if backend == "cpu" else row.tiles if COMPILED else {}
                    more = own if backend in row.kernels else {}
                    for edge in ("", *row.edges, *more):
                        for dtype in dtypes(cell, edge):
                            kind = str(dtype).removeprefix("torch.")
                            late = EMULATED and (dtype != BF16 or edge in row.edges)
                            yield pytest.param(
                                cell, parity, dict(dtype=dtype, edge=edge),
                                id=f"{label}-{kind}-{edge or 'main'}",
                                marks=[pytest.mark.slow] * late,
                            )  # fmt: skip


@pytest.mark.parametrize("cell, check, how", [*cells()])
def test_suite(cell, check, how):
    if cell.lane.isa:
        with use_cpu_isa(cell.lane.isa), use_backend("cpu", strict=True):
            check(cell, **how)
    else:
        with use_backend("triton", strict=True):
            check(cell, **how)


# -- the table is whole ---------------------------------------------------------------------------


def test_every_public_op_has_a_row():
    files = Path(sys.modules["fastvdm.ops"].__path__[0]).glob("[!_]*.py")
    assert {p.stem for p in files} == {row.op for row in ROWS.values()}
    assert set(registered_ops()) <= {row.function for row in ROWS.values()}
    for name, row in ROWS.items():
        assert name.split("/")[0] == row.op and ROWS[name].tensors


def test_every_reason_is_of_a_check():
    for name, row in ROWS.items():
        for key, why in row.without.items():
            check, _, backend = key.partition("-")
            assert check in CHECKS and backend in ("", *BACKENDS) and len(why) > 9, (name, key)


def test_every_op_is_known():
    """What torch.library has of ours is what the table's files define."""
    ours = {n for n in BODIES if "_test_" not in n}
    assert len(ours) > 20
    stems = {row.op for row in ROWS.values()} | {row.function for row in ROWS.values()}
    for name in ours:
        assert any(name.startswith(s) for s in stems), name


def test_the_matrix_says_what_passed_and_what_did_not_run():
    text = matrix({("linear/linear", "parity", "cpu"): {"passed"}})
    assert "linear/linear\n  parity           cpu [" in text and "cpu: ['not run']" in text

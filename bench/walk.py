"""What a forward or a training step of a network launches on a GPU, on any machine, with the bytes
that each launch moves and the FLOPs of matrix products.

    walk(NETS["ucf101"], batch=1)

The network runs on the fake tensors of ``network_launches``. The bytes of a launch are those of its
tensors, each read or written once. Repeated reads within a launch come from a cache and are not
counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from unittest import mock

import torch
from network_launches import Case, Net
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastvdm.ops._call import BODIES
from fastvdm.ops._cost import FORMULAS, Cost
from fastvdm.runtime.device import Facts, pretend

_FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "sym_size"}
# Names in a table, by the name of torch's op; all others are "other".
_KINDS = {
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "conv2d": "convolution",
    "linear": "product",
    "mm": "product",
    "addmm": "product",
    "addmm_": "product",
    "bmm": "product",
    "_scaled_dot_product_flash_attention": "axis_attention",
    "cat": "concatenation",
    "clone": "copy",
    "copy_": "copy",
    "_to_copy": "copy",
    "add": "addition",
    "add_": "addition",
    "sum": "sum",
}
_SMALL = 1 << 16  # bytes; below, an op is "tiny" and only its launch counts


class Work(NamedTuple):
    """One launch: a kernel of ours such as "norm_act.group_fwd", or "aten.cat"."""

    name: str
    bytes: int
    flops: int = 0

    @property
    def kind(self) -> str:
        """The name in a table."""
        own, _, op = self.name.partition(".")
        if own != "aten":
            return own
        found = _KINDS.get(op, "other")
        return (
            found
            if found in ("convolution", "product", "axis_attention") or self.bytes > _SMALL
            else "tiny"
        )


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes that the tensors occupy, each counted once; a broadcast dimension is read once."""
    seen = {id(t): t for t in tensors}
    return sum(_moved(t) for t in seen.values())


def _moved(t: Tensor) -> int:
    sizes = zip(t.shape, t.stride())
    return t.element_size() * math.prod(n if step else 1 for n, step in sizes)


class _Ours:
    """Bodies of our ops that record what they launch; the FLOPs go to an op's first launch."""

    def __init__(self) -> None:
        self.flops = 0

    def bodies(self) -> dict[str, Callable[..., Any]]:
        return {name: self._counting(name, body) for name, body in BODIES.items()}

    def _counting(self, name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        formula = FORMULAS.get(f"fastvdm::{name}")
        schema = getattr(torch.ops.fastvdm, name).default._schema
        names = [a.name for a in schema.arguments]

        def call(*args: Any) -> Any:
            shapes = [tuple(a.shape) if isinstance(a, Tensor) else a for a in args]
            cost = formula(**dict(zip(names, shapes))) if formula and args[-1] == "triton" else 0
            self.flops += cost.flops if isinstance(cost, Cost) else cost
            return body(*args)

        return call

    def take(self) -> int:
        found, self.flops = self.flops, 0
        return found


class _Ops(TorchDispatchMode):
    def __init__(self, found: list[Work]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given = list(_tensors((*args, *kwargs.values())))
        made = list(_tensors([out]))
        if name in _FREE or not made or _is_view(func, made, given):
            return out
        if not any(t.is_cuda for t in made):
            return out
        packet = torch.ops.aten.addmm if name == "addmm_" else func.overloadpacket
        count = flop_registry.get(packet)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        self.found.append(Work(f"aten.{name}", _bytes([*given, *made]), int(flops)))
        if name == "addmm" and args[0].ndim > 1:  # cuBLAS adds in place, so it makes a copy
            self.found.append(Work("aten.clone", 2 * _bytes(made)))
        return out


def _is_view(func: Any, made: list[Tensor], given: list[Tensor]) -> bool:
    """Whether an op only makes a view; an op that writes in place does work."""
    if func._schema.is_mutable:
        return False
    storages = {t.untyped_storage()._cdata for t in given}
    return all(t.untyped_storage()._cdata in storages for t in made)


def walk(net: Net, batch: int, gpu: Facts, dtype: str = "bf16", train: bool = False) -> list[Work]:
    """The launches of one forward without gradients, or of a training step (forward, loss,
    gradients of all weights; no optimizer), in order."""
    from launches import NoDevice
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    found: list[Work] = []
    ours = _Ours()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        op = kernel.fn.__module__.removeprefix("fastvdm.kernels.").split(".")[0]
        name = kernel.fn.__name__.strip("_").removesuffix("_kernel")
        tensors = [getattr(a, "base", a) for a in (*args, *options.values())]
        found.append(Work(f"{op}.{name}", _bytes(_tensors(tensors)), ours.take()))

    def listening() -> _Ops:
        found.clear()
        return _Ops(found)

    driver.set_active(NoDevice(gpu.capability))
    # Weights are prepared once, so only the launches of the second forward count.
    case = Case(net, dtype, batch)
    run = mock.patch.object(JITFunction, "run", launch)
    with run, mock.patch.dict(BODIES, ours.bodies()), pretend(gpu):
        if train:
            case.run("train", listening)
        else:
            case.forward(lambda: _Ops(found), found.clear)
    return found


def summary(works: Iterable[Work], key: Callable[[Work], str] = lambda w: w.kind) -> str:
    """Launches, megabytes and GFLOP by kind, the most launches first."""
    launches: Counter[str] = Counter()
    moved: Counter[str] = Counter()
    flops: Counter[str] = Counter()
    for w in works:
        for count, n in ((launches, 1), (moved, w.bytes), (flops, w.flops)):
            count[key(w)] += n
    rows = [f"{'':28}{'launches':>9}{'MB':>10}{'GFLOP':>9}"]
    for name, n in [*launches.most_common(), ("all", launches.total())]:
        m = moved.total() if name == "all" else moved[name]
        p = flops.total() if name == "all" else flops[name]
        rows.append(f"{name:28}{n:9}{m / 1e6:10.1f}{p / 1e9:9.1f}")
    return "\n".join(rows)

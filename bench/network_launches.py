"""What whole networks launch on a GPU, on any machine: calls for ``launches.captured``.

    captured(network_calls("UNet3D(64)", dtypes=("bf16",)), H100)

A network is built and run on fake tensors that claim to be on "cuda". Ops, autograd and autocast
choose as on a GPU, shapes and strides are those of torch's own kernels, and nothing is computed.
``fake_gpu`` is all that replaces the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from calls import Call
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode

from fastvdm import UNet3D
from fastvdm.diffusion.condition import Condition
from fastvdm.diffusion.denoiser import Denoiser, evaluating, input_gradient
from fastvdm.diffusion.given import Given
from fastvdm.diffusion.plan import Row
from fastvdm.diffusion.run import Noise, Run
from fastvdm.layers import embedding, kept
from fastvdm.ops import _call, _op
from fastvdm.runtime import dispatch
from fastvdm.unet.config import PRESETS, RECIPES

_CUDA, _META = 1, 14  # indices in c10's table of device guards, c10/core/DeviceType.h


@dataclass(frozen=True)
class Net:
    """A network and its video: (frames, height and width)."""

    make: Callable[[], nn.Module]
    frames: int
    size: int


NETS: dict[str, Net] = {
    "UNet3D(64)": Net(lambda: UNet3D(64), 16, 64),
    "UNet3D(64, rms)": Net(lambda: UNet3D(64, norm="rms"), 16, 64),
    "UNet3D(256)": Net(lambda: UNet3D(256), 16, 64),
} | {
    name: Net(partial(UNet3D.from_preset, name), RECIPES[name]["num_frames"], config.image_size)
    for name, config in PRESETS.items()
    if config.image_size is not None
}
DTYPES = "bf16", "autocast", "fp32"  # bf16 weights; fp32 weights with bf16 autocast; fp32
WAYS = "sample", "guided", "train"


@contextlib.contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Tensors without data on "cuda". Ops take the path of a GPU down to Triton's launchers, and
    gradients are computed in this thread, which listens to the launches."""
    _guard_cuda()
    gradient = mock.patch.object(torch.autograd, "grad", _grad)
    # Relative to the start of the storage, which CUDA's allocator aligns to more than Triton needs.
    place = mock.patch.object(
        FakeTensor, "data_ptr", lambda t: t.storage_offset() * t.element_size(), create=True
    )
    # Otherwise the mode that makes the tensors would count as one that listens to ops.
    unheard = [mock.patch.object(file, "observed", lambda *_: False) for file in (_call, _op)]
    here = mock.patch.object(_call, "_on_device", lambda launch: launch)
    able = mock.patch.object(dispatch, "no_launch", lambda: None)
    # The memory format of cuDNN's output, which a torch without CUDA does not know.
    layout = mock.patch.object(torch._C, "_conv_determine_backend_memory_format", _layout)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Tables that a network makes once; here they must be fake tensors too.
    tables = [
        *(mock.patch.object(file, "watched", lambda: False) for file in (kept, embedding)),
        mock.patch.object(kept, "_lasts", lambda *_: True),
        mock.patch.object(kept, "_TABLES", {}),
    ]
    fused = mock.patch.object(F, "scaled_dot_product_attention", _fused_attention)
    patches = fused, place, *unheard, here, able, layout, *tables
    with mode, gradient, contextlib.ExitStack() as stack, warnings.catch_warnings():
        for patch in patches:
            stack.enter_context(patch)
        warnings.simplefilter("ignore")
        yield mode


def _layout(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """The memory format of a convolution's output: channels last if one input is."""
    last = torch.channels_last
    found = any(t.is_contiguous(memory_format=last) for t in (x, weight))
    return last if found else torch.contiguous_format


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **_: Any) -> Tensor:
    """The attention that torch chooses on a GPU; without CUDA it would choose its composition."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]


def _guard_cuda() -> None:
    """A torch built without CUDA cannot give autograd the current stream, so CUDA gets the guard of
    devices without streams."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = "_ZN3c104impl26device_guard_impl_registryE"
    guards = (ctypes.c_void_p * (_META + 1)).in_dll(library, table)
    if guards[_CUDA] is None:
        guards[_CUDA] = guards[_META]


def _grad(outputs: Tensor, inputs: Any, grad_outputs: Tensor | None = None) -> tuple[Any, ...]:
    """``torch.autograd.grad`` of one output, node by node: torch's engine asks for a stream of the
    GPU and works in another thread."""
    leaves = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    start = torch.ones_like(outputs) if grad_outputs is None else grad_outputs
    root: Any = outputs.grad_fn
    waiting: dict[Any, dict[int, Tensor]] = {root: {outputs.output_nr: start}}
    pending = _users(root)
    ready, found = [root], {}
    while ready:
        node = ready.pop()
        given = waiting.pop(node, {})
        if hasattr(node, "variable"):  # AccumulateGrad: an input
            found[id(node.variable)] = given.get(0)
            continue
        made = _apply(node, given) if given else [None] * len(node.next_functions)
        for (after, place), grad in zip(node.next_functions, made):
            if after is None:
                continue
            if grad is not None:
                slot = waiting.setdefault(after, {})
                slot[place] = grad if place not in slot else slot[place] + grad
            pending[after] -= 1
            if pending[after] == 0:
                ready.append(after)
    return tuple(found.get(id(leaf)) for leaf in leaves)


def _users(root: Any) -> dict[Any, int]:
    """The number of edges that lead to each node below ``root``."""
    count, stack = {root: 0}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                if node not in count:
                    stack.append(node)
                count[node] = count.get(node, 0) + 1
    return count


def _apply(node: Any, given: dict[int, Tensor]) -> list[Tensor | None]:
    """One gradient for each of ``node.next_functions``."""
    grads = [given.get(i) for i in range(max(given) + 1)]
    with torch.no_grad():
        if not hasattr(node, "needs_input_grad"):  # torch's own
            made = node(*grads)
            return list(made) if isinstance(made, tuple) else [made]
        made = node.apply(*grads)
    made = made if isinstance(made, tuple) else (made,)
    # An autograd.Function returns one gradient per argument and has one edge per tensor.
    kept = iter([g for g, need in zip(made, node.needs_input_grad) if need])
    return [next(kept) if after is not None else None for after, _ in node.next_functions]


class Case:
    """A network on the fake GPU in one of DTYPES; each of WAYS is a call."""

    def __init__(self, net: Net, dtype: str, batch: int) -> None:
        self.net, self.dtype = net, dtype
        self.shape = (batch, 3, net.frames, net.size, net.size)
        known = torch.zeros(self.shape)[:, :, :5]
        self.given = Given(Condition(frames=known), self.shape, torch.device("cpu"), torch.float32)

    def run(self, way: str, listening: Callable[[], Any] | None = None) -> None:
        """Run one of WAYS; with ``listening`` once before, then again within ``listening()``."""
        with torch.device("meta"):
            model = self.net.make().to(memory_format=torch.channels_last)
        with fake_gpu(), self._autocast(), torch.device("cuda"):
            _place(model, torch.bfloat16 if self.dtype == "bf16" else torch.float32)
            for context in [contextlib.nullcontext, *([listening] if listening else [])]:
                with context():
                    if way == "train":
                        train(model, self.shape)
                    else:
                        self._sample(model, way == "guided")

    def forward(self, listening: Callable[[], Any], between: Callable[[], None]) -> None:
        """Two forwards without gradients, with a call of ``between`` in between; both within
        ``listening()``."""
        with torch.device("meta"):
            model: Any = self.net.make().to(memory_format=torch.channels_last).eval()
        with fake_gpu(), self._autocast(), torch.device("cuda"), torch.no_grad():
            kind = torch.bfloat16 if self.dtype == "bf16" else torch.float32
            _place(model, kind)
            cond = _condition(model, self.shape[0])
            given = {} if cond is None else {"cond": cond.to(kind)}
            x, time = torch.zeros(self.shape, dtype=kind), torch.rand(self.shape[0])
            with listening():
                model(x, time, **given)
                between()
                model(x, time, **given)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        """Enable autocast directly, because torch.autocast refuses a missing GPU."""
        before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", self.dtype == "autocast")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            yield
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])
            torch.clear_autocast_cache()

    def _sample(self, model: nn.Module, guided: bool) -> None:
        """The start and one step of ``fastvdm.diffusion.sample``, whose checks read data."""
        given, batch = self.given, self.shape[0]
        assert given.known is not None and given.slot is not None
        given.known = torch.empty(given.known.shape)
        given.slot = torch.empty(given.slot.shape, dtype=given.slot.dtype)
        coefs = torch.rand(batch, 4), torch.rand(batch, 9), torch.rand(batch, 9)
        row = Row(torch.rand(batch), *coefs, noisy=True, guided=guided)
        cond = _condition(model, batch)
        noise = Noise(batch, torch.device("cpu"), torch.Generator(), None)
        noise.rng = torch.zeros(batch, dtype=torch.int64)
        run = Run(
            Denoiser(model, cond=cond), given if guided else None, noise, "static", 0.9, False
        )
        with torch.no_grad(), evaluating(model), input_gradient(model):
            z = torch.zeros(self.shape)
            start: Any = mock.Mock(start=coefs[1])
            z = run.start(start, self.shape, z.device, z.dtype)
            run.advance(z, row)


def _place(model: nn.Module, dtype: torch.dtype) -> None:
    """Move weights and buffers from meta to the fake GPU, floating-point ones in ``dtype``."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, t in held.items():
                if t is not None:
                    kind = dtype if t.is_floating_point() else t.dtype
                    made = torch.empty_strided(t.shape, t.stride(), dtype=kind)
                    held[name] = nn.Parameter(made) if isinstance(t, nn.Parameter) else made


def _condition(model: Any, batch: int) -> Tensor | None:
    width = model.cond_dim
    return None if width is None else torch.rand(batch, width)


def train(model: Any, shape: Sequence[int]) -> None:
    """Forward, MSE, and the gradient of every weight."""
    model.train()
    kind = next(model.parameters()).dtype
    x = torch.rand(*shape, dtype=kind)
    cond = _condition(model, len(x))
    out = model(x, torch.rand(len(x)), **({} if cond is None else {"cond": cond.to(kind)}))
    loss = nn.functional.mse_loss(out.float(), torch.rand(*shape))
    torch.autograd.grad(loss, list(model.parameters()))


def network_calls(
    *names: str, dtypes: Sequence[str] = DTYPES, ways: Sequence[str] = WAYS
) -> list[Call]:
    """Calls of the named networks (default: all) in each of ``dtypes`` and ``ways``; a training
    step has eight videos."""

    def call(name: str, dtype: str, way: str) -> Call:
        batch = 8 if way == "train" else 1
        return network_call(f"{name} {dtype} {way}", NETS[name], dtype, way, batch)

    return [call(n, d, w) for n in names or NETS for d in dtypes for w in ways]


def network_call(name: str, net: Net, dtype: str, way: str, batch: int) -> Call:
    kind = torch.float32 if dtype == "fp32" else torch.bfloat16
    return Call(name, lambda _: partial(Case(net, dtype, batch).run, way), kind)


def network_of(call: str) -> str | None:
    """The name of the network that a call runs; None if it runs an op."""
    return next((name for name in NETS if call.startswith(f"{name} ")), None)

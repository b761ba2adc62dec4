"""The host's time for a forward when a GPU would wait for it, measured on any machine.

The network runs as on a GPU, down to Triton's launcher, on CPU tensors of its smallest video. This
includes its Python, its checks, torch's dispatcher and Triton's specialisation. Kernels, Triton's
own C and the library's convolutions and products do nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from launches import NoDevice
from network_launches import Net
from torch import Tensor

from fastvdm.layers import kept
from fastvdm.ops import _call
from fastvdm.runtime import dispatch
from fastvdm.runtime.device import Facts, pretend

FRAMES, SIZE = 16, 8


@contextlib.contextmanager
def host_alone(gpu: Facts) -> Iterator[list[str]]:
    """CPU tensors take the path of a GPU, and nothing is computed. Yields the launched kernels."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launched: list[str] = []

    def compile(kernel: Any, *_: Any) -> Any:
        key, name = _[0], kernel.fn.__name__
        cache = kernel.device_caches[gpu.capability][0]
        cache[key] = SimpleNamespace(
            launch_metadata=lambda *_: None, run=lambda *_: launched.append(name),
            function=None, packed_metadata=None,
        )  # fmt: skip
        return cache[key]

    def conv(x: Tensor, weight: Tensor, *_: Any, stride: int = 1, padding: int = 0) -> Tensor:
        n, _c, h, w = x.shape
        return x.new_empty((n, h // stride, w // stride, weight.shape[0])).permute(0, 3, 1, 2)

    def transposed(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        n, _c, h, w = x.shape
        return x.new_empty((n, 2 * h, 2 * w, weight.shape[1])).permute(0, 3, 1, 2)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    def here(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, device=None, **options: make(*args, **options)

    def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
        shape = list(tensors[0].shape)
        shape[dim] = sum(t.shape[dim] for t in tensors)
        return tensors[0].new_empty(shape)

    driver.set_active(NoDevice(gpu.capability))
    patches = [
        mock.patch.object(JITFunction, "_do_compile", compile),
        mock.patch.object(_call, "_on_device", lambda launch: launch),
        mock.patch.object(dispatch, "no_launch", lambda: None),
        mock.patch.object(Tensor, "is_cuda", True, create=True),
        mock.patch.object(Tensor, "device", torch.device("cuda", 0), create=True),
        mock.patch.object(kept, "_TABLES", {}),
        mock.patch.object(kept, "_lasts", lambda *_: True),
        *(mock.patch.object(torch, n, here(getattr(torch, n))) for n in ("arange", "empty")),
        mock.patch.object(torch, "cat", cat),
        mock.patch.object(F, "conv2d", conv),
        mock.patch.object(F, "conv_transpose2d", transposed),
        mock.patch.object(F, "linear", linear),
        mock.patch.object(Tensor, "addmm_", lambda y, *_: y),
    ]
    with contextlib.ExitStack() as stack, pretend(gpu):
        for patch in patches:
            stack.enter_context(patch)
        yield launched


def host_ms(net: Net, gpu: Facts, repeats: int = 15) -> float:
    """Milliseconds of CPU time for a forward without gradients on one thread: the minimum of
    ``repeats``, so that a busy machine has little influence."""
    model: Any = net.make().bfloat16().eval()
    x = torch.zeros(1, 3, FRAMES, SIZE, SIZE, dtype=torch.bfloat16)
    cond = None if model.cond_dim is None else torch.zeros(1, model.cond_dim).bfloat16()
    given = {} if cond is None else {"cond": cond}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with host_alone(gpu), torch.no_grad():
            return _least(lambda: model(x, torch.zeros(1), **given), repeats)
    finally:
        torch.set_num_threads(threads)


def _least(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        start = time.thread_time()
        call()
        found.append(time.thread_time() - start)
    return 1e3 * min(found)

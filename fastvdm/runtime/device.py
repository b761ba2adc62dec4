"""Facts about the device of a launch, and a way to pretend to have another one.

    facts(x.device).multiprocessors

    with pretend(H100):  # on any machine: what would run on an H100?
        pick_config(...), or a launcher whose launches are recorded

Importing this file imports no Triton and initialises no CUDA; nor does a query within ``pretend``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

# Whether Triton interprets its kernels in this process; it decides when kernels are defined. These
# are the words that Triton accepts as true.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@dataclass(frozen=True)
class Facts:
    """Facts about one device. If it is not a GPU (under the interpreter), only ``kind`` is set."""

    kind: str  # torch.device.type; "cuda" for every GPU
    name: str = ""  # reported by CUDA
    capability: int = 0  # 80, 90, 100 ...
    multiprocessors: int = 0

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"


A100 = Facts("cuda", "NVIDIA A100-SXM4-80GB", 80, 108)
H100 = Facts("cuda", "NVIDIA H100 80GB HBM3", 90, 132)
H200 = Facts("cuda", "NVIDIA H200", 90, 132)
B200 = Facts("cuda", "NVIDIA B200", 100, 148)

_pretended: ContextVar[Facts | None] = ContextVar("pretended", default=None)
# A launch must not pay for a driver call or for ``device.type``, which makes a string.
_known: dict[torch.device, Facts] = {}


@contextmanager
def pretend(gpu: Facts) -> Iterator[None]:
    """Within the block every device counts as ``gpu``, so launchers choose kernels, tiles and grids
    for it. The tensors stay where they are: the caller prevents the launches, or runs them under
    the interpreter.

    It holds only for this thread (context), not for threads started within the block, e.g. those in
    which autograd runs a backward on a real GPU.
    """
    token = _pretended.set(gpu)
    try:
        yield
    finally:
        _pretended.reset(token)


def facts(device: torch.device) -> Facts:
    """The facts of a device that holds tensors. A GPU without an index is the current one."""
    return _pretended.get() or _known.get(device) or _read(device)


def current_gpu() -> Facts | None:
    """The facts of the GPU to which a launch would go. None if kernels are interpreted, there is no
    GPU, or CUDA is not initialised."""
    pretended = _pretended.get()
    if pretended is not None or INTERPRETED or not torch.cuda.is_initialized():
        return pretended
    return facts(torch.device("cuda", torch.cuda.current_device()))


def _read(device: torch.device) -> Facts:
    if device.type != "cuda":
        return _known.setdefault(device, Facts(device.type))
    if device.index is None:  # not cached, because the current device can change
        return facts(torch.device("cuda", torch.cuda.current_device()))
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    read = Facts("cuda", found.name, capability, found.multi_processor_count)
    return _known.setdefault(device, read)

"""What a launcher may ask about the device that it launches on, and how to ask for another one.

    facts(x.device).multiprocessors

    with pretend(H100):  # on any machine: what would an H100 be given?
        pick_config(...), or a launcher whose launches are recorded

Importing this file imports no Triton and initialises no CUDA; nor does asking within ``pretend``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

# Whether Triton interprets its kernels in this process, which it decides when they are defined. The
# words are those that Triton takes for true.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")


@dataclass(frozen=True)
class Facts:
    """One device. Where it is no GPU (under the interpreter) there is only its kind."""

    kind: str  # as torch.device.type; "cuda" for every GPU
    name: str = ""  # as CUDA gives it
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
# A launch must cost neither a call of the driver nor ``device.type``, which makes a string.
_known: dict[torch.device, Facts] = {}


@contextmanager
def pretend(gpu: Facts) -> Iterator[None]:
    """Within the block every device is ``gpu``, so that launchers choose kernels, tiles and grids
    as they would there. Where the tensors are does not change: whoever asks keeps the launches
    from running, or runs them under the interpreter.

    It holds for this thread (context) alone: not in threads started within the block, so not in
    the backward that autograd runs on a real GPU.
    """
    token = _pretended.set(gpu)
    try:
        yield
    finally:
        _pretended.reset(token)


def facts(device: torch.device) -> Facts:
    """Of a device that holds tensors; a GPU without an index is the current one."""
    return _pretended.get() or _known.get(device) or _read(device)


def current_gpu() -> Facts | None:
    """Of the GPU that a launch would go to; None where kernels are interpreted, where there is no
    GPU, or where CUDA is not initialised yet."""
    pretended = _pretended.get()
    if pretended is not None or INTERPRETED or not torch.cuda.is_initialized():
        return pretended
    return facts(torch.device("cuda", torch.cuda.current_device()))


def _read(device: torch.device) -> Facts:
    if device.type != "cuda":
        return _known.setdefault(device, Facts(device.type))
    if device.index is None:  # not kept: the current one changes
        return facts(torch.device("cuda", torch.cuda.current_device()))
    found = torch.cuda.get_device_properties(device)
    capability = 10 * found.major + found.minor
    read = Facts("cuda", found.name, capability, found.multi_processor_count)
    return _known.setdefault(device, read)

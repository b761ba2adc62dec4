"""Runs Triton launches on CPU tensors by executing the PTX that Triton compiles for them.

Within ``emulate`` Triton specialises and compiles for a driver that has no device. Pointers are the
addresses of the tensors; every storage is an allocation, and every tensor passed is a view of it.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastvdm.runtime import dispatch
from fastvdm.runtime.device import INTERPRETED, Facts, pretend

from . import descriptors
from .decode import decode
from .engine import ALLOCATION, REPORT, STATISTICS, Launch, library
from .findings import HARMLESS, REFUSED, Finding, describe
from .program import Program

_MAX_REPORTS = 256
_INTEGERS = {"i1": 1, "u1": 1, "i8": 1, "u8": 1, "i16": 2, "u16": 2, "i32": 4, "u32": 4}


@dataclass
class Launched:
    """A launch that ran. ``ran``: CTAs that were executed, which the statistics are of;
    ``touched``: distinct bytes (read, written) of each allocation."""

    kernel: str
    grid: tuple[int, ...]
    ran: int
    num_warps: int
    shared: int
    program: Program
    statistics: np.ndarray
    touched: np.ndarray
    seconds: float


class NoDevice:
    """A Triton driver that names an architecture. Kernels are cached by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@dataclass
class Emulator:
    """``sample``: so many CTAs of each launch, spread over the grid, all by default; ``check``:
    races, bounds and uninitialised values, too; ``seed``: of the order of CTAs and warps, 0 as
    numbered; ``mutate``: (kernel, PTX) to PTX, to show that a defect is noticed."""

    arch: int
    sample: int | None = None
    check: bool = True
    seed: int = 1
    mutate: Callable[[str, str], str] | None = None
    findings: list[Finding] = field(default_factory=list)
    launches: list[Launched] = field(default_factory=list)

    def bad(self) -> list[Finding]:
        return [f for f in self.findings if f.kind not in HARMLESS]

    def launch(self, kernel: Any, name: str, grid: tuple[int, ...], bound: dict) -> None:
        meta = kernel.metadata
        if meta.num_ctas != 1 or meta.global_scratch_size:
            raise NotImplementedError(f"{name}: clusters or global scratch")
        ptx = kernel.asm["ptx"]
        program = decode(self.mutate(name, ptx) if self.mutate else ptx)
        if program.threads not in (0, meta.num_warps * 32):
            raise NotImplementedError(f"{name}: {program.threads} threads (warp specialisation)")
        values, tensors = self._arguments(kernel, name, bound)
        values += [_pack("*i8", 0)] * 2  # scratch for kernels that ask for it, and for a profiler
        self.execute(name, program, values, tensors, grid, meta.num_warps, meta.shared)

    def execute(
        self,
        name: str,
        program: Program,
        values: list[bytes],
        tensors: list[torch.Tensor],
        grid: tuple[int, ...],
        num_warps: int,
        shared: int,
    ) -> None:
        """``values``: the bytes of each parameter; ``tensors``: what the kernel may touch."""
        parameters = _parameters(name, program, values)
        allocations, views = _memory(tensors, program)
        grid = (*(int(g) for g in grid), 1, 1)[:3]
        ctas = self._order(int(np.prod(grid)))
        statistics = np.zeros(len(program.code), STATISTICS)
        reports = np.zeros(_MAX_REPORTS, REPORT)
        touched = np.zeros((max(1, len(allocations)), 2), np.uint64)
        constants = np.frombuffer(program.constants, np.uint8).copy()
        arrays = (program.code, program.operands, constants, parameters, allocations, views,
                  statistics, reports, touched, ctas)  # fmt: skip
        launch = Launch(
            *(a.ctypes.data for a in arrays), len(ctas), len(program.code), program.arena_bytes,
            len(program.registers), len(allocations), num_warps, shared, _MAX_REPORTS, 0,
            (ctypes.c_int32 * 3)(*grid), self.seed, int(self.check), program.local_bytes,
        )  # fmt: skip
        start = time.perf_counter()
        library().emu_run(ctypes.byref(launch))
        seconds = time.perf_counter() - start
        for r in reports[: launch.num_reports]:
            text = describe(r, program, allocations)
            self.findings.append(Finding(name, int(r["kind"]), int(r["count"]), text))
        self.launches.append(
            Launched(
                name, grid, len(ctas), num_warps, shared, program, statistics, touched, seconds
            )
        )

    def _order(self, total: int) -> np.ndarray:
        ctas = np.arange(total, dtype=np.int64)
        if self.sample and total > self.sample:
            return np.unique(np.linspace(0, total - 1, self.sample).astype(np.int64))
        if self.seed:
            np.random.default_rng(self.seed).shuffle(ctas)
        return ctas

    def _arguments(
        self, kernel: Any, name: str, bound: dict
    ) -> tuple[list[bytes], list[torch.Tensor]]:
        """The bytes of each argument as the driver would lay them out, and the tensors."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        tensors: list[torch.Tensor] = []
        values: list[bytes] = []
        boxes = list(getattr(kernel.metadata, "tensordesc_meta", None) or [])

        def add(kind: Any, value: Any) -> None:
            if isinstance(kind, tuple):
                for k, v in zip(kind, value):
                    add(k, v)
            elif isinstance(value, TensorDescriptor):
                meta = boxes.pop(0)
                box, swizzle = list(meta["block_size"]), int(meta["swizzle"])
                if faults := descriptors.faults(value, box, swizzle):
                    self.findings.append(Finding(name, REFUSED, 1, "; ".join(faults)))
                tensors.append(value.base)
                values.append(descriptors.encode(value, box, swizzle))
                values.extend(_pack("i32", s) for s in value.shape)
                values.extend(_pack("i64", s) for s in value.strides)
            elif kind != "constexpr":
                if isinstance(value, torch.Tensor):
                    tensors.append(value)
                    value = value.data_ptr()
                values.append(_pack(kind, value or 0))

        for argument, kind in kernel.src.signature.items():
            add(kind, bound[argument])
        return values, tensors


def _parameters(name: str, program: Program, values: list[bytes]) -> np.ndarray:
    """What the driver would copy: the values at their offsets."""
    sizes = [size for _, _, size in program.parameters]
    if [len(v) for v in values] != sizes:
        raise RuntimeError(f"{name}: arguments of {[*map(len, values)]} bytes for {sizes}")
    memory = np.zeros(program.parameter_bytes + 256, np.uint8)
    shift = -memory.ctypes.data % 128
    found = memory[shift : shift + program.parameter_bytes]
    for value, (_, offset, size) in zip(values, program.parameters):
        found[offset : offset + size] = np.frombuffer(value, np.uint8)
    return found


def _pack(kind: str, value: Any) -> bytes:
    """One kernel argument."""
    if kind in ("fp32", "f32"):
        return struct.pack("<f", value)
    if kind == "fp64":
        return struct.pack("<d", value)
    if kind == "fp16":
        return struct.pack("<e", value)
    if kind == "bf16":
        return struct.pack("<f", value)[2:]
    size = 8 if kind[0] == "*" else _INTEGERS.get(kind, 8)
    return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _memory(tensors: list[torch.Tensor], program: Program) -> tuple[np.ndarray, np.ndarray]:
    """The storages, and the views of them that the launch was given. Races are told apart by the
    grain of a storage, the logarithm of the bytes of its smallest elements."""
    storages: dict[int, tuple[int, int, list[tuple[int, int]]]] = {}
    for t in tensors:
        if t.numel() == 0:
            continue
        store, size = t.untyped_storage(), t.element_size()
        extent = (sum((n - 1) * s for n, s in zip(t.shape, t.stride())) + 1) * size
        _, grain, views = storages.get(store.data_ptr(), (0, 9, []))
        grain = min(grain, {1: 0, 2: 1}.get(size, 2))
        views = [*views, (t.data_ptr(), extent)]
        storages[store.data_ptr()] = (store.nbytes(), grain, views)
    for data in program.symbols.values():
        at = data.ctypes.data
        storages[at] = (data.nbytes, 0, [(at, data.nbytes)])
    allocations = np.zeros(max(1, len(storages)), ALLOCATION)
    table: list[tuple[int, int]] = []
    for a, (base, (size, grain, views)) in zip(allocations, storages.items()):
        a["base"], a["size"], a["grain"] = base, size, grain
        a["first_view"], a["num_views"] = len(table), len(views)
        table += views
    return allocations, np.array(table or [(0, 0)], np.uint64)


def _kernel_launch(emulator: Emulator) -> Callable[..., Any]:
    """What stands for ``JITFunction.run``."""
    from triton.runtime.jit import JITFunction

    compile = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = compile(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        options = kwargs | {"debug": kwargs.get("debug", self.debug), "instrumentation_mode": ""}
        bound = self.device_caches[emulator.arch][4](*args, **options)[0]
        size = grid(bound) if callable(grid) else grid
        if all(size):
            emulator.launch(kernel, self.__name__, size, bound)
        return kernel

    return run


@contextmanager
def emulate(arch: int = 90, *, multiprocessors: int = 2, **options: Any) -> Iterator[Emulator]:
    """Within the block the Triton backend takes CPU tensors and every launch is emulated.

    Args:
        arch: 80, 90 or 100.
        multiprocessors: what launchers are told that the GPU has; few, so that a program of a
            small launch walks over several tiles.
        options: of ``Emulator``.

    Raises:
        RuntimeError: Triton interprets in this process, or there is no C++ compiler.
    """
    if INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels have no PTX")
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from fastvdm.ops import _call

    library()
    emulator = Emulator(arch, **options)
    gpu = Facts("cuda", f"emulated sm_{arch}", arch, multiprocessors)
    with ExitStack() as stack:
        patch = lambda *a: stack.enter_context(mock.patch.object(*a))  # noqa: E731
        patch(driver, "_active", NoDevice(arch))
        patch(JITFunction, "run", _kernel_launch(emulator))
        # PTX is enough. A cache of its own: nobody else must find kernels without machine code.
        patch(CUDABackend, "make_cubin", lambda *a, **k: b"")
        cache = {"TRITON_CACHE_DIR": f"{knobs.cache.dir}-ptx"}
        stack.enter_context(mock.patch.dict(os.environ, cache))
        patch(dispatch, "no_launch", lambda: None)
        stack.enter_context(mock.patch.dict(dispatch._DEVICES, triton=("cuda", "cpu")))
        patch(_call, "_on_device", lambda launch: launch)
        stack.enter_context(pretend(gpu))
        yield emulator

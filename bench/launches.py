"""What calls launch, on any machine: each kernel with the types, constants and options from its
launcher, specialised by Triton itself for the arguments.

    for launch in captured(calls, H100):    # bench/calls.py, on tensors without data
        compiled(launch).asm["ptx"]

A driver that names an architecture but has no device replaces the GPU's, and a hook of Triton takes
each launch at the point of compilation: nothing is patched and nothing runs. The driver stays, so
this needs a process of its own, without TRITON_INTERPRET, which compiles nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from calls import Call

from fastvdm.kernels.tuned import choosing
from fastvdm.runtime.device import Facts, pretend


@dataclass(frozen=True)
class Launch:
    """A kernel as compiled for one launch. ``name`` consists of the kernel and the first of
    ``calls``, which all make the same launch."""

    name: str
    module: str
    function: str
    arch: int
    signature: dict[str, Any]
    constants: dict[tuple, Any]
    attributes: dict[tuple, Any]
    options: dict[str, Any]
    calls: list[str] = field(default_factory=list)

    @property
    def kernel(self) -> str:
        return self.name.split("/")[0]

    @property
    def apart_from_integers(self) -> str:
        """Equal for launches that differ only in Triton's specialisation of integers on 1 and on
        multiples of 16."""
        kernel = getattr(importlib.import_module(self.module), self.function)
        constant = {p.name for p in kernel.params if p.is_constexpr}
        given = {kernel.arg_names[place[0]]: value for place, value in self.constants.items()}
        whole = {name for name, kind in self.signature.items() if kind in ("i32", "i64")}
        whole |= {name for name, value in given.items() if name not in constant and value == 1}
        types = {n: kind for n, kind in self.signature.items() if n not in whole}
        values = {n: v for n, v in given.items() if n not in whole}
        return repr((self.module, self.function, types, values, sorted(self.options.items())))

    @property
    def uses_tma(self) -> bool:
        return any(str(kind).startswith("tensordesc") for kind in self.signature.values())


class NoDevice:
    """A Triton driver that can only compile; its device is an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def captured(calls: Iterable[Call], gpu: Facts, *, measured: bool = False) -> list[Launch]:
    """Each launch once, in the order of the calls, with analytic configurations or, if
    ``measured``, with those of the GPU's file in kernels/configs.

    Raises:
        RuntimeError: a call raised; the message names it.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    from triton import knobs
    from triton.runtime.driver import driver

    found: dict[tuple[str, str, str], Launch] = {}
    current = ""

    def take(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Return True, which tells Triton not to compile."""
        given = json.loads(compile["specialization_data"])["options"]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
        at = (fn.module, fn.name, key)
        if at not in found:
            op = fn.module.removeprefix("fastvdm.kernels.").split(".")[0]
            name = f"{op}.{fn.name.strip('_').removesuffix('_kernel')}/{current}"
            others = sum(m.name.startswith(name) for m in found.values())
            found[at] = Launch(
                f"{name} #{others + 1}" if others else name,
                fn.module,
                fn.name,
                gpu.capability,
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                options,
            )
        if current not in found[at].calls:
            found[at].calls.append(current)
        return True

    driver.set_active(NoDevice(gpu.capability))
    knobs.runtime.jit_cache_hook = take
    try:
        with pretend(gpu), nullcontext() if measured else choosing(lambda c: c.analytic):
            for call in calls:
                current = call.name
                try:
                    call.build(call.capture)()
                except Exception as error:
                    raise RuntimeError(f"{call.name}: {type(error).__name__}: {error}") from error
    finally:
        knobs.runtime.jit_cache_hook = None
    return list(found.values())


def _source(launch: Launch) -> Any:
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.function)
    return ASTSource(kernel, launch.signature, launch.constants, launch.attributes)


def compiled(launch: Launch, **options: Any) -> Any:
    """Triton's ``CompiledKernel``, with the assembler's output in ``metadata.ptxas_log``.
    ``options`` override those of the launch."""
    import triton
    from triton import knobs

    target = NoDevice(launch.arch).get_current_target()
    with knobs.nvidia.scope(), knobs.runtime.scope(), knobs.compilation.scope():
        knobs.nvidia.dump_ptxas_log = True
        knobs.runtime.add_stages_inspection_hook = _keep_log
        for _ in range(2):
            made = triton.compile(_source(launch), target=target, options=launch.options | options)
            if hasattr(made.metadata, "ptxas_log"):
                break
            knobs.compilation.always_compile = True  # the cache has it from a launch without a log
    return made


def _keep_log(backend: Any, stages: dict[str, Any], *_: Any) -> None:
    """Store the log, which Triton prints, in the metadata, which its cache keeps."""
    assemble = stages["cubin"]

    def cubin(source: str, metadata: dict[str, Any]) -> bytes:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            made = assemble(source, metadata)
        metadata["ptxas_log"] = log.getvalue()
        return made

    stages["cubin"] = cubin


def lowered(launch: Launch) -> None:
    """Run only Triton's front end, which refuses some code that Python (and thus the interpreter)
    accepts. It takes a tenth of the time."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    target = NoDevice(launch.arch).get_current_target()
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(launch.options))
    module = backend.get_module_map()
    _source(launch).make_ir(
        target, options, backend.get_codegen_implementation(options), module, context
    )

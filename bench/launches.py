"""What calls launch, on any machine: each kernel with the types, constants and options that its
launcher gives it, specialised by Triton itself for the arguments at hand.

    for launch in captured(calls, H100):    # bench/calls.py, on tensors without data
        compiled(launch).asm["ptx"]

A driver that names an architecture and has no device stands in for the GPU's, and a hook of Triton
takes each launch where it would be compiled: nothing is patched, nothing runs. The driver stays, so
this is for a process of its own, and not for one under TRITON_INTERPRET, which compiles nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from calls import Call

from fastvdm.kernels.tuned import choosing
from fastvdm.runtime.device import Facts, pretend


@dataclass(frozen=True)
class Launch:
    """A kernel as it is compiled for one launch. ``name`` is the kernel's and that of the first of
    ``calls``, which all launch the same."""

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
        """Equal for launches that differ in no more than how Triton specialises their integers on 1
        and on multiples of 16."""
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
    """A Triton driver for compiling alone; a device of it is an architecture."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def captured(calls: Iterable[Call], gpu: Facts) -> list[Launch]:
    """Each launch once, in the order of the calls, with analytic configurations.

    Raises:
        RuntimeError: a call raised; names it.
    """
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    from triton import knobs
    from triton.runtime.driver import driver

    found: dict[tuple[str, str, str], Launch] = {}
    current = ""

    def take(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """True, to Triton: do not compile."""
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
        with pretend(gpu), choosing(lambda choice: choice.analytic):
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
    """Triton's ``CompiledKernel``, what its assembler said as ``metadata.ptxas_log``. ``options``
    go before the launch's own."""
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
            knobs.compilation.always_compile = True  # from the cache, put there by a real launch
    return made


def _keep_log(backend: Any, stages: dict[str, Any], *_: Any) -> None:
    """Triton prints the log; into the metadata with it, which its cache keeps."""
    assemble = stages["cubin"]

    def cubin(source: str, metadata: dict[str, Any]) -> bytes:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            made = assemble(source, metadata)
        metadata["ptxas_log"] = log.getvalue()
        return made

    stages["cubin"] = cubin


def lowered(launch: Launch) -> None:
    """Through Triton's front end alone, which refuses what Python, and thus the interpreter, takes:
    a tenth of the time."""
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

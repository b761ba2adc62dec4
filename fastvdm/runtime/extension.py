"""Loads the optional C++ extension, or keeps the reason why not for ``fastvdm info``."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvdm.runtime import config

# csrc/build.py gives the same advice when it fails.
WITH_KERNELS = (
    'pip install "torch>=2.11" "setuptools>=77" && '
    "FASTVDM_BUILD_CPP=1 pip install --no-build-isolation ."
)
_BUILD = f"with a C++20 compiler, in fastvdm's source folder: {WITH_KERNELS}"


def lacks(name: str) -> str:
    """The reason if an extension exists but is older than this package."""
    return f"the C++ kernels are older than this package, {name} is not among them; {_BUILD}"


def _load() -> str | None:
    """Load ``fastvdm/_C*.so``; return why it is off, or None if it is loaded."""
    package = Path(__file__).parents[1]
    found = sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd"))
    if not found:
        return f"the C++ kernels are not built; {_BUILD}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} failed to load ({error}); {_BUILD}"
    if not hasattr(torch.ops.fastvdm_C, "set_output_pool_limit"):  # the latest addition
        return lacks("set_output_pool_limit")
    # Raises if this CPU or build lacks the FASTVDM_CPU_ISA that was asked for.
    torch.ops.fastvdm_C.set_cpu_isa(config.active.cpu_isa)
    torch.ops.fastvdm_C.set_packed_weights_limit(config.active.packed_weights_mb << 20)
    torch.ops.fastvdm_C.set_output_pool_limit(config.active.output_pool_mb << 20)
    return None


_reason = _load()


def reason_off() -> str | None:
    return _reason


def set_cpu_isa(name: str) -> str:
    """Run the C++ backend on the given instruction set: "auto", "amx", "avx512_bf16", "avx512",
    "avx2" or "portable".

    Returns:
        The instruction set now in force.

    Raises:
        RuntimeError: the extension is off, or this machine or build has no such path.
    """
    if _reason is not None:
        raise RuntimeError(f"the C++ extension is off: {_reason}")
    return torch.ops.fastvdm_C.set_cpu_isa(name)


def has_launcher(name: str) -> bool:
    """Whether the extension registers ``fastvdm_C::<name>``."""
    return _reason is None and hasattr(torch.ops.fastvdm_C, name)


# Evaluated once, so that dynamo traces a comparison of constants.
AMX = _reason is None and torch.ops.fastvdm_C.cpu_isa() == "amx"
EMULATED = tuple(
    dtype
    for dtype in (torch.bfloat16, torch.float16)
    if _reason is None and not torch.ops.fastvdm_C.cpu_has_native(dtype == torch.bfloat16)
)


def emulated(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch's library only emulates ``dtype`` on ``device`` and the C++ backend, which is
    faster, is available."""
    on = device.type == "cpu" and dtype in EMULATED
    return on and config.active.backend in ("auto", "cpu")

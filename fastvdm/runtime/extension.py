"""Loads the optional C++ extension; keeps the reason when there is none for ``fastvdm info``."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvdm.runtime.config import get_config

# csrc/build.py says the same when it fails.
WITH_KERNELS = (
    'pip install "torch>=2.11" "setuptools>=77" && '
    "FASTVDM_BUILD_CPP=1 pip install --no-build-isolation ."
)
_BUILD = f"with a C++20 compiler, in fastvdm's source folder: {WITH_KERNELS}"


def lacks(name: str) -> str:
    """The reason where an extension is there, but older than this package."""
    return f"the C++ kernels are older than this package, {name} is not among them; {_BUILD}"


def _load() -> str | None:
    """Load ``fastvdm/_C*.so``; returns why it is off, or None when it is loaded."""
    package = Path(__file__).parents[1]
    found = sorted(package.glob("_C*.so")) + sorted(package.glob("_C*.pyd"))
    if not found:
        return f"the C++ kernels are not built; {_BUILD}"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} failed to load ({error}); {_BUILD}"
    if not hasattr(torch.ops.fastvdm_C, "set_packed_weights_limit"):  # the latest addition
        return lacks("set_packed_weights_limit")
    # Raises where FASTVDM_CPU_ISA asks for what this CPU or build lacks.
    torch.ops.fastvdm_C.set_cpu_isa(get_config().cpu_isa)
    torch.ops.fastvdm_C.set_packed_weights_limit(get_config().packed_weights_mb << 20)
    return None


_reason = _load()


def reason_off() -> str | None:
    return _reason


def set_cpu_isa(name: str) -> str:
    """Run the C++ backend on the given instruction set: "auto", "amx", "avx512", "avx2" or
    "portable".

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

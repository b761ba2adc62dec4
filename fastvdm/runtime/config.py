"""Run-time configuration: read from ``FASTVDM_*`` at import; only ``use_backend`` changes it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

BACKENDS = ("auto", "reference", "triton", "cpu")
CPU_ISAS = ("auto", "amx", "avx512_bf16", "avx512", "avx2", "portable")


def _choice(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "auto").lower()
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0").lower()
    if value not in ("0", "1", "true", "false", ""):
        raise ValueError(f"{name} must be 0 or 1, got {value!r}")
    return value in ("1", "true")


def _count(name: str, default: int) -> int:
    value = os.environ.get(name, "") or str(default)
    if not value.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    return int(value)


@dataclass(frozen=True)
class Config:
    """An immutable snapshot of the settings; docs/environment.md describes each variable."""

    backend: str = "auto"  # FASTVDM_BACKEND: force one backend for every op
    strict: bool = False  # FASTVDM_STRICT: a fallback to the reference is an error
    cpu_isa: str = "auto"  # FASTVDM_CPU_ISA: cap the instruction set of the C++ backend
    packed_weights_mb: int = 2048  # FASTVDM_PACKED_WEIGHTS_MB: the C++ backend's weight cache
    output_pool_mb: int = 512  # FASTVDM_OUTPUT_POOL_MB: freed memory kept for new outputs

    @staticmethod
    def from_env() -> Config:
        return Config(
            backend=_choice("FASTVDM_BACKEND", BACKENDS),
            strict=_flag("FASTVDM_STRICT"),
            cpu_isa=_choice("FASTVDM_CPU_ISA", CPU_ISAS),
            packed_weights_mb=_count("FASTVDM_PACKED_WEIGHTS_MB", 2048),
            output_pool_mb=_count("FASTVDM_OUTPUT_POOL_MB", 512),
        )


active = Config.from_env()  # read as config.active, because use_backend rebinds it


@contextmanager
def use_backend(backend: str, *, strict: bool | None = None) -> Iterator[None]:
    """Context manager: force ``backend`` for every op, e.g. ``use_backend("reference")``.

    Args:
        backend: one of ``BACKENDS``; "auto" lets each op choose.
        strict: True makes a fallback to the reference an error; None keeps the current setting.

    Raises:
        ValueError: the name is not one of ``BACKENDS``.
    """
    global active
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    before = active
    active = replace(before, backend=backend, strict=before.strict if strict is None else strict)
    try:
        yield
    finally:
        active = before

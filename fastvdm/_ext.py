"""Loads the optional C++ extension; keeps the reason when there is none for ``fastvdm info``."""

from __future__ import annotations

from pathlib import Path

import torch


def _load() -> str | None:
    """Load ``fastvdm/_C*.so``; returns why it is off, or None when it is loaded."""
    found = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(
        Path(__file__).parent.glob("_C*.pyd")
    )
    if not found:
        return "not built (pip install with a C++ compiler and FASTVDM_BUILD_CPP=1)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"{found[0].name} failed to load: {error}"
    return None


_reason = _load()


def reason_off() -> str | None:
    return _reason


def has_launcher(name: str) -> bool:
    """Whether the extension registers ``fastvdm_C::<name>``."""
    return _reason is None and hasattr(torch.ops.fastvdm_C, name)

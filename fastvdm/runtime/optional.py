"""Imports of optional dependencies, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """Import ``module``, a dependency of the ``extra``, e.g. ``require("av", "video")``.

    Raises:
        ImportError: it is not installed; the message has the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # If an installed package lacks a dependency of its own, keep its message.
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise ImportError(
            f"this needs the package {module.split('.')[0]!r}: pip install 'fastvdm[{extra}]'"
        ) from error

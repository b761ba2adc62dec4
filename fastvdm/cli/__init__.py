"""The command ``fastvdm``: info, train, check, config, push, sample, extend, interpolate, upscale,
export.

``info`` needs no optional package; the other commands need the extra ``cli``.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

# Errors that a user can cause and fix: printed without a traceback.
_EXPECTED = (ValueError, TypeError, ImportError, OSError, FloatingPointError)


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code: 1 after an error, 2 for a wrong command line, 130
    after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        if arguments[:1] == ["info"]:
            from fastvdm import info

            return info.main(arguments[1:])
        with warnings.catch_warnings():
            warnings.showwarning = _one_line(warnings.showwarning)
            return _typer(arguments)
    except KeyboardInterrupt:
        print("fastvdm: interrupted", file=sys.stderr)
        return 130
    except _EXPECTED as error:
        if debug:
            raise
        print(f"fastvdm: {error}", file=sys.stderr)
        return 1
    except (RuntimeError, MemoryError) as error:
        if debug or not _is_memory(error):
            raise
        said = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2].rstrip(".")
        said = said or "no memory is left"
        print(
            f"fastvdm: out of memory: {said}. A smaller --batch-size (train: --accumulate keeps "
            "the batch of a step), --size or --frames takes less",
            file=sys.stderr,
        )
        return 1


def _is_memory(error: Exception) -> bool:
    """Whether it is of a GPU's memory, of a CPU's (torch has no type for that), or of numpy's."""
    texts = ("DefaultCPUAllocator: ", "Storage size calculation overflowed")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(text in str(error) for text in texts)


def _one_line(show: Any) -> Any:
    """Print our own warnings, and those at a caller in Typer, without their place in the code."""
    package = str(Path(__file__).parents[1])

    def shown(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
        if filename.startswith(package) or "typer" in Path(filename).parts:
            print(f"fastvdm: warning: {message}", file=sys.stderr)
        else:
            show(message, category, filename, *rest, **more)

    return shown


def _typer(arguments: list[str]) -> int:
    from fastvdm.runtime.optional import require

    try:
        require("typer", "cli")
    except ImportError as error:
        if arguments in ([], ["-h"], ["--help"]):
            print(f"{__doc__}\n{error}")
            return 0
        raise
    from fastvdm.cli import commands, training  # noqa: F401  they register themselves
    from fastvdm.cli.app import app

    try:
        code = app(arguments, standalone_mode=True, prog_name="fastvdm")
    except SystemExit as done:
        code = done.code
    return code if isinstance(code, int) else 0

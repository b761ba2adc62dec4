"""The command ``fastvdm``."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code. ``fastvdm info`` needs no optional package."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["info"]:
        from fastvdm import info

        return info.main(arguments[1:])
    return 2

"""Builds fastvdm, with the C++ extension if there is a compiler.

FASTVDM_BUILD_CPP=0 leaves the extension out; =1 makes a missing compiler an error. An sdist or
metadata alone need neither torch nor a compiler.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT))

from csrc.build import WITH_KERNELS, build_arguments, compiler  # noqa: E402


def extension() -> dict:
    """The arguments of ``setup()`` for the extension; empty if it is left out."""
    wanted = os.environ.get("FASTVDM_BUILD_CPP") or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTVDM_BUILD_CPP must be 0 or 1, got {wanted!r}")
    if wanted == "0":
        return {}
    if wanted == "auto" and compiler() is None:
        print(
            "fastvdm: no C++ compiler, so a package without the C++ kernels. With a compiler:\n"
            f"    {WITH_KERNELS}",
            file=sys.stderr,
        )
        return {}
    return build_arguments(
        sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp"))
    )


def packages() -> dict:
    """The path of ``fastvdm.kernels``: ``fastvdm/kernels``, a link to ``kernels/``. A clone without
    symbolic links, as git makes it on Windows, has a text file there; its sdist has nothing."""
    if (ROOT / "fastvdm" / "kernels").is_dir():
        return {}
    return {"package_dir": {"fastvdm": "fastvdm", "fastvdm.kernels": "kernels"}}


setup(**packages(), **extension())

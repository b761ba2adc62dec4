"""Build of fastvdm. The C++ extension is optional: a failed compile leaves a working package.

FASTVDM_BUILD_CPP=0 skips the CPU extension, =1 makes its failure an error; unset tries it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def extension() -> dict:
    """The libtorch stable-ABI extension, or nothing where torch or a compiler is missing."""
    wanted = os.environ.get("FASTVDM_BUILD_CPP", "auto")
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("**/*.cpp"))
    if wanted == "0" or not sources:
        return {}
    try:
        from csrc.build import build_arguments
    except ImportError as error:
        if wanted == "1":
            raise
        print(f"fastvdm: building without the C++ extension ({error})", file=sys.stderr)
        return {}
    return build_arguments(sources, required=wanted == "1")


sys.path.insert(0, str(ROOT))
setup(**extension())

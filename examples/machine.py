"""What a figure was taken on, in one line: it belongs beside every figure."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from pathlib import Path

import torch

import fastvdm
from fastvdm.info import collect

ROOT = Path(__file__).resolve().parents[1]


def processor() -> str:
    """The GPU, or the CPU's name with the instruction set that the C++ kernels run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = re.findall(r"^model name\s*: (.*)$", text, re.M)
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({collect()['cpu_isa'] or 'no C++ kernels'})"


def commit() -> str | None:
    """The commit of this checkout, with a ``+`` where files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe() -> str:
    """Processor, threads, versions, commit and date."""
    threads, at = torch.get_num_threads(), commit()
    parts = [
        processor(),
        f"{threads} thread{'s' if threads > 1 else ''}",
        f"torch {torch.__version__}",
        f"fastvdm {fastvdm.__version__}" + (f" ({at})" if at else ""),
        datetime.date.today().isoformat(),
    ]
    return " · ".join(parts)


if __name__ == "__main__":
    print(describe())

"""Importing fastvdm needs neither Triton, nor a compiler, nor a GPU, and touches none of them."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastvdm

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {"UNet3D", "accelerate", "convert_optimizer_state", "use_backend", "__version__"}

FORWARD = """
import torch
from fastvdm import UNet3D
y = UNet3D(8, dim_mults=(1, 2), attn_heads=2)(torch.randn(1, 3, 2, 4, 4), torch.tensor([1]))
assert y.shape == (1, 3, 2, 4, 4)
"""


def run(code: str, cwd: Path | None = None, **env: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("FASTVDM", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | env,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_public_names():
    assert set(fastvdm.__all__) == PUBLIC
    assert all(hasattr(fastvdm, name) for name in fastvdm.__all__)


def documented() -> set[str]:
    """The names of the package that the pages import in their Python, or say in their prose."""
    names = set()
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        text = page.read_text()
        names |= set(re.findall(r"`(fastvdm(?:\.\w+)+)[`(]", text))
        for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("fastvdm."):
                    names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(documented()))
def test_documented_names_are_there(name):
    pkgutil.resolve_name(name)


def test_a_checkout_that_is_not_installed_imports(tmp_path):
    code = "import fastvdm.kernels, fastvdm; print(fastvdm.__file__, fastvdm.kernels.__file__)"
    package, kernels = run(code, cwd=tmp_path, PYTHONPATH=str(ROOT)).split()
    assert Path(package) == ROOT / "fastvdm" / "__init__.py"
    assert Path(kernels).resolve() == ROOT / "kernels" / "__init__.py"


def test_import_touches_nothing_heavy():
    """Nor do the numbers of kernels/limits.py, or what a GPU is asked and pretended to be. (torch's
    FLOP counter would bring Triton.)"""
    heavy = (
        "triton", "transformers", "accelerate", "av", "matplotlib", "torchvision", "lightning",
        "torch.utils.flop_counter", "fastvdm.kernels.tuned",
    )  # fmt: skip
    out = run(f"""
import sys, torch, fastvdm, fastvdm.kernels.limits
from fastvdm.runtime.device import H100, current_gpu, facts, pretend
current_gpu()
with pretend(H100):
    assert facts(torch.device("cuda")) is current_gpu() is H100
print([m for m in {heavy!r} if m in sys.modules], torch.cuda.is_initialized())
""")
    assert out == "[] False\n"


@pytest.mark.parametrize("missing", ["triton", "_C", "both"])
def test_without(missing, tmp_path):
    """Blocked imports and an absent extension leave a working package."""
    block = ["import sys"]
    if missing in ("triton", "both"):
        block.append("sys.modules['triton'] = None")
    if missing in ("_C", "both"):
        block.append("import pathlib; pathlib.Path.glob = lambda self, pattern: iter(())")
    out = run(
        "\n".join(block)
        + FORWARD
        + "from fastvdm.runtime import dispatch\nprint(dispatch.explain('norm_act'))"
    )
    if missing != "triton":
        assert "not built" in out
    if missing != "_C":
        assert "triton is not installed" in out


def test_backend_variable_is_checked():
    with pytest.raises(AssertionError, match="FASTVDM_BACKEND must be one of"):
        run("import fastvdm", FASTVDM_BACKEND="gpu")
    run(FORWARD, FASTVDM_BACKEND="reference")

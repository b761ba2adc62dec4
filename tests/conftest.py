"""Without a GPU the Triton kernels run under the interpreter; a fallback is an error everywhere."""

from __future__ import annotations

import os
import sys

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before the tests could choose its interpreter")

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("FASTVDM_STRICT", "1")

import pytest  # noqa: E402

from fastvdm.testing import poison_empty  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps the precision of the first run of a process for all later ones."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture
def device() -> str:
    """The device that Triton kernels run on here: a GPU, or the CPU under the interpreter."""
    return "cuda" if GPU else "cpu"


@pytest.fixture
def poison():
    """NaN in every ``torch.empty`` of the test."""
    with poison_empty():
        yield

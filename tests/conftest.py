"""Fixtures and the order of tests. Without a GPU the Triton kernels run under the interpreter, or,
if FASTVDM_EMULATE names an architecture (90), compiled for it in ``ptxemu``. A fallback is an error
everywhere.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

if "triton" in sys.modules:
    raise RuntimeError("triton was imported before the tests could choose its interpreter")

import torch

GPU = torch.cuda.is_available()
ARCH = int(os.environ.get("FASTVDM_EMULATE", "0"))
if not GPU and not ARCH:
    os.environ["TRITON_INTERPRET"] = "1"
# The emulator's own tests run in it alone.
collect_ignore_glob = [] if ARCH else ["ptxemu/*"]
# Without a compiler there is no C++ extension, and every call on a CPU is a fallback.
BUILT = any((Path(__file__).parents[1] / "fastvdm").glob("_C*.so"))
os.environ.setdefault("FASTVDM_STRICT", "1" if BUILT else "0")

import interpreter  # noqa: E402
import pytest  # noqa: E402
from processes import Ranks  # noqa: E402

from fastvdm.testing import cpu_isas, poison_empty, use_cpu_isa  # noqa: E402

if not GPU and not ARCH and importlib.util.find_spec("triton"):
    interpreter.hasten()


# The files that take longest, in falling order: they start first, so that none is left alone at the
# end. ``.ci/check.py`` keeps xdist from putting those with few tests last.
LONGEST = (
    "suite", "aot", "axis_attention", "space_conv", "export", "norm_act",
    "parallel", "compile",
    "packaging", "trainers", "training", "guidance_edges", "paper_tables", "unet", "guidance",
)  # fmt: skip


def _place(item: pytest.Item) -> int:
    stem = item.path.stem.removesuffix("_test")
    return LONGEST.index(stem) if stem in LONGEST else len(LONGEST)


def _launches(item: pytest.Item) -> bool:
    """Whether a test runs Triton kernels, by its name or what it asks for."""
    asks = {"device", "tma", "emulated"} & set(item._fixtureinfo.argnames)
    return "triton" in item.name or "ptxemu" in item.path.parts or bool(asks)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    if ARCH:
        others = [item for item in items if not _launches(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords and not GPU:
            item.add_marker(skip)


def pytest_collectstart() -> None:
    """What a file draws when it is imported does not depend on the files before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_tf32() -> None:
    """cuDNN's fp32 convolutions are TF32 by default; ours are not, and what they are held to should
    not be."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=ARCH > 0)
def emulated(request):
    """The emulator of the test, which ends with what it found: races, bounds, uninitialised values.
    What it ran is a line of build/ptxemu/<arch>.jsonl (``python -m ptxemu.report``)."""
    from ptxemu import emulate, report

    with emulate(ARCH) as emulator:
        yield emulator
    report.record(request.node.nodeid, emulator)
    assert not emulator.bad(), "\n".join(map(str, emulator.bad()))


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> None:
    """accelerate keeps the precision of the first run of a process for all later ones."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def ranks():
    """Processes that run a worker each: ``ranks.run(worker, world, tmp_path, *args)``."""
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture
def device() -> str:
    """The device that Triton kernels run on here: a GPU, or the CPU under the interpreter."""
    return "cuda" if GPU else "cpu"


@pytest.fixture(params=cpu_isas() or ["none"])
def isa(request):
    """Each instruction set of the C++ backend that this machine has."""
    with use_cpu_isa(request.param):
        yield request.param


@pytest.fixture(params=["triton", *(f"cpu-{isa}" for isa in cpu_isas() if not ARCH)])
def lane(request, device):
    """(backend, device) of each implementation; the C++ one on each instruction set."""
    backend, _, isa = request.param.partition("-")
    if not isa:
        yield backend, device
        return
    with use_cpu_isa(isa):
        yield backend, "cpu"


@pytest.fixture
def tma(monkeypatch, device):
    """Convolutions by tensor descriptors with small boxes, for whatever takes them."""
    kernels = pytest.importorskip("fastvdm.kernels.space_conv")
    shared = pytest.importorskip("fastvdm.kernels.space_conv.shared")
    if (torch.cuda.get_device_capability()[0] * 10 if device == "cuda" else ARCH or 90) < 90:
        pytest.skip("tensor descriptors need sm_90")

    def pick(widths, grid, itemsize, tma):
        return shared.ConvConfig(64, 32, 16, 4, 2, True, *shared.pick_box(*grid, 32))

    monkeypatch.setattr(kernels, "pick_config", pick)


@pytest.fixture
def poison():
    """NaN in every ``torch.empty`` of the test."""
    with poison_empty():
        yield

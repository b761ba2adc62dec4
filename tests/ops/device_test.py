"""What a launcher is told about its device, and what another GPU would be given."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastvdm.runtime import device as devices
from fastvdm.runtime.device import A100, B200, H100, H200, Facts, current_gpu, facts, pretend

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# -- what another GPU would launch ----------------------------------------------------------------


def never(*args, **kwargs):
    raise AssertionError("CUDA was asked")


@functools.cache
def launches(gpu: Facts) -> dict[str, list[tuple[str, tuple, dict]]]:
    """(kernel, grid, constexprs and options) of every job of the tuner, in a GPU's batch, with
    analytic tiles; and of one whose grid goes by the GPU only where there is one video. Nothing
    runs: the tensors have no data, and CUDA may not be touched."""
    pytest.importorskip("triton")
    import calls
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from fastvdm.kernels.tuned import choosing

    def alone(device: str):
        return calls.linear(calls.shape("l0"), device, torch.bfloat16)

    more = [calls.Call("alone", alone, torch.bfloat16)]
    found: dict[str, list[tuple[str, tuple, dict]]] = {}

    def run(kernel, *args, grid, warmup, **options):
        found[job.name].append((kernel.__name__, grid, options))

    analytic = choosing(lambda choice: choice.analytic)
    with pytest.MonkeyPatch.context() as patch, pretend(gpu), analytic:
        patch.setattr(JITFunction, "run", run)
        patch.setattr(InterpretedFunction, "run", run)
        patch.setattr(torch.cuda, "_lazy_init", never)
        for job in [*calls.networks(), *calls.by_name(), *more]:
            found[job.name] = []
            job.build("meta")()
    return found


def grids(gpu: Facts) -> dict[str, list[tuple]]:
    """By kernel, in the order of the jobs."""
    found: dict[str, list[tuple]] = {}
    for calls in launches(gpu).values():
        for kernel, grid, _ in calls:
            found.setdefault(kernel, []).append(grid)
    return found


def test_descriptors_from_sm_90_on() -> None:
    for gpu in (A100, H100, B200):
        convs = {n: calls[0][0] for n, calls in launches(gpu).items() if n.startswith("conv ")}
        expected = "_conv_kernel" if gpu is A100 else "_conv_tma_kernel"
        assert len(convs) == 7 and set(convs.values()) == {expected}


def test_a_tile_of_the_temporal_block_is_what_the_architecture_holds() -> None:
    rtx = Facts("cuda", "NVIDIA GeForce RTX 5090", 120, 108)  # as many multiprocessors as an A100
    pixels = {g: launches(g)["temporal l0 backward"][0][2]["P"] for g in (A100, H100, B200)}
    assert pixels[A100] < pixels[H100] == pixels[B200]
    for name, calls in launches(A100).items():
        assert name.startswith("conv ") or launches(rtx)[name] == calls, name


def test_as_many_programs_as_there_are_multiprocessors() -> None:
    """Kernels whose programs walk over tiles, or share a sum, have a grid by the GPU."""
    by_gpu = {gpu: grids(gpu) for gpu in (A100, H100, B200)}
    for kernel in (
        "_short_bwd_kernel",
        "_stats_kernel",
        "_group_fwd_kernel",
        "_group_bwd_sums_kernel",
        "_row_bwd_kernel",
    ):
        assert by_gpu[A100][kernel] != by_gpu[H100][kernel] != by_gpu[B200][kernel], kernel
    job = "temporal l0 backward"  # more tiles than four programs a multiprocessor
    for gpu, count, splits in ((A100, 108, 2), (H100, 132, 3), (B200, 148, 3)):
        assert launches(gpu)[job][0][:2] == ("_bwd_kernel", (4 * count,))
        # 16 frames of 8 heads: two waves of programs
        assert launches(gpu)["alone"][0][:2] == ("_fwd_context_kernel", (128 * splits,))
    guided = [g["_guidance_seed_kernel"] for g in by_gpu.values()]
    assert guided[0] == guided[1] == guided[2]


def test_an_h100_and_an_h200_differ_in_what_was_measured_alone() -> None:
    """kernels/configs has a file a name."""
    assert launches(H100) == launches(H200) and H100.name != H200.name


# -- pretending -----------------------------------------------------------------------------------


def test_it_ends_with_the_block() -> None:
    before = facts(CPU), current_gpu()
    with pretend(A100):
        with pytest.raises(KeyError), pretend(B200):
            assert facts(CPU) is facts(CUDA) is current_gpu() is B200
            raise KeyError
        assert facts(CPU) is facts(CUDA) is current_gpu() is A100
    assert (facts(CPU), current_gpu()) == before


def test_it_holds_in_its_thread_alone() -> None:
    seen = []

    def elsewhere() -> None:
        seen.append(facts(CPU))
        with pretend(A100):
            seen.append(facts(CPU))

    with pretend(H100):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert facts(CPU) is H100
    assert seen == [Facts("cpu"), A100]


def test_each_architecture_is_compiled_ahead_of_time() -> None:
    pytest.importorskip("triton")
    from aot import GPUS

    assert {gpu.capability for gpu in (A100, H100, H200, B200)} == set(GPUS)


# -- a real device --------------------------------------------------------------------------------


def test_a_gpu_is_read_once(monkeypatch) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device.index)
        return SimpleNamespace(
            name=f"GPU {device.index}", major=9, minor=0, multi_processor_count=7
        )

    monkeypatch.setattr(devices, "_known", {})
    monkeypatch.setattr(devices, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    assert not asked and facts(torch.device("cuda", 2)) == Facts("cuda", "GPU 2", 90, 7)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for current in (2, 1, 2, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda at=current: at)
        assert facts(CUDA) == current_gpu() == Facts("cuda", f"GPU {current}", 90, 7)
    assert asked == [2, 1]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    assert current_gpu() is None


@pytest.mark.gpu
def test_the_facts_of_this_gpu() -> None:
    found = facts(CUDA)
    major, minor = torch.cuda.get_device_capability()
    assert (found.name, found.capability) == (torch.cuda.get_device_name(), 10 * major + minor)
    assert found.multiprocessors == torch.cuda.get_device_properties().multi_processor_count


def test_no_gpu_has_a_kind_alone() -> None:
    assert facts(CPU) == Facts("cpu") and not facts(CPU).is_gpu and H100.is_gpu


@pytest.mark.parametrize("word", ["1", "true", "ON", "y", "yes", "0", "", "2", "no"])
def test_interpreted_where_triton_says_so(word, monkeypatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", word)
    spec = importlib.util.spec_from_file_location("device_again", devices.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "device_again", again)
    spec.loader.exec_module(again)
    assert triton.knobs.runtime.interpret is again.INTERPRETED


def test_kernels_ask_nobody_else() -> None:
    """Neither torch.cuda nor Triton's settings: what they say cannot be pretended."""
    asked = [
        f"{path.name}:{node.lineno} {name}"
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names(node)
        if name.startswith(("torch.cuda", "triton.knobs", "triton.runtime"))
    ]
    assert not asked


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []

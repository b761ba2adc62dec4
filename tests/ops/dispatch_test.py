"""Nothing falls back in silence: a missing extension, Triton or C compiler is said once, with what
to type; strict mode makes it an error."""

from __future__ import annotations

import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from fastvdm import UNet3D, use_backend
from fastvdm.ops import _call
from fastvdm.ops.conv_group_norm import norm_act, space_conv
from fastvdm.ops.guidance import guidance_update
from fastvdm.runtime import config, dispatch, extension
from fastvdm.runtime.device import H100, Facts, pretend
from fastvdm.runtime.dispatch import FallbackError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
REASON = "the C++ kernels are not built; type this"
MISSING = "not built; type this .if that is meant: FASTVDM_BACKEND=reference"


def off(monkeypatch, backend: str, reason: str | None) -> None:
    """Every op's kernels of ``backend`` are off for ``reason``, and nothing was said yet."""
    monkeypatch.setattr(_call, "_warned", set())
    for entry in dispatch.OPS.values():
        if not isinstance(entry.off[backend], dispatch.ByDesign):
            monkeypatch.setitem(entry.off, backend, reason)


@pytest.fixture
def no_extension(monkeypatch):
    off(monkeypatch, "cpu", REASON)
    monkeypatch.setattr(extension, "_reason", REASON)
    with use_backend("auto", strict=False):
        yield


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_DEVICES", {"triton": ("cuda",), "cpu": ("cpu",)})
    dispatch._probe.cache_clear()
    yield
    dispatch._probe.cache_clear()


def network():
    net = UNet3D(8, dim_mults=(1, 2), attn_heads=2).eval().requires_grad_(False)
    return lambda: net(torch.randn(1, 3, 2, 4, 6), torch.tensor([1]))


def guidance(dtype=torch.float32, device="cpu"):
    z = torch.ones(1, 3, 2, 4, 6, dtype=dtype, device=device)
    return guidance_update(z, z, torch.ones(1, 9, dtype=dtype, device=device))


def conv(kernel=3, stride=1, dtype=torch.float32, device="cpu"):
    x = torch.ones(1, 2, 5, 6, 7, dtype=dtype, device=device)
    return space_conv(
        x, torch.ones(8, 7, kernel, kernel, dtype=dtype, device=device), stride=stride
    )


def norm(dtype=torch.float32, device="cpu"):
    x = torch.ones(1, 2, 5, 6, 8, dtype=dtype, device=device)
    return norm_act(x, torch.ones(8, dtype=dtype, device=device), kind="layer")


DOORS = {
    "network": network, "guidance": lambda: guidance, "conv": lambda: conv, "norm": lambda: norm
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_missing_extension_is_said_once(door, no_extension):
    call = door()
    with pytest.warns(UserWarning, match=MISSING) as seen:
        call()
        call()
        norm()
    assert len(seen) == 1
    with use_backend("auto", strict=True), pytest.raises(FallbackError, match="not built"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: guidance(torch.float64),
        lambda: norm(torch.float64),
        lambda: norm(device="meta"),
        lambda: conv(dtype=torch.float64),
        lambda: conv(device="meta"),
        lambda: conv(kernel=1),
        lambda: conv(stride=2),
    ],
)
def test_what_no_kernel_would_take_is_no_fallback(call, no_extension):
    with use_backend("auto", strict=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        call()


def test_the_reference_by_name_is_meant(no_extension):
    net = network()
    with use_backend("reference", strict=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        net()


def test_an_extension_that_does_not_load_or_is_old_is_a_missing_one(monkeypatch, tmp_path):
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "runtime" / "extension.py"))
    assert extension._load().startswith("the C++ kernels are not built; ")
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    assert extension._load().startswith("_C.abi3.so failed to load (")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(torch.ops, "fastvdm_C", types.SimpleNamespace(), raising=False)
    assert "older than this package" in extension._load() and extension._load().endswith(
        extension.WITH_KERNELS
    )


def test_a_compiled_call_warns_without_a_graph_break(no_extension):
    compiled = torch.compile(lambda: norm() + conv()[..., :8], fullgraph=True, backend="eager")
    with pytest.warns(UserWarning, match=MISSING) as seen:
        compiled()
    assert len(seen) == 1


def test_a_refusal_in_a_compiled_call_warns(monkeypatch, no_extension):
    def refuse(x):
        yield "cpu", f"F = {x.shape[1]}"

    few = dispatch._Op(refuse, {"cpu": None}, dict)
    monkeypatch.setitem(dispatch.OPS, "toy", few)
    compiled = torch.compile(
        lambda x: x + (_call.select("toy", x.device, x) == "cpu"),
        fullgraph=True,
        backend="eager",
    )
    with pytest.warns(UserWarning, match="toy uses the torch reference: cpu: F = 5"):
        assert compiled(torch.zeros(2, 5)).eq(0).all()


@pytest.mark.parametrize("op", ["axis_attention", "guidance_update", "norm_act", "attention_block"])
def test_cuda_without_triton_is_said(op, monkeypatch, no_interpreter):
    off(monkeypatch, "triton", dispatch.NO_TRITON)
    entry = dispatch.OPS[op]
    any_call = dispatch._Op(lambda: iter([("triton", None)]), entry.off, dict)
    monkeypatch.setitem(dispatch.OPS, op, any_call)
    with use_backend("auto", strict=False), pytest.warns(UserWarning, match='pip install "triton'):
        assert _call.select(op, CUDA) == "reference"
    with use_backend("auto", strict=True), pytest.raises(FallbackError, match="not installed"):
        _call.select(op, CUDA)


def test_what_is_off_is_said_before_what_is_refused(no_interpreter):
    """Asked for by name: another head would not help."""
    wide = torch.empty(1, 1, 1, 1, 3, 1, 130)
    with use_backend("triton", strict=True), pytest.raises(FallbackError, match="run on cpu"):
        _call.select("axis_attention", CPU, wide)
    with use_backend("cpu", strict=True), pytest.raises(FallbackError, match="cpu does not run on"):
        _call.select("axis_attention", CUDA, wide)


def test_the_command_for_triton_is_the_extra():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (requirement,) = re.findall(r'^triton = \["(\S+?);', project, re.MULTILINE)
    assert dispatch.NO_TRITON.endswith(f'pip install "{requirement}"')


# -- an op of no other test ----------------------------------------------------------------------


@pytest.fixture
def toy_op():
    @dispatch.implementations("toy", "toy_fwd", backends=("triton",), examples=dict)
    def _(n):
        yield "triton", "n is odd" if n % 2 else None

    yield "toy"
    del dispatch.OPS["toy"]


def test_strict_turns_a_fallback_into_an_error(toy_op):
    with use_backend("triton", strict=True):
        if dispatch.INTERPRETED:
            assert _call.select(toy_op, CPU, 2) == "triton"
        with pytest.raises(FallbackError, match="toy fell back to the torch reference"):
            _call.select(toy_op, CPU, 3)
    assert _call.select(toy_op, CPU, 3) == "reference"  # nothing here to fall back from


@pytest.mark.parametrize(
    "reason, by_default, by_name",
    [
        (None, "cpu", "cpu"),
        ("refuses", None, None),
        (dispatch.ByDesign("composed"), "parts", "parts"),
        (dispatch.ByDefault("fp64"), "parts", None),
        (dispatch.ByName("slower"), "parts", "cpu"),
    ],
)
@pytest.mark.parametrize("after", ["parts", "reference"])
def test_reasons(reason, by_default, by_name, after, toy_op, monkeypatch):
    """What takes the call where a kernel gives this reason; None: a fallback, said aloud."""

    def call():
        yield "cpu", reason
        if after == "parts":
            yield "parts", None

    toy = types.SimpleNamespace(implementations=call, off=dict.fromkeys(dispatch.KERNELS))
    monkeypatch.setitem(dispatch.OPS, toy_op, toy)
    for backend, wanted in (("auto", by_default), ("cpu", by_name)):
        if (backend, after, wanted) == ("cpu", "reference", "parts"):
            wanted = None  # of a backend that was asked for, the reference is never the way
        with use_backend(backend, strict=True):
            if wanted is not None:
                assert _call.select(toy_op, CPU) == (wanted if wanted == "cpu" else after)
                continue
            with pytest.raises(FallbackError):
                _call.select(toy_op, CPU)
        monkeypatch.setattr(_call, "_warned", set())
        with use_backend(backend, strict=False), pytest.warns(UserWarning) as seen:
            assert _call.select(toy_op, CPU) == after
        instead = "its parts" if after == "parts" else "the torch reference"
        assert f"fastvdm.toy uses {instead}: cpu: " in str(seen[0].message)


def test_a_fallback_warns_once(toy_op):
    with use_backend("triton", strict=False):
        with pytest.warns(UserWarning, match="toy uses the torch reference"):
            assert _call.select(toy_op, CPU, 3) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _call.select(toy_op, CPU, 3)


def test_explain(toy_op):
    reasons = dispatch.explain(toy_op, 3)
    assert reasons["triton"] == "n is odd" and reasons["cpu"] == "no kernel for this op"
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("tpu"):
        pass


# -- the C compiler that Triton calls -------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch, tmp_path, no_interpreter):
    """A Linux with gcc and Python.h, an empty Triton cache, and Triton installed."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    here = types.SimpleNamespace(path=tmp_path, programs={"gcc", "/opt/cc"})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(dispatch.shutil, "which", lambda name: name in here.programs or None)
    paths = {"include": str(tmp_path / "include")}
    monkeypatch.setattr(dispatch.sysconfig, "get_paths", lambda scheme: paths)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    off(monkeypatch, "triton", None)
    entry = dispatch.OPS["norm_act"]
    toy = dispatch._Op(lambda *_: iter([("triton", None)]), entry.off, dict)
    monkeypatch.setitem(dispatch.OPS, "norm_act", toy)
    return here


def launches() -> bool:
    dispatch._probe.cache_clear()
    with use_backend("auto", strict=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _call.select("norm_act", CUDA) == "triton"


def test_a_machine_without_a_c_compiler(machine, monkeypatch):
    assert launches()
    machine.programs.discard("gcc")
    assert not launches()
    with use_backend("auto", strict=False), pytest.warns(UserWarning, match="no C compiler"):
        monkeypatch.setattr(_call, "_warned", set())
        _call.select("norm_act", CUDA)
    with use_backend("auto", strict=True), pytest.raises(FallbackError, match="C compiler"):
        _call.select("norm_act", CUDA)
    machine.programs.add("clang")
    assert launches()


def test_what_cc_names_decides(machine, monkeypatch):
    monkeypatch.setenv("CC", "/no/cc")  # Triton then tries no other
    assert not launches() and "CC=/no/cc" in dispatch.no_launch()
    monkeypatch.setenv("CC", "/opt/cc")
    machine.programs.discard("gcc")
    assert launches()


def test_a_machine_without_python_h(machine, monkeypatch):
    (machine.path / "include" / "Python.h").rename(machine.path / "Python.h")
    assert not launches() and "Python.h" in dispatch.no_launch()
    monkeypatch.setenv("CPATH", f"/no:{machine.path}")
    assert launches()


def test_a_filled_cache_needs_no_compiler(machine):
    machine.programs.clear()
    assert not launches()
    (machine.path / "cache" / "KEY").mkdir(parents=True)
    (machine.path / "cache" / "KEY" / "cuda_utils.cpython-311-x86_64-linux-gnu.so").touch()
    assert launches()


def test_compiled_code_asks_the_machine_while_it_is_traced(machine, monkeypatch):
    machine.programs.clear()
    monkeypatch.setattr(_call, "_warned", set())
    dispatch._probe.cache_clear()
    chosen = torch.compile(
        lambda x: x + (_call.select("norm_act", CUDA) == "triton"),
        fullgraph=True, backend="eager",
    )  # fmt: skip
    with use_backend("auto", strict=False), pytest.warns(UserWarning, match="C compiler"):
        assert chosen(torch.zeros(3)).eq(0).all()


def test_a_gpu_that_the_kernels_do_not_suit(machine, monkeypatch):
    """On a T4 some tiles exceed the shared memory; ROCm's devices are of type "cuda" too."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capability in (75, 80, 120):
        with pretend(Facts("cuda", "made up", capability, 40)):
            assert launches() is (capability >= 80)
            told = dispatch.unsuited(CUDA)
            assert told is None if capability >= 80 else "made up is sm_75" in told
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pretend(H100):  # gfx94x reports 9.4
        assert not launches() and "ROCm" in dispatch.unsuited(CUDA)


def test_nothing_is_asked_before_a_gpu_is(machine):
    machine.programs.clear()
    dispatch._probe.cache_clear()
    norm()
    assert dispatch.explain("guidance_seed")["triton"] is None or torch.cuda.is_available()
    assert dispatch._probe.cache_info().currsize == 0


# -- one truth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, values", [("FASTVDM_BACKEND", config.BACKENDS), ("FASTVDM_CPU_ISA", config.CPU_ISAS)]
)
def test_envs_lists_the_values(name, values):
    table = (Path(__file__).parents[2] / "docs" / "environment.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|(.*)\|$", table, re.MULTILINE)
    assert tuple(re.findall(r"`([^`]*)`", row.split("|")[1])) == values


def test_every_backend_has_an_op():
    named = set(config.BACKENDS) - {"auto", "reference"}
    for entry in dispatch.OPS.values():
        assert set(entry.off) == named
    for backend in named:
        kernels = [e for e in dispatch.OPS.values() if e.off[backend] is not dispatch.NO_KERNEL]
        assert kernels, f"no op has {backend} kernels"

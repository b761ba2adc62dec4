"""``fastvdm info``: what it says, and that it says it without any optional package."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvdm
from fastvdm import info, use_backend
from fastvdm.ops import _call
from fastvdm.ops import linear as linear_ops
from fastvdm.ops._call import BODIES
from fastvdm.ops.conv_group_norm import space_conv
from fastvdm.runtime import dispatch, extension

BLOCKED = ("typer", "rich", "click", "av", "accelerate", "transformers", "torchmetrics")


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_report_names_versions_devices_and_every_op(capsys):
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert fastvdm.__version__ in text and torch.__version__ in text and "cpu:" in text
    assert dispatch.registered_ops()
    for op in dispatch.registered_ops():
        assert f"  {op} " in text


def test_reasons_are_those_of_dispatch(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = info.collect()
    assert set(report["ops"]) == set(report["runs"]) == set(dispatch.registered_ops())
    lines = info.render(report).splitlines()
    for op, backends in report["ops"].items():
        explained = dispatch.explain(op)
        assert backends["cpu"] == explained["cpu"]
        none = explained["triton"] == dispatch.NO_KERNEL
        assert backends["triton"] == (dispatch.NO_KERNEL if none else "no CUDA device")
        for backend, reason in backends.items():
            said = lines.count(f"  {info._KERNELS[backend]} off: {reason}")
            assert said == (reason not in (None, dispatch.NO_KERNEL))


TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.skipif(
    extension.reason_off() is not None, reason=f"C++ extension: {extension.reason_off()}"
)
@pytest.mark.parametrize("backend", ["auto", "reference", "cpu"])
def test_what_runs_is_what_ran(backend, monkeypatch):
    """Of every size and type of convolution that the line speaks of."""
    cpu, ran = torch.device("cpu"), []
    body = BODIES["space_conv_fwd"]
    monkeypatch.setitem(BODIES, "space_conv_fwd", lambda *a: ran.append(a[-1]) or body(*a))
    with use_backend(backend):
        said = _call.examples("space_conv", cpu)
        for kernel, stride in ((1, 1), (3, 1), (4, 2)):
            for name, dtype in TYPES.items():
                x = torch.zeros(1, 2, 5, 6, 7, dtype=dtype)
                space_conv(x, torch.zeros(8, 7, kernel, kernel, dtype=dtype), stride=stride)
                which = said.pop(f"{kernel}x{kernel} at stride {stride} in {name}")
                assert ran == ([which] if which in ("cpu", "library") else [])
                ran.clear()
        line = info._runs("space_conv", cpu)
    assert not said and ("Winograd" in line) is (backend != "reference")


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("types", [(), (torch.bfloat16,), (torch.bfloat16, torch.float16)])
def test_what_runs_the_linear_layer(types, backend, monkeypatch):
    """On a machine that emulates ``types``."""
    ran = []
    monkeypatch.setattr(linear_ops, "EMULATED", types)
    monkeypatch.setitem(dispatch.OPS["linear"].off, "cpu", None)
    monkeypatch.setattr(linear_ops, "run", lambda op, x, *_: ran.append(x.dtype))
    with use_backend(backend):
        said = _call.examples("linear", torch.device("cpu"))
        line = info._runs("linear", torch.device("cpu"))
        for dtype in TYPES.values():
            linear_ops.linear(torch.zeros(5, 7, dtype=dtype), torch.zeros(8, 7, dtype=dtype))
    assert [TYPES[name] for name, which in said.items() if which == "cpu"] == ran
    wanted = {"auto": types, "cpu": tuple(TYPES.values()), "reference": ()}[backend]
    assert set(ran) == set(wanted)
    assert line.endswith("for the rest") is (0 < len(wanted) < 3)
    assert ("C++ for the rest" not in line) and (line == "C++") is (len(wanted) == 3)


def test_what_runs_names_a_missing_extension(monkeypatch):
    monkeypatch.setattr(extension, "_reason", "not built; type this")
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    for entry in dispatch.OPS.values():
        if entry.off["cpu"] != dispatch.NO_KERNEL:
            monkeypatch.setitem(entry.off, "cpu", "not built; type this")
    report = info.collect()
    assert report["runs"]["norm_act"]["cpu"] == "torch reference"
    assert report["runs"]["space_conv"]["cpu"] == "oneDNN"
    text = info.render(report)
    assert "C++ extension  off: not built" in text and text.count("not built; type this") == 1


def test_a_gpu_that_triton_cannot_launch_on_is_named(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_DEVICES", {"triton": ("cuda",), "cpu": ("cpu",)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    for lacking in (None, "Triton cannot launch: no C compiler"):
        monkeypatch.setattr(dispatch, "no_launch", lambda lacking=lacking: lacking)
        with FakeTensorMode():  # there is no such device here
            report = info.collect()
        runs = {op: devices["cuda"] for op, devices in report["runs"].items()}
        assert runs["norm_act"] == ("torch reference" if lacking else "Triton")
        assert runs["space_conv"] == runs["space_conv_transpose"] == "cuDNN"
        runs_on = "torch reference" if lacking else "Triton"
        rest = "composed of other ops for the rest"
        assert runs["attention_block"] == f"{runs_on} for time and linear in bf16, {rest}"
        assert (f"Triton off: {lacking}" in info.render(report)) is (lacking is not None)


@pytest.mark.parametrize("gpus", [[], [(9, 0), (9, 0)], [(8, 0), (10, 0)]])
def test_the_assembler_that_triton_takes(gpus, tmp_path, monkeypatch):
    """By architecture, as TRITON_PTXAS_PATH names it; one that does not run is passed over."""
    pytest.importorskip("triton")
    report = info.collect()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", gpus.__getitem__)
    tool = tmp_path / "ptxas"
    tool.write_text("#!/bin/sh\necho Cuda compilation tools, release 77.7, V77.7.1\n")
    tool.chmod(0o755)
    shipped = info._ptxas()
    assert list(shipped) == [f"sm_{a}{b}" for a, b in sorted(set(gpus)) or [(9, 0), (10, 0)]]
    assert all(re.fullmatch(r"\d+\.\d+", v) for v in shipped.values())
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tool))
    hopper = [arch for arch in shipped if arch != "sm_100"]
    assert info._ptxas() == shipped | dict.fromkeys(hopper, "77.7")
    text = info.render(report | {"ptxas": info._ptxas()})
    assert f"ptxas          77.7 for {hopper[0]}" in text
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "none"))
    assert info._ptxas() == shipped


def test_no_assembler_without_triton_and_none_that_runs(monkeypatch):
    have = info._version
    monkeypatch.setattr(info, "_version", lambda p: None if p == "triton" else have(p))
    assert info._ptxas() == {} and "\nptxas" not in info.render(info.collect())
    monkeypatch.setattr(info, "_version", lambda p: "9.9")
    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    assert set(info._ptxas()) == {"sm_90", "sm_100"}
    assert all(why.startswith("unknown (") for why in info._ptxas().values())


def test_a_broken_op_is_reported_and_hides_nothing(monkeypatch, capsys):
    real = info.importlib.import_module

    def broken(name):
        if name == "fastvdm.ops.guidance":
            raise RuntimeError("no such kernel")
        return real(name)

    monkeypatch.setattr(info.importlib, "import_module", broken)
    assert info.main(["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["broken"] == {"guidance": "RuntimeError: no such kernel"} and report["ops"]


def test_works_without_optional_packages():
    code = (
        f"import sys\nfor name in {BLOCKED}: sys.modules[name] = None\n"
        "sys.argv = ['fastvdm', 'info', '--json']\n"
        "from fastvdm.cli import main\nsys.exit(main())"
    )
    done = _run(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["versions"]["fastvdm"] == fastvdm.__version__

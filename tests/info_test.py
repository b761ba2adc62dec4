"""``fastvdm info``: what it says, and that it says it without any optional package."""

from __future__ import annotations

import json
import subprocess
import sys

import torch

import fastvdm
from fastvdm import dispatch, info

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
    monkeypatch.setattr(dispatch, "INTERPRET", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = info.collect()
    assert set(report["ops"]) == set(dispatch.registered_ops())
    for op, backends in report["ops"].items():
        explained = dispatch.explain(op)
        assert backends["cpu"] == explained["cpu"]
        assert backends["triton"] == (explained["triton"] or "no CUDA device")
        for backend, reason in backends.items():
            if reason is not None:
                assert f"{backend:<10} off: {reason}" in info.render(report)


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

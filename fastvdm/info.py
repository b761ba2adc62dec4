"""What this installation can do: versions, devices, and for each op what runs it, or why not.

It prints the output of ``fastvdm info`` and ``python -m fastvdm.info`` (both take ``--json``) and
needs no optional package.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import fastvdm.ops
from fastvdm.ops import _call
from fastvdm.runtime import config, dispatch, extension

_EXTRAS = {
    "triton": ("triton",),
    "video": ("av", "pillow"),
    "cli": ("typer", "tqdm"),
    "train": ("accelerate", "pyyaml", "tqdm"),
    "text": ("transformers",),
    "metrics": ("torchmetrics", "scipy"),
}
_VARIABLES = ("FASTVDM_", "TRITON_", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_KERNELS = {"cpu": "C++", "triton": "Triton"}
_KINDS = {"parts": "composed of other ops", "reference": "torch reference"}
_LIBRARY = {"cpu": "oneDNN", "cuda": "cuDNN"}  # the libraries behind torch's convolutions


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _register_ops() -> dict[str, str]:
    """Import every op file, which registers its op. Returns file name → why the import failed."""
    failed = {}
    for module in pkgutil.iter_modules(fastvdm.ops.__path__):
        try:
            importlib.import_module(f"fastvdm.ops.{module.name}")
        except Exception as error:  # a broken op must not hide the state of the others
            failed[module.name] = f"{type(error).__name__}: {error}"
    return failed


def _devices() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    devices = [f"cpu: {platform.machine()}, {capability}, {torch.get_num_threads()} threads"]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        gib = p.total_memory / 2**30
        devices.append(f"cuda:{i}: {p.name}, sm_{p.major}{p.minor}, {gib:.0f} GiB")
    return devices


def _ptxas() -> dict[str, str]:
    """Architecture → release of the ptxas that Triton uses for it, or why it is unknown. The
    architectures are those of the GPUs here, else the two that Triton distinguishes; none without
    Triton."""
    if _version("triton") is None:
        return {}
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    found = {}
    for major, minor in sorted(set(gpus)) or [(9, 0), (10, 0)]:
        try:
            nvidia = importlib.import_module("triton.knobs").nvidia
            found[f"sm_{major}{minor}"] = (
                nvidia.ptxas_blackwell if major >= 10 else nvidia.ptxas
            ).version
        except Exception as error:  # another version of Triton, or a tool that does not run
            found[f"sm_{major}{minor}"] = f"unknown ({type(error).__name__}: {error})"
    return found


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def _op_table() -> dict[str, dict[str, str | None]]:
    """op → backend → why it is off here (None: on). The reference is always on and not listed."""
    table = {}
    for op in sorted(dispatch.registered_ops()):
        table[op] = dict(dispatch.explain(op))
        nowhere = not (dispatch.INTERPRETED or torch.cuda.is_available())
        if nowhere and table[op]["triton"] != dispatch.NO_KERNEL:
            table[op]["triton"] = "no CUDA device"  # whether Triton is installed does not matter
    return table


def _name(op: str, implementation: str, device: torch.device) -> str:
    """The name of the library or kernel that runs the op."""
    if implementation in _KERNELS:
        winograd = " (Winograd)" if (op, implementation) == ("space_conv", "cpu") else ""
        return _KERNELS[implementation] + winograd
    if implementation in ("library", "torch"):
        convolves = op in ("space_conv", "space_conv_transpose")
        return _LIBRARY[device.type] if convolves else "torch"
    return _KINDS.get(implementation, implementation)


def _runs(op: str, device: torch.device) -> str:
    """What runs calls of ``op`` on ``device`` under the current configuration, according to the
    function that chooses: "C++ (Winograd) for 3x3 at stride 1, oneDNN for the rest"."""
    chosen = _call.examples(op, device)
    found: dict[str, list[str]] = {}
    for kind, implementation in chosen.items():
        found.setdefault(_name(op, implementation, device), []).append(kind)
    # A kernel is never "the rest": it may not take calls that no example shows (fp64).
    rest = [_name(op, which, device) for which in chosen.values() if which not in _KERNELS]
    most = max(rest or found, key=lambda name: len(found[name]))
    all_types = _types_of(list(chosen))
    parts = []
    for name in (name for name in found if name != most):
        alike: dict[str, list[str]] = {}  # key: the same dtypes
        for what, types in _types_of(found[name]).items():
            some = "" if what and types == all_types[what] else ", ".join(types)
            alike.setdefault(some, []).append(what)
        for some, kinds in alike.items():
            words = " and ".join(kind for kind in kinds if kind), some
            parts.append(f"{name} for {' in '.join(word for word in words if word)}")
    return f"{', '.join(parts)}, {most} for the rest" if parts else most


def _types_of(kinds: list[str]) -> dict[str, list[str]]:
    """["a in fp32", "a in bf16"] -> {"a": ["fp32", "bf16"]}."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        what, _, dtype = kind.rpartition(" in ")
        found.setdefault(what, []).append(dtype)
    return found


def collect() -> dict[str, Any]:
    """All that ``fastvdm info`` prints, as plain types."""
    failed = _register_ops()
    settings = config.active
    return {
        "versions": {
            "fastvdm": fastvdm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "platform": platform.platform(),
        },
        "devices": _devices(),
        "extension": extension.reason_off(),
        "cpu_isa": None if extension.reason_off() else extension.set_cpu_isa(settings.cpu_isa),
        "interpreter": dispatch.INTERPRETED,
        "ptxas": _ptxas(),
        "config": dataclasses.asdict(settings),
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k == "CC" or k.startswith(_VARIABLES)
        },
        "extras": {
            extra: {p: _version(p) for p in packages} for extra, packages in _EXTRAS.items()
        },
        "ops": _op_table(),
        "runs": {
            op: {name: _runs(op, torch.device(name)) for name in _device_types()}
            for op in sorted(dispatch.registered_ops())
        },
        "broken": failed,
    }


def render(report: dict[str, Any]) -> str:
    """Format the report as text."""
    lines = [f"{name:<14} {value}" for name, value in report["versions"].items()]
    lines += ["", "devices"] + [f"  {d}" for d in report["devices"]]
    off = report["extension"]
    loaded = f"loaded, runs on {report['cpu_isa']}"
    lines += ["", f"C++ extension  {loaded if off is None else 'off: ' + off}"]
    if report["interpreter"]:
        lines.append("triton         under its interpreter (TRITON_INTERPRET=1): for tests, slow")
    if report["ptxas"]:
        tools = ", ".join(f"{v} for {arch}" for arch, v in report["ptxas"].items())
        lines.append(f"ptxas          {tools}")
    lines.append("config         " + ", ".join(f"{k}={v}" for k, v in report["config"].items()))
    if report["environment"]:
        lines.append(
            "environment    " + ", ".join(f"{k}={v}" for k, v in report["environment"].items())
        )
    lines += ["", "optional packages"]
    for extra, packages in report["extras"].items():
        have = ", ".join(f"{p} {v}" for p, v in packages.items() if v)
        lack = [p for p, v in packages.items() if not v]
        hint = f"missing {', '.join(lack)}: pip install 'fastvdm[{extra}]'" if lack else ""
        lines.append(f"  {extra:<12} {'; '.join(part for part in (have, hint) if part)}")
    lines += ["", "ops, and what runs them"]
    for op, runs in report["runs"].items():
        lines.append(f"  {op:<22} {'; '.join(f'{d}: {what}' for d, what in runs.items())}")
    reasons = {
        (backend, reason): None
        for backends in report["ops"].values()
        for backend, reason in backends.items()
        if reason not in (None, dispatch.NO_KERNEL, report["extension"])  # printed above
    }
    lines += [f"  {_KERNELS[backend]} off: {reason}" for backend, reason in reasons]
    lines += [f"  {name}: failed to import: {why}" for name, why in report["broken"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run ``fastvdm info [--json]``; returns 1 if an op cannot be imported."""
    parser = argparse.ArgumentParser("fastvdm info", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="machine readable")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 1 if report["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())

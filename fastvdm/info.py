"""What this installation can do: versions, devices, and for each op the backends, or why not.

``fastvdm info``, or ``python -m fastvdm.info`` (also with ``--json``); needs no optional package.
"""

from __future__ import annotations

import argparse
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
from fastvdm import _ext, dispatch
from fastvdm.config import get_config

_EXTRAS = {
    "triton": ("triton",),
    "video": ("av", "imageio", "pillow"),
    "cli": ("typer", "rich", "tqdm"),
    "train": ("accelerate", "tqdm"),
    "text": ("transformers",),
    "metrics": ("torchmetrics", "scipy"),
}
_VARIABLES = ("FASTVDM_", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _register_ops() -> dict[str, str]:
    """Import every op file, since an op is known once its file is; file name → why it failed."""
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


def _op_table() -> dict[str, dict[str, str | None]]:
    """op → backend → why it is off here (None: on). The reference is always on."""
    table = {}
    for op in sorted(dispatch.registered_ops()):
        reasons = dict(dispatch.explain(op))
        for backend in ("triton", "cuda"):
            if reasons[backend] is None and not torch.cuda.is_available():
                interpreted = backend == "triton" and dispatch.INTERPRET
                reasons[backend] = None if interpreted else "no CUDA device"
        table[op] = reasons
    return table


def collect() -> dict[str, Any]:
    """Everything that ``fastvdm info`` prints, as plain types."""
    failed = _register_ops()
    config = get_config()
    return {
        "versions": {
            "fastvdm": fastvdm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda,
            "platform": platform.platform(),
        },
        "devices": _devices(),
        "extension": _ext.reason_off(),
        "cpu_isa": None if _ext.reason_off() else _ext.set_cpu_isa(config.cpu_isa),
        "interpreter": dispatch.INTERPRET,
        "config": {k: getattr(config, k) for k in config.__dataclass_fields__},
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_VARIABLES)},
        "extras": {
            extra: {p: _version(p) for p in packages} for extra, packages in _EXTRAS.items()
        },
        "ops": _op_table(),
        "broken": failed,
    }


def render(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"{name:<14} {value}" for name, value in report["versions"].items()]
    lines += ["", "devices"] + [f"  {d}" for d in report["devices"]]
    off = report["extension"]
    loaded = f"loaded, runs on {report['cpu_isa']}"
    lines += ["", f"C++ extension  {loaded if off is None else 'off: ' + off}"]
    if report["interpreter"]:
        lines.append("triton         under its interpreter (TRITON_INTERPRET=1): for tests, slow")
    lines.append("config         " + ", ".join(f"{k}={v}" for k, v in report["config"].items()))
    if report["environment"]:
        lines.append(
            "environment    " + ", ".join(f"{k}={v}" for k, v in report["environment"].items())
        )
    lines += ["", "optional packages"]
    for extra, packages in report["extras"].items():
        have = ", ".join(f"{p} {v}" for p, v in packages.items() if v)
        lack = [p for p, v in packages.items() if not v]
        hint = f"missing {', '.join(lack)}: pip install fastvdm[{extra}]" if lack else ""
        lines.append(f"  {extra:<12} {'; '.join(part for part in (have, hint) if part)}")
    lines += ["", "ops (the torch reference is always there; `off` says why a kernel is not used)"]
    for op, backends in report["ops"].items():
        on = [b for b, reason in backends.items() if reason is None]
        lines.append(f"  {op:<20} {', '.join([*on, 'reference'])}")
        lines += [f"    {b:<10} off: {r}" for b, r in backends.items() if r is not None]
    lines += [f"  {name}: failed to import: {why}" for name, why in report["broken"].items()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """``fastvdm info [--json]``; returns 1 if an op cannot be imported."""
    parser = argparse.ArgumentParser("fastvdm info", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="machine readable")
    options = parser.parse_args(arguments)
    report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 1 if report["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())

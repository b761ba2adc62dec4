"""Ahead-of-time export of a UNet3D: ``torch.export``, then an AOTInductor package (.pt2).

The package runs without this source tree. ``backend`` decides which kernels it contains:

- "reference": only torch's own operators, compiled by inductor. It needs no library at run time, in
  Python or C++, on CPU and CUDA.
- "cpu": our C++ kernels as opaque operators ``fastvdm_C::*``. The process that runs the package
  must load the extension first: ``import fastvdm`` in Python, ``dlopen(library_path())`` in C++.
- "triton": our Triton kernels as opaque operators ``fastvdm::*``, which are implemented in Python:
  the package runs in a Python process that has imported ``fastvdm``.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastvdm.kernels import space_conv_library
from fastvdm.runtime import extension
from fastvdm.runtime.config import use_backend
from fastvdm.unet import UNet3D

BACKENDS = ("auto", "reference", "cpu", "triton")


class _Inference(nn.Module):
    """The interface of a package, with positional arguments: (x, time[, cond]) → prediction."""

    def __init__(self, model: UNet3D, cond_scale: float | None) -> None:
        super().__init__()
        self.model, self.cond_scale = model, cond_scale

    def forward(self, x: Tensor, time: Tensor, cond: Tensor | None = None) -> Tensor:
        if self.cond_scale is None:
            return self.model(x, time, cond)
        return self.model.forward_with_cond_scale(x, time, cond, cond_scale=self.cond_scale)


def library_path() -> Path:
    """The path of the extension that a package exported with backend="cpu" needs.

    Raises:
        RuntimeError: the extension is not built.
    """
    if extension.reason_off() is not None:
        raise RuntimeError(f"the C++ extension is off: {extension.reason_off()}")
    return sorted(Path(__file__).parent.glob("_C*.so"))[0]


def example_inputs(
    model: UNet3D, batch: int, num_frames: int, height: int, width: int
) -> tuple[Tensor, ...]:
    """(x, time[, cond]) on the model's device and in its dtype.

    Args:
        model: the network; ``cond`` is there if it has conditioning.
        batch: size of the batch.
        num_frames: number of frames.
        height: pixels.
        width: pixels.
    """
    weight = model.stem.weight
    x = torch.randn(
        batch, model.channels, num_frames, height, width, device=weight.device, dtype=weight.dtype
    )
    time = torch.ones(batch, device=weight.device)  # valid as a step index and as a log-SNR
    if not model.has_cond:
        return x, time
    assert model.cond_dim is not None
    return x, time, torch.randn(batch, model.cond_dim, device=weight.device, dtype=weight.dtype)


def export_program(
    model: UNet3D, inputs: tuple[Tensor, ...], *, backend: str = "auto",
    cond_scale: float | None = None,
) -> torch.export.ExportedProgram:  # fmt: skip
    """``torch.export`` of the forward pass for inference, for the extents of ``inputs``.

    Args:
        model: the network, on the device on which it will run; exported in evaluation mode.
        inputs: (x, time) or (x, time, cond), e.g. from ``example_inputs``.
        backend: "auto", "reference", "cpu" or "triton"; see the docstring of the module.
        cond_scale: scale of classifier-free guidance inside the program; None for no guidance.

    Returns:
        The exported program.

    Raises:
        ValueError: there is no such backend, or guidance is asked of an unconditional network.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if cond_scale is not None and not model.has_cond:
        raise ValueError("cond_scale needs a conditional network")
    training = model.training
    with torch.no_grad(), use_backend(backend) if backend != "auto" else nullcontext():
        try:
            program = torch.export.export(_Inference(model.eval(), cond_scale), inputs)
        finally:
            model.train(training)
    program = _inline_library(program)
    _call_extension_directly(program)
    return program


def _inline_library(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Inline Python ops that are compositions of torch's own operators."""
    table = {}
    for node in program.graph.nodes:
        if node.args and node.args[-1] == "library":
            compose = getattr(space_conv_library, node.target._schema.name.split("::")[1])
            table[node.target] = lambda *args, compose=compose: compose(*args[:-1])
    return program.run_decompositions(table) if table else program


def _call_extension_directly(program: torch.export.ExportedProgram) -> None:
    """Replace ``fastvdm::x(..., "cpu")``, a Python op, by ``fastvdm_C::x_cpu(...)``."""
    for node in program.graph.nodes:
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fastvdm":
            continue
        if not node.args or node.args[-1] != "cpu":
            continue
        name = f"{target._schema.name.split('::')[1]}_cpu"
        _register_fake(name, target)
        node.target = getattr(torch.ops.fastvdm_C, name).default
        node.args = node.args[:-1]
    program.graph_module.recompile()


_faked: set[str] = set()


def _register_fake(name: str, op: Any) -> None:
    """Give the C++ operator the fake of the public operator that calls it."""
    if name in _faked:
        return
    _faked.add(name)
    torch.library.register_fake(f"fastvdm_C::{name}", lambda *args: op(*args, "cpu"))


def export_unet(
    model: UNet3D, path: str | os.PathLike[str], inputs: tuple[Tensor, ...], *,
    backend: str = "auto", cond_scale: float | None = None,
) -> Path:  # fmt: skip
    """Write an AOTInductor package (.pt2) of a network.

    Load it with ``torch._inductor.aoti_load_package(path)`` or, in C++, with
    ``torch::inductor::AOTIModelPackageLoader``.

    Args:
        model: as in ``export_program``.
        path: the file to write; it ends in .pt2.
        inputs: as in ``export_program``.
        backend: as in ``export_program``.
        cond_scale: as in ``export_program``.

    Returns:
        The path of the package.

    Raises:
        ValueError: ``path`` does not end in .pt2, or as in ``export_program``.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"the package must end in .pt2, got {target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    program = export_program(model, inputs, backend=backend, cond_scale=cond_scale)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / target.name)
        )
        os.replace(made, target)
    return target

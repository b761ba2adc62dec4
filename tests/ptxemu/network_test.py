"""UNet3D forward and backward, every op on its compiled kernel: errors against fp64 beside those of
plain torch in the same precision."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_cases import ROWS

import fastvdm.kernels
from fastvdm import UNet3D, use_backend
from fastvdm.testing import max_error

PEER = dict(dim=32, dim_mults=(1, 2), attn_heads=2)
PAPER = dict(dim=32, dim_mults=(1, 2), image_size=8, attn_resolutions=(4,), attn_dim_head=32,
             resnet_groups=8, emb_dim=32)  # fmt: skip
NETWORKS: dict[str, Callable[[], UNet3D]] = {
    "group": lambda: UNet3D(**PEER),
    "rms": lambda: UNet3D(**PEER, norm="rms"),
    "paper": lambda: UNet3D.from_preset("ucf101", **PAPER),
}
FP32, BF16 = torch.float32, torch.bfloat16


def _net(name: str) -> UNet3D:
    torch.manual_seed(0)
    net = NETWORKS[name]()
    for p in net.parameters():  # the zero-initialised ones would hide everything
        p.data.add_(0.02 * torch.randn_like(p))
    return net


@pytest.mark.parametrize(
    "name, autocast, frozen",
    [
        pytest.param("group", True, False, id="group-autocast"),
        pytest.param("paper", True, True, id="paper-autocast-frozen", marks=pytest.mark.slow),
        *(
            pytest.param(n, a, False, id=f"{n}{'-autocast' * a}", marks=pytest.mark.slow)
            for n, a in (("group", False), ("rms", False), ("rms", True), ("paper", True))
        ),
    ],
)
def test_network(name, autocast, frozen, emulated):
    net = _net(name).requires_grad_(not frozen)
    x, step = torch.randn(1, 3, 5, 8, 8), torch.tensor([500])

    def run(backend: str, dtype: torch.dtype, low: bool) -> list[torch.Tensor]:
        model = net.to(dtype)
        model.zero_grad()
        leaf = x.to(dtype).requires_grad_()
        with use_backend(backend), torch.autocast("cpu", BF16, enabled=low):
            y = model(leaf, step)
            (y.double() ** 2).mean().backward()
        grads = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
        return [y.detach(), leaf.grad, *([torch.cat(grads)] if grads else [])]

    exact = run("reference", torch.float64, False)
    plain = run("reference", FP32, autocast)
    assert not emulated.launches
    found = run("triton", FP32, autocast)
    assert len({launch.kernel for launch in emulated.launches}) > 5
    for what, a, b, e in zip(("output", "input", "parameters"), found, plain, exact):
        ours, theirs = max_error(a, e), max_error(b, e)
        assert ours <= 3 * theirs, f"{what}: error {ours:.3g}, of plain torch {theirs:.3g}"


def kernels() -> set[str]:
    folder = Path(fastvdm.kernels.__path__[0])
    text = "".join(p.read_text() for p in folder.rglob("*.py"))
    return set(re.findall(r"^@triton\.jit(?:\(.*\))?\ndef (_\w+_kernel)\(", text, re.M))


@pytest.mark.slow
def test_every_kernel_is_run(emulated):
    """By a row of the suite at the sizes of the gate."""
    from suite_test import BF16, Cell, Lane, parity

    assert len(kernels()) > 20
    for name, row in ROWS.items():
        if "triton" in row.kernels:
            for edge in ("", *row.tiles):
                with use_backend("triton", strict=True):
                    parity(Cell(name, Lane("triton")), BF16, edge)
    assert kernels() - {launch.kernel for launch in emulated.launches} == set()

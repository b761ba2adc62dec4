"""The branches that networks and ops take for tensors on a GPU, on CPU tensors that claim to be on
one: they must compute what the reference does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastvdm import UNet3D, use_backend
from fastvdm.testing import assert_close3

SMALL = dict(resnet_groups=4, cond_drop_prob=0.0)
PRESET = dict(
    dim=16, dim_mults=(1, 2), image_size=8, attn_resolutions=(4, 8), attn_dim_head=8, num_blocks=1,
    resnet_groups=4, emb_dim=16,
)  # fmt: skip
NETS = {
    "group": lambda: UNet3D(16, dim_mults=(1, 2, 4), **SMALL),
    "rms": lambda: UNet3D(16, dim_mults=(1, 2), norm="rms", **SMALL),
    "ucf101": lambda: UNet3D.from_preset("ucf101", **PRESET),
}


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_a_network_computes_the_same(name: str, train: bool, monkeypatch) -> None:
    torch.manual_seed(0)
    model = NETS[name]().eval()
    for p in model.parameters():
        if not p.any():  # zero weights would hide what precedes them
            nn.init.normal_(p, std=0.05)
    x = torch.randn(2, 3, 4, 8, 8)
    time = torch.tensor([0.3, 1.2]) if name == "ucf101" else torch.tensor([3.0, 700.0])

    def results(x: Tensor) -> list[Tensor]:
        x = x.requires_grad_(train)
        with torch.set_grad_enabled(train):
            y = model(x, time)
        if not train:
            return [y]
        given = [x, *model.parameters()]
        return [y, *torch.autograd.grad(y.square().mean(), given, materialize_grads=True)]

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True, raising=False)
        found = results(x.clone())
    with use_backend("reference"):
        plain = results(x.clone())
        model.double()
        exact = results(x.double())
    for i, tensors in enumerate(zip(found, plain, exact)):
        assert_close3(*tensors, factor=3.0 if i else 2.0, name=f"result {i}")

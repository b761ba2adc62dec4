"""fastvdm.accelerate on the peer's own modules, and its optimizer's state carried over."""

from __future__ import annotations

import copy

import pytest
import torch
from peer import peer_or_skip
from torch import nn

from fastvdm import UNet3D, accelerate, convert_optimizer_state
from fastvdm.testing import max_error

ARGUMENTS = dict(dim=8, dim_mults=(1, 2), attn_heads=2, cond_dim=3)


class LatentDiffusion(nn.Module):
    """A fork's shape: the network deep inside, twice under two names."""

    def __init__(self, network):
        super().__init__()
        self.first_stage = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"denoise_fn": network})
        self.alias = network


@pytest.mark.parametrize("version", ["0.7.0", "0.6.3"])
def test_swap_inside_a_module(version):
    network = peer_or_skip(version).Unet3D(**ARGUMENTS).eval()
    network.time_mlp[1].weight.requires_grad_(False)
    x, time, cond = torch.randn(1, 3, 3, 4, 4), torch.tensor([7]), torch.randn(1, 3)
    want = network(x, time, cond=cond)
    model = accelerate(LatentDiffusion(network), checkpointing="level")
    new = model.inner["denoise_fn"]
    assert isinstance(new, UNet3D) and new is model.alias and not new.training
    assert new.checkpointing == "level"
    assert max_error(new(x, time, cond=cond), want) < 1e-5
    frozen = [n for n, p in new.named_parameters() if not p.requires_grad]
    assert frozen == ["time_embedding.mlp.0.weight"]
    assert isinstance(accelerate(network), UNet3D)
    with pytest.raises(ValueError, match="no peer Unet3D found inside Linear"):
        accelerate(nn.Linear(2, 2))


def test_adam_continues():
    """Five steps of the peer, then one more of each: the same step."""
    network = peer_or_skip("0.7.0").Unet3D(**ARGUMENTS)
    x, time, cond = torch.randn(2, 3, 2, 4, 4), torch.tensor([7, 300]), torch.randn(2, 3)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(x, time, cond=cond, null_cond_prob=0.0).square().mean().backward()
        optimizer.step()

    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(5):
        step(network, adam)
    ours = accelerate(copy.deepcopy(network))
    ours_adam = torch.optim.Adam(ours.parameters(), lr=1.0)
    ours_adam.load_state_dict(convert_optimizer_state(adam.state_dict(), network, ours))
    assert ours_adam.param_groups[0]["lr"] == 1e-3
    step(network, adam)
    step(ours, ours_adam)
    want, got = network.state_dict(), ours.to_peer_state_dict()
    assert {k: e for k in want if (e := max_error(got[k], want[k])) > 1e-4} == {}
    with pytest.raises(ValueError, match="one group"):
        convert_optimizer_state({"state": {}, "param_groups": []}, network, ours)

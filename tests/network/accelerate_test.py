"""fastvdm.accelerate on the peer's own modules, and its optimizer's state carried over."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peer import peer_or_skip
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrize

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
    with pytest.raises(TypeError, match="takes a module, got the class Linear"):
        accelerate(nn.Linear)
    with pytest.raises(TypeError, match="takes a module, got dict; UNet3D.from_unet3d reads"):
        accelerate({})
    with pytest.raises(ValueError, match="no peer Unet3D found inside Linear"):
        accelerate(nn.Linear(2, 2))


def test_one_network_under_two_names_of_one_module():
    model = nn.Module()
    model.first = model.second = peer_or_skip("0.7.0").Unet3D(**ARGUMENTS)
    accelerate(model)
    assert isinstance(model.first, UNet3D) and model.first is model.second


# -- compiled, wrapped, hooked --------------------------------------------------------------------

SMALL = dict(dim=8, dim_mults=(1,), attn_heads=2)


def network(**arguments):
    return peer_or_skip("0.7.0").Unet3D(**(SMALL | arguments))


def test_compiled_network_trains():
    """The compiled code is the new network's: its parameters get gradients and change it."""
    model, x, time = nn.Module(), torch.randn(2, 3, 2, 4, 6), torch.tensor([7, 300])
    old = network()
    model.denoise_fn = torch.compile(old, backend="eager", fullgraph=True)
    context = model.denoise_fn.dynamo_ctx
    assert accelerate(model) is model
    new = model.denoise_fn
    assert type(new._orig_mod) is UNet3D and new.dynamo_ctx is context
    adam, outputs = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(2):
        adam.zero_grad()
        outputs.append(new(x, time))
        outputs[-1].square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        adam.step()
    assert max_error(outputs[0], old(x, time)) < 1e-5
    assert max_error(outputs[1], outputs[0]) > 1e-2


def test_compiled_itself():
    new = accelerate(torch.compile(network(), backend="eager"))
    assert type(new._orig_mod) is UNet3D and "UNet3D" in repr(new)
    assert UNet3D.from_unet3d(torch.compile(network(), backend="eager")).levels == 1


@pytest.mark.parametrize("part", ["", "mid_block1"])
def test_compiled_in_place_says_so(part):
    old = network()
    old.get_submodule(part).compile(backend="eager")
    with pytest.warns(UserWarning, match=r"call .compile\(\) on it") as caught:
        assert accelerate(old)._compiled_call_impl is None
    assert [w.filename for w in caught] == [__file__]


def test_data_parallel():
    model = accelerate(DataParallel(network()))
    assert type(model.module) is UNet3D


def test_distributed(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(network())
        with pytest.raises(ValueError, match="DistributedDataParallel.*before wrapping"):
            accelerate(nn.ModuleList([wrapped]))
        assert type(wrapped.module) is not UNet3D
        assert UNet3D.from_unet3d(wrapped).levels == 1
        from torch.distributed.fsdp import fully_shard

        sharded = network()
        fully_shard(sharded.mid_block1)
        for read in (accelerate, UNet3D.from_unet3d):
            with pytest.raises(ValueError, match="sharded .FSDP.*before sharding"):
                read(sharded)
    finally:
        torch.distributed.destroy_process_group()


def test_torchscript():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.trace(
            network().eval(), (torch.zeros(1, 3, 2, 2, 2), torch.zeros(1)), check_trace=False
        )
    for read in (accelerate, UNet3D.from_unet3d):
        with pytest.raises(ValueError, match="TorchScript.*nn.Module that it was made from"):
            read(scripted)


HOOKS = {
    "_forward_hooks": lambda n: n.mid_block1.register_forward_hook(print),
    "_backward_pre_hooks": lambda n: n.register_full_backward_pre_hook(print),
    "_load_state_dict_post_hooks": lambda n: n.register_load_state_dict_post_hook(print),
    "forward set": lambda n: setattr(n, "forward", n.forward),
}


@pytest.mark.parametrize("name", HOOKS)
def test_what_a_swap_would_lose(name):
    model = nn.ModuleDict({"net": network()})
    HOOKS[name](model["net"])
    with pytest.raises(ValueError, match=f"net.* has {name}.*would lose"):
        accelerate(model)
    assert type(model["net"]) is not UNet3D


def test_parametrized_weight():
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    old = network()
    parametrize.register_parametrization(old.init_conv, "weight", Twice())
    with pytest.raises(ValueError, match="incomplete, or of a changed network.*init_conv.weight"):
        accelerate(old)
    old = network()
    parametrize.register_parametrization(old.mid_block1.block1.proj, "weight", Twice())
    with pytest.raises(ValueError, match="1 keys more .*original.* 1 less .*keep the module"):
        accelerate(old)


def test_parameter_shared_with_another_module():
    model = nn.ModuleList([network(), nn.Conv3d(3, 8, (1, 7, 7))])
    model[1].weight = model[0].init_conv.weight
    with pytest.raises(ValueError, match="1.weight is the network's init_conv.weight"):
        accelerate(model)


def test_all_or_nothing():
    """The second network does not fit, so the first is left too."""
    model = nn.ModuleList([network(), network()])
    model[1].extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="2 keys more"):
        accelerate(model)
    assert [type(m).__name__ for m in model] == ["Unet3D", "Unet3D"]


# -- several networks, and other modules beside ---------------------------------------------------


def test_groups_are_the_networks_own():
    old = peer_or_skip("0.6.3").Unet3D(**SMALL, resnet_groups=2).eval()
    model = LatentDiffusion(old)
    model.vqgan = nn.Sequential(nn.Conv3d(3, 32, 1), nn.GroupNorm(32, 32))
    x, time = torch.randn(1, 3, 2, 4, 6), torch.tensor([7])
    assert max_error(UNet3D.from_unet3d(model).eval()(x, time), old(x, time)) < 1e-5


def test_one_of_several():
    model = nn.ModuleDict({"online_model": LatentDiffusion(network())})
    model["ema_model"] = LatentDiffusion(network())
    model["ema_model"].register_buffer("step", torch.zeros(1))

    def stem(**options):
        return UNet3D.from_unet3d(model, **options).stem.weight.flatten()

    online, ema = (model[k].alias.init_conv.weight.flatten() for k in ("online_model", "ema_model"))
    assert torch.equal(stem(), online) and torch.equal(stem(ema=True), ema)
    assert torch.equal(stem(prefix="ema_model.alias.", ema=None), ema)
    assert torch.equal(stem(prefix="online_model"), online)
    with pytest.raises(ValueError, match="no network under 'vae'; .*'online_model.alias'"):
        stem(prefix="vae")
    model["second"] = network()
    with pytest.raises(ValueError, match="several networks .*'second': choose with prefix"):
        stem()
    accelerate(model)
    assert type(model["second"]) is type(model["ema_model"].alias) is UNet3D
    with pytest.raises(ValueError, match="no averaged weights"):
        UNet3D.from_unet3d(network(), ema=True)


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

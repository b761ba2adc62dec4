"""torch.compile of the whole network: one graph, no recompile after the first change of size."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from fastvdm import UNet3D
from fastvdm.testing import max_error

NETWORKS = {
    "peer": dict(dim=8, dim_mults=(1, 2), attn_heads=2, cond_dim=3),
    "paper": dict(dim=8, dim_mults=(1, 2), layout="paper", image_size=8, attn_resolutions=(4,),
                  attn_dim_head=8, resnet_groups=4, emb_dim=16, num_blocks=1, position="shaw",
                  cond_dim=3, null_cond="zeros", zero_init=False),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def batch(b: int, f: int):
    return torch.randn(b, 3, f, 8, 8), torch.rand(b), torch.randn(b, 3)


def inputs_and_gradients(model, network, x, time, cond):
    leaf = x.clone().requires_grad_()
    out = model(leaf, time, cond, null_cond_prob=0.0)
    out.square().sum().backward()
    found = [out.detach(), leaf.grad, *(p.grad for p in network.parameters() if p.grad is not None)]
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", ["peer", pytest.param("paper", marks=pytest.mark.slow)])
def test_training_step_fullgraph(name):
    """Batch 2, 8 frames; then other batches and frame counts on one dynamic graph.

    On one CPU thread torch chooses another convolution below 16 images, B * F, and guards on it.
    """
    model = UNet3D(**NETWORKS[name])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for i, (b, f) in enumerate([(2, 8), (3, 9), (4, 7), (5, 5)]):
        x, time, cond = batch(b, f)
        got = inputs_and_gradients(compiled, model, x, time, cond)
        want = inputs_and_gradients(model, model, x, time, cond)
        assert len(got) == len(want)
        assert max(max_error(a, w) for a, w in zip(got, want)) < 1e-4
        assert graphs() <= min(i + 1, 2)


def test_guidance_and_autocast_fullgraph():
    model = UNet3D(**NETWORKS["peer"]).eval()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, time, cond):
        with torch.autocast("cpu", torch.bfloat16):
            return model.forward_with_cond_scale(x, time, cond, cond_scale=3.0)

    x, time, cond = batch(2, 3)
    with torch.no_grad():
        out = step(x, time, cond)
        want = model.forward_with_cond_scale(x, time, cond, cond_scale=3.0)
    assert graphs() == 1 and max_error(out, want) < 5e-2


def test_frozen_weights_input_gradient_fullgraph():
    """The guided step: gradient of the input only, no parameter wants one."""
    model = UNet3D(**NETWORKS["paper"]).eval().requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, time, cond = batch(1, 3)
    grads = []
    for call in (compiled, model):
        leaf = x.clone().requires_grad_()
        grads += torch.autograd.grad(call(leaf, time, cond).square().sum(), leaf)
    assert graphs() == 1 and max_error(*grads) < 1e-5
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_inductor_forward():
    model = UNet3D(**NETWORKS["peer"]).eval()
    compiled = torch.compile(model, fullgraph=True)
    x, time, cond = batch(1, 2)
    with torch.no_grad():
        assert max_error(compiled(x, time, cond), model(x, time, cond)) < 1e-5
    assert graphs() == 1

"""torch.func: under its transforms, as under forward-mode autograd, plain torch is what runs."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from peer import peer_or_skip
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, linearize, vjp, vmap

from fastvdm import UNet3D, use_backend
from fastvdm.ops._call import backend_in_force
from fastvdm.ops.attention_block import attention_block
from fastvdm.ops.conv_group_norm import (
    norm_act,
    space_conv,
)
from fastvdm.runtime import extension
from fastvdm.testing import max_error

BACKENDS = ["auto", "triton"] + ["cpu"] * (extension.reason_off() is None)


def weights(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=generator) * 0.4 for s in shapes]


C = weights((8,))[0]
W = weights(
    *((5, 8, 3, 3), (5, 11, 3, 3), (8, 5, 4, 4), (24, 8), (8, 8), (1, 2, 4, 6, 3), (8, 8, 3, 3))
)


# Every public op, as a function of x (1, 2, 4, 6, 8)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_transforms(backend):
    x, v = torch.randn(2, 1, 2, 1, 1, 8)

    def fn(x):
        return attention_block(norm_act(x, C, kind="layer"), C, W[3], W[4], core="time", heads=2)

    def all_of_them():
        yield vjp(fn, x)[1](v)[0]
        yield jacrev(fn)(x)
        yield hessian(lambda x: fn(x).square().sum())(x)
        yield linearize(fn, x)[1](v)
        yield jvp(grad(lambda x: fn(x).square().sum()), (x,), (v,))[1]

    with use_backend("reference"):
        wanted = list(all_of_them())
    with use_backend(backend, strict=True):
        for a, b in zip(all_of_them(), wanted, strict=True):
            assert a.abs().max() > 0 and torch.equal(a, b)


def test_only_inside():
    def asked(x):
        seen.append(backend_in_force())
        return x.sum()

    seen: list[str] = []
    with use_backend("cpu"):
        for call in (asked, vmap(asked), grad(asked), asked):
            call(torch.ones(3, 2))
        with torch.autograd.forward_ad.dual_level():
            asked(torch.ones(2))
        with pytest.raises(KeyError):
            grad(lambda x: {}["an error inside"])(torch.ones(()))
        asked(torch.ones(2))
    assert seen == ["cpu", "reference", "reference", "cpu", "reference", "cpu"]


@pytest.mark.parametrize("dual", ["x", "weight", "bias"])
def test_group_norm_in_forward_mode(dual):
    """By itself and through ``torch.func``; what has no tangent computes as ever."""
    inputs = {"x": torch.randn(2, 3, 4, 5, 8), "weight": torch.randn(8), "bias": torch.randn(8)}
    tangent = torch.randn_like(inputs[dual])

    def norm(value):
        return norm_act(**inputs | {dual: value}, kind="group", groups=2)

    expected = jvp(norm, (inputs[dual],), (tangent,))
    with use_backend("reference"):
        plain = norm(inputs[dual])
    with fwAD.dual_level():
        assert torch.equal(norm(inputs[dual]), plain)
        found = fwAD.unpack_dual(norm(fwAD.make_dual(inputs[dual], tangent)))
    for a, e in zip(found, expected):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_batch_of_gradients(backend):
    """``is_grads_batched`` maps the backward of kernels that have run."""
    x = torch.randn(1, 2, 4, 6, 8, requires_grad=True)
    with use_backend(backend):
        y = space_conv(norm_act(x, C, kind="rms"), W[1], x2=W[5])
        douts = torch.randn(3, *y.shape)
        (found,) = torch.autograd.grad(y, x, douts, is_grads_batched=True, retain_graph=True)
        for dout, one in zip(douts, found):
            torch.testing.assert_close(torch.autograd.grad(y, x, dout, retain_graph=True)[0], one)


# --- networks ------------------------------------------------------------------------------------

SMALL = dict(dim=8, dim_mults=(1, 2), attn_heads=2)
PAPER = dict(
    dim=8, dim_mults=(1, 2), layout="paper", image_size=8, attn_resolutions=(4,), attn_dim_head=8,
    resnet_groups=4, emb_dim=16, num_blocks=1, position="shaw", null_cond="zeros", zero_init=False,
)  # fmt: skip
NETWORKS = {
    "rms": lambda: UNet3D(**SMALL, norm="rms", cond_dim=3),
    "group": lambda: UNet3D(**SMALL, resnet_groups=4, cond_dim=3),
    "paper": lambda: UNet3D(**PAPER, cond_dim=3),
    "paper_resblock": lambda: UNet3D(**PAPER, cond_dim=3, resample="resblock", dropout=0.0),
    "peer": lambda: peer_or_skip("0.7.0").Unet3D(**SMALL, cond_dim=3),
}


def per_sample(model, **options):
    def loss(parameters, x, time, cond):
        out = functional_call(model, parameters, (x[None], time[None], cond[None]))
        return out.square().mean()

    return vmap(grad(loss), in_dims=(None, 0, 0, 0), **options)


def batch() -> tuple[Tensor, ...]:
    return torch.randn(3, 3, 2, 8, 8), torch.rand(3), torch.randn(3, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_per_sample_gradients(name):
    """As a loop of backward() gives them, which runs on the kernels."""
    model = NETWORKS[name]().eval()
    inputs = batch()
    model(*inputs)  # the peer fills a cache in its first call
    found = per_sample(model)(dict(model.named_parameters()), *inputs)
    for i, (x, time, cond) in enumerate(zip(*inputs)):
        model.zero_grad()
        model(x[None], time[None], cond[None]).square().mean().backward()
        pairs = [(g[i], p.grad) for p, g in zip(model.parameters(), found.values())]
        scale = max(p.abs().max() for _, p in pairs if p is not None)
        for ours, loop in pairs:
            expected = torch.zeros_like(ours) if loop is None else loop
            # Of a bias before a norm over its channel alone the exact gradient is 0.
            assert (ours - expected).abs().max() < 2e-5 * max(expected.abs().max(), scale / 50)


@pytest.mark.parametrize("name", ["rms", "group", "paper"])
def test_vmap_of_a_network(name):
    model, inputs = NETWORKS[name]().eval(), [t[:, None] for t in batch()]
    with torch.no_grad():
        found = vmap(model)(*inputs)
        for out, *one in zip(found, *inputs):
            torch.testing.assert_close(out, model(*one), rtol=1e-4, atol=1e-5)


def test_per_sample_gradients_draw_as_vmap_says():
    """Dropout and the dropped condition: another draw for each sample, or the same."""
    model = UNet3D(**SMALL, norm="rms", cond_dim=3, dropout=0.5, cond_drop_prob=0.5)
    x, time, cond = (t[:1].expand(3, *t.shape[1:]) for t in batch())
    parameters = dict(model.named_parameters())
    found = {}
    for mode in ("same", "different"):
        g = per_sample(model, randomness=mode)(parameters, x, time, cond)["stem.weight"]
        found[mode] = max_error(g[0], g[1])
    assert found["same"] < 1e-4 and found["different"] > 1e-2
    with pytest.raises(RuntimeError, match="randomness"):
        per_sample(model)(parameters, x, time, cond)


def test_compiled():
    """One graph, with the transforms outside as inside; and without them the kernels stay."""
    torch._dynamo.reset()

    def fn(x, weight):
        h = space_conv(norm_act(x, C, kind="rms"), weight, x2=W[5])
        return h.square().mean()

    both = vmap(grad(fn, argnums=1), in_dims=(0, None))
    x = torch.randn(3, 1, 2, 4, 6, 8)
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, W[1]), both(x, W[1]))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain = torch.compile(fn, fullgraph=True, backend=backend)
    torch.testing.assert_close(plain(x[0], W[1]), fn(x[0], W[1]))
    assert "space_conv_fwd" in graphs[0].code and "functorch" not in graphs[0].code
    torch._dynamo.reset()

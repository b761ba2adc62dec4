"""What layers launch: no concatenation, no layout change, no loose bias, SiLU, FiLM or residual."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastvdm import UNet3D, use_backend
from fastvdm.layers.attention import Attention
from fastvdm.layers.conv import SpaceConv, convolve
from fastvdm.layers.embedding import TimeEmbedding
from fastvdm.layers.kept import kept
from fastvdm.layers.norm import Norm
from fastvdm.layers.position import T5RelativeBias, rotary_table
from fastvdm.layers.resnet import Films, PreNormResnetBlock, ResnetBlock, films
from fastvdm.runtime.dispatch import INTERPRETED
from fastvdm.unet.blocks import film_layers

VIEWS = {
    "view", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "split",
    "slice", "select", "alias", "detach", "unbind", "as_strided", "reshape", "_reshape_alias",
    "empty", "empty_like", "new_empty", "zeros", "chunk", "unflatten", "lift_fresh",
    "promote_types",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operators that do work; one of ours is one launch or a fixed few."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.copies: list[tuple[str, tuple[int, ...]]] = []  # of whole videos

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names[name] += 1
        out = func(*args, **(kwargs or {}))
        if name in ("clone", "copy_", "_to_copy", "cat") and out.ndim >= 4:
            self.copies.append((name, tuple(out.shape)))
        return out


def kernels_or_skip() -> str:
    if torch.cuda.is_available() or INTERPRETED:
        return "triton"
    pytest.skip("needs the Triton kernels, on a GPU or interpreted")


def launches(block, *inputs) -> Counter:
    backend = kernels_or_skip()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    block, inputs = block.to(device), [t.to(device) for t in inputs]
    with torch.no_grad(), use_backend(backend), Launches() as seen:
        block(*inputs)
    return seen.names


def group(channels: int) -> Norm:
    return Norm("group", channels, groups=4)


def test_residual_block():
    """Four launches and the FiLM projection of a vector."""
    block = ResnetBlock(8, 8, group, emb_dim=5)
    seen = launches(block, torch.randn(1, 2, 4, 6, 8), torch.randn(1, 5))
    assert seen.pop("addmm") == 1
    assert sum(seen.values()) == 4, seen


def test_residual_block_with_a_skip_connection():
    """The two sources are never concatenated; the shortcut is one more convolution."""
    block = ResnetBlock(8 + 4, 8, group, emb_dim=None)
    x, x2 = torch.randn(1, 2, 4, 6, 8), torch.randn(1, 2, 4, 6, 4)
    backend = kernels_or_skip()
    with torch.no_grad(), use_backend(backend), Launches() as seen:
        block(x, None, x2)
    assert sum(seen.names.values()) == 5, seen.names


def test_pre_norm_block():
    """The second norm has its statistics from the first convolution; the second ends in the sum."""
    block = PreNormResnetBlock(8, 8, group, emb_dim=5)
    seen = launches(block, torch.randn(1, 2, 4, 6, 8), torch.randn(1, 5))
    assert seen.pop("addmm") == 1
    assert seen == {"norm_act_fwd": 2, "space_conv_stats_fwd": 1, "space_conv_fwd": 1}


@pytest.mark.parametrize("resample", [None, "up"])
def test_pre_norm_block_is_the_same_on_every_backend(resample):
    """Output and gradients; the statistics of the epilogue are those of the norm's own pass."""
    block = PreNormResnetBlock(8, 8, group, emb_dim=5, resample=resample, zero_init=False)
    block.to("cuda" if torch.cuda.is_available() else "cpu")
    x, emb = (torch.randn(s).to(block.conv1.weight.device) for s in ((1, 2, 4, 6, 8), (1, 5)))
    found = []
    for backend in (kernels_or_skip(), "reference"):
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        with use_backend(backend):
            y = block(leaves[0], emb)
        found.append((y, *torch.autograd.grad(y.square().mean(), leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


class _Wrapped(torch.nn.Module):
    """Stands in the place of a module, as adapters do, and has none of its attributes."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("block", [ResnetBlock, PreNormResnetBlock])
@pytest.mark.parametrize("name", ["conv1", "norm1", "conv2", "norm2", "skip"])
def test_a_wrapped_module_of_a_residual_block(block, name):
    """It is called, and what stands beside it stays fused."""
    block = block(8 + 4, 8, group, emb_dim=5)
    torch.nn.init.normal_(block.conv2.weight)
    x, x2 = torch.randn(1, 2, 4, 6, 8), torch.randn(1, 2, 4, 6, 4)
    emb, called = torch.randn(1, 5), []
    wanted = block(x, emb, x2)
    setattr(block, name, _Wrapped(getattr(block, name)))
    getattr(block, name).inner.register_forward_hook(lambda *_: called.append(name))
    torch.testing.assert_close(block(x, emb, x2), wanted, rtol=1e-4, atol=1e-4)
    assert called == [name]


def test_a_hook_unfuses_no_other_pair():
    block = ResnetBlock(8, 8, group, emb_dim=5)
    block.conv2.register_forward_hook(lambda *_: None)
    seen = launches(block, torch.randn(1, 2, 4, 6, 8), torch.randn(1, 5))
    assert seen["space_conv_stats_fwd"] == seen["space_conv_fwd"] == 1


def _attention(core: str, channels: int) -> Attention:
    return Attention(core, Norm("layer", channels), 2, 16, bias=True)


@pytest.mark.parametrize(("axis", "channels"), [("space", 24), ("time", 264)])
def test_attention_with_layer_norm(axis, channels):
    """Norm, attention, and a product with the residual; the other product is the library's."""
    seen = launches(_attention(axis, channels), torch.randn(1, 3, 2, 4, channels))
    ours = {"norm_act_fwd": 1, "axis_attention_fwd": 1, "linear_residual_fwd": 1}
    assert seen == ours | {"addmm": 1}


def test_an_adapter_keeps_its_place():
    """What stands for a projection is called."""
    block = _attention("space", 24)
    block.qkv = torch.nn.Sequential(block.qkv)
    seen = launches(block, torch.randn(1, 3, 2, 4, 24))
    assert seen["norm_act_fwd"] == seen["axis_attention_fwd"] == 1


@pytest.mark.parametrize("axis", ["space", "time"])
def test_attention_is_the_same_on_every_backend(axis):
    block = _attention(axis, 264).to("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(2, 3, 2, 4, 264).to(block.out.weight.device)
    found = []
    for backend in (kernels_or_skip(), "reference"):
        leaves = [x.clone().requires_grad_(), *block.parameters()]
        with use_backend(backend):
            y = block(leaves[0])
        found.append((y, *torch.autograd.grad(y.square().mean(), leaves)))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_network_changes_layout_only_at_its_ends():
    backend = kernels_or_skip()
    with FakeTensorMode(), torch.no_grad(), use_backend(backend):
        model = UNet3D(8, dim_mults=(1, 2), attn_heads=2)
        x, time = torch.randn(1, 3, 2, 4, 4), torch.tensor([3])
        with Launches() as seen:
            model(x, time)
    assert seen.copies == [("clone", (1, 2, 4, 4, 3)), ("clone", (1, 3, 2, 4, 4))]
    assert seen.names["silu"] == 1  # of the embedding
    assert seen.names["norm_act_fwd"] and seen.names["axis_attention_fwd"]


def test_all_film_layers_are_one_product():
    """With the same result, and only where each may be part of it."""
    layers, emb = [nn.Linear(6, n) for n in (4, 10, 2)], torch.randn(3, 6)
    with torch.no_grad():
        found = films(emb, layers)
        assert isinstance(found, Films)
        for layer in layers:
            torch.testing.assert_close(found.made[layer], layer(emb))
        layers[1].register_forward_hook(lambda *_: None)
        assert films(emb, layers) is emb and films(emb, []) is emb
        assert films(emb, [nn.Linear(6, 4, bias=False), layers[0]]) is emb
    assert films(emb, layers[::2]) is emb  # their weights want a gradient
    leaf = emb.clone().requires_grad_()
    for layer in layers[::2]:
        layer.requires_grad_(False)
    made = films(leaf, layers[::2]).made
    assert torch.autograd.grad(made[layers[0]].sum(), leaf)[0].abs().max() > 0


def test_who_is_called_with_the_films():
    """All blocks of a network, and none where something between it and a layer wants the call."""
    made = UNet3D(8, dim_mults=(1, 2), attn_heads=2)

    def found(model: UNet3D) -> list:
        return film_layers([*model.downs, *model.ups], model.middle)

    own = {id(m.film) for m in made.modules() if getattr(m, "film", None) is not None}
    assert {id(layer) for layer in found(made)} == own and len(own) > 5
    assert not {id(layer) for layer in found(copy.deepcopy(made))} & own
    for place in (made.middle[0], made.ups[0].units[0].blocks[1]):
        hook = place.register_forward_pre_hook(lambda *_: None)
        assert found(made) == []
        hook.remove()
    first = made.downs[0].units[0].blocks[0]
    made.downs[0].units[0].blocks[0] = copy.deepcopy(first)
    assert first.film not in found(made) and len(found(made)) == len(own)
    made.downs[0].units[0].blocks[0] = nn.Identity()
    assert found(made) == []


@pytest.mark.parametrize("options", [{}, dict(conditioning="add")], ids=["film", "add"])
def test_a_block_takes_the_films_of_its_embedding(options):
    block = PreNormResnetBlock(8, 8, group, emb_dim=6, zero_init=False, **options)
    x, emb = torch.randn(2, 1, 4, 4, 8), torch.randn(2, 6)
    with torch.no_grad():
        other = nn.Linear(6, 16)
        torch.testing.assert_close(block(x, films(emb, [other, block.film])), block(x, emb))
        torch.testing.assert_close(block(x, films(emb, [other])), block(x, emb))


def test_tables_are_made_once_for_eager_calls():
    made = []

    @kept
    def ramp(n: int, device: torch.device) -> torch.Tensor:
        made.append(n)
        return torch.arange(n, device=device).float()

    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = ramp(5, cpu)
    assert ramp(5, cpu) is first and ramp(6, cpu).numel() == 6 and made == [5, 6]
    assert not first.is_inference()
    with FakeTensorMode():
        assert type(ramp(5, cpu)) is not torch.Tensor
    torch.vmap(lambda x: x + ramp(5, cpu))(torch.zeros(2, 5))
    assert made == [5, 6, 5, 5] and ramp(5, cpu) is first
    torch.jit.trace(lambda x: x + ramp(len(x), cpu), torch.zeros(7))
    torch.jit.trace(lambda x: x + ramp(len(x), cpu), torch.zeros(7))
    torch.testing.assert_close(rotary_table(4, 6, cpu), rotary_table.__wrapped__(4, 6, cpu))


def test_embeddings_in_fewer_launches_are_the_same(monkeypatch):
    """Where no gradient is wanted and nothing listens, to the last bit."""

    def refuse(*_):
        raise AssertionError("the long way")

    time = TimeEmbedding(10, 6, time_input="index", num_layers=2, act=nn.GELU)
    bias = T5RelativeBias(3)
    t, cpu = torch.tensor([0.0, 7.0, 999.0]), torch.device("cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        time.to(dtype), bias.to(dtype)
        found = time(t), bias(5, cpu)
        with torch.no_grad():
            with monkeypatch.context() as patch:
                patch.setattr(torch, "cat", refuse)
                patch.setattr(nn.Embedding, "forward", refuse)
                fewer = time(t), bias(5, cpu)
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(t.to(dtype), t.to(dtype))
                assert torch.autograd.forward_ad.unpack_dual(time(dual)).tangent is not None
            seen = []
            hook = bias.relative_attention_bias.register_forward_hook(
                lambda *a, seen=seen: seen.append(a)
            )
            listened = bias(5, cpu)
            hook.remove()
        assert len(seen) == 1 and torch.equal(listened, found[1])
        assert all(torch.equal(a, b) for a, b in zip(found, fewer)) and fewer[1].is_contiguous()


def test_a_weight_that_is_a_buffer():
    """As weights frozen by hand are: the module is called, as any other."""
    layer = SpaceConv(8, 8, 3)
    weight, x = layer.weight.detach().clone(), torch.randn(1, 1, 4, 4, 8)
    expected = convolve(layer, x)
    del layer.weight
    layer.register_buffer("weight", weight)
    assert torch.equal(convolve(layer, x), expected)

"""What people hang on a network: hooks, adapters, quantisation, offloading, flat vectors. Each has
the effect that it has on the peer's network with the same weights, or says why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from peer import peer_or_skip
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.modules import module as hooks
from torch.nn.utils import prune

from fastvdm import UNet3D, use_backend
from fastvdm.layers.attention import Attention, TimeContext
from fastvdm.layers.conv import SpaceConv
from fastvdm.layers.resnet import PreNormResnetBlock, ResnetBlock
from fastvdm.parallel import frame_parallel
from fastvdm.testing import max_error
from fastvdm.unet.blocks import Unit
from fastvdm.unet.peer import parameter_order

SMALL = dict(dim=8, dim_mults=(1, 2), attn_heads=2, cond_dim=3)
PAPER = dict(dim=8, dim_mults=(1, 2), layout="paper", image_size=4, attn_resolutions=(2, 4),
             attn_dim_head=8, resnet_groups=4, emb_dim=16, num_blocks=1, zero_init=False,
             cond_dim=3)  # fmt: skip
NETWORKS = {
    "group": dict(**SMALL, resnet_groups=4),
    "rms": dict(dim=8, dim_mults=(1, 2), attn_heads=2, norm="rms"),
    "dense": dict(dim=8, dim_mults=(1,), attn_heads=2, norm="rms", use_sparse_linear_attn=False),
    "paper": dict(**PAPER, position="shaw", dropout=0.1),
    "added": dict(**PAPER, position="t5", conditioning="add", resample="resblock"),
}
X, TIME, COND = torch.randn(2, 3, 3, 4, 4), torch.tensor([1.0, 30.0]), torch.randn(2, 3)


def run(model: nn.Module, x: Tensor = X) -> Tensor:
    cond = COND if getattr(model, "has_cond", True) else None
    return model(x, TIME, cond=cond, null_cond_prob=0.0)


def pair() -> tuple[nn.Module, UNet3D]:
    torch.manual_seed(0)
    peer = peer_or_skip("0.7.0").Unet3D(**SMALL)
    return peer.eval(), UNet3D.from_unet3d(peer, exact=True).eval()


def module_pairs(model: UNet3D) -> dict[str, str]:
    """The peer's name of each module with parameters: ours."""
    names = (tuple(n.rpartition(".")[0] for n in both) for both in parameter_order(model))
    return {peer: own for peer, own in names if own}


def with_forward(model: nn.Module) -> set[str]:
    """The submodules that are called: not the containers, of which a level is one."""
    missing = hooks._forward_unimplemented
    return {n for n, m in model.named_modules() if type(m).forward is not missing}


def test_parameters_that_are_plain_attributes():
    """As DataParallel leaves them on its replicas."""
    model = UNet3D(**NETWORKS["group"]).eval()
    want = run(model)
    for module in model.modules():
        for name, p in [*module._parameters.items()]:
            if p is not None:
                del module._parameters[name]
                setattr(module, name, p.detach())
    assert torch.equal(run(model), want)


def untrained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.grad is None}


# --- hooks ---------------------------------------------------------------------------------------


def note_all(model: nn.Module) -> dict[str, set[str]]:
    """A hook of every kind on every submodule; each notes where it fired."""
    kinds: dict[str, tuple[str, dict]] = {
        "pre": ("register_forward_pre_hook", {}),
        "pre_kwargs": ("register_forward_pre_hook", {"with_kwargs": True}),
        "forward": ("register_forward_hook", {}),
        "kwargs": ("register_forward_hook", {"with_kwargs": True, "always_call": True}),
        "backward_pre": ("register_full_backward_pre_hook", {}),
        "backward": ("register_full_backward_hook", {}),
    }
    fired: dict[str, set[str]] = {kind: set() for kind in kinds}
    for name, module in model.named_modules():
        for kind, (register, options) in kinds.items():
            note = lambda *_, seen=fired[kind], name=name: seen.add(name)  # noqa: E731
            getattr(module, register)(note, **options)
    return fired


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_hook_fires(name, backend):
    model = UNet3D(**NETWORKS[name])
    want = run(model.eval())
    called = with_forward(model)
    fired = note_all(model)
    with use_backend(backend):
        assert max_error(run(model), want) < 1e-5
        run(model.train()).square().mean().backward()
    for kind, seen in fired.items():
        assert seen == called, (kind, called - seen)
    assert untrained(model) <= {"null_cond_emb"}


def change(value):
    if isinstance(value, tuple | list):
        return tuple(change(v) for v in value)
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return 0.9 * value + 0.01 if floating else value  # a norm would undo a factor alone


CHANGES: list[Callable[[nn.Module], object]] = [
    lambda m: m.register_forward_hook(lambda _, args, y: change(y)),
    lambda m: m.register_forward_pre_hook(lambda _, args: change(args)),
    lambda m: m.register_full_backward_hook(lambda _, dx, dy: change(dx)),
    lambda m: m.register_full_backward_pre_hook(lambda _, dy: change(dy)),
]


def output_and_gradients(model: nn.Module) -> list[Tensor]:
    leaf = X.clone().requires_grad_()
    y = run(model, leaf)
    stem = model.stem if isinstance(model, UNet3D) else model.init_conv
    found = torch.autograd.grad(y.square().sum(), [leaf, stem.weight])
    return [y.detach(), found[0], found[1].flatten(2)]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("first", range(4))
def test_hooks_change_what_they_change_in_the_peer(first):
    """On every module with parameters one of the four kinds; with ``first`` another one."""
    peer, own = pair()
    plain = output_and_gradients(own)
    handles = []
    for i, names in enumerate(module_pairs(own).items(), first):
        for model, name in zip((peer, own), names):
            handles.append(CHANGES[i % 4](model.get_submodule(name)))
    found = output_and_gradients(own)
    assert all(max_error(a, b) < 2e-4 for a, b in zip(found, output_and_gradients(peer)))
    assert all(max_error(a, b) > 1e-2 for a, b in zip(found, plain))
    for handle in handles:
        handle.remove()
    assert all(torch.equal(a, b) for a, b in zip(output_and_gradients(own), plain))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_on_all_modules(kind):
    model, seen = UNet3D(**NETWORKS["group"]), set()
    handle = getattr(hooks, f"register_module_{kind}_hook")(lambda m, *_: seen.add(m) and None)
    try:
        run(model).sum().backward()
    finally:
        handle.remove()
    assert {model.get_submodule(n) for n in with_forward(model)} <= seen


def test_a_copy_keeps_its_hooks():
    model = UNet3D(**NETWORKS["rms"]).eval()
    plain = run(model)
    model.middle[0].blocks[0].norm2.register_forward_hook(lambda m, args, y: y * 2)
    assert max_error(run(model), plain) > 1e-3
    assert torch.equal(run(copy.deepcopy(model)), run(model))


def test_hooks_under_compile():
    torch._dynamo.reset()
    unit = UNet3D(**NETWORKS["dense"]).downs[0].units[0]
    inputs = torch.randn(2, 3, 4, 4, 8), torch.randn(2, 32), TimeContext({})
    plain = unit(*inputs)
    for layer in (unit.blocks[0].conv1, unit.blocks[0].norm2, unit.temporal.qkv):
        layer.register_forward_hook(lambda m, args, y: 1.5 * y + 0.1)
    want = unit(*inputs)
    got = torch.compile(unit, fullgraph=True, backend="aot_eager")(*inputs)
    assert max_error(got, want) < 1e-5 and max_error(want, plain) > 1e-2


@contextmanager
def one_process(tmp_path) -> Iterator[object]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_every_hook_fires_with_frames_sharded(tmp_path):
    model = UNet3D(**NETWORKS["paper"]).eval()
    want, called = run(model), with_forward(model)
    with one_process(tmp_path) as mesh:
        fired = note_all(frame_parallel(model, mesh))
        y = run(model)
        y.sum().backward()
    assert max_error(y, want) < 1e-5
    assert all(seen == called for seen in fired.values())


# --- other modules and other weights in a layer's place ------------------------------------------


PLACES = (
    "ups.0.0.block1.proj", "ups.0.0.block2.proj", "ups.0.0.res_conv", "downs.0.1.block1.norm",
    "downs.1.3.fn.fn.fn.to_out", "init_conv", "final_conv.1",
)  # fmt: skip


def in_each_place(change: Callable[[nn.Module], object]) -> Callable[[nn.Module], None]:
    """``change`` on a convolution of two sources, one with a residual, a shortcut of two sources, a
    norm, a projection and both ends; a module that it returns takes the place."""

    def tool(model: nn.Module) -> None:
        own = module_pairs(model) if isinstance(model, UNet3D) else {}
        for place in PLACES:
            parent, _, name = own.get(place, place).rpartition(".")
            parent = model.get_submodule(parent)
            found = change(getattr(parent, name))
            if isinstance(found, nn.Module):
                setattr(parent, name, found)

    return tool


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def has_bias(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd)


def weight_norm(module: nn.Module) -> None:
    if has_bias(module):
        torch.nn.utils.weight_norm(module).weight_g.data.mul_(2)


def new_weight_norm(module: nn.Module) -> None:
    if has_bias(module):
        torch.nn.utils.parametrizations.weight_norm(module)
        module.parametrizations.weight.original0.data.mul_(2)


def spectral_norm(module: nn.Module) -> None:
    if has_bias(module):
        torch.manual_seed(3)  # of its power iteration
        torch.nn.utils.spectral_norm(module)


def new_spectral_norm(module: nn.Module) -> None:
    if has_bias(module):
        torch.manual_seed(3)
        torch.nn.utils.parametrizations.spectral_norm(module)


def flat_vector(model: nn.Module) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]  # not the peer's frequencies
    flat = torch.nn.utils.parameters_to_vector(parameters)
    torch.nn.utils.vector_to_parameters(flat * 1.1, parameters)


def lbfgs(model: nn.Module) -> None:
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=2)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = run(model).square().mean()
        found.backward()
        return found

    with torch.enable_grad():
        optimizer.step(loss)


TOOLS: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": in_each_place(weight_norm),
    "spectral_norm": in_each_place(spectral_norm),
    "parametrizations.weight_norm": in_each_place(new_weight_norm),
    "parametrizations.spectral_norm": in_each_place(new_spectral_norm),
    "wrapped": in_each_place(lambda m: nn.Sequential(m, Twice())),
    "identity": in_each_place(lambda m: None if has_bias(m) else nn.Identity()),
    "prune": in_each_place(
        lambda m: prune.l1_unstructured(m, "weight", 0.5) and None if has_bias(m) else None
    ),
    "flat vector": flat_vector,
    "LBFGS": lbfgs,
}


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_effect_is_the_peers(tool):
    peer, own = pair()
    with torch.no_grad():
        before = run(own)
        for model in (peer, own):
            TOOLS[tool](model)
        after = run(own)
        assert max_error(after, run(peer)) < 1e-4
    assert max_error(after, before) > 1e-2
    run(own).square().mean().backward()
    assert untrained(own) <= {"null_cond_emb"}


def test_no_attention():
    peer, own = pair()

    class Nothing(nn.Module):  # the peer passes its own keywords
        def forward(self, x, **_):
            return x

    peer.init_temporal_attn = peer.mid_spatial_attn = peer.downs[0][2] = peer.ups[0][3] = Nothing()
    own.stem_attention = own.middle[0].spatial = nn.Identity()
    own.downs[0].units[0].spatial = own.ups[0].units[0].temporal = nn.Identity()
    assert max_error(run(own), run(peer)) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_wrappers_around_blocks(name):
    """Recomputation wraps whatever it is given, blocks and attentions too."""
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as checkpoints

    model = UNet3D(**NETWORKS[name]).eval()
    want = run(model)
    wrapped = (Unit, ResnetBlock, PreNormResnetBlock, Attention, SpaceConv)
    checkpoints.apply_activation_checkpointing(model, check_fn=lambda m: isinstance(m, wrapped))
    y = run(model)
    y.sum().backward()
    assert max_error(y, want) < 1e-5


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_in_either_layout(layout):
    """Flat vectors want the default one; the gradients have that of their weights."""
    model = UNet3D(**NETWORKS["group"])
    want = run(model.eval())
    model.to(memory_format=layout)
    y = run(model)
    y.sum().backward()
    assert max_error(y, want) < 1e-5
    for p in model.parameters():
        kept = layout if p.ndim == 4 else torch.contiguous_format
        assert p.grad is None or p.grad.is_contiguous(memory_format=kept)
    model.to(memory_format=torch.contiguous_format)
    flat_vector(model)


# --- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["group", "paper"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_offloaded_weights(name):
    """Every weight is on no device until its module is called."""
    accelerate = pytest.importorskip("accelerate")
    model = UNet3D(**NETWORKS[name]).eval()
    guided = lambda: model.forward_with_cond_scale(X, TIME, COND, cond_scale=3.0)  # noqa: E731
    with torch.no_grad():
        want = run(model), guided()
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        assert max_error(run(model), want[0]) < 1e-5 and max_error(guided(), want[1]) < 1e-5
    with pytest.raises(ValueError, match="x is on meta, the network on cpu"):
        UNet3D(**NETWORKS["rms"])(X.to("meta"), TIME.to("meta"))


@pytest.mark.filterwarnings("ignore")
def test_summary_names_every_size():
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.utilities.model_summary import ModelSummary

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = UNet3D(**NETWORKS["group"])
            self.example_input_array = (X, TIME, COND)

        def forward(self, *args):
            return self.net(*args)

    module = Module()
    summary = ModelSummary(module, max_depth=-1)
    unknown = {n for n, s in zip(summary.layer_names, summary.in_sizes) if s == "?"}
    assert unknown.isdisjoint(f"net.{n}" for n in with_forward(module.net)), unknown

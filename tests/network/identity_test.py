"""The same keys are not the same network: every source becomes the right network or an error."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from peer import peer_or_skip
from torch import nn

from fastvdm import UNet3D, accelerate
from fastvdm.testing import max_error

SMALL = dict(dim=8, dim_mults=(1, 2), attn_heads=2)
X, TIME = torch.randn(1, 3, 3, 4, 6), torch.tensor([7])
RELEASES = {"0.5.3": "before", "0.6.3": "after", "0.7.0": "after"}


def patched(old: str, new: str, version: str = "0.6.3"):
    """The peer's Unet3D with a line of its source replaced."""
    peer = peer_or_skip(version)
    source = inspect.getsource(peer.Unet3D)
    assert source.count(old) == 1
    names = dict(vars(peer))
    exec(source.replace(old, new), names)
    return names["Unet3D"]


def release(version: str):
    """Its Unet3D. Up to 0.5.3 the outermost skip left before the stem's attention."""
    if version != "0.5.3":
        return peer_or_skip(version).Unet3D
    stem = "        x = self.init_conv(x)\n\n"
    attention = "        x = self.init_temporal_attn(x, pos_bias = time_rel_pos_bias)\n\n"
    skip = "        r = x.clone()\n"
    return patched(stem + attention + skip, stem + skip + attention)


def diffusion(network, version: str = "0.6.3"):
    return peer_or_skip(version).GaussianDiffusion(network, image_size=8, num_frames=2, timesteps=4)


# -- releases, three ways -------------------------------------------------------------------------


@pytest.mark.parametrize("cond", [None, 5])
@pytest.mark.parametrize("version", RELEASES)
def test_module(version, cond):
    network = release(version)(**SMALL, cond_dim=cond).eval()
    given = {} if cond is None else {"cond": torch.randn(1, cond)}
    want = network(X, TIME, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = UNet3D.from_unet3d(diffusion(network)).eval()
        swapped = accelerate(diffusion(network)).denoise_fn
    for ours in (read, swapped):
        assert ours.stem_skip == RELEASES[version]
        assert max_error(ours(X, TIME, **given), want) < 1e-5


@pytest.mark.parametrize("kind", ["state", "file", "load", "hook"])
@pytest.mark.parametrize("version", RELEASES)
def test_state(version, kind, tmp_path):
    """Weights alone do not tell: to read a network off them is an error unless it is chosen, and to
    load them into one that was built a warning."""
    network = release(version)(**SMALL).eval()
    state = diffusion(network).state_dict()
    if kind == "file":
        torch.save({"step": 1, "model": state, "ema": state, "scaler": {}}, tmp_path / "model-1.pt")

    def read(**options):
        if kind == "state":
            return UNet3D.from_unet3d(network.state_dict(), **options)
        if kind == "file":
            return UNet3D.from_unet3d(tmp_path / "model-1.pt", ema=True, **options)
        norm = "rms" if version == "0.7.0" else "group"
        model = UNet3D(**SMALL, norm=norm, **options)
        (diffusion(model) if kind == "hook" else model).load_state_dict(state)
        return model

    if version != "0.7.0" and kind in ("state", "file"):
        with pytest.raises(ValueError, match="0.6.3 are stem_skip='after'.*Pass stem_skip"):
            read()
    elif version != "0.7.0":
        with pytest.warns(UserWarning, match="stem_skip='before'") as caught:
            read()
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = read() if version == "0.7.0" else read(stem_skip=RELEASES[version])
    assert max_error(model.eval()(X, TIME), network(X, TIME)) < 1e-5
    back = model.to_peer_state_dict()
    assert all(torch.equal(back[k], v) for k, v in network.state_dict().items())


def test_chosen_skip_is_the_only_one_compared():
    network = release("0.5.3")(**SMALL)
    with pytest.raises(ValueError, match=r"differ by 0\.\d+ with stem_skip='after' \(rel"):
        accelerate(network, stem_skip="after")
    assert accelerate(network, stem_skip="before").stem_skip == "before"
    assert accelerate(network, stem_skip="after", check=False).stem_skip == "after"
    with pytest.raises(ValueError, match="drop the overrides if they change"):
        accelerate(network, norm_per_frame=True)
    with pytest.raises(ValueError, match="stem_skip must be one of None, after, before, got 'mid'"):
        UNet3D(**SMALL, stem_skip="mid")
    with pytest.raises(ValueError, match="layout='paper'"):
        UNet3D(**SMALL, layout="paper", image_size=8, stem_skip="before")


def test_skip_is_kept(tmp_path):
    """In the saved configuration, and under checkpointing."""
    model = accelerate(release("0.5.3")(**SMALL)).eval()
    want = model(X, TIME)
    model.save_pretrained(tmp_path)
    assert torch.equal(UNet3D.from_pretrained(tmp_path)(X, TIME), want)
    again = UNet3D.from_unet3d(nn.ModuleDict({"inner": model}))  # ours tells its own arguments
    assert again.stem_skip == "before" and torch.equal(again.eval()(X, TIME), want)
    for level in ("block", "level"):
        model.checkpointing = level
        out = model(X, TIME)
        assert torch.equal(out, want) and out.requires_grad


def test_what_was_set_afterwards_is_kept(tmp_path):
    model = UNet3D(**SMALL).eval()
    model.stem_skip, model.cond_drop_prob = "before", 0.3
    model.save_pretrained(tmp_path)
    for again in (UNet3D.from_pretrained(tmp_path), UNet3D.from_unet3d(model).eval()):
        assert torch.equal(again(X, TIME), model(X, TIME)) and again.cond_drop_prob == 0.3


# -- networks with the peer's keys that are not the peer's ----------------------------------------


def subclass(version="0.6.3"):
    class Doubled(peer_or_skip(version).Unet3D):
        def forward(self, x, time, **kw):
            return 2 * super().forward(x, time, **kw)

    return Doubled(**SMALL)


def guided():
    class Guided(peer_or_skip().Unet3D):
        def forward_with_cond_scale(self, *args, cond_scale=2.0, **kw):
            return super().forward_with_cond_scale(*args, cond_scale=1 + 2 * cond_scale, **kw)

    return Guided(**SMALL, cond_dim=3)


def edited(change, version="0.6.3"):
    network = peer_or_skip(version).Unet3D(**SMALL)
    change(network)
    return network


def wider_table(network):
    network.time_rel_pos_bias.max_distance = 64


def other_norm(network):
    for m in list(network.modules()):
        if isinstance(m, nn.GroupNorm) and m.num_channels == 16:
            m.num_groups = 4


def zero_head(network):
    nn.init.zeros_(network.final_conv[1].weight)


def no_stem_attention(network):
    nn.init.zeros_(network.init_temporal_attn.fn.fn.fn.to_out.weight)


def add_head(network):
    network.occlusion = nn.Conv3d(8, 1, 1)


def no_last_skip(network):  # release 0.5.1
    network.final_conv[0] = type(network.mid_block1)(8, 8)


def drop_a_level(network):  # release 0.5.0
    network.ups = network.ups[:-1]


def not_finite(network):
    nn.init.constant_(network.init_conv.bias, float("nan"))


CHANGED = {
    "forward": (
        subclass,
        r"Doubled has the peer's keys but .* they differ by 0?\.?\d.*check=False",
    ),
    "guidance": (guided, "computes something else"),
    "table": (lambda: edited(wider_table), "computes something else"),
    "nan": (lambda: edited(not_finite), "has NaN or infinite values.*check=False"),
    "groups": (lambda: edited(other_norm), r"differ, in groups or eps: 4 \(eps 1e-05\), 8"),
    "zero": (lambda: edited(zero_head), "constant .*check=False"),
    "no_stem": (lambda: edited(no_stem_attention), "pass stem_skip='after' .* or 'before'"),
    "head": (lambda: edited(add_head), r"2 keys more \(occlusion.bias, occlusion.weight\).*keep"),
    "0.5.1": (lambda: edited(no_last_skip), "final_conv of 8 channels after a stem of 8.*0.5.2"),
    "0.5.0": (lambda: edited(drop_a_level), "1 up levels to 2 down"),
    "meta": (lambda: edited(lambda n: n.to("meta")), "meta has no values.*check=False"),
    "broken": (
        lambda: patched("x = self.init_conv(x)\n", "x = self.init_conv(x.long())\n")(**SMALL),
        r"Unet3D cannot be run .*\(RuntimeError: .*check=False",
    ),
    "tuple": (
        lambda: patched("return self.final_conv(x)", "return self.final_conv(x), r")(**SMALL),
        "its output is a tuple",
    ),
    "tied": (
        lambda: edited(lambda n: setattr(n, "mid_block2", n.mid_block1)),
        "are one parameter, which UNet3D would part",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_network(name):
    make, message = CHANGED[name]
    network = make()
    model = nn.ModuleDict({"denoise_fn": network})
    with pytest.raises(ValueError, match=message):
        accelerate(model)
    assert model["denoise_fn"] is network
    if name != "tied":  # a copy may part them
        with pytest.raises(ValueError, match=message):
            UNet3D.from_unet3d(model)


def test_epsilon_is_read():
    def change(network):
        for m in network.modules():
            if isinstance(m, nn.GroupNorm):
                m.eps = 1e-2

    network = edited(change).eval()
    assert max_error(accelerate(network)(X, TIME), network(X, TIME)) < 1e-5


def test_an_attention_with_a_bias_of_its_own_is_no_network():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.time_rel_pos_bias = peer_or_skip().RelativePositionBias(heads=2)

    with pytest.raises(ValueError, match="no peer Unet3D found inside Attention"):
        accelerate(Attention())
    model = nn.ModuleList([Attention(), peer_or_skip().Unet3D(**SMALL)])
    accelerate(model)
    assert isinstance(model[0], Attention) and isinstance(model[1], UNet3D)


@pytest.mark.parametrize("layout", [{}, {"layout": "paper", "image_size": 8, "attn_dim_head": 8}])
def test_a_subclass_of_ours_tells_its_arguments(layout):
    class Own(UNet3D):
        pass

    class Doubled(UNet3D):
        def forward(self, *args, **kw):
            return 2 * super().forward(*args, **kw)

    arguments = SMALL | layout | {"resnet_groups": 4, "zero_init": False}
    network = Own(**arguments).eval()
    assert torch.equal(UNet3D.from_unet3d(network).eval()(X, TIME), network(X, TIME))
    with pytest.raises(ValueError, match="computes something else"):
        UNet3D.from_unet3d(Doubled(**arguments))


def test_keys_of_a_changed_network_do_not_fit():
    state = edited(lambda n: setattr(n, "second", copy.deepcopy(n.mid_block1))).state_dict()
    with pytest.raises(ValueError, match="unexpected keys: second.block1.norm.bias"):
        UNet3D(**SMALL, stem_skip="after").load_state_dict(state)
    with pytest.raises(ValueError, match="10 keys more .second.block1.norm.bias"):
        UNet3D.from_unet3d(state, stem_skip="after")


# -- the comparison leaves no trace ---------------------------------------------------------------


def test_check_leaves_no_trace():
    class Counting(peer_or_skip().Unet3D):
        def __init__(self, **kw):
            super().__init__(**kw)
            self.calls, self.seen = 0, []
            self.register_buffer("mean", torch.zeros(2), persistent=False)

        def forward(self, x, *args, **kw):
            self.calls += 1
            self.seen.append(x)
            self.mean += 1
            self.draw = torch.rand(1)
            return super().forward(x, *args, **kw)

    network = Counting(**SMALL).bfloat16()
    network.mid_block1.eval()
    with torch.autocast("cpu", torch.bfloat16):
        network(X, TIME).sum().backward()  # caches its rotary table
    matmul, modes = torch.backends.mkldnn.matmul, [m.training for m in network.modules()]
    before = copy.deepcopy(dict(network.named_buffers())), copy.deepcopy(network.state_dict())
    grads = {k: p.grad.clone() for k, p in network.named_parameters() if p.grad is not None}
    state = torch.random.get_rng_state()
    matmul.fp32_precision = "bf16"
    try:
        with torch.autocast("cpu", torch.bfloat16):
            ours = UNet3D.from_unet3d(network)
            assert torch.equal(torch.random.get_rng_state(), state)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = "none"
    assert ours.stem_skip == "after" and ours.training
    assert [m.training for m in network.modules()] == modes
    assert network.calls == 1 and len(network.seen) == 1 and network.mean.tolist() == [1, 1]
    for old, new in zip(before, (dict(network.named_buffers()), network.state_dict())):
        assert all(v.dtype == new[k].dtype and torch.equal(v, new[k]) for k, v in old.items())
    assert all(torch.equal(network.get_parameter(k).grad, g) for k, g in grads.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


# -- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_is_kept_bit_for_bit(dtype):
    network = edited(lambda n: n.to(dtype))
    norms = [m for m in network.modules() if isinstance(m, nn.GroupNorm)]
    for m in norms if dtype != torch.float64 else ():  # a usual mixture
        m.float()
    want, got = network.state_dict(), accelerate(network).to_peer_state_dict()
    for key, value in want.items():
        if not key.endswith("freqs"):
            assert got[key].dtype == value.dtype and torch.equal(got[key], value), key


def test_made_in_inference_mode():
    with torch.inference_mode():
        network = edited(lambda n: n.bfloat16())
    assert accelerate(network).stem.weight.dtype == torch.bfloat16


def test_meta():
    model = UNet3D.from_unet3d(edited(lambda n: n.to("meta")), check=False, stem_skip="after")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_several_devices():
    network = edited(lambda n: n.mid_block1.to("meta"))
    with pytest.raises(ValueError, match="several devices: cpu, meta"):
        accelerate(network)


@pytest.mark.parametrize("version", ["0.6.3", "0.7.0"])
def test_a_stem_attention_that_adds_nothing(version):
    """Then both skips agree: of the GroupNorm era it is asked, of the other there is one."""
    network = release(version)(**SMALL)
    network.init_temporal_attn.fn.fn.fn.to_out.weight.data.zero_()
    if version == "0.7.0":
        assert accelerate(network).stem_skip == "after"
        return
    with pytest.raises(ValueError, match="does not tell where its outermost skip leaves"):
        accelerate(network)
    assert accelerate(network, stem_skip="before").stem_skip == "before"

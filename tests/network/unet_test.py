"""UNet3D on its own: isolation, fixes, options, presets, errors, saving."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from fastvdm import UNet3D
from fastvdm.testing import max_error
from fastvdm.unet import PRESETS, UNetConfig
from fastvdm.unet.blocks import Unit

SMALL = dict(dim=16, dim_mults=(1, 2), attn_heads=2)
PAPER = dict(dim=16, dim_mults=(1, 2), image_size=16, attn_resolutions=(8,), attn_dim_head=8,
             resnet_groups=4, emb_dim=24)  # fmt: skip
# Parameters of the six models, as the README prints them.
PRESET_PARAMETERS = {
    "ucf101": 1_167_748_355,
    "bair": 148_479_619,
    "kinetics600": 1_165_649_155,
    "t2v-small": 310_661_763,
    "t2v-large": 1_171_946_755,
    "t2v-128": 1_175_519_875,
}


def reduced(name: str, **options) -> UNet3D:
    model = UNet3D.from_preset(name, **(PAPER | options))
    for p in model.parameters():  # the zero-initialised ones would hide everything
        torch.nn.init.normal_(p, std=0.15) if p.ndim > 1 else p.data.add_(0.1 * torch.randn_like(p))
    return model


def changed_frames(model, x, time, frame, **kw) -> list[int]:
    y = x.clone()
    y[:, :, frame] += 1.0
    model.eval()
    with torch.no_grad():
        difference = (model(x, time, **kw) - model(y, time, **kw)).abs().amax(dim=(0, 1, 3, 4))
    return difference.nonzero().flatten().tolist()


# -- the mask leaks nowhere ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(norm="rms"), dict(norm_per_frame=True)])
def test_focus_mask_isolates_frames(options):
    model = UNet3D(**SMALL, **options)
    x, time = torch.randn(2, 3, 5, 4, 8), torch.tensor([3, 400])
    focus = torch.tensor([True, True])
    assert changed_frames(model, x, time, 3, focus_present_mask=focus) == [3]
    assert changed_frames(model, x, time, 3) == [0, 1, 2, 3, 4]


def test_peer_leak_is_a_switch():
    model = UNet3D(**SMALL, norm="rms", mask_stem_attention=False)
    x, time = torch.randn(1, 3, 5, 4, 8), torch.tensor([3])
    focus = torch.tensor([True])
    assert changed_frames(model, x, time, 3, focus_present_mask=focus) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", ["peer", "paper"])
def test_images_are_isolated(family):
    """Joint training (paper §3): videos frames mix, image frames touch nothing else, exactly."""
    if family == "peer":
        model, x = UNet3D(**SMALL, norm="rms"), torch.randn(1, 3, 6, 4, 8)
    else:
        model, x = reduced("bair"), torch.randn(1, 3, 6, 16, 16)
    time = torch.tensor([0.5])
    assert changed_frames(model, x, time, 5, num_images=2) == [5]
    assert changed_frames(model, x, time, 1, num_images=2) == [0, 1, 2, 3]
    video = model(x[:, :, :4], time)
    assert max_error(model(x, time, num_images=2)[:, :, :4], video) < 1e-5


# -- fixes of the peer's defects ------------------------------------------------------------------


def test_init_dim():
    model = UNet3D(**SMALL, init_dim=24)
    out = model(torch.randn(1, 3, 2, 4, 4), torch.tensor([1]))
    assert out.shape == (1, 3, 2, 4, 4) and out.isfinite().all()


def test_null_embedding_is_trained_by_default():
    model = UNet3D(**SMALL, cond_dim=5, cond_drop_prob=1.0)
    x, time, cond = torch.randn(2, 3, 2, 4, 4), torch.tensor([1, 2]), torch.randn(2, 5)
    model(x, time, cond=cond).square().mean().backward()
    assert model.null_cond_emb.grad.abs().max() > 0
    model.eval()
    assert torch.equal(model(x, time, cond=cond), model(x, time, cond=cond, null_cond_prob=0.0))
    assert not torch.equal(model(x, time, cond=cond), model(x, time, cond=cond, null_cond_prob=1.0))


def test_no_host_sync():
    """The forward runs on fake tensors, which refuse every read of a value."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = UNet3D(**SMALL, cond_dim=5)
        x, time, cond = torch.randn(2, 3, 2, 4, 4), torch.zeros(2), torch.randn(2, 5)
        out = model(x, time, cond, 0.3, prob_focus_present=0.5)
        model.forward_with_cond_scale(x, time, cond, cond_scale=3.0, prob_focus_present=0.5)
    assert out.shape == x.shape


def test_forward_on_meta():
    """Shapes without memory or arithmetic, as accelerate and FLOP counters ask for them."""
    with torch.device("meta"):
        out = UNet3D(**SMALL, norm="rms")(torch.zeros(2, 3, 5, 4, 8), torch.zeros(2))
    assert out.shape == (2, 3, 5, 4, 8) and out.device.type == "meta"


# -- options --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", ["block", "level"])
@pytest.mark.parametrize("family", ["peer", "paper"])
def test_checkpointing_changes_nothing(family, checkpointing):
    size = 4 if family == "peer" else 16
    torch.manual_seed(1)
    plain = UNet3D(**SMALL, dropout=0.2) if family == "peer" else reduced("bair", dropout=0.2)
    other = copy.deepcopy(plain)
    twin = (
        UNet3D(**SMALL, checkpointing=checkpointing, dropout=0.2)
        if family == "peer"
        else (reduced("bair", checkpointing=checkpointing, dropout=0.2))
    )
    twin.load_state_dict(other.state_dict())
    x, time, grads = torch.randn(1, 3, 3, size, size), torch.tensor([0.7]), []
    for model in (plain, twin):
        torch.manual_seed(2)
        leaf = x.clone().requires_grad_()
        model(leaf, time).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_dropout_only_in_training():
    model = UNet3D(**SMALL, dropout=0.5)
    x, time = torch.randn(1, 3, 2, 4, 4), torch.tensor([1])
    assert not torch.equal(model(x, time), model(x, time))
    model.eval()
    assert torch.equal(model(x, time), model(x, time))


@pytest.mark.parametrize("position", ["rotary+t5", "t5", "shaw", "none"])
def test_position(position):
    """Without a position the temporal attention cannot tell the order of the frames."""
    model = UNet3D(**SMALL, norm="rms", position=position)
    for name, p in model.named_parameters():
        if "shaw" in name:
            torch.nn.init.normal_(p)
    x, time = torch.randn(1, 3, 5, 4, 4), torch.tensor([1])
    order = torch.tensor([4, 0, 3, 1, 2])
    with torch.no_grad():
        error = max_error(model(x[:, :, order], time), model(x, time)[:, :, order])
    assert (error < 1e-5) == (position == "none")


@pytest.mark.parametrize(
    "options",
    [
        dict(resample="resblock"),
        dict(conditioning="add"),
        dict(position="t5"),
        dict(shaw_per_head=True, shaw_values=False),
        dict(norm="rms", norm_eps=None),
        dict(cond_dim=7),
    ],
    ids=str,
)
def test_paper_options_train(options):
    model = UNet3D.from_preset("bair", **(PAPER | {"num_blocks": 1} | options))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    x, noise = torch.randn(2, 3, 3, 16, 16), torch.randn(2, 3, 3, 16, 16)
    cond = torch.randn(2, 7) if "cond_dim" in options else None
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x + noise, torch.tensor([0.3, -4.0]), cond=cond) - noise).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_zero_init_is_the_identity_path():
    model = UNet3D.from_preset("ucf101", **PAPER)
    out = model(torch.randn(1, 3, 2, 16, 16), torch.tensor([0.0]))
    assert torch.equal(out, torch.zeros_like(out))


def test_half_precision():
    model = UNet3D(**SMALL)
    x, time = torch.randn(1, 3, 3, 4, 4), torch.tensor([10])
    with torch.no_grad():
        exact = model(x, time)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, time)
        low = copy.deepcopy(model).bfloat16()(x.bfloat16(), time)
        wide = copy.deepcopy(model).double()(x.double(), time)
    assert max_error(mixed, exact) < 4e-2 and max_error(low, exact) < 4e-2
    assert low.dtype == torch.bfloat16
    assert wide.dtype == torch.float64 and max_error(wide, exact) < 1e-5


# -- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = UNet3D.from_preset(name)
    assert sum(p.numel() for p in model.parameters()) == PRESET_PARAMETERS[name]
    sizes = {}
    for i, level in enumerate(model.downs):
        size = PRESETS[name].image_size >> i
        attention = level.units[0].spatial
        if attention is not None:
            sizes[size] = attention.heads
    # Heads at 32, 16, 8: C / head_dim (Appendix A)
    want = {"bair": (4, 6, 8), "t2v-small": (4, 8, 16), "t2v-128": (4, 8, 16)}
    assert tuple(sizes[s] for s in (32, 16, 8)) == want.get(name, (8, 16, 32))


def test_the_arguments_are_one_configuration():
    # Of the class Python 3.10 finds that of ModelHubMixin.__new__.
    _, *given = inspect.signature(UNet3D.__init__).parameters.values()
    assert [(p.name, p.kind is p.KEYWORD_ONLY) for p in given] == [
        (f.name, f.kw_only) for f in fields(UNetConfig)
    ]
    for f, p in list(zip(fields(UNetConfig), given))[1:]:
        assert f.default == p.default, f.name
    for f in fields(UNetConfig):
        assert f"{f.name}: " in UNetConfig.__doc__ or f"{f.name}, " in UNetConfig.__doc__, f.name
    assert UNet3D.__init__.__doc__ == UNetConfig.__doc__
    config = UNetConfig(16, dim_mults=[1, 2])
    assert config == copy.deepcopy(config) and hash(config) == hash(
        UNetConfig(16, dim_mults=(1, 2))
    )
    with pytest.raises(FrozenInstanceError):
        config.dim = 8
    with pytest.raises(ValueError, match="dim must be even"):
        replace(PRESETS["bair"], dim=5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'dims'"):
        UNet3D.from_preset("bair", dims=16)


# -- bad input ------------------------------------------------------------------------------------

X, T, C = torch.zeros(2, 3, 4, 8, 8), torch.zeros(2), torch.zeros(2, 5)
BAD_CALLS = {
    "rank": (dict(x=X[0]), ValueError, r"x must be \(B, 3, F, H, W\), got \(3, 4, 8, 8\)"),
    "channels": (dict(x=X[:, :2]), ValueError, r"\(B, 3, F, H, W\)"),
    "height": (dict(x=X[:, :, :, :7]), ValueError, "multiples of 2 .*got 7 x 8"),
    "empty": (dict(x=X[..., :0]), ValueError, "multiples of 2"),
    "no_frames": (dict(x=X[:, :, :0]), ValueError, "one frame"),
    "integer": (dict(x=X.long()), TypeError, "floating-point.*int64"),
    "array": (dict(x=X.numpy()), TypeError, "ndarray"),
    "time_shape": (dict(time=torch.zeros(3)), ValueError, r"time must be \(2,\)"),
    "time_kind": (dict(time=3), TypeError, "time must be a tensor"),
    "time_type": (dict(time=T + 0j), TypeError, "time must be of real numbers, got .*complex64"),
    "no_cond": (dict(cond=None), ValueError, r"cond of shape \(2, 5\)"),
    "cond_width": (dict(cond=C[:, :4]), ValueError, r"cond must be \(2, 5\), got \(2, 4\)"),
    "cond_text": (dict(cond=["a", "b"]), TypeError, "cond must be"),
    "focus_kind": (dict(focus_present_mask=T), TypeError, "bool"),
    "focus_shape": (dict(focus_present_mask=T.bool()[:1]), ValueError, r"\(2,\)"),
    "images": (dict(num_images=4), ValueError, r"num_images must lie in \[0, 3\]"),
    "device": (dict(x=X.to("meta")), ValueError, "x is on meta, the network on cpu"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case):
    change, error, message = BAD_CALLS[case]
    model = UNet3D(**SMALL, cond_dim=5)
    with pytest.raises(error, match=message):
        model(**(dict(x=X, time=T, cond=C) | change))


def test_cond_without_cond_dim():
    with pytest.raises(ValueError, match="unconditional"):
        UNet3D(**SMALL)(X, T, C)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(dim=0), ValueError, "dim must be positive"),
        (dict(dim=16.0), TypeError, "dim must be an int"),
        (dict(dim_mults=()), ValueError, "dim_mults"),
        (dict(dim_mults=2), TypeError, "dim_mults must be a sequence of ints, got 2"),
        (dict(attn_resolutions=8), TypeError, "attn_resolutions must be a sequence of ints, got 8"),
        (dict(attn_resolutions=(8.5,)), TypeError, r"attn_resolutions\[0\] must be an int"),
        (dict(attn_dim_head=7), ValueError, "attn_dim_head below 32 must be even .*, got 7"),
        (dict(norm_eps=float("nan")), ValueError, "norm_eps must be at least 0, got nan"),
        (dict(init_kernel_size=4), ValueError, "init_kernel_size must be odd"),
        (dict(resnet_groups=5), ValueError, "5 groups do not divide 16"),
        (dict(norm="batch"), ValueError, "norm must be one of group, rms"),
        (dict(layout="paper"), ValueError, "image_size"),
        (dict(layout="paper", image_size=16.0), TypeError, "image_size must be an int, got float"),
        (dict(dropout=1.5), ValueError, r"dropout must lie in \[0, 1\]"),
        (dict(layout="paper", image_size=16, attn_dim_head=24), ValueError, "attn_dim_head"),
    ],
    ids=str,
)
def test_bad_constructor(arguments, error, message):
    with pytest.raises(error, match=message):
        UNet3D(**(SMALL | arguments))
    with pytest.raises(ValueError, match="ucf101"):
        UNet3D.from_preset("imagenet")


# -- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["peer", "paper"])
def test_save_and_load(family, tmp_path):
    model = UNet3D(**SMALL, norm="rms") if family == "peer" else reduced("bair")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dim"] == 16
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tmp") == []
    again = UNet3D.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    size = 8 if family == "peer" else 16
    x, time = torch.randn(1, 3, 2, size, size), torch.tensor([0.5])
    assert torch.equal(again(x, time), model.eval()(x, time))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_deepcopy_and_memory_format(layout):
    model = UNet3D(**SMALL)
    assert all(p.is_contiguous() for p in model.parameters())
    twin = copy.deepcopy(model.to(memory_format=layout))
    conv = twin.downs[0].units[0].blocks[0].conv1.weight
    assert conv.is_contiguous(memory_format=layout)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_options_set_afterwards_are_checked_and_take_effect():
    model = UNet3D(8, dim_mults=(1, 2), attn_heads=2)
    for name, value in (("stem_skip", "Before"), ("time_input", "sigma"), ("checkpointing", "all")):
        before = getattr(model, name)
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            setattr(model, name, value)
        assert getattr(model, name) == before
    for value in ("block", "level"):
        model.checkpointing = value
        units = [m for m in model.modules() if isinstance(m, Unit)]
        assert units and all(m.recompute == (value == "block") for m in units)
    for conv, name, value in (
        (model.stem, "padding_mode", "circular"),
        (model.downs[0].resample, "dilation", (2, 2)),
        (model.ups[0].resample, "padding", (0, 0)),
    ):
        with pytest.raises(ValueError, match=f"{name} of a SpaceConv.* stays"):
            setattr(conv, name, value)

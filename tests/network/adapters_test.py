"""Adapters and quantised weights: in a layer's place, with the effect they have in the peer."""

from __future__ import annotations

import copy

import pytest
import torch
from hooks_test import NETWORKS, module_pairs, pair, run
from torch import Tensor, nn

from fastvdm import UNet3D
from fastvdm.layers.conv import SpaceConv, SpaceConvTranspose
from fastvdm.testing import max_error

# --- quantised weights ---------------------------------------------------------------------------


def quantised(model: nn.Module, kind: str) -> nn.Module:
    if kind == "dynamic":
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    torchao = pytest.importorskip("torchao.quantization")
    config = {
        "weights": torchao.Int8WeightOnlyConfig,
        "products": torchao.Int8DynamicActivationInt8WeightConfig,
    }[kind]
    torchao.quantize_(model, config())
    return model


@pytest.mark.parametrize("kind", ["dynamic", "weights", "products"])
@pytest.mark.filterwarnings("ignore")
def test_int8(kind):
    model = UNet3D(**NETWORKS["group"]).eval()
    with torch.no_grad():
        want = run(model)
        assert 1e-4 < max_error(run(quantised(model, kind)), want) < 0.1


# --- adapters ------------------------------------------------------------------------------------

TARGETS = {
    "conv1": (r".*block1\.proj", r".*\.conv1"),
    "conv2": (r".*block2\.proj", r".*\.conv2"),
    "ends": (r"init_conv|final_conv\.1|downs\.0\.4", r"stem|head\.conv|downs\.0\.resample"),
    "attention": (
        r"(downs|ups).*\.3\..*(qkv|out)", r"(downs|ups).*temporal.*(qkv|out)"
    ),
    "film": (r".*\.mlp\.1", r".*\.film"),
}  # fmt: skip


def adapted(model: nn.Module, targets: str, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, **options))


def fill(model: nn.Module) -> None:
    """B, which starts at zero."""
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)


def assert_adapts(model: nn.Module, before: Tensor) -> None:
    """Only the adapters are trained, all of them, and merging them changes nothing."""
    fill(model)
    y = run(model)
    assert max_error(y, before) > 1e-3
    y.square().mean().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == ("lora_" in name), name
    for change in (model.merge_adapter, model.unmerge_adapter):
        change()
        assert max_error(run(model), y) < 1e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["group", "paper", "added"])
@pytest.mark.parametrize("targets", [r".*(conv[12]|skip|stem|head\.conv|resample)", "all-linear"])
def test_lora(name, targets):
    model = UNet3D(**NETWORKS[name]).eval()
    # peft has none for a transposed convolution, and the resampling of "added" is a block
    taken = {"group": r"downs\.0\.resample", "added": "stem"}.get(name, "resample")
    targets = targets.replace("resample", taken)
    before = run(model)
    model = adapted(model, targets)
    assert max_error(run(model), before) < 1e-5
    assert_adapts(model, before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", TARGETS)
def test_lora_is_the_peers(targets):
    peer, own = pair()
    names = {there: here for there, here in module_pairs(own).items()}
    peer, own = (adapted(m, t) for m, t in zip((peer, own), TARGETS[targets]))
    fill(peer)
    theirs = {n: p for n, p in peer.named_parameters() if "lora_" in n}
    copied = 0
    for name, p in theirs.items():
        module, lora, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if module in names:
            mine = own.get_parameter(f"base_model.model.{names[module]}{lora}{rest}")
            mine.data.copy_(p.data.view_as(mine))
            copied += 1
    assert copied == len(theirs) == sum("lora_" in n for n, _ in own.named_parameters()) > 0
    with torch.no_grad():
        assert max_error(run(own), run(peer)) < 1e-4


@pytest.mark.filterwarnings("ignore")
def test_dora():
    model = UNet3D(**NETWORKS["group"]).eval()
    before = run(model)
    assert_adapts(adapted(copy.deepcopy(model), r".*(qkv|out|film)", use_dora=True), before)
    for target in ("conv1", "stem", "resample"):
        where = r"downs.*resample" if target == "resample" else rf".*{target}"
        with pytest.raises(ValueError, match="DoRA on a convolution takes channels on axis 1"):
            run(adapted(copy.deepcopy(model), where, use_dora=True))


# --- the convolutions that they make --------------------------------------------------------------


def test_convolutions_are_made_as_torchs_are():
    conv = SpaceConv(4, 6, 3, bias=False)
    assert repr(conv) == repr(nn.Conv2d(4, 6, 3, padding=1, bias=False)).replace(
        "Conv2d", "SpaceConv"
    )
    again = type(conv)(4, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)
    assert again.weight.shape == (2, 4, 3, 3) and again.bias is None
    half = SpaceConv(4, 6, 4, 2, dtype=torch.float64)
    assert half.padding == (1, 1) and half.weight.dtype == torch.float64
    up = SpaceConvTranspose(4, 6, bias=False)
    assert up(torch.randn(1, 2, 3, 5, 4)).shape == (1, 2, 6, 10, 6)
    assert up.state_dict().keys() == {"weight"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceConv(4, 6, (3, 5)), r"kernel_size must be one number, .* got \(3, 5\)"),
        (lambda: SpaceConv(4, 6, 4), "kernel_size must be odd, or 4 with stride 2, got 4"),
        (lambda: SpaceConv(4, 6, 3, 3), "stride must be 1 or 2, got 3"),
        (lambda: SpaceConv(4, 6, 3, padding=0), "padding must be 1, got 0"),
        (lambda: SpaceConv(4, 6, 3, dilation=2), "dilation must be 1, got 2"),
        (lambda: SpaceConv(4, 6, 3, groups=2), "groups must be 1, got 2"),
        (lambda: SpaceConv(4, 6, 3, padding_mode="circular"), "padding_mode must be 'zeros'"),
        (lambda: SpaceConvTranspose(4, 6, 3), "kernel_size must be 4, got 3"),
        (lambda: SpaceConvTranspose(4, 6, output_padding=1), "output_padding must be 0, got 1"),
    ],
)  # fmt: skip
def test_other_convolutions_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""Checkpoints as wrappers write them: the network is found, or the error says what is there."""

from __future__ import annotations

import argparse
import os
import warnings
import zipfile

import numpy as np
import pytest
import torch
from peer import peer_or_skip
from torch import nn

from fastvdm import UNet3D
from fastvdm.bundle import Bundle, Settings
from fastvdm.diffusion import sample
from fastvdm.unet.checkpoint import save_tensors

TINY = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8, "norm": "rms"}
X, TIME = torch.randn(1, 3, 2, 4, 6), torch.tensor([7])


@pytest.fixture(scope="module", params=["own", "peer"])
def nets(request):
    """(network, averaged network, our network of the first, of the second)."""
    torch.manual_seed(0)
    ours = [UNet3D(**TINY).eval() for _ in range(2)]
    if request.param == "own":
        return (*ours, *ours)
    peer = peer_or_skip("0.7.0")
    arguments = {k: v for k, v in TINY.items() if k != "norm"}
    theirs = [peer.Unet3D(**arguments).eval() for _ in range(2)]
    for a, b in zip(theirs, ours):
        a.load_state_dict(b.to_peer_state_dict())
    return (*theirs, *ours)


class Diffusion(nn.Module):
    """What GaussianDiffusion and its like keep beside the network."""

    def __init__(self, net):
        super().__init__()
        self.denoise_fn = net
        self.register_buffer("betas", torch.full((5,), 0.01))


def under(prefix, net):
    return {f"{prefix}{k}": v for k, v in net.state_dict().items()}


def optimizer():
    return {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]}


ONE = {
    "bare": lambda net: net.state_dict(),
    "unet": lambda net: under("unet.", net) | {"vae.weight": torch.zeros(2)},
    "net": lambda net: under("net.", net),
    "GaussianDiffusion": lambda net: Diffusion(net).state_dict(),
    "DDP": lambda net: under("module.", net),
    "torch.compile": lambda net: under("_orig_mod.", net),
    "AveragedModel": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "Lightning": lambda net: {
        "state_dict": under("model.", net), "hyper_parameters": {"lr": 1e-3}, "epoch": 3,
        "optimizer_states": [optimizer()],
    },
    "Lightning, diffusion": lambda net: {"state_dict": under("diffusion.", Diffusion(net))},
    "LFDM": lambda net: {"example": 3, "diffusion": under("denoise_fn.", net), "o": optimizer()},
    "model_state_dict": lambda net: {"model_state_dict": net.state_dict(), "opt": optimizer()},
    "DeepSpeed": lambda net: {"module": under("_orig_mod.", net), "dp_world_size": 2},
    "all at once": lambda net: {
        "a": {"b": {"c": under("model._orig_mod.module.", Diffusion(Diffusion(net)))}}
    },
    "ema alone": lambda net: under("ema_model.", net) | {"step": torch.tensor(4)},
    "the peer's Trainer": lambda net: {
        "step": 7, "model": Diffusion(net).state_dict(), "ema": {}, "scaler": {}
    },
}  # fmt: skip


@pytest.mark.parametrize("wrap", ONE)
def test_one_network_in_any_wrapper(nets, wrap, tmp_path):
    net, _, ours, _ = nets
    torch.save(ONE[wrap](net), tmp_path / "weights.ckpt")
    with torch.no_grad():
        want = ours(X, TIME)
        for source in (ONE[wrap](net), tmp_path / "weights.ckpt"):
            built = UNet3D.from_unet3d(source, time_input="index").eval()
            assert torch.equal(built(X, TIME), want)
        loaded = UNet3D(**TINY).eval()
        loaded.load_state_dict(ONE[wrap](net))
        assert torch.equal(loaded(X, TIME), want)


TWO = {
    "the peer's Trainer": lambda a, b: {
        "step": 1, "model": Diffusion(a).state_dict(), "ema": Diffusion(b).state_dict()
    },
    "ema_pytorch": lambda a, b: {
        "initted": torch.tensor(True), "step": torch.tensor(3),
        **under("online_model.", a), **under("ema_model.", b),
    },
    "ema_pytorch in a dict": lambda a, b: {
        "ema": under("online_model.", a) | under("ema_model.module.", b)
    },
    "Lightning": lambda a, b: {"state_dict": under("model.", a) | under("model_ema.", b)},
    "swa": lambda a, b: {
        "net": a.state_dict(), "copy": torch.optim.swa_utils.AveragedModel(b).state_dict()
    },
    "state_dict_ema": lambda a, b: {"state_dict": a.state_dict(), "state_dict_ema": b.state_dict()},
}  # fmt: skip


@pytest.mark.parametrize("wrap", TWO)
def test_averaged_weights_are_told_apart(nets, wrap):
    net, average, *ours = nets
    state = TWO[wrap](net, average)
    for ema, want in ((False, ours[0]), (True, ours[1]), (None, ours[1])):
        got = UNet3D.from_unet3d(state, ema=ema, time_input="index")
        assert torch.equal(got.stem.weight, want.stem.weight)
        got = UNet3D(**TINY)
        got.load_state_dict(state, ema=ema)
        assert torch.equal(got.stem.weight, want.stem.weight)
    # Fresh averages equal the weights: still one of each.
    UNet3D.from_unet3d(TWO[wrap](net, net), ema=True, time_input="index")
    with pytest.raises(ValueError, match="no averaged weights"):
        UNet3D.from_unet3d({"model": net.state_dict()}, ema=True)


def test_several_networks_are_named_and_chosen(nets):
    net, other, ours, second = nets
    state = {"state_dict": under("teacher.", net) | under("student.denoise_fn.", other)}
    alias = under("first.", net) | under("again.", net)
    assert torch.equal(UNet3D.from_unet3d(alias, time_input="index").stem.weight, ours.stem.weight)
    target = UNet3D(**TINY)
    for load in (UNet3D.from_unet3d, target.load_state_dict):
        with pytest.raises(ValueError, match="'state_dict.teacher', 'state_dict.student.denoise_"):
            load(state)
        with pytest.raises(ValueError, match="no network under 'x'; .*'state_dict.teacher'"):
            load(state, prefix="x")
    for prefix in ("student", "student.denoise_fn.", "state_dict.student.denoise_fn"):
        got = UNet3D.from_unet3d(state, prefix=prefix, time_input="index")
        assert torch.equal(got.stem.weight, second.stem.weight)
    target.load_state_dict(state, prefix="teacher")
    assert torch.equal(target.stem.weight, ours.stem.weight)


def test_a_network_with_another_inside_loads_its_own_state():
    outer = UNet3D(**TINY)
    outer.teacher = UNet3D(**TINY)
    state = {k: v.clone() for k, v in outer.state_dict().items()}
    again = UNet3D(**TINY)
    again.teacher = UNet3D(**TINY)
    again.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in again.state_dict().items())


def test_a_part_of_a_state_and_the_paper_layout():
    paper = {"layout": "paper", "image_size": 8, "attn_resolutions": (4,), "resnet_groups": 4}
    arguments = {"dim": 8, "dim_mults": (1, 2), "attn_dim_head": 8, "emb_dim": 12} | paper
    a, b = UNet3D(**arguments), UNet3D(**arguments)
    b.load_state_dict({"state_dict": under("model.", a)})
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in b.state_dict().items())
    part = {f"net.{k}": v + 1 for k, v in a.state_dict().items() if k.startswith("head.")}
    b.load_state_dict(part, strict=False)
    assert torch.equal(b.head.conv.bias, a.head.conv.bias + 1)
    with pytest.raises(ValueError, match=r"missing keys.*begin with decoder \(2\)"):
        b.load_state_dict({"decoder.weight": torch.ones(1), "decoder.bias": torch.ones(1)})
    with pytest.raises(ValueError, match=r"no UNet3D found: .*begin with decoder \(1\)"):
        UNet3D.from_unet3d({"decoder.weight": torch.ones(1)})


# -- what weights do not tell ---------------------------------------------------------------------


def test_the_time_of_bare_weights_is_not_guessed(tmp_path):
    net = UNet3D(**TINY, time_input="logsnr").eval()
    net.save_pretrained(tmp_path / "model")
    for source in (net.state_dict(), {"state_dict": under("model.", net)}):
        with pytest.raises(ValueError, match="time_input.*config.json|config.json.*time_input"):
            UNet3D.from_unet3d(source)
        assert UNet3D.from_unet3d(source, time_input="logsnr").time_input == "logsnr"
    # Beside a config.json, in a module, or as the peer's diffusion saves it, it is known.
    for source in (tmp_path / "model" / "model.safetensors", net, nn.ModuleDict({"unet": net})):
        assert UNet3D.from_unet3d(source).time_input == "logsnr"
    assert UNet3D.from_unet3d(Diffusion(UNet3D(**TINY)).state_dict()).time_input == "index"
    (tmp_path / "model" / "config.json").write_text('{"architectures": []}')
    with pytest.raises(ValueError, match="time_input"):
        UNet3D.from_unet3d(tmp_path / "model" / "model.safetensors")


def test_assumed_groups_are_a_warning(tmp_path):
    state = UNet3D(**TINY | {"norm": "group", "resnet_groups": 4}).to_peer_state_dict()
    with pytest.raises(ValueError, match="Pass stem_skip, and resnet_groups unless it is 8"):
        UNet3D.from_unet3d(state)
    own = Diffusion(UNet3D(**TINY | {"norm": "group"})).state_dict()
    torch.save(own, tmp_path / "own.pt")
    for read in (lambda: UNet3D.from_unet3d(own), lambda: Bundle.load(tmp_path / "own.pt")):
        with pytest.warns(UserWarning, match="GroupNorm with 8 groups is assumed") as caught:
            read()
        assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for given in (state, own):
            net = UNet3D.from_unet3d(given, resnet_groups=4, stem_skip="after")
            assert net.downs[0].units[0].blocks[0].norm1.groups == 4
        UNet3D.from_unet3d(UNet3D(**TINY).to_peer_state_dict())


# -- files ----------------------------------------------------------------------------------------


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def bad_file(kind, folder):
    path = folder / ("w.safetensors" if "safetensors" in kind else "w.pt")
    state = UNet3D(**TINY).state_dict()
    if kind == "objects":
        torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(lr=1)}, path)
    elif kind == "objects, old format":
        value = {"state_dict": state, "hyper_parameters": argparse.Namespace(lr=1)}
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif kind == "malicious":
        torch.save({"x": _Touch(folder / "touched")}, path)
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)
    elif kind == "script":
        with zipfile.ZipFile(path, "w") as archive:  # what tells TorchScript from a state_dict
            for name, text in {"data.pkl": "x", "constants.pkl": "x", "version": "3"}.items():
                archive.writestr(f"w/{name}", text)
    elif kind.startswith("cut"):
        net = UNet3D(**TINY)
        net.save_pretrained(folder / "whole")
        torch.save(state, folder / "whole.pt")
        whole = folder / ("whole/model.safetensors" if "safetensors" in kind else "whole.pt")
        path.write_bytes(whole.read_bytes()[:-500])
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"empty": b"", "text": b"no video\n", "pickle": b"\x80\x02K\x01."}[kind])
    return path


@pytest.mark.filterwarnings("ignore:'torch.load' received a zip file")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("objects", r"holds Python objects \(argparse.Namespace\).*save the weights alone"),
        ("objects, old format", r"holds Python objects \(argparse.Namespace\)"),
        ("malicious", r"holds Python objects \(posix.system\)"),
        ("module", "holds Python objects .*torch.nn.modules.linear.Linear"),
        ("script", "not a readable checkpoint: a TorchScript archive"),
        ("cut", "not a readable checkpoint"),
        ("cut safetensors", "not a readable checkpoint"),
        ("empty", "not a readable checkpoint: it is empty"),
        ("text", "not a readable checkpoint"),
        ("pickle", "not a readable checkpoint"),
        ("folder", "is a folder.*from_pretrained"),
    ],
)
def test_bad_files(kind, message, tmp_path):
    path = bad_file(kind, tmp_path)
    doors = [UNet3D.from_unet3d] + [Bundle.load] * (kind != "folder")
    for door in doors:
        with pytest.raises(ValueError, match=message) as error:
            door(path)
        text = str(error.value)
        assert "weights_only" not in text and "Re-running" not in text and len(text) < 400
        assert "\n" not in text and str(path) in text
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("name", ["w.bin", "w.pth", "w.ckpt", "w.safetensors", "w"])
def test_formats_are_told_by_content(name, tmp_path):
    from safetensors.torch import save_file

    net = UNet3D(**TINY)
    for save in (torch.save, save_file):
        state = {k: v.contiguous() for k, v in under("net.", net).items()}
        save(state, tmp_path / name)
        got = UNet3D.from_unet3d(tmp_path / name, time_input="index")
        assert torch.equal(got.stem.weight, net.stem.weight)


def test_numbers_of_numpy_are_no_code(tmp_path):
    """Trainers store a best loss as they computed it."""
    net = UNet3D(**TINY)
    extra = {"best": np.float64(0.5), "epoch": np.int64(3), "ema_decay": np.float32(0.9)}
    torch.save({"state_dict": net.to_peer_state_dict(), **extra}, tmp_path / "w.ckpt")
    again = UNet3D.from_unet3d(tmp_path / "w.ckpt")
    assert torch.equal(again.stem.weight, net.stem.weight)


# -- folders --------------------------------------------------------------------------------------


def test_settings_stay_with_the_network(tmp_path):
    """A v-model is sampled as one, from wherever it was loaded, and after it was saved again."""
    torch.manual_seed(0)
    net = UNet3D(**TINY, time_input="logsnr")
    Bundle(net, Settings(prediction="v", num_frames=2, image_size=(4, 6))).save(tmp_path / "a")
    options = {"num_steps": 3, "seed": 0}
    want = sample(net, X.shape, prediction="v", **options)
    UNet3D.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for folder in ("a", "b"):
        loaded = UNet3D.from_pretrained(tmp_path / folder)
        for net in (
            loaded,
            UNet3D.from_unet3d(nn.ModuleDict({"net": loaded})),
            UNet3D.from_unet3d(tmp_path / folder / "model.safetensors"),
        ):
            assert torch.equal(sample(net, X.shape, **options), want)
        assert not torch.equal(sample(loaded, X.shape, prediction="eps", **options), want)
        assert Bundle.load(tmp_path / folder).settings.image_size == (4, 6)
    UNet3D(**TINY).save_pretrained(tmp_path / "a")
    assert UNet3D.from_pretrained(tmp_path / "a").settings == UNet3D(**TINY).settings == {}


def test_a_folder_that_says_too_much_or_too_little(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at /nope"):
        UNet3D.from_pretrained("/nope")
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor a config.json"):
        UNet3D.from_pretrained(tmp_path)
    net = UNet3D(**TINY)
    net.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a file: UNet3D.from_unet3d"):
        UNet3D.from_pretrained(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*model.safetensors"):
        UNet3D.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with depth of the caller.*'depth'"):
        UNet3D.from_pretrained(pretrained_model_name_or_path=tmp_path, depth=3)
    UNet3D(**TINY | {"dim": 16}).save_pretrained(tmp_path / "other")
    os.replace(tmp_path / "other" / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        UNet3D.from_pretrained(tmp_path)
    for text, message in {
        '{"dim": 8, "new": 1}': "new", "[]": "must be a JSON object", "{": "is not JSON",
        '{"architectures": []}': "does not hold the arguments of a UNet3D",
    }.items():  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            UNet3D.from_pretrained(tmp_path)


def test_only_what_is_read_comes_from_the_hub(tmp_path, monkeypatch):
    import fnmatch

    import huggingface_hub

    UNet3D(**TINY).save_pretrained(tmp_path)
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **options: calls.append((name, options)) or str(tmp_path),
    )
    assert Bundle.load("me/model").unet.time_input == "index"
    UNet3D.from_pretrained("me/model", revision="v2")
    assert [name for name, _ in calls] == ["me/model"] * 2 and calls[1][1]["revision"] == "v2"
    patterns = calls[0][1]["allow_patterns"]
    there = ["config.json", "model.safetensors", "state.pt", "videos/a.mp4", "code.py",
             "checkpoints/step-1/ema/model.safetensors", "checkpoints/step-1/state.pt"]  # fmt: skip
    kept = [n for n in there if any(fnmatch.fnmatch(n, p) for p in patterns)]
    assert kept == ["config.json", "model.safetensors", there[5]]


def test_weights_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match="cannot write .*absent"):
        save_tensors({"a": torch.zeros(4)}, tmp_path / "absent" / "w.safetensors")


def test_on_a_gpu_weights_are_channels_last():
    """cuDNN would change their layout at every call; elsewhere they stay as they are."""
    calls = []

    class Unet:
        time_input, cond_dim = "index", None

        def to(self, *args, **options):
            calls.append((*args, *options.values()))

    for device in ("cpu", "cuda:1"):
        Bundle(Unet(), Settings(schedule="discrete")).to(device)
    assert calls == [("cpu",), ("cuda:1",), (torch.channels_last,)]

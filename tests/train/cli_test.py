"""The commands: video in and out, errors without a traceback, nothing overwritten."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for _name in ("typer", "av", "accelerate"):
    pytest.importorskip(_name)

from peer import peer_or_skip  # noqa: E402

from fastvdm import UNet3D  # noqa: E402
from fastvdm.bundle import Bundle, Settings  # noqa: E402
from fastvdm.cli import main  # noqa: E402
from fastvdm.diffusion import DiscreteSchedule  # noqa: E402
from fastvdm.video import read_video, write_video  # noqa: E402

TINY = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}
FEW = ["--steps", "2", "--device", "cpu"]
TRAIN = ["--size", "8", "--num-frames", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Untrained, and small: 4 frames of 16 x 16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    settings = Settings(num_frames=4, image_size=(16, 16), fps=5, gamma=0.3)
    Bundle(UNet3D(**TINY, time_input="logsnr"), settings).save(folder)
    return folder


@pytest.fixture
def clip(tmp_path) -> Path:
    """Three frames, 16 x 16, a ramp that gets brighter."""
    ramp = torch.linspace(0, 0.7, 16).expand(3, 3, 16, 16)
    path = tmp_path / "clip.mp4"
    write_video(path, ramp + torch.arange(3)[None, :, None, None] * 0.1, fps=10, quality=1)
    return path


def _frames(path: Path) -> torch.Tensor:
    video = read_video(path)
    assert video.isfinite().all()
    return video


def test_sample_is_reproducible_and_independent_of_the_batch(model, tmp_path):
    assert main(["sample", str(model), str(tmp_path / "a.gif"), "--num", "3", *FEW]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0.gif", "a-1.gif", "a-2.gif"]
    one = ["sample", str(model), str(tmp_path / "b.gif"), "--seed", "2", *FEW]
    assert main(one) == 0
    again = _frames(tmp_path / "b.gif")
    assert again.shape == (3, 4, 16, 16)
    torch.testing.assert_close(again, _frames(tmp_path / "a-2.gif"), atol=0.02, rtol=0)
    assert (again - _frames(tmp_path / "a-1.gif")).abs().max() > 0.1


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "langevin"])
def test_extend_keeps_what_was_given(model, tmp_path, clip, sampler):
    out = tmp_path / "long.mp4"
    arguments = ["extend", str(model), str(clip), str(out), "--num-frames", "9", "--overlap", "2"]
    assert main([*arguments, "--sampler", sampler, "--guidance-weight", "2", *FEW]) == 0
    video = _frames(out)
    assert video.shape == (3, 9, 16, 16)
    torch.testing.assert_close(video[:, :3], _frames(clip), atol=0.05, rtol=0)


def test_replacement_and_reconstruction_differ(model, tmp_path, clip):
    videos = []
    for method, weight in (("replacement", "auto"), ("reconstruction", "20")):
        out = tmp_path / f"{method}.mp4"
        arguments = ["extend", str(model), str(clip), str(out), "--num-frames", "5"]
        assert main([*arguments, "--method", method, "--guidance-weight", weight, *FEW]) == 0
        videos.append(_frames(out))
    assert (videos[0] - videos[1])[:, 3:].abs().max() > 0.05


def test_interpolate(model, tmp_path, clip):
    out = tmp_path / "slow.mp4"
    assert main(["interpolate", str(model), str(clip), str(out), "--factor", "3", *FEW]) == 0
    video = _frames(out)
    assert video.shape == (3, 7, 16, 16)
    torch.testing.assert_close(video[:, ::3], _frames(clip), atol=0.05, rtol=0)


def test_upscale(model, tmp_path, clip):
    out = tmp_path / "large.webm"
    arguments = ["upscale", str(model), str(clip), str(out), "--low-size", "8", "--frameskip", "2"]
    assert main([*arguments, "--guidance-weight", "1", *FEW]) == 0
    assert _frames(out).shape == (3, 6, 16, 16)


def test_a_peer_checkpoint_is_sampled(tmp_path):
    peer = peer_or_skip()
    torch.manual_seed(0)
    net = peer.Unet3D(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8)
    diffusion = peer.GaussianDiffusion(net, image_size=8, num_frames=2, timesteps=6)
    torch.save({"step": 1, "model": diffusion.state_dict()}, tmp_path / "model-1.pt")
    out = tmp_path / "peer.gif"
    arguments = ["sample", str(tmp_path / "model-1.pt"), str(out), "--size", "8", "--frames", "2"]
    assert main([*arguments, "--device", "cpu"]) == 0
    assert _frames(out).shape == (3, 2, 8, 8)


@pytest.fixture
def drawn(monkeypatch):
    """(network, arguments) of every call of the sampler, which runs as it is."""
    from fastvdm import diffusion

    real, calls = diffusion.sample, []

    def record(unet, shape, **options):
        calls.append((unet, options))
        return real(unet, shape, **options)

    monkeypatch.setattr(diffusion, "sample", record)
    return calls


SMALL = ["--frames", "2", "--size", "8", *FEW]


@pytest.mark.parametrize(
    ("time_input", "options", "schedule"),
    [
        ("index", [], "DiscreteSchedule(timesteps=1000, time_input='index')"),
        ("index", ["--timesteps", "6"], "DiscreteSchedule(timesteps=6, time_input='index')"),
        ("logsnr", [], "CosineSchedule(logsnr_min=-20.0, logsnr_max=20.0, time_input='logsnr')"),
        ("logsnr", ["--schedule", "discrete", "--timesteps", "6", "--prediction", "v"],
         "DiscreteSchedule(timesteps=6, time_input='logsnr')"),
    ],
)  # fmt: skip
def test_a_folder_without_settings(time_input, options, schedule, tmp_path, drawn):
    UNet3D(**TINY, time_input=time_input).save_pretrained(tmp_path / "model")
    arguments = ["sample", str(tmp_path / "model"), str(tmp_path / "a.gif"), *SMALL]
    assert main([*arguments, *options]) == 0
    assert repr(drawn[0][1]["schedule"]) == schedule
    assert drawn[0][1]["prediction"] == ("v" if "v" in options else "eps")
    assert _frames(tmp_path / "a.gif").shape == (3, 2, 8, 8)


def test_the_weights_in_a_folder_are_the_model(tmp_path, drawn, capsys):
    """config.json and settings.json beside a .safetensors count; without them it is an error."""
    folder = tmp_path / "m"
    settings = Settings(num_frames=2, image_size=(8, 8), prediction="v")
    Bundle(UNet3D(**TINY, time_input="logsnr"), settings).save(folder)
    for i, source in enumerate((folder, folder / "model.safetensors")):
        assert main(["sample", str(source), str(tmp_path / f"{i}.mp4"), *FEW]) == 0
    assert (tmp_path / "0.mp4").read_bytes() == (tmp_path / "1.mp4").read_bytes()
    assert [c[1]["prediction"] for c in drawn] == ["v", "v"]
    assert {c[0].time_input for c in drawn} == {"logsnr"}
    (folder / "config.json").rename(tmp_path / "config.json")
    capsys.readouterr()
    arguments = ["sample", str(folder / "model.safetensors"), str(tmp_path / "2.mp4"), *SMALL]
    assert main(arguments) == 1
    assert "there is no config.json of it beside them" in capsys.readouterr().err
    assert len(drawn) == 2


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """(file of the peer's 0.6.3 with 4 groups and a condition of 5 numbers, the network)."""
    peer = peer_or_skip("0.6.3")
    torch.manual_seed(0)
    net = peer.Unet3D(dim=8, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8, cond_dim=5,
                      resnet_groups=4).eval()  # fmt: skip
    for name, p in net.named_parameters():
        if ".norm.weight" in name:
            p.data += 0.3 * torch.randn_like(p)
    path = tmp_path_factory.mktemp("peer") / "model-1.pt"
    diffusion = peer.GaussianDiffusion(net, image_size=8, num_frames=2, timesteps=6)
    torch.save({"step": 1, "model": diffusion.state_dict(), "ema": {}, "scaler": {}}, path)
    return path, net


def test_a_peer_file_with_groups_and_a_vector(conditional, tmp_path, drawn, capsys):
    path, net = conditional
    vector = torch.randn(5)
    torch.save(vector, tmp_path / "c.pt")
    arguments = ["sample", str(path), str(tmp_path / "a.gif"), *SMALL, "--overwrite"]
    arguments += ["--cond", str(tmp_path / "c.pt")]
    assert main([*arguments, "--resnet-groups", "4", "--stem-skip", "after"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(arguments) == 1 and len(drawn) == 1
    said = capsys.readouterr().err
    assert "Pass stem_skip, and resnet_groups" in said and said.count("\n") == 1
    assert main([*arguments, "--stem-skip", "after"]) == 0  # with 8 groups
    x, time, cond = torch.randn(1, 3, 2, 8, 8), torch.tensor([3]), vector[None]
    with torch.no_grad():
        want = net(x, time, cond=cond)
        right, wrong = (unet(x, time, cond=cond) for unet, _ in drawn)
    torch.testing.assert_close(right, want, atol=1e-5, rtol=1e-4)
    assert (wrong - want).abs().max() > 0.01
    assert torch.equal(drawn[0][1]["cond"], cond)
    assert repr(drawn[0][1]["schedule"]) == "DiscreteSchedule(timesteps=6, time_input='index')"


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_vectors_from_files(conditional, suffix, tmp_path, drawn, capsys):
    import numpy as np
    from safetensors.torch import save_file

    file, rows = tmp_path / f"c{suffix}", torch.randn(3, 5)

    def run(value, *more):
        if suffix == ".npy":
            np.save(file, value.numpy())
        elif suffix == ".pt":
            torch.save(value, file)
        else:
            save_file({"cond": value.contiguous()}, file)
        arguments = ["sample", str(conditional[0]), str(tmp_path / "a.gif"), "--num", "3", *SMALL]
        arguments += ["--resnet-groups", "4", "--stem-skip", "after"]
        return main([*arguments, "--cond", str(file), *more])

    assert run(rows, "--batch-size", "2") == 0
    assert torch.equal(torch.cat([c[1]["cond"] for c in drawn]), rows)
    for value, more, message in [
        (rows[:2], [], "cond must be (5,) or (3, 5), got (2, 5)"),
        (rows[:, :4], [], "cond must be (5,) or (3, 5), got (3, 4)"),
        (
            rows,
            ["--caption", "a cat"],
            "give captions, labels or a vector (cond), not captions and",
        ),
        (rows * float("nan"), [], "cond has NaN"),
        (rows > 0, [], "must hold one tensor of numbers"),
    ]:
        assert run(value, "--overwrite", *more) == 1
        assert message in capsys.readouterr().err
    file.write_bytes(b"nothing")
    arguments = ["sample", str(conditional[0]), str(tmp_path / "b.gif"), "--cond", str(file)]
    assert main(arguments) == 1 and "is not a readable" in capsys.readouterr().err


def _peer_of_width(width, path):
    arguments = {k: v for k, v in TINY.items() if k != "resnet_groups"}
    net = UNet3D(**arguments, norm="rms", cond_dim=width)
    torch.save({"state_dict": net.to_peer_state_dict()}, path)
    return str(path)


def test_captions_of_a_peer_file(tmp_path, drawn, monkeypatch, capsys):
    """Width 768 is bert-base-cased with the peer's pooling; any other encoder is named."""
    import fastvdm.text

    class States:
        """Of the width asked for; position 0 and what the mask hides are far off."""

        dim = 768

        def __call__(self, captions):
            states = torch.arange(4.0)[:, None].expand(len(captions), 4, self.dim).clone()
            states[:, 0], states[:, 3] = 1e3, -1e3
            return states, torch.tensor([[True, True, True, False]]).expand(len(captions), 4)

    class Encoder:
        at_hand = False

        def __new__(cls, name, max_length, **where):
            assert max_length == 512
            if name == "bert-base-cased" and not cls.at_hand:
                raise ValueError(f"cannot load the text encoder {name!r}: no network")
            return States()

    monkeypatch.setattr(fastvdm.text, "TextEncoder", Encoder)
    arguments = [_peer_of_width(768, tmp_path / "w.ckpt"), str(tmp_path / "a.gif"), *SMALL]
    arguments = ["sample", *arguments, "--caption", "a cat", "--overwrite"]
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert all(word in errors for word in ("bert-base-cased", "--text-encoder", "--cond FILE"))
    Encoder.at_hand = True
    assert main(arguments) == 0
    assert "warning: captions go through bert-base-cased" in capsys.readouterr().err
    assert main([*arguments, "--text-encoder", "mine"]) == 0
    for _, options in drawn:  # the mean of positions 1 and 2
        torch.testing.assert_close(options["cond"], torch.full((1, 768), 1.5))
    arguments[1] = _peer_of_width(6, tmp_path / "w.ckpt")
    assert main(arguments) == 1 and "conditioned on 6 numbers" in capsys.readouterr().err
    assert main([*arguments, "--text-encoder", "mine"]) == 1
    assert "has width 768, got out_dim=6" in capsys.readouterr().err


def test_what_a_file_does_not_tell_reaches_the_network(tmp_path, monkeypatch, capsys):
    path, seen = _peer_of_width(6, tmp_path / "w.ckpt"), {}

    def stop(state, **options):
        seen.update(options)
        raise ValueError("stop")

    monkeypatch.setattr(UNet3D, "from_unet3d", stop)
    options = ["--resnet-groups", "4", "--stem-skip", "before", "--prefix", "state_dict"]
    for command in (["sample", path, "a.gif"], ["export", path, "-o", str(tmp_path / "a.pt2")]):
        assert main([*command, *options]) == 1
        assert seen.pop("resnet_groups") == 4 and seen.pop("stem_skip") == "before"
        assert seen.pop("prefix") == "state_dict" and seen.pop("ema") is None
    monkeypatch.undo()
    UNet3D(**TINY).save_pretrained(tmp_path / "m")
    assert main(["sample", str(tmp_path / "m"), str(tmp_path / "a.gif"), *options[:2]]) == 1
    assert "config.json says resnet_groups" in capsys.readouterr().err


def test_another_schedule_than_the_cosine_is_kept(tmp_path):
    state = UNet3D(**TINY, norm="rms").to_peer_state_dict()
    betas = torch.linspace(1e-3, 0.02, 10)
    torch.save({"model": {f"denoise_fn.{k}": v for k, v in state.items()} | {"betas": betas}},
               tmp_path / "w.pt")  # fmt: skip
    loaded = Bundle.load(tmp_path / "w.pt")
    loaded.save(tmp_path / "again")
    for bundle in (loaded, Bundle.load(tmp_path / "again")):
        assert torch.equal(bundle.schedule.betas.float(), betas)
    betas = DiscreteSchedule(10).betas.bfloat16()  # of a network in half precision
    torch.save({"model": {f"denoise_fn.{k}": v for k, v in state.items()} | {"betas": betas}},
               tmp_path / "w.pt")  # fmt: skip
    assert torch.equal(Bundle.load(tmp_path / "w.pt").schedule.betas, DiscreteSchedule(10).betas)
    with pytest.raises(ValueError, match="trained with 10 timesteps"):
        Bundle.load(tmp_path / "w.pt", timesteps=20)


def test_train_then_sample(tmp_path):
    for i in range(2):
        write_video(tmp_path / "data" / f"{i}.mp4", torch.rand(3, 5, 8, 8))
    run = tmp_path / "run"
    arguments = ["train", str(run), "--data", str(tmp_path / "data"), "--size", "8", "--quiet"]
    arguments += ["--num-frames", "2", "--batch-size", "1", "--model", json.dumps(TINY)]
    assert main([*arguments, "--betas", "0.9,0.999", "--steps", "2", "--device", "cpu"]) == 0
    assert main(["train", str(run), "--resume", "--steps", "3", "--quiet"]) == 0
    stored = json.loads((run / "config.json").read_text())
    assert stored["steps"] == 3 and stored["betas"] == [0.9, 0.999]
    for weights in ("ema", "raw"):
        out = tmp_path / f"{weights}.mp4"
        assert main(["sample", str(run), str(out), "--weights", weights, *FEW]) == 0
        assert _frames(out).shape == (3, 2, 8, 8)
    last = run / "checkpoints" / "step-00000003"
    for ema in (True, False):
        want = Bundle.load(last / ("ema" if ema else "model")).unet.stem.weight
        for source in (run, last, last / ("ema" if ema else "model")):
            net = UNet3D.from_pretrained(source, ema=ema)
            assert torch.equal(net.stem.weight, want)
        assert net.settings["prediction"] == "eps" and net.settings["fps"] == 8
    out = tmp_path / "file.mp4"
    assert main(["sample", str(last / "ema" / "model.safetensors"), str(out), *FEW]) == 0
    assert out.read_bytes() == (tmp_path / "ema.mp4").read_bytes()


def test_export_hands_the_model_and_its_size_on(model, tmp_path, monkeypatch, capsys):
    exporting = pytest.importorskip("fastvdm.export")
    calls = []

    def record(unet, path, inputs, *, backend, cond_scale):
        calls.append((unet, [tuple(t.shape) for t in inputs], backend, cond_scale))
        return path

    monkeypatch.setattr(exporting, "export_unet", record)
    out = tmp_path / "net.pt2"
    arguments = ["export", str(model), "-o", str(out), "--batch", "2", "--backend", "reference"]
    assert main([*arguments, "--device", "cpu"]) == 0
    unet, shapes, backend, scale = calls[0]
    assert shapes == [(2, 3, 4, 16, 16), (2,)] and (backend, scale) == ("reference", None)
    assert torch.equal(unet.stem.weight, Bundle.load(model).unet.stem.weight)
    assert str(out) in capsys.readouterr().out
    out.write_text("mine")
    assert main(arguments) == 1 and out.read_text() == "mine"


BAD = {
    "unreadable video": (["extend", "{model}", "{broken}", "{out}", "--num-frames", "9"],
                         "broken.mp4 is not a readable video"),
    "too few frames": (["extend", "{model}", "{clip}", "{out}", "--num-frames", "3"],
                       "num_frames must exceed the 3 frames given"),
    "overlap": (["extend", "{model}", "{clip}", "{out}", "--num-frames", "9", "--overlap", "4"],
                "overlap must be in"),
    "factor": (["interpolate", "{model}", "{clip}", "{out}", "--factor", "3", "--overlap", "2"],
               "factor 3 exceeds window - overlap = 4 - 2"),
    "negative weight": (["extend", "{model}", "{clip}", "{out}", "--num-frames", "9",
                         "--guidance-weight", "-1"], "guidance_weight"),
    "weight": (["upscale", "{broken}x", "{clip}", "{out}", "--guidance-weight", "much"],
               "guidance_weight must be auto or a number, got 'much'"),
    "low weight": (["upscale", "{broken}x", "{clip}", "{out}", "--low-res-weight", "-1"],
                   "low_res_weight must be finite"),
    "weight of replacement": (
        ["extend", "{broken}x", "{clip}", "{out}", "--method", "replacement",
         "--num-frames", "5", "--guidance-weight", "9"],
        "guidance_weight=9.0 is of method='reconstruction'",
    ),
    "limit": (["interpolate", "{broken}x", "{clip}", "{out}", "--guidance-limit", "some"],
              "guidance_limit must be one of stable, none"),
    "no model": (["sample", "{broken}x", "{out}"], "no model at"),
    "not a model": (["sample", "{broken}", "{out}"], "not a readable checkpoint"),
    "suffix": (["sample", "{model}", "{out}.avi"], "must end in"),
    "caption": (["sample", "{model}", "{out}", "--caption", "a cat"], "no conditioning"),
    "no cond": (["sample", "{model}", "{out}", "--cond", "{vector}"], "has no conditioning"),
    "export suffix": (["export", "{model}", "-o", "{out}"], "must end in .pt2"),
    "sampler": (["sample", "{model}", "{out}", "--sampler", "euler"], "sampler must be"),
    "gamma of ddim": (
        ["sample", "{model}", "{out}", "--sampler", "ddim", "--gamma", "0.1"], "ddim has eta"
    ),
    "eta of ancestral": (["sample", "{model}", "{out}", "--eta", "0.1"], "eta is of ddim"),
    "graph": (["sample", "{model}", "{out}", "--cuda-graph", *FEW], "needs a CUDA device"),
    "device": (["sample", "{model}", "{out}", "--device", "abacus"], "device 'abacus' cannot be"),
    "absent": (["sample", "{model}", "{out}", "--device", "cuda:64"], "device 'cuda:64' cannot be"),
    "train device": (["train", "{out}", "--data", "{broken}", "--device", "abacus"],
                     "device must be one of auto, cpu"),
    "size": (["sample", "{model}", "{out}", "--size", "15"], "multiples of 2"),
    "no data": (["train", "{out}"], "where are the videos"),
    "no folder": (["train", "{out}", "--data", "{broken}x"], "no folder at"),
    "betas": (["train", "{out}", "--data", "{broken}", "--betas", "0.9"],
              "betas must be 2 numbers"),
    "no numbers": (["train", "{out}", "--size", "64,big"], "--size takes numbers, got '64,big'"),
    "no word": (["train", "{out}", "--loss-type", "huber"], "loss_type must be one of mse, l1"),
    "unknown field": (["train", "{out}", "--config", "{fields}"], "unknown setting stpes"),
    "no config": (["train", "{out}", "--config", "{broken}.yaml"], "no file"),
    "unknown argument": (["train", "{out}", "--model", "{{\"dims\": 8}}"],
                         "unexpected keyword argument 'dims'"),
    "log elsewhere": (["train", "{out}", "--data", "{broken}", "--log", "../log.csv"],
                      "log must be the name of a .csv"),
    "train nowhere": (["train", "/proc/run", "--data", "{broken}"], "/proc/run cannot be written"),
    "tracker": (["train", "{out}", "--data", "{clips}", "--trackers", "abacus"],
                "trackers must be auto, none, or of"),
    "fsdp": (["train", "{out}", "--data", "{clips}", "--parallel", "fsdp", *TRAIN],
             "needs several processes"),
    "no classes": (["sample", "{model}", "{out}", "--label", "cat"],
                   "labels given, but this model"),
    "no steps": (["sample", "{model}", "{out}", "--steps", "0"], "--steps must be positive, got 0"),
    "no frames": (["sample", "{model}", "{out}", "--frames", "0"], "--frames must be positive"),
    "negative": (["sample", "{model}", "{out}", "--frames", "-2"], "--frames must be positive"),
    "no fps": (["sample", "{model}", "{out}", "--fps", "0"], "--fps must be positive"),
    "nan fps": (["sample", "{model}", "{out}", "--fps", "nan"], "--fps must be positive"),
    "no size": (["sample", "{model}", "{out}", "--size", "0"], "--size must be positive"),
    "no window": (["extend", "{model}", "{clip}", "{out}", "--num-frames", "9", "--window", "0"],
                  "--window must be positive"),
    "no batch": (["export", "{model}", "-o", "{out}.pt2", "--batch", "0"], "--batch must be"),
    "unwritable": (["sample", "{model}", "/proc/nowhere/x.mp4"], "x.mp4 cannot be written: /proc"),
    "below a file": (["sample", "{model}", "{broken}/x.mp4"], "broken.mp4: Not a directory"),
    "over a folder": (["sample", "{model}", "{folder}", "--overwrite"], "is a folder"),
    "schedule": (["sample", "{model}", "{out}", "--schedule", "linear"], "schedule must be one of"),
    "timesteps": (["sample", "{model}", "{out}", "--timesteps", "9"], "timesteps belong to"),
    "prefix": (["sample", "{model}", "{out}", "--prefix", "x"], "networks of a file"),
    "vector": (["sample", "{model}", "{out}", "--cond", "{broken}"], "not a readable checkpoint"),
    "no vector": (["sample", "{model}", "{out}", "--cond", "{broken}.npy"], "no file "),
    "index cosine": (["sample", "{index}", "{out}", "--schedule", "cosine"], "step indices"),
    "four channels": (["sample", "{rgba}", "{out}"], "got 4: write a .webp or .npy"),
    "two of three": (["extend", "{learned}", "{clip}", "{out}", "--num-frames", "9"],
                     "takes 3 channels and gives 6"),
    "resume nothing": (["train", "{out}", "--resume"], "no run to resume in"),
    "train fps": (["train", "{out}", "--data", "{broken}", "--fps", "0"],
                  "fps must be positive"),
    "train lr": (["train", "{out}", "--data", "{broken}", "--lr", "0"], "expected lr > 0"),
    "many workers": (["train", "{out}", "--data", "{clips}", "--num-workers", "1000000000"],
                     "num_workers must be at most 1024, got 1000000000"),
    "large batch": (["train", "{out}", "--data", "{clips}", "--batch-size", "1000000000"],
                    "batch_size must be at most 1000000, got 1000000000"),
    "large clips": (["train", "{out}", "--data", "{clips}", *TRAIN, "--size", "100000000"],
                    "out of memory: can't allocate memory: you tried to allocate"),
    **{f"large {name}": (["sample", "{model}", "{out}", f"--{name}", "1000000000"],
                         f"--{name} must be at most 1000000, got 1000000000")
       for name in ("size", "frames", "num", "batch-size", "steps", "timesteps")},
    "no memory": (["sample", "{model}", "{out}", "--size", "1000000", "--frames", "10000"],
                  "out of memory: can't allocate memory: you tried to allocate"),
    "overflow": (["sample", "{model}", "{out}", "--size", "1000000", "--frames", "1000000",
                  "--num", "100", "--batch-size", "100"], "out of memory: Storage size"),
    "rate": (["sample", "{broken}x", "{out}", "--fps", "1000000000"], "--fps must be at most"),
    "rate of a file": (["sample", "{model}", "{out}", "--fps", "5000"],
                       "fps of a .mp4 must be in [0.01, 1000], got 5000"),
    "rate of a result": (["interpolate", "{model}", "{clip}", "{out}", "--factor", "100000"],
                         "fps of a .mp4 must be in"),
    "model json": (["train", "{out}", "--model", "dim=3"], "--model is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_write_nothing(case, model, clip, tmp_path, capsys):
    broken, out = tmp_path / "broken.mp4", tmp_path / "out.mp4"
    broken.write_text("no video")
    arguments, message = BAD[case]
    places = {"model": model, "broken": broken, "clip": clip, "out": out}
    for name, options in {"index": {}, "rgba": {"channels": 4}, "learned": {"out_dim": 6}}.items():
        if f"{{{name}}}" in arguments:
            places[name] = tmp_path / name
            UNet3D(**TINY, **options).save_pretrained(places[name])
    places["fields"] = tmp_path / "fields.yaml"
    places["fields"].write_text("stpes: 1\n")
    places["clips"] = tmp_path / "clips"
    write_video(places["clips"] / "a.mp4", torch.rand(3, 3, 8, 8))
    places["vector"] = tmp_path / "vector.pt"
    torch.save(torch.ones(3), places["vector"])
    places["folder"] = tmp_path / "folder.mp4"
    places["folder"].mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main([a.format(**places) for a in arguments]) == 1
    errors = capsys.readouterr().err.strip().splitlines()[-1]
    assert errors.startswith("fastvdm: ") and message in errors
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mistyped_path_is_not_a_mystery(tmp_path, monkeypatch, capsys):
    import huggingface_hub

    def offline(name, **options):
        raise OSError("cannot reach the hub\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert main(["sample", "runs/clpis", str(tmp_path / "a.mp4")]) == 1
    errors = capsys.readouterr().err
    assert errors.strip() == (
        "fastvdm: no model at runs/clpis, and none on the hub: cannot reach the hub"
    )


def test_an_existing_output_is_kept(model, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    out.write_text("mine")
    assert main(["sample", str(model), str(out), *FEW]) == 1
    assert "--overwrite" in capsys.readouterr().err and out.read_text() == "mine"
    assert main(["sample", str(model), str(out), "--overwrite", *FEW]) == 0
    assert _frames(out).shape == (3, 4, 16, 16)


def test_wrong_command_line_is_exit_code_2(capsys):
    assert main(["smaple"]) == 2
    assert main(["sample"]) == 2
    assert main(["--help"]) == 0
    assert "extend" in capsys.readouterr().out


def test_missing_extra_is_named():
    code = "import sys; sys.modules['typer'] = None\nfrom fastvdm.cli import main\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['sample', 'm', 'o.mp4']))"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "pip install 'fastvdm[cli]'" in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(main(['--help']))"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "interpolate" in done.stdout and "fastvdm[cli]" in done.stdout

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
from fastvdm.video import read_video, write_video  # noqa: E402

TINY = {"dim": 8, "dim_mults": (1, 2), "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}
FEW = ["--steps", "2", "--device", "cpu"]


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
    for method in ("replacement", "reconstruction"):
        out = tmp_path / f"{method}.mp4"
        arguments = ["extend", str(model), str(clip), str(out), "--num-frames", "5"]
        assert main([*arguments, "--method", method, "--guidance-weight", "20", *FEW]) == 0
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


def test_train_then_sample(tmp_path):
    for i in range(2):
        write_video(tmp_path / "data" / f"{i}.mp4", torch.rand(3, 5, 8, 8))
    run = tmp_path / "run"
    arguments = ["train", str(run), "--data", str(tmp_path / "data"), "--size", "8", "--quiet"]
    arguments += ["--num-frames", "2", "--batch-size", "1", "--model", json.dumps(TINY)]
    assert main([*arguments, "--set", "betas=[0.9,0.999]", "--steps", "2", "--device", "cpu"]) == 0
    assert main(["train", str(run), "--resume", "--steps", "3", "--quiet"]) == 0
    stored = json.loads((run / "config.json").read_text())
    assert stored["steps"] == 3 and stored["betas"] == [0.9, 0.999]
    for weights in ("ema", "raw"):
        out = tmp_path / f"{weights}.mp4"
        assert main(["sample", str(run), str(out), "--weights", weights, *FEW]) == 0
        assert _frames(out).shape == (3, 2, 8, 8)
    net = UNet3D.from_pretrained(run / "checkpoints" / "step-00000003" / "ema")
    assert torch.equal(net.stem.weight, Bundle.load(run).unet.stem.weight)


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
    "negative weight": (["extend", "{model}", "{clip}", "{out}", "--num-frames", "9",
                         "--guidance-weight", "-1"], "guidance_weight"),
    "no model": (["sample", "{broken}x", "{out}"], "no model at"),
    "not a model": (["sample", "{broken}", "{out}"], "not a readable checkpoint"),
    "suffix": (["sample", "{model}", "{out}.avi"], "must end in"),
    "caption": (["sample", "{model}", "{out}", "--caption", "a cat"], "no text conditioning"),
    "export suffix": (["export", "{model}", "-o", "{out}"], "must end in .pt2"),
    "sampler": (["sample", "{model}", "{out}", "--sampler", "euler"], "sampler must be"),
    "graph": (["sample", "{model}", "{out}", "--cuda-graph", *FEW], "needs a CUDA device"),
    "device": (["sample", "{model}", "{out}", "--device", "abacus"], "device 'abacus' cannot be"),
    "absent": (["sample", "{model}", "{out}", "--device", "cuda:64"], "device 'cuda:64' cannot be"),
    "train device": (["train", "{out}", "--data", "{broken}", "--device", "abacus"],
                     "device must be one of auto, cpu"),
    "size": (["sample", "{model}", "{out}", "--size", "15"], "multiples of 2"),
    "no data": (["train", "{out}"], "where are the videos"),
    "no folder": (["train", "{out}", "--data", "{broken}x"], "no folder at"),
    "unknown field": (["train", "{out}", "--set", "stpes=1"], "unknown setting stpes"),
    "model json": (["train", "{out}", "--model", "dim=3"], "--model is not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_errors_are_one_line_and_write_nothing(case, model, clip, tmp_path, capsys):
    broken, out = tmp_path / "broken.mp4", tmp_path / "out.mp4"
    broken.write_text("no video")
    arguments, message = BAD[case]
    places = {"model": model, "broken": broken, "clip": clip, "out": out}
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
    assert "pip install fastvdm[cli]" in done.stderr and "Traceback" not in done.stderr

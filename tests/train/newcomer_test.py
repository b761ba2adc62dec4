"""What a new user does: a folder of phone clips, a run, a stop, samples, the hub, a video."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

for _name in ("accelerate", "av", "typer"):
    pytest.importorskip(_name)

import av  # noqa: E402

from fastvdm import UNet3D  # noqa: E402
from fastvdm.cli import main  # noqa: E402
from fastvdm.diffusion import sample  # noqa: E402
from fastvdm.training.log import read_log  # noqa: E402
from fastvdm.video import check_video, read_video, write_video  # noqa: E402

NETWORK = {"dim": 8, "dim_mults": [1, 2], "attn_heads": 2, "attn_dim_head": 8, "resnet_groups": 4}


def phone_clip(path: Path, rate: int, angle: int, frames: int = 20) -> None:
    """A bright bar that falls in an upright picture; stored lying where ``angle`` is 90."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(rate))
        stream.width, stream.height = (64, 48) if angle else (48, 64)
        if angle:
            stream.set_display_rotation(-angle)
        for i in range(frames):
            upright = np.zeros((64, 48, 3), np.uint8)
            top = i * 60 // frames
            upright[top : top + 4] = 255
            stored = np.rot90(upright, angle // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(stored), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_from_phone_clips_to_a_video_and_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clips = tmp_path / "clips"
    for i, (rate, angle) in enumerate([(30, 90), (24, 0), (60, 90), (30, 0), (24, 90), (30, 0)]):
        phone_clip(clips / ("fall" if i % 2 else "drop") / f"IMG {i}.mp4", rate, angle)
    (clips / "fall" / "IMG 9.mp4").write_bytes((clips / "fall" / "IMG 1.mp4").read_bytes()[:200])

    # Clips are read upright, whichever way they are stored.
    bar = read_video(clips / "drop" / "IMG 0.mp4")[:, 10].mean(0)
    assert bar.shape == (64, 48) and bar.mean(1).max() > 0.8 and bar.mean(0).max() < 0.3
    assert main(["check", "clips"]) == 1
    assert "7 videos, 120 frames; 1 with a problem" in capsys.readouterr().out

    arguments = ["--data", "clips", "--size", "16", "--num-frames", "3", "--fps", "12"]
    arguments += ["--conditioning", "classes", "--steps", "12", "--batch-size", "2", "--log-every"]
    arguments += ["1", "--model", json.dumps(NETWORK), "--device", "cpu", "--holdout", "0.3"]
    arguments += ["--sample-every", "12", "--sample-steps", "2", "--validate-every", "6"]
    assert main(["train", "run", *arguments, "--dry-run", "--quiet"]) == 0
    assert not (tmp_path / "run").exists()

    # Ctrl-C, and on.
    code = "import os, signal, sys\nfrom fastvdm.training import trainer\n"
    code += "real = trainer.Trainer._step\ndef step(self, batches):\n"
    code += f"    if self.step == 4: os.kill(os.getpid(), {int(signal.SIGINT)})\n"
    code += "    return real(self, batches)\ntrainer.Trainer._step = step\n"
    code += "from fastvdm.cli import main\nsys.exit(main(sys.argv[1:]))\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, "train", "run", *arguments],
                          capture_output=True, text=True, env=environment)  # fmt: skip
    assert done.returncode == 130 and "step 5 of 12" in done.stdout, done.stderr
    for words in ("UNet3D", "held out", "at 12 fps", "conditioned on classes"):
        assert words in done.stderr
    assert main(["train", "run", "--resume", "--quiet"]) == 0
    assert [r["step"] for r in read_log("run/log.csv")] == list(range(1, 13))
    assert read_video("run/samples/step-00000012.gif").shape[1] == 3

    # From the run, and from the hub's format in a folder, the same video.
    sent: dict[str, bytes] = {}

    class Api:
        def create_repo(self, name, **options):
            return f"https://example/{name}"

        def upload_folder(self, repo_id, folder_path, **options):
            sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert main(["push", "run", "me/falling"]) == 0
    (tmp_path / "hub").mkdir()
    for name, content in sent.items():
        (tmp_path / "hub" / name).write_bytes(content)
    draw = ["--label", "fall", "--steps", "3", "--device", "cpu", "--seed", "4"]
    for source, output in (("run", "a.mp4"), ("hub", "b.mp4")):
        assert main(["sample", source, output, *draw]) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    report = check_video("a.mp4")
    assert (report.frames, report.width, report.height, report.fps) == (3, 16, 16, 12.0)

    # And in Python.
    model = UNet3D.from_pretrained("hub")
    video = sample(model, cond=torch.eye(2)[1:], num_steps=3, seed=[4], value_range=(0, 1))
    write_video("c.mp4", video[0], model.settings["fps"])
    torch.testing.assert_close(read_video("c.mp4"), read_video("a.mp4"), atol=0.02, rtol=0)

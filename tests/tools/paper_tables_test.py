"""``make paper-tables`` in little: it runs to the end and goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from paper import data, measure
from paper.intervals import gains_table, joined
from paper.tables import QUICK, Place, Row, jobs, networks
from paper.train import HeldOut, Recipe, Training, factor, train

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "paper_tables.py"
TINY = Recipe("tiny", steps=4, batch=2, every=2)


def run(*args: str) -> subprocess.CompletedProcess:
    env = os.environ | {"FASTVDM_STRICT": "0", "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(SCRIPT), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)


@pytest.mark.slow
def test_quick(tmp_path):
    pytest.importorskip("tqdm")
    done = run("--quick", "--out", str(tmp_path), "--processes", "1")
    assert done.returncode == 0, done.stderr[-2000:]
    report = (tmp_path / "paper_tables.md").read_text()
    assert "mean nothing" in report and "nan" not in report
    exact = (tmp_path / "paper_tables_exact.md").read_text()
    assert "mean nothing" in exact and "### Extension" in exact
    for title in ("Networks", "Table 4", "Table 5", "Table 6", "Cascade", "Interpolation"):
        assert f"### {title}" in report, title
    for name in ("extension.gif", "extension.png", "cascade.gif", "scale.png", "curves.png"):
        assert (tmp_path / f"paper_tables_{name}").stat().st_size > 0
    rows = sorted((tmp_path / "cache" / "rows").iterdir())
    assert len(rows) == len(jobs(QUICK))
    before = [path.stat().st_mtime_ns for path in rows]
    again = run("--quick", "--out", str(tmp_path), "--processes", "1")
    assert again.returncode == 0, again.stderr[-2000:]
    assert before == [path.stat().st_mtime_ns for path in rows]


def test_quick_does_not_overwrite_the_report():
    pytest.importorskip("tqdm")
    done = run("--quick")
    assert done.returncode == 2 and "--out" in done.stderr


def test_training_goes_on_where_it_was(tmp_path):
    whole = train(TINY, tmp_path / "whole", held_out_clips=4)
    part = Training(TINY, HeldOut(TINY, 4))
    for _ in range(2):
        part.advance()
    part.look()
    (tmp_path / "part").mkdir()
    torch.save(part.state(), tmp_path / "part" / "tiny.pt")
    rest = train(TINY, tmp_path / "part", held_out_clips=4)
    assert rest.curve == whole.curve
    for a, b in zip(whole.average.parameters(), rest.average.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(ValueError, match="is of"):
        train(Recipe("tiny", steps=5), tmp_path / "part", held_out_clips=4)


def test_learning_rate():
    rates = [factor(Recipe("x", steps=1000), step) for step in range(1000)]
    assert rates[0] == 0.02 and max(rates) == rates[49] == rates[400] == 1
    assert rates[400:] == sorted(rates[400:], reverse=True) and rates[-1] < 1e-4


def test_networks_with_images_see_the_same_clips():
    jobs = [Training(Recipe("x", batch=2, num_images=k, conditional=False), None) for k in (0, 4)]
    for job in jobs:
        job.advance()
    for i in (0, 1):  # of clips and of their noise
        assert torch.equal(*(job.streams[i].get_state() for job in jobs))


def test_names_are_distinct():
    names = [job.name for job in jobs(QUICK)]
    assert len(set(names)) == len(names)
    place = Place(Path("nowhere"), QUICK)
    assert all(place.recipe(name).name == name for name in networks(QUICK))
    assert Row("auto", langevin=True).options(place)["num_steps"] == 1


def test_score_of_the_truth_and_of_another_clip():
    truth = data.draw(200, data.FRAMES, torch.Generator().manual_seed(0))
    video = data.continued(truth, 18)
    parts = measure.windows(8, 18, 5)
    perfect, other = (measure.score(v, truth, parts) for v in (video, video.roll(1, 0)))
    for name in ("background", "colour", "error"):
        assert torch.tensor(perfect[name]).max() < 1e-6
        assert (torch.tensor(other[name]).mean(1) - 1).abs().max() < 0.2
    for name in ("glyph", "position"):
        assert torch.tensor(perfect[name]).min() == 1 and torch.tensor(other[name]).mean() < 0.2
    assert abs(measure.seam(video, [part.start for part in parts]) - 1) < 0.1
    gains = gains_table(
        "", [("", other, perfect), ("", joined([perfect] * 2), joined([other] * 2))]
    )
    assert "**10 of 20 are beyond it.**" in gains.note


def test_interval_and_jackknife():
    mean = measure.interval([1.0, 2.0, 3.0])
    assert mean.value == 2 and mean.half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    g = torch.Generator().manual_seed(0)
    true = torch.randn(4000, 2, generator=g)
    drawn = torch.randn(400, 2, generator=g) + 1
    got = measure.jackknife(true, drawn)
    assert abs(got.value - 2) < 2 * got.half < 1

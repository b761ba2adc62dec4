"""The harness of the benchmarks: parity first, interleaved rounds, figures that are checked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
import unet_bench
import waterfall
from floor import network_costs
from harness import (
    Contest,
    Provider,
    ReplayClock,
    Result,
    Unavailable,
    need_kernel,
    run_contest,
    summary,
)
from peer import peer_or_skip

from fastvdm import UNet3D
from fastvdm.ops._cost import Cost

ROOT = Path(__file__).resolve().parents[2]
X = torch.arange(12.0).reshape(3, 4)


def contest(**builds) -> Contest:
    providers = {name: Provider(build, 1e-6) for name, build in builds.items()}
    return Contest(lambda: X.double() * 2, providers, cost=lambda dtype: Cost(12, 96))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: lambda: X * 2.001, "max error"),
        (lambda: lambda: torch.where(X > 10, torch.nan, X * 2), "max error inf"),
        (lambda: lambda: X[:2] * 2, "shapes"),
        (lambda: lambda: (X * 2, X), "shapes"),
        (lambda: lambda: torch.zeros_like(X), "max error"),
    ],
)
def test_a_wrong_provider_is_not_timed(wrong, why: str) -> None:
    results = run_contest(contest(good=lambda: lambda: X * 2, wrong=wrong), budget=0.0)
    assert why in results["wrong"].failed
    assert not results["wrong"].times
    assert len(results["good"].times) == 3


def test_an_absent_provider_is_skipped_with_its_reason() -> None:
    def absent():
        raise Unavailable("no such thing")

    results = run_contest(contest(good=lambda: lambda: X * 2, absent=absent), budget=0.0)
    assert results["absent"].skipped == "no such thing" and not results["absent"].times


def test_rounds_interleave() -> None:
    order = []

    def build(name: str):
        def run():
            order.append(name)
            return X * 2

        return lambda: run

    run_contest(contest(a=build("a"), b=build("b")), budget=0.0, min_rounds=4)
    assert order[-8:] == ["a", "b"] * 4


def test_only_the_asked_for_providers_run() -> None:
    def forbidden():
        raise AssertionError("built although not asked for")

    results = run_contest(contest(a=lambda: lambda: X * 2, b=forbidden), names=["a"], budget=0.0)
    assert list(results) == ["a"]


def test_summary_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.limits", lambda device, dtype: (1e3, 1e3))
    results = {"a": Result([4.0, 2.0, 8.0], 0.0), "b": Result([1.0, 1.0, 2.0], 1e-7)}
    row = summary(contest(a=None, b=None), results, "b")
    assert row["ratio"] == 4.0  # the median of 4, 2, 4, and not 4 / 1 of the medians
    assert row["median_ms"] == 1e3 and row["max_error"] == 1e-7
    assert row["floor_ms"] == pytest.approx(96.0)  # 96 bytes at 1000 bytes/s, above 12 FLOP
    assert row["floor_pct"] == pytest.approx(9.6)


def test_summary_adds_the_floors_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.limits", lambda device, dtype: (1e3, 1e3))
    parts = [Cost(1000, 1), Cost(1, 1000)]
    held = Contest(lambda: X, {"a": Provider(None, 0.0)}, cost=lambda dtype: parts)
    assert summary(held, {"a": Result([4.0])}, "a")["floor_pct"] == pytest.approx(50.0)


def test_replayed_durations_are_exact() -> None:
    clock = ReplayClock()
    clock.load([0.5, 0.25])
    seen = []
    for _ in range(2):
        start = clock()
        clock.advance()
        seen.append(clock() - start)
    assert seen == [0.5, 0.25]


def test_need_kernel_names_the_reason() -> None:
    from fastvdm.runtime import dispatch

    off = dispatch.explain("norm_act")["cpu"]
    if off is None:
        need_kernel("norm_act", "cpu")
    else:
        with pytest.raises(Unavailable, match="cpu: "):
            need_kernel("norm_act", "cpu")


def test_network_floor_scales_with_the_video() -> None:
    net = UNet3D(dim=16, dim_mults=(1, 2))
    time = torch.zeros(1)

    def flops(frames: int) -> tuple[int, int]:
        costs = network_costs(net, torch.zeros(1, 3, frames, 8, 8), time, torch.float32)
        return sum(c.flops for c in costs), len(costs)

    (two, calls), (four, same) = flops(2), flops(4)
    assert calls == same and two > 0
    # All but the embedding is per frame, and attention over time grows with its square.
    assert 1.9 < four / two < 2.5
    conv = 2 * 2 * 64 * 3 * 16 * 49  # the 7x7 stem alone
    assert two > conv
    assert net.stem.weight.device.type == "cpu"


def made_up_run(folder: Path, *rows: dict) -> waterfall.Run:
    """What is read of a run of the small network: the peer, ours and ``rows``."""
    row = {
        "provider": "peer", "dtype": "float32", "median_ms": 1234.5, "max_error": 1e-7,
        "ratio": 1.0, "gflops": 10.0, "gbs": 2.0, "floor_pct": 12.3, "peak_mib": 5.0,
    }  # fmt: skip
    ours = row | {"provider": "fastvdm", "median_ms": 300.0, "ratio": 4.1, "fallbacks": ["why"]}
    half = ours | {"provider": "fastvdm-bf16", "dtype": "bfloat16", "ratio": 5.2}
    benchmarks = [
        {
            "group": "unet-forward-small",
            "extra_info": r,
            "stats": {"min": 1, "median": 2, "max": 3, "data": [1, 2, 3]},
        }
        for r in (row, ours, half, *(row | r for r in rows))
    ]
    machine = {"device": "cpu", "torch": "2", "openvino": "3", "threads": 2, "commit": "abc"}
    data = {
        "machine_info": {
            "fastvdm": machine | {"cpu_capability": "AVX9"},
            "cpu": {"brand_raw": "P<Q"},
        },
        "benchmarks": benchmarks,
        "datetime": "2026-01-02",
    }
    source = folder / "r.json"
    source.write_text(json.dumps(data))
    (run,) = waterfall.load([source])
    return run


def test_results_page(tmp_path: Path) -> None:
    page = waterfall.render([made_up_run(tmp_path)], tmp_path / "up" / "page.md")
    assert "| peer | float32 | 1234 | 1x | 0.01 | 2 | 12 | 1.0e-07 | 5 |  |" in page
    assert "**4.1x**" in page and "falls back: why" in page and "2026-01-02, commit abc" in page
    assert "torch 2, openvino 3, 2 threads" in page and "](../r.svg)" in page
    whole = "| P<Q, AVX9 | unet-forward-small | 1234 | 300, **4.1x** | 300, **5.2x** | 5 / 5 / 5 |"
    assert page.index(whole) < page.index("## P<Q, AVX9 (cpu)")


def test_results_are_kept_small(tmp_path: Path) -> None:
    once = made_up_run(tmp_path)
    path = tmp_path / "r.json"
    kept = path.read_text()
    assert json.loads(kept)["benchmarks"][0]["stats"] == {"min": 1, "max": 3}
    assert waterfall.load([path]) == [once] and path.read_text() == kept


def test_chart_has_five_bars(tmp_path: Path) -> None:
    others = {"torch": 900.0, "peer-openvino": 700.0, "peer-bf16": 800.0}
    rows = [{"provider": p, "median_ms": ms, "peak_mib": None} for p, ms in others.items()]
    run = made_up_run(tmp_path, *rows)
    (path,) = waterfall.write_charts([run])
    text = path.read_text()
    assert path == tmp_path / "r.svg" and len(text) < 6000
    bars = ElementTree.fromstring(text).findall("{*}g")
    said = [[t.text for t in bar.findall("{*}text")] for bar in bars]
    assert [label for label, _ in said] == [
        "video-diffusion-pytorch, fp32",
        "video-diffusion-pytorch in OpenVINO, fp32",
        "video-diffusion-pytorch, bf16 autocast",
        "fastvdm, fp32",
        "fastvdm, bf16",
    ]
    assert said[0][1] == "1234 ms · 1x · 5 MiB" and said[1][1] == "700 ms · 1x"
    widths = [float(bar.find("{*}rect").get("width")) for bar in bars]
    assert widths[0] == 568 and widths[3] == pytest.approx(568 * 300 / 1234.5, abs=0.1)
    assert "P&lt;Q, AVX9, 2 threads. 2026-01-02, commit abc" in text
    machine, found = run
    assert waterfall.chart(machine, [r for r in found if r["provider"] != "peer"]) is None


def test_chart_names_the_networks_that_are_run() -> None:
    for group, (name, *sizes) in waterfall.NETWORKS.items():
        net = unet_bench.CASES[group.removeprefix("unet-forward-")]
        assert name == f"Unet3D(dim={net.dim})"
        assert sizes == [net.frames, net.size, net.batch, net.gpu_batch]
    shown = waterfall.PEER | waterfall.OTHERS | waterfall.OURS
    assert shown.keys() <= set(unet_bench.PROVIDERS)


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.svg")), ids=str)
def test_committed_charts_are_of_the_committed_figures(path: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(path.with_suffix(".json"), tmp_path))
    ((machine, rows),) = waterfall.load([source])
    assert waterfall.chart(machine, rows) == path.read_text()


def test_benches_collect_on_this_machine() -> None:
    """Every bench file imports and parametrizes; running them is `make bench`."""
    command = [sys.executable, "-m", "pytest", "bench", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "unet_bench.py::test_forward[small-fastvdm]" in done.stdout


@pytest.mark.parametrize(
    ("step", "why"),
    [
        (unet_bench.forward, "pip install 'fastvdm[openvino]'"),
        (unet_bench.train, "OpenVINO has no backward pass"),
    ],
)
def test_openvino_is_optional(step, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer_or_skip()
    monkeypatch.setitem(sys.modules, "openvino", None)
    names = ("peer-openvino", "peer-openvino-bf16")
    results = run_contest(unet_bench.contest("tiny", "cpu", step), names=names, budget=0.0)
    assert [why in results[n].skipped for n in names] == [True, True]

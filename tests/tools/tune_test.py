"""Measured configurations: the loader's answers, and the search with a clock that is made up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import calls
import tune
import tune_cases
from calls import Call, Shape

from fastvdm.kernels import (
    guidance,
    linear_attention,
    linear_attention_block,
    linear_residual,
    space_conv,
    temporal_block,
    tuned,
)
from fastvdm.kernels.axis_attention import long, short
from fastvdm.kernels.common import next_power_of_2
from fastvdm.kernels.limits import GROUP, RMS, SPACE, TIME
from fastvdm.kernels.norm_act import group, row
from fastvdm.runtime.device import H100, H200, pretend

KEY = "n=64, dtype=float32"


@dataclass(frozen=True)
class Config:
    block: int
    num_warps: int
    maxnreg: int | None = None


def make_picker(calls: list | None = None):
    @tuned.tuned("op", n=next_power_of_2)
    def pick_config(n: int, dtype: torch.dtype = torch.float32) -> Config:
        """Doc."""
        if calls is not None:
            calls.append(n)
        return Config(n, 4)

    return pick_config


@pytest.fixture
def file(monkeypatch, tmp_path) -> Iterator[Path]:
    """The file of the GPU that this test pretends to have."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    with pretend(H200):
        yield tuned.path_of(H200.name)


def entry(**config) -> dict:
    return {"op": {KEY: {"config": config, "ms": 1.0}}}


def test_hit_miss_and_class(file) -> None:
    file.write_text(json.dumps(entry(block=7, num_warps=2, maxnreg=None)))
    pick = make_picker()
    assert pick(64) == Config(7, 2)
    assert pick(50) == Config(7, 2)  # the same power of two
    assert pick(65) == Config(65, 4)
    assert pick(64, torch.float64) == Config(64, 4)
    assert pick.analytic(64) == Config(64, 4) and pick.__doc__ == "Doc."


def test_another_gpu_and_no_gpu_are_analytic(file, monkeypatch) -> None:
    file.write_text(json.dumps(entry(block=7, num_warps=2)))
    with pretend(H100):
        assert make_picker()(64) == Config(64, 4)
    monkeypatch.setattr(tuned, "current_gpu", lambda: None)
    assert make_picker()(64) == Config(64, 4)


def test_the_file_is_read_once_and_not_before_a_launch(file, monkeypatch) -> None:
    file.write_text(json.dumps(entry(block=7, num_warps=2)))
    reads, calls, read = [], [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **kw: reads.append(p) or read(p, **kw))
    pick = make_picker(calls)
    assert not reads
    for _ in range(3):
        pick(64), pick(128)
    assert reads == [file] and calls == [64, 128]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not a table"),
        ('{"op": 3}', "is not a table"),
        (json.dumps(entry(block=7)), "no Config"),
        (json.dumps(entry(block=7, num_warps=2, stages=3)), "stages"),
        (json.dumps(entry(block="7", num_warps=2)), "block is '7'"),
        (json.dumps({"op": {KEY: {}}}), "KeyError"),
        (json.dumps({"op": {KEY: 5}}), "no Config"),
    ],
)
def test_a_malformed_file_is_named(file, text: str, why: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=why) as raised:
        make_picker()(64)
    assert str(file) in str(raised.value)


def test_choosing_goes_before_the_file_in_its_thread_alone(file) -> None:
    file.write_text(json.dumps(entry(block=7, num_warps=2)))
    pick, seen = make_picker(), []

    def elsewhere() -> None:
        with pretend(H200):
            seen.append(pick(50))

    with tuned.choosing(lambda choice: Config(choice.given["n"], 1)):
        assert pick(50) == Config(64, 1)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [Config(7, 2)] and pick(50) == Config(7, 2)


def test_the_shipped_files_belong_to_these_kernels() -> None:
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.table(path).keys() <= tune_cases.MOVES.keys(), path


# Candidates.

SHORT = dict(backward=True, even=True, frozen=False, major=9)
ASKED = {
    "linear": linear_attention.pick_config.choice(32, torch.bfloat16, 4096, backward=True, major=9),
    "linear small": linear_attention.pick_config.choice(
        128, torch.bfloat16, 20, backward=False, major=9
    ),
    **{
        f"linear_block {kind}": linear_attention_block.pick_config.choice(
            kind, 64, 32, 2, 2, major=9
        )
        for kind in ("sum", "apply", "dm", "dk", "dx")
    },
    "group": group.pick_config.choice(96, 48, 2, "sums"),
    "row": row.pick_row_config.choice(512, 0, 2, "fwd"),
    "short": short.pick_config.choice(16, 32, 2, 4096, shaw=False, biased=True, **SHORT),
    "short shaw": short.pick_config.choice(16, 64, 2, 4096, shaw=True, biased=False, **SHORT),
    "short one": short.pick_config.choice(32, 128, 2, 1, shaw=True, biased=False, **SHORT),
    **{
        f"long {kind} {n}": long.pick_config.choice(
            kind, 64, 2, n, shaw=kind == "drel", bias=True, rotary=False, major=9
        )
        for kind in ("fwd", "dq", "dkv", "dbias", "drel")
        for n in (40, 1024)
    },
    "temporal": temporal_block.pick_config.choice(
        16, 64, 32, 4096, 2, tables=False, backward=False, major=9
    ),
    "linear_residual": linear_residual.pick_config.choice(8192, 256, 512, 2, 2, major=9),
    "linear_residual small": linear_residual.pick_config.choice(100, 256, 40, 2, 2, major=9),
    "guidance": guidance.pick_config.choice("seed", torch.float32),
    "conv": space_conv.pick_config.choice((192, 192), (64, 48), 2, True),
    "conv small": space_conv.pick_config.choice((64, 64), (8, 8), 2, True),
    "conv pointers": space_conv.pick_config.choice((64, 64), (8, 8), 2, False),
}


@pytest.mark.parametrize("name", ASKED)
def test_candidates_are_a_handful_of_valid_neighbours(name: str) -> None:
    choice = ASKED[name]
    found = tune_cases.candidates(choice)
    assert len(found) <= 9 and len(set(found)) == len(found) and choice.analytic not in found
    assert found or name == "short one"
    for config in found:
        assert type(config) is type(choice.analytic)
        assert config.num_warps in (1, 2, 4, 8)
        other = ("num_stages", "maxnreg", "tma")
        sizes = [v for k, v in tune._fields(config).items() if k not in other]
        assert all(v >= 1 and v == next_power_of_2(v) for v in sizes)
        if name.startswith("long drel"):
            assert config.BM == config.BN
        if name.startswith("long"):
            assert min(config.BM, config.BN) >= 16
        if name in ("conv", "conv small"):
            assert config.box_h * config.box_w == config.block_p and config.block_co >= 64


WIDE = Shape(2, 5, 7, 24, heads=1, head_dim=16)  # more pixels than the short attention takes
FEW = Shape(3, 2, 5, 24, heads=2, head_dim=16)
BOTH = ({}, {"backward": True})
MAKERS = {
    f"{make.__name__} {options}": (make, shape, options)
    for make, shape, some in (
        (calls.norm, FEW, [{"kind": k, **way} for k in (GROUP, RMS) for way in BOTH]),
        (calls.temporal, FEW, BOTH),
        (calls.linear, FEW, BOTH),
        (calls.linear_block, FEW, BOTH),
        (calls.attention, FEW, [{"axis": TIME, "given": calls.PEERS, **way} for way in BOTH]),
        (calls.attention, FEW, [{"axis": TIME, "given": calls.SHAW, **way} for way in BOTH]),
        (calls.attention, WIDE, [{"axis": SPACE, **way} for way in BOTH]),
        (calls.second_half, FEW, [{}]),
        (
            calls.guided,
            Shape(7, 4, 6, 3, batch=2),
            [{"what": w, "more": more} for w in ("seed", "update") for more in (False, True)],
        ),
        (calls.conv, FEW, [{}]),
    )
    for options in some
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the search itself does this")
@pytest.mark.parametrize("name", MAKERS)
def test_jobs_run_and_every_candidate_is_right(name: str) -> None:
    """Tiles change, results do not. The interpreter runs what a GPU would refuse, and knows no
    warps, stages or registers: tiles that it has seen are left out."""
    make, shape, options = MAKERS[name]
    job = Call(name, lambda d: make(shape, d, torch.float32, **options), torch.float32)
    run, asked = tune.prepare(job, "cpu")
    assert asked and {c.kernel for c in asked} <= tune_cases.MOVES.keys()
    expected = tune.answering(run, {})()
    for choice in asked:
        tiles = {_tile(c): c for c in (choice.analytic, *tune_cases.candidates(choice))}
        for config in list(tiles.values())[1:]:
            out = tune.answering(run, {(choice.kernel, choice.key): config})()
            for got, want in zip(out, expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, msg=str(config))


def _tile(config) -> tuple:
    launch = ("num_warps", "num_stages", "maxnreg")
    return tuple(v for k, v in tune._fields(config).items() if k not in launch)


def test_names_of_calls_are_unique() -> None:
    parts = (calls.networks, calls.by_name, calls.classes, calls.edges)
    names = [call.name for part in parts for call in part()]
    assert len(names) == len(set(names))


# The search, on a launcher made up: seconds by its configuration.


class Stub:
    """A launcher that asks one picker. ``wrong`` and ``raises`` are blocks of its candidates."""

    def __init__(self, wrong: tuple = (), raises: tuple = ()) -> None:
        self.pick, self.wrong, self.raises = make_picker(), wrong, raises
        self.used: list[Config] = []

    def job(self, name: str = "stub", n: int = 64) -> Call:
        return Call(name, lambda device: lambda: self.launch(n), torch.float32)

    def launch(self, n: int) -> torch.Tensor:
        config = self.pick(n)
        self.used.append(config)
        if config.block in self.raises:
            raise RuntimeError("out of resource: shared memory\nand more")
        return torch.ones(3) * (2 if config.block in self.wrong else 1)


@pytest.fixture
def search(monkeypatch):
    """``search(jobs, seconds by block)`` → (outcomes, report)."""
    blocks = (1, 2, 3)
    monkeypatch.setattr(tune, "candidates", lambda choice: [Config(b, 4) for b in blocks])

    def run(jobs, seconds, budget: float = 1e4):
        times = {str(Config(b, 4)): s for b, s in seconds.items()}
        monkeypatch.setattr("harness._round", lambda contest, runs: {n: times[n] for n in runs})
        found: list[tune.Found] = []
        return found, tune.tune(jobs, found.append, device="cpu", budget=budget)

    return run


def test_the_fastest_right_candidate_wins(search) -> None:
    stub = Stub(wrong=(1,), raises=(3,))
    (found,), report = search([stub.job()], {64: 1.0, 1: 0.1, 2: 0.5, 3: 0.1})
    assert found.best == Config(2, 4) and (found.seconds, found.analytic_seconds) == (0.5, 1.0)
    assert found.choice.key == KEY and found.timed == 1
    assert "max error" in found.rejected[str(Config(1, 4))]
    assert found.rejected[str(Config(3, 4))] == "RuntimeError: out of resource: shared memory"
    assert not report.failed and not report.missed


def test_three_percent_is_not_enough(search) -> None:
    seconds = {64: 1.0, 1: 0.98, 2: 0.975, 3: 1.5}
    (found,), _ = search([Stub().job()], seconds)
    assert found.best == Config(64, 4) and found.seconds == 1.0


def test_a_choice_is_tuned_once_and_later_jobs_use_it(search) -> None:
    stub, seconds = Stub(), {64: 1.0, 128: 1.0, 1: 0.9, 2: 0.5, 3: 1.0}
    jobs = [stub.job(f"{i}", n) for i, n in enumerate((64, 60, 128, *[33] * 20))]
    found, report = search(jobs, seconds)
    assert [(f.job, f.choice.given["n"]) for f in found] == [("0", 64), ("2", 128)]
    assert not report.missed and not report.failed


def test_a_job_that_raises_leaves_the_others(search) -> None:
    jobs = [Stub(raises=(64,)).job("bad"), Stub().job("good", 128)]
    found, report = search(jobs, {128: 1.0, 1: 0.5, 2: 1.0, 3: 1.0})
    assert [f.job for f in found] == ["good"]
    assert report.failed == {"bad": "RuntimeError: out of resource: shared memory"}


def test_no_time_no_timing(search) -> None:
    stub = Stub()
    found, report = search([stub.job(str(i)) for i in range(20)], {}, budget=0.0)
    assert not found and not stub.used and len(report.missed) == 20


def test_the_budget_ends_the_search(search, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])
    real = tune.race

    def slow(*args):
        now[0] += 10.0
        return real(*args)

    monkeypatch.setattr(tune, "race", slow)
    jobs = [Stub().job(str(n), n) for n in (64, 128, 256, 512)]
    seconds = {64: 1.0, 128: 1.0, 256: 1.0, 512: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}
    found, report = search(jobs, seconds, budget=15.0)
    assert [f.job for f in found] == ["64", "128"] and report.missed == ["256", "512"]


def test_what_is_slow_to_compile_is_left_out(monkeypatch) -> None:
    """The deadline comes when the fast one is ready."""
    wait = tune.wait

    def until_one(futures, timeout):
        assert timeout > 0
        return wait(futures, return_when=FIRST_COMPLETED)

    monkeypatch.setattr(tune, "wait", until_one)
    gate = threading.Event()
    later = tune.time.monotonic() + 1e4
    results = tune.in_threads({"fast": lambda: 1, "slow": gate.wait}, later)
    gate.set()
    assert results == {"fast": 1}


# The file, from the search to the launch.


def test_what_is_found_is_what_a_launch_uses(search, file) -> None:
    stub, origin = Stub(), {"date": "2026-01-02", "torch": "2", "triton": "3", "commit": "abc"}
    (found,), _ = search([stub.job()], {64: 1.0, 1: 0.5, 2: 0.6, 3: 1.0})
    table: dict = {"other": {"k": {"config": {}}}}
    tune.record(table, found, origin)
    tune.write(file, table)
    assert json.loads(file.read_text())["op"][KEY] == {
        "config": {"block": 1, "num_warps": 4, "maxnreg": None},
        "ms": 500.0,
        "analytic": {"block": 64, "num_warps": 4, "maxnreg": None},
        "analytic_ms": 1000.0,
        "job": "stub",
        **origin,
    }
    assert stub.pick(64) == Config(1, 4)
    (found,), _ = search([stub.job()], {64: 1.0, 1: 1.0, 2: 1.0, 3: 1.0})
    tune.record(table, found, origin)  # now the analytic one is best: the entry goes
    assert table == {"other": {"k": {"config": {}}}, "op": {}}
    assert tune.versions().keys() == origin.keys()


def test_a_write_is_whole_or_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "new" / "gpu.json"
    tune.write(path, {"op": {}})
    with pytest.raises(TypeError):
        tune.write(path, {"op": object()})
    assert json.loads(path.read_text()) == {"op": {}}
    monkeypatch.setattr(tune.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        tune.write(path, {"op": {"more": {}}})
    assert json.loads(path.read_text()) == {"op": {}}


def test_keeper_writes_both_files(file, tmp_path, search) -> None:
    said: list[str] = []
    (found,), _ = search([Stub(wrong=(3,)).job()], {64: 1.0, 1: 0.5, 2: 0.6, 3: 1.0})
    tune.keeper(H200.name, tmp_path / "out", said.append)(found)
    assert file.read_text() == (tmp_path / "out" / file.name).read_text()
    assert json.loads(file.read_text())["op"][KEY]["config"]["block"] == 1
    assert "2.00x" in said[0] and "REJECTED" in said[1]


def test_answers_are_kept_for_later_calls(search) -> None:
    """A stage hands them from one group of calls to the next."""
    answers: dict = {}
    seconds = {64: 1.0, 1: 0.5, 2: 0.6, 3: 1.0}
    search([], seconds)  # only for its clock
    found: list[tune.Found] = []
    for name in ("first", "second"):
        jobs = [Stub().job(name)]
        tune.tune(jobs, found.append, device="cpu", budget=1e4, answers=answers)
    assert [f.job for f in found] == ["first"] and list(answers.values()) == [Config(1, 4)]

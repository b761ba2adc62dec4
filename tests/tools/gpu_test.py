"""The stages of ``make gpu`` on a machine without a GPU: what goes wrong is one item's, and every
kind of item runs on a device that is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import gpu
import gpu_pack
import gpu_worker
import pytest
from gpu_worker import Context, Item

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def faulty(tmp_path, monkeypatch, capsys):
    """``faulty(only, seconds)`` → (exit status, records by item, table, what was printed)."""
    folders = [ROOT / "tests" / "tools", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "tools"))

    def run(*only: str, seconds: float = 60.0, workers: int = 2):
        context = Context(tmp_path)
        status = gpu.run(
            "faults", "gpu_faults", context, workers=workers, seconds=seconds, only=only
        )
        lines = (tmp_path / "faults.jsonl").read_text().splitlines()
        records: dict[str, list[dict]] = {}
        for record in map(json.loads, lines):
            records.setdefault(record["item"], []).append(record)
        return status, records, (tmp_path / "faults.md").read_text(), capsys.readouterr().out

    return run


def test_what_goes_wrong_is_one_items(faulty) -> None:
    status, records, table, said = faulty("good", "bad")
    verdicts = {name: [r["verdict"] for r in found] for name, found in records.items()}
    assert status == 1 and verdicts == {
        "good/alone": ["ok"],
        "bad/wrong": ["failed"],
        "bad/aborts": ["crashed"],
        "bad/exits": ["crashed"],
        "bad/hangs": ["hung"],
        "bad/parts": ["crashed", "ok"],
        "good/absent": ["skipped"],
        "good/variable": ["ok"],
        "good/last": ["ok"],
    }
    assert records["bad/wrong"][0]["why"] == "ValueError: two results differ\nand more"
    assert "gpu_faults.py" in records["bad/wrong"][0]["at"][-1]
    assert "SIGABRT" in records["bad/aborts"][0]["why"]
    why = records["bad/exits"][0]["why"]
    assert why.startswith("exit status 7: ") and why.endswith("the last words")
    # The part that crashed is left out, and named.
    first, second = records["bad/parts"]
    assert first["part"] == "second" and second["without"] == ["second"]
    assert second["parts"] == "the rest"
    assert records["good/variable"][0]["say"] == "b"
    assert "| bad | 1 | 1 | 3 | 1 |  |  |" in table and "## crashed: 3" in table
    assert "- `bad/hangs`: killed after 0 s" in table
    assert "failed   bad/wrong: ValueError" in said and "no such program here" in table


def test_what_there_is_no_time_for_is_named(faulty) -> None:
    status, records, table, _ = faulty("slow", seconds=2.5)
    verdicts = [found[0]["verdict"] for found in records.values()]
    assert status == 0 and len(verdicts) == 40
    done = verdicts.count("ok")
    assert 1 <= done <= 8 and verdicts.count("left out") == 40 - done
    assert verdicts[0] == "ok"  # the first are the most important
    assert "- `slow/39`: no time" in table and "## left out" in table


def test_no_worker_starts(tmp_path, monkeypatch) -> None:
    """Two failures, and a slot gives up; the rest is not tried."""
    kept: list[dict] = []
    items = [Item(f"a/{i}", lambda without: None) for i in range(5)]
    gpu.Run("no_such_module", Context(tmp_path), kept.append, workers=1, seconds=30, log="x").run(
        items
    )
    assert [r["verdict"] for r in kept] == ["crashed", "crashed", *["left out"] * 3]
    assert "No module named" in kept[0]["why"] and kept[-1]["why"] == "no worker starts"


def test_the_printed_table_is_short() -> None:
    records = [{"item": f"a/{i}", "verdict": "left out", "why": "no time"} for i in range(99)]
    assert "- and 59 more" in gpu.table("check", records, 1.0, gpu.SHOWN)


def test_names_are_of_one_item(monkeypatch) -> None:
    import gpu_faults

    twice = [Item("a", gpu_faults.good), Item("a", gpu_faults.wrong)]
    monkeypatch.setattr(gpu_faults, "items", lambda context: twice)
    with pytest.raises(ValueError, match="two items of gpu_faults are called a"):
        gpu_worker.load("gpu_faults", Context(Path()))


def test_a_module_that_is_not_installed_has_a_stand_in(monkeypatch) -> None:
    names = ("no_such_package", "no_such_package.part")
    assert gpu_worker.stand_in(names) == list(names)
    try:
        from no_such_package.part import Base

        class Derived(Base, option=1):
            pass

        assert issubclass(Derived, Base)
        with pytest.raises(AttributeError):
            sys.modules["no_such_package"].__file__  # noqa: B018
    finally:
        for name in names:
            del sys.modules[name]
    assert gpu_worker.stand_in(("json",)) == []


# -- the stages, on a made-up device --------------------------------------------------------------


def dry(stage: str, out: Path, *only: str, seconds: int = 1500, **environment: str):
    """(records, what was printed)."""
    command = [sys.executable, "bench/gpu.py", stage, "--dry-run", "--out", str(out)]
    command += ["--seconds", str(seconds), *(["--only", *only] if only else [])]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = (out / f"{stage}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    bad = [r for r in records if r["verdict"] not in ("ok", "skipped")]
    assert not bad and done.returncode == 0, json.dumps(bad, indent=1)[:4000] + done.stderr[-2000:]
    assert f"# {stage}: {len(records)} items" in (out / f"{stage}.md").read_text()
    return records, done.stdout


def kinds(records: list[dict]) -> set[str]:
    return {r["item"].split("/")[0] for r in records}


def test_check(tmp_path) -> None:
    """One item of each kind that takes no more than a second."""
    only = (
        "facts", "op/guidance/seed-l0", "op/attention-by-torch", "launch/guided l0",
        "many/linear_attention", "suite/norm_act/layer-bit_equal", "bits/linear", "ptxas/linear",
    )  # fmt: skip
    records, said = dry("check", tmp_path, *only)
    assert kinds(records) == {"facts", "op", "launch", "many", "suite", "bits", "ptxas"}
    assert records[0]["facts"]["gpu"] == "made up" and "made up" in said
    assert records[0]["facts"]["tf32"] == [False, False]
    assert {r.get("ptxas") for r in records if r["item"].startswith("ptxas")} == {"13.5"}


def test_measure(tmp_path) -> None:
    records, said = dry("measure", tmp_path, "facts", "op/guidance-ends")
    rows = records[1]["rows"]
    assert [row["provider"] for row in rows] == ["torch", "fastvdm"] and rows[1]["ratio"] > 0
    assert "op/guidance-ends-l0" in said and "fastvdm" in (tmp_path / "RESULTS.md").read_text()
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert saved["benchmarks"][0]["group"] == "guidance-ends-l0"
    assert saved["machine_info"]["fastvdm"]["gpu"] == "made up"


@pytest.mark.slow
def test_tune(tmp_path) -> None:
    records, said = dry("tune", tmp_path, "tune/guided")
    assert records[0]["found"] and "timed:" in said
    assert json.loads((tmp_path / "made_up.json").read_text()).keys() == {"guidance"}
    assert not (ROOT / "kernels" / "configs" / "made_up.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["check", "measure", "tune"])
def test_every_item(stage: str, tmp_path) -> None:
    records, _ = dry(stage, tmp_path)
    if stage == "check":
        assert kinds(records) >= {"network", "sample", "compile", "sanitizer"}


# -- what is carried along ------------------------------------------------------------------------


def test_the_pack_comes_out_where_it_went_in(tmp_path, monkeypatch) -> None:
    """Files of Triton's cache name each other by absolute paths."""
    triton = pytest.importorskip("triton")
    pack, archive = tmp_path / "out" / "gpu-pack", tmp_path / "out" / "gpu-pack.tar.xz"
    monkeypatch.setattr(gpu_pack, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_pack, "PACK", pack)
    monkeypatch.setattr(gpu_pack, "ARCHIVE", archive)
    places = {"triton": pack / "triton", "peer": tmp_path / ".peer", "tools": pack}
    monkeypatch.setattr(gpu_pack, "PLACES", places)
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    assert "no pack" in gpu_pack.unpack(pack)
    entry = places["triton"] / "KEY"
    entry.mkdir(parents=True)
    (entry / "k.cubin").write_bytes(b"code")
    group = {"child_paths": {"k.cubin": str(entry / "k.cubin")}}
    (entry / "__grp__k.json").write_text(json.dumps(group))
    (pack / "triton.json").write_text(
        json.dumps({"triton": triton.__version__, "key": "other", "kernels": 1})
    )
    for path in (pack / "ptxas", pack / "compute-sanitizer" / "compute-sanitizer"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\n")
    (tmp_path / ".peer").mkdir()
    (tmp_path / ".peer" / "peer.py").write_text("x = 1\n")
    assert gpu_pack.pack() == 0
    with tarfile.open(archive) as found:
        assert (
            str(tmp_path).lstrip("/")
            not in found.extractfile("triton/KEY/__grp__k.json").read().decode()
        )
    moved = tmp_path / "moved"
    (moved / "out").mkdir(parents=True)
    archive.rename(moved / "out" / archive.name)
    new = moved / "out" / "gpu-pack"
    monkeypatch.setattr(gpu_pack, "ROOT", moved)
    monkeypatch.setattr(gpu_pack, "ARCHIVE", moved / "out" / archive.name)
    places = {"triton": new / "triton", "peer": moved / ".peer", "tools": new}
    monkeypatch.setattr(gpu_pack, "PLACES", places)
    from triton.runtime import cache

    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    assert "another build of the same version" in gpu_pack.unpack(new)
    assert cache.triton_key() == "other" and os.environ["TRITON_CACHE_DIR"] == str(new / "triton")
    moved_group = json.loads((new / "triton" / "KEY" / "__grp__k.json").read_text())
    path = moved_group["child_paths"]["k.cubin"]
    assert Path(path).read_bytes() == b"code" and path.startswith(str(moved))
    assert os.access(new / "ptxas", os.R_OK) and (moved / ".peer" / "peer.py").exists()


def answer(script: str, cache: Path) -> list:
    """What a process prints that launches without a device."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
    env["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests"), str(ROOT / "tests" / "ops")]
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.lower())


def test_every_op_of_the_check_is_in_the_pack(tmp_path) -> None:
    """None raises before its last kernel: what is missing would be compiled on the device."""
    pytest.importorskip("triton")
    script = """
import json
import gpu_cache
from calls import Call
from launches import captured
from fastvdm.runtime.device import H200
wanted = gpu_cache.ops_of_the_check()
ops = [Call(name, lambda _, run=run: run, None, "meta") for name, run in wanted]
with gpu_cache.launching():
    reached = {name for launch in captured(ops, H200) for name in launch.calls}
print(json.dumps([len(ops), len(reached)]))
"""
    ops, reached = answer(script, tmp_path)
    assert ops == reached > 100


@pytest.mark.slow
def test_a_second_process_finds_what_was_compiled(tmp_path) -> None:
    """The key has nothing of a device, of a process or of a path."""
    script = """
import sys
import gpu_cache, calls
from launches import captured, compiled
from triton import knobs
from fastvdm.runtime.device import H200
hits = []
knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
with gpu_cache.launching():
    for launch in captured(calls.networks()[-4:], H200):
        compiled(launch)
print(hits)
"""
    found = [answer(script, tmp_path) for _ in range(2)]
    assert found[0] and not any(found[0]) and found[1] == [True] * len(found[0])

"""Every Triton configuration that our networks call for compiles for sm_90, and of each kernel the
heaviest for sm_80 and sm_100, without spills. ``python bench/aot.py`` takes all for all three."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from aot import ARCHS, AotResult, heaviest, minmax, occupancy, stems, table

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
AOT = Path(__file__).resolve().parents[2] / "bench" / "aot.py"


def without_interpreter(*arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
    assert run.stdout, run.stderr[-2000:]
    return run.stdout


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    """One line per case and architecture."""
    lines = without_interpreter(str(AOT), "--common", "--json").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_case_may_ship(compiled, arch) -> None:
    """No compiler error, no spills, shared memory within the limit, the matrix instruction and
    the bulk copy where the case asks for them."""
    mine = [r for r in compiled if r["arch"] == arch]
    assert mine
    faults = [f"{r['name']}: {'; '.join(r['faults'])}" for r in mine if r["faults"]]
    assert not faults, "\n".join(faults)


def test_every_kernel_is_compiled_for_every_architecture(compiled) -> None:
    kernels = {a: {r["name"].split("/")[0] for r in compiled if r["arch"] == a} for a in ARCHS}
    copies = {r["name"].split("/")[0] for r in compiled if r["uses_tma"]}  # none before sm_90
    assert kernels[90] == kernels[100] and kernels[90] - copies <= kernels[80] <= kernels[90]


def test_names_are_unique(compiled) -> None:
    names = [(r["name"], r["arch"]) for r in compiled]
    assert len(names) == len(set(names))


def test_every_kernel_file_declares_its_cases() -> None:
    """A file that launches a kernel is a stem of the table."""
    declared = {stem.replace(".", "/") for stem in stems()}
    for path in KERNELS.rglob("*.py"):
        stem = path.relative_to(KERNELS).with_suffix("").as_posix().removesuffix("/__init__")
        if any(line.startswith("def _") and "_kernel" in line for line in path.open()):
            assert stem in declared, f"{stem} has kernels and no aot_cases()"


def test_heavier_matrix_instructions_where_tiles_allow(compiled) -> None:
    """The online-softmax kernels reach the warp-group instruction of Hopper."""
    found = {r["name"]: r["matrix"] for r in compiled if r["arch"] == 90}
    assert found["axis_attention_long_fwd/bf16-D64-plain"] == "wgmma.mma_async"


# The maxima of softmax, plain: PTX drops a NaN there, but exp(NaN - m) is NaN, and with it the sum
# that the row is divided by; a NaN in m itself would only make the same elements NaN.
SOFTMAX = {
    "m = tl.max(q, 1)",
    "m_new = tl.maximum(m_i, m)",
    "m_new = tl.maximum(m_i, tl.max(k, 0))",
    "m_new = tl.maximum(m_i, tl.max(s, 1))",
    "top = tl.max(s, 2)",
}


def test_no_minimum_or_maximum_drops_nan(compiled) -> None:
    """max.f32 and min.f32 of PTX return the operand that is a number, so that a clip makes -1 of
    NaN. The interpreter keeps NaN whatever the kernel says."""
    found = {tuple(pair) for r in compiled for pair in r["minmax"]}
    assert {line for name, line in found if ".NaN" not in name} == SOFTMAX
    asked = {
        line.strip()
        for path in KERNELS.rglob("*.py")
        if path.name != "common.py"
        for line in path.read_text().splitlines()
        if "at_least(" in line or "at_most(" in line
    }
    assert len(asked) > 4 and asked <= {line for name, line in found if ".NaN" in name}


def test_minima_and_maxima_are_found() -> None:
    """In any width, predicated or not, and none of whole numbers."""
    ptx = """
\t.loc\t1 180 27 // standard.py:180:27 @[ linear_attention.py:1:1 ]
\tmax.f32 \t%r1, %r2, %r3;
\tmax.s32 \t%r1, %r2, %r3;
\t@%p1 min.NaN.bf16x2 \t%r1, %r2, %r3;
\t.loc\t1 0 0 // guidance.py:0
\tmax.ftz.f32 \t%r1, %r2, %r3;
"""
    first = (KERNELS / "linear_attention.py").read_text().splitlines()[0]
    assert minmax(ptx) == (("max.f32", first), ("max.ftz.f32", ""), ("min.NaN.bf16x2", first))


def test_every_masked_load_says_what_lies_beyond() -> None:
    """A masked load without ``other`` reads 0 under the interpreter and anything on a GPU."""
    loads = [
        (path.name, node.lineno, {k.arg for k in node.keywords})
        for path in KERNELS.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load"
    ]
    assert len(loads) > 50
    assert not [load for load in loads if "mask" in load[2] and "other" not in load[2]]


def test_the_gate_sees_spills() -> None:
    """A kernel held to 32 registers spills, and the table says so."""
    code = f"""
import sys
from dataclasses import replace
sys.path.append({str(AOT.parent)!r})
from aot import cases, compile_case
case = next(c for c in cases("axis_attention.short") if "bwd/bf16-N16-D32" in c.name)
print(compile_case(replace(case, maxnreg=32), 90).faults())
"""
    assert "bytes of spills" in without_interpreter("-c", code)


def result(**change) -> AotResult:
    good = dict(
        name="k/x", arch=90, registers=128, spills=0, shared=1024, blocks=4, warps=16,
        matrix="mma.sync", tma=True, uses_dot=True, uses_tma=True,
    )  # fmt: skip
    return AotResult(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 8}, "spills"),
        ({"shared": 228 * 1024}, "shared memory"),
        ({"matrix": ""}, "matrix"),
        ({"tma": False}, "bulk"),
        ({"blocks": 0}, "no block"),
        ({"error": "CompilationError: x"}, "CompilationError"),
    ],
)
def test_faults_are_named(change, fault) -> None:
    assert not result().faults()
    assert any(fault in f for f in result(**change).faults())
    assert fault in table([result(**change)])


def test_the_heaviest_of_each_kernel() -> None:
    made = [
        result(name="a/small", registers=40),
        result(name="a/registers", registers=200),
        result(name="a/shared", registers=60, shared=9000),
        result(name="a/copies", uses_tma=False),
        result(name="b/alone"),
    ]
    assert heaviest(made) == {r.name for r in made} - {"a/small"}


def test_occupancy() -> None:
    """Against NVIDIA's occupancy calculator for sm_90."""
    assert occupancy(90, 128, 0, 4) == 4  # registers
    assert occupancy(90, 32, 0, 4) == 16  # 64 warps
    assert occupancy(90, 32, 100 * 1024, 4) == 2  # shared memory
    assert occupancy(90, 255, 0, 8) == 1

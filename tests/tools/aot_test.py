"""What the table of calls launches compiles without spills, for each GPU, with its launchers' own
arguments: the interpreter, which runs Python, accepts more than the compiler does.

Every run compiles what ``python bench/aot.py --gate`` says, once; the whole table is slow.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from aot import GPUS, KNOWN_SPILLS, AotResult, heaviest, minmax, occupancy, table
from calls import edges
from launches import captured

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
AOT = Path(__file__).resolve().parents[2] / "bench" / "aot.py"


def without_interpreter(*arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)
    assert run.stdout, run.stderr[-2000:]
    return run.stdout


def report(*arguments: str) -> list[dict]:
    """One line per launch and architecture."""
    lines = without_interpreter(str(AOT), "--json", *arguments).splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return report("--gate")


def faults(results: list[dict], arch: int) -> str:
    mine = [r for r in results if r["arch"] == arch]
    assert mine
    return "\n".join(f"{r['name']}: {'; '.join(r['faults'])}" for r in mine if r["faults"])


@pytest.mark.parametrize("arch", GPUS)
def test_every_launch_may_ship(compiled, arch) -> None:
    """No compiler error, no spills but the known, shared memory within the limit, the matrix
    instruction and the bulk copy where the kernel asks for them."""
    assert not (found := faults(compiled, arch)), found


@pytest.mark.slow
@pytest.mark.parametrize("arch", GPUS)
def test_the_whole_table_may_ship(arch) -> None:
    """And what is known to spill does, to the byte: where it fell, the list must."""
    results = report("--arch", str(arch))
    assert not (found := faults(results, arch)), found
    spills = {r["name"]: r["spills"] for r in results if r["spills"]}
    assert spills == {name: n for (name, at), n in KNOWN_SPILLS.items() if at == arch}


def kernels_of(results: list[dict], arch: int) -> set[str]:
    return {r["name"].split("/")[0] for r in results if r["arch"] == arch}


def test_every_kernel_is_launched(compiled) -> None:
    """By a call of the table, as the launchers would on an H100."""
    launched = kernels_of(compiled, 90)
    for path in KERNELS.rglob("*.py"):
        op = path.relative_to(KERNELS).with_suffix("").parts[0]
        for name in re.findall(r"^def _(\w+)_kernel\(", path.read_text(), re.M):
            assert f"{op}.{name}" in launched, f"no call in bench/calls.py launches {op}.{name}"


def test_every_kernel_is_compiled_for_every_architecture(compiled) -> None:
    whole = [r for r in compiled if not r["lowered"]]
    kernels = {arch: kernels_of(whole, arch) for arch in GPUS}
    copies = {r["name"].split("/")[0] for r in whole if r["uses_tma"]}  # none before sm_90
    assert copies and kernels[90] == kernels[100] and kernels[90] - copies <= kernels[80]


def test_names_are_unique(compiled) -> None:
    names = [(r["name"], r["arch"], r["lowered"]) for r in compiled]
    assert len(names) == len(set(names))


def test_heavier_matrix_instructions_where_tiles_allow(compiled) -> None:
    """The online-softmax kernels reach the warp-group instruction of Hopper."""
    found = {r["name"]: r["matrix"] for r in compiled if r["arch"] == 90 and not r["lowered"]}
    assert found["axis_attention.long_fwd/attention ucf-16 axis=2"] == "wgmma.mma_async"


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
sys.path.append({str(AOT.parent)!r})
from aot import H100, captured, measure, networks
calls = [c for c in networks() if c.name.startswith("attention l3 axis=1") and "back" in c.name]
launch = [m for m in captured(calls, H100) if "bwd" in m.kernel][0]
print(measure(launch, maxnreg=32).faults())
"""
    assert "bytes of spills" in without_interpreter("-c", code)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="not interpreted")
def test_the_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        captured(edges(), GPUS[90])


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
        result(name="a/no products", registers=30, uses_dot=False),
        result(name="b/alone"),
    ]
    assert heaviest(made) == {r.name for r in made} - {"a/small"}


def test_occupancy() -> None:
    """Against NVIDIA's occupancy calculator for sm_90."""
    assert occupancy(90, 128, 0, 4) == 4  # registers
    assert occupancy(90, 32, 0, 4) == 16  # 64 warps
    assert occupancy(90, 32, 100 * 1024, 4) == 2  # shared memory
    assert occupancy(90, 255, 0, 8) == 1

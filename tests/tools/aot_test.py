"""What networks launch compiles without spills, for each GPU, with the launchers' own arguments:
the interpreter, which runs Python, accepts more than the compiler does.

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
from aot import (
    GPUS,
    KNOWN_ADVISORIES,
    KNOWN_SPILLS,
    AotResult,
    Assembly,
    heaviest,
    minmax,
    occupancy,
    table,
    trigonometric,
)
from calls import edges
from launches import captured
from network_launches import network_of
from sass import exposed, parsed

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
    """No compiler error, no spills or advice of ptxas but the known, no operand overwritten, shared
    memory within the limit, the matrix instruction and the bulk copy where they are asked for."""
    assert not (found := faults(compiled, arch)), found


@pytest.mark.slow
@pytest.mark.parametrize("arch", GPUS)
def test_the_whole_table_may_ship(arch) -> None:
    """And what is known to spill does, to the byte: where it fell, the list must."""
    results = report("--arch", str(arch))
    assert not (found := faults(results, arch)), found
    spills: dict[tuple[str, int], int] = {}
    advice: dict[tuple[str, int], set[str]] = {}
    for r in results:
        place = AotResult(r["name"], arch, calls=r["calls"]).places[0]
        if r["spills"]:
            spills[place] = max(spills.get(place, 0), r["spills"])
        if r["advisories"] and network_of(r["calls"][0]):
            advice.setdefault(place, set()).update(r["advisories"])
    assert spills == {place: n for place, n in KNOWN_SPILLS.items() if place[1] == arch}
    assert advice == {place: a for place, a in KNOWN_ADVISORIES.items() if place[1] == arch}


@pytest.mark.slow
def test_what_was_measured_may_ship() -> None:
    """A tile that won on a GPU may hold operands in registers while they are overwritten: a
    comparison of results does not always see it."""
    if not list((KERNELS / "configs").glob("*.json")):
        pytest.skip("nothing was measured yet")
    results = report("--measured")
    assert not (found := [f"{r['name']}: {r['faults']}" for r in results if r["faults"]]), found


def test_measured_configurations_are_captured(tmp_path) -> None:
    entry = {"config": {"block": 1024, "num_warps": 8}}
    table = {"guidance": {"what='update', dtype=float32, factor=1": entry}}
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps(table))
    code = f"""
import pathlib, sys
sys.path.append({str(AOT.parent)!r})
from aot import H100, H200, captured
from calls import networks
from fastvdm.kernels import tuned
tuned.FOLDER = pathlib.Path({str(tmp_path)!r})
calls = [c for c in networks() if c.name.startswith("guided l0 float32 what=update")][:1]
for gpu, measured in ((H200, True), (H200, False), (H100, True)):
    (launch,) = captured(calls, gpu, measured=measured)
    print(launch.options["num_warps"])
"""
    assert without_interpreter("-c", code).split() == ["8", "4", "4"]


def kernels_of(results: list[dict], arch: int) -> set[str]:
    return {r["name"].split("/")[0] for r in results if r["arch"] == arch}


def test_every_kernel_is_launched(compiled) -> None:
    """By a network or a call of the table, as the launchers would on an H100."""
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
    assert found["axis_attention.long_fwd/ucf101 bf16 guided"] == "wgmma.mma_async"


# The maxima of softmax, plain: PTX drops a NaN there, but exp(NaN - m) is NaN, and with it the sum
# that the row is divided by; a NaN in m itself would only make the same elements NaN.
SOFTMAX = {
    "m = tl.max(q, 1)",
    "m_new = tl.maximum(m_i, m)",
    "m_new = tl.maximum(m_i, tl.max(k, 0))",
    "m_new = tl.maximum(m_i, tl.max(s, 1) * unit)",
    "new = tl.maximum(top, one)",
    "new = tl.maximum(top, tl.max(k, 1))",
    "top = tl.max(q, 2)",
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
from aot import H100, captured, measure
from calls import networks
calls = [c for c in networks() if c.name.startswith("attention l3 axis=1") and "back" in c.name]
launch = [m for m in captured(calls, H100) if "bwd" in m.kernel][0]
print(measure(launch, maxnreg=32).faults())
"""
    assert "bytes of spills" in without_interpreter("-c", code)


# Two products a turn into one accumulator, which is read between them.
SERIAL = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 out, .param .u64 in, .param .u32 n)
.reqntid 128
{
 .reg .pred %p; .reg .b32 %i<3>, %a<5>; .reg .f32 %f<5>; .reg .b64 %q<4>;
 ld.param.u64 %q1, [out]; ld.param.u64 %q2, [in]; ld.param.u32 %i1, [n];
 mov.u64 %q3, 0; mov.u32 %i2, 0;
 mov.f32 %f1, 0f00000000; mov.f32 %f2, %f1; mov.f32 %f3, %f1; mov.f32 %f4, %f1;
LOOP:
 ld.global.v4.b32 {%a1, %a2, %a3, %a4}, [%q2];
 wgmma.fence.sync.aligned;
 PRODUCT add.f32 %f1, %f1, %f1; PRODUCT
 wgmma.commit_group.sync.aligned;
 wgmma.wait_group.sync.aligned 0;
 add.u64 %q2, %q2, 16; add.u32 %i2, %i2, 1; setp.lt.u32 %p, %i2, %i1; @%p bra LOOP;
 st.global.v4.f32 [%q1], {%f1, %f2, %f3, %f4};
 ret;
}
""".replace(
    "PRODUCT",
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
    "{%f1, %f2, %f3, %f4}, {%a1, %a2, %a3, %a4}, %q3, 1, 1, 1, 0;",
)


def test_a_serialised_kernel_is_seen(tmp_path) -> None:
    from triton import knobs

    path = tmp_path / "serial.ptx"
    path.write_text(SERIAL)
    command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", str(path), "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = Assembly.read(log)
    assert "C7514" in found.advisories and found.spills == 0
    assert any("C7514" in f for f in result(advisories=found.advisories).faults())


def test_of_what_only_options_launch_advice_is_no_fault() -> None:
    assert not result(advisories=("C7515",), calls=["conv l1"]).faults()


def test_a_log_that_says_less_is_refused() -> None:
    with pytest.raises(ValueError, match="not the log"):
        Assembly.read("ptxas info    : Used 32 registers")


def test_arrays_of_the_sine_are_told_from_others() -> None:
    local = ".local .align 4 .b8 \t__local_depot0[28];"
    assert trigonometric(local) == 0
    assert trigonometric(f".global .align 4 .b8 __cudart_i2opi_f[24];\n{local}") == 32


def sass(*lines: str) -> str:
    """As nvdisasm prints it; a line that ends in a colon is a label."""
    return "\n".join(
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0"
LOAD, WAIT = "LDS.128 R4, [R3]", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
SECOND, SECOND_LOAD = PRODUCT.replace("R4", "R12"), LOAD.replace("R4", "R12")
LOOSE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
AGAIN = "@P0 BRA `(.L_x_1)"


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, LOAD, WAIT),
        (PRODUCT, "IMAD.MOV.U32 R7, RZ, RZ, R2", WAIT),  # the last of the four
        (PRODUCT, "LDSM.16.M88.4 R0, [R2]", "LDG.E.64 R6, [R8.64]", WAIT),
        (PRODUCT, "SHFL.BFLY PT, R5, R9, 0x1, 0x1f", WAIT),
        (PRODUCT, LOOSE, LOAD, WAIT),
        (".L_x_1:", LOAD, PRODUCT, LOOSE, AGAIN, WAIT),  # by the next turn of the loop
        (PRODUCT, "@P1 BRA `(.L_x_2)", WAIT, LOAD, "EXIT", ".L_x_2:", LOAD, WAIT),
        (PRODUCT, "BRA.U !UP0, `(.L_x_2)", LOAD, ".L_x_2:", WAIT),
        (PRODUCT.replace(", gsb0", ""), WAIT, LOAD, PRODUCT, WAIT),  # its group is still open
        (PRODUCT, "HGMMA.64x8x16.F32.BF16 R4, gdesc[UR8], !UPT, gsb0", WAIT),
    ],
)
def test_an_operand_overwritten_before_its_wait_is_seen(lines) -> None:
    found = exposed(sass(*lines))
    assert len(found) == 1 and "is overwritten by" in found[0]
    assert any("is overwritten by" in f for f in result(exposed=found).faults())


@pytest.mark.parametrize(
    "lines",
    [
        (PRODUCT, WAIT, LOAD),
        (".L_x_1:", LOAD, PRODUCT, WAIT, AGAIN),
        # Two buffers in turn.
        (".L_x_1:", LOAD, PRODUCT, LOOSE, SECOND_LOAD, SECOND, LOOSE, AGAIN, WAIT),
        # One group may stay pending: the second product's.
        (PRODUCT, SECOND, LOOSE, LOAD, WAIT),
        (PRODUCT, "STS.128 [R3], R4", "ISETP.NE.AND P0, PT, R4, R5, PT", WAIT),
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", LOAD, WAIT),  # no register operand
        (PRODUCT, "BRA `(.L_x_2)", LOAD, ".L_x_2:", WAIT),  # never reached
    ],
)
def test_operands_kept_until_the_wait_are_no_fault(lines) -> None:
    text = sass(*lines)
    assert any(i.name.startswith("HGMMA") for i in parsed(text)[0])
    assert exposed(text) == []


def test_a_network_launches_its_kernels() -> None:
    """A tiny one, forward and backward, in this order of names; nothing runs."""
    code = f"""
import sys
sys.path.append({str(AOT.parent)!r})
import network_launches as n
from aot import H100, captured
from fastvdm import UNet3D
n.NETS["tiny"] = n.Net(lambda: UNet3D(32, dim_mults=(1, 2)), 8, 16)
for m in captured(n.network_calls("tiny", dtypes=("autocast",)), H100):
    print(m.kernel, m.calls[-1], *sorted(set(map(str, m.signature.values()))), sep="|")
"""
    lines = [line.split("|") for line in without_interpreter("-c", code).splitlines()]
    kernels = {line[0] for line in lines}
    assert {
        "norm_act.group_fwd", "norm_act.group_bwd_dx", "norm_act.row_fwd", "temporal_block.fwd",
        "temporal_block.bwd", "linear_attention_block.apply", "linear_attention_block.dx",
        "guidance.guidance_seed", "guidance.guidance_update",
    } <= kernels  # fmt: skip
    assert {line[1] for line in lines} <= {
        f"tiny autocast {w}" for w in ("sample", "guided", "train")
    }
    types = {line[0]: line[2:] for line in lines}
    assert {"*bf16", "*fp32"} <= set(types["temporal_block.fwd"])  # the stream is wide


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="not interpreted")
def test_the_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        captured(edges(), GPUS[90])


def result(**change) -> AotResult:
    good = dict(
        name="k/x", arch=90, registers=128, spills=0, shared=1024, blocks=4, warps=16,
        matrix="mma.sync", tma=True, uses_dot=True, uses_tma=True, calls=["UNet3D(64) bf16 train"],
    )  # fmt: skip
    return AotResult(**{**good, **change})


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"spills": 8}, "spills"),
        ({"stack": 8}, "local memory"),
        ({"advisories": ("C7515",)}, "C7515"),
        ({"registers": 256}, "256 registers"),
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

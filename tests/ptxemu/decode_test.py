"""Single instructions against NumPy, and one small kernel for each kind of finding."""

from __future__ import annotations

import os
import struct

import numpy as np
import pytest
import torch

from .decode import decode
from .emulator import Emulator
from .findings import KINDS

ARCH = int(os.environ["FASTVDM_EMULATE"])
HEAD = """.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1
)
.reqntid {threads}
{{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<20>;
	ld.param.b64 %rd1, [k_param_0];
	ld.param.b64 %rd2, [k_param_1];
	mov.u32 %r0, %tid.x;
	mul.wide.u32 %rd3, %r0, {stride};
	add.s64 %rd1, %rd1, %rd3;
	add.s64 %rd2, %rd2, %rd3;
{body}
	ret;
}}
"""


def run(body: str, given: np.ndarray, out: np.ndarray, threads: int = 32, shared: int = 0):
    """The kernel with a row of ``given`` and one of ``out`` for each thread; what it found."""
    ptx = HEAD.format(threads=threads, stride=given.itemsize * given.shape[1], body=body)
    x, y = torch.from_numpy(given), torch.from_numpy(out)
    emulator = Emulator(ARCH)
    pointers = [struct.pack("<Q", t.data_ptr()) for t in (x, y)]
    emulator.execute("k", decode(ptx), pointers, [x, y], (1,), threads // 32, shared)
    return emulator


def one(text: str, *columns: np.ndarray) -> np.ndarray:
    """``text`` with %r1, %r2, %r3 (or %rd10 ...) given, %r4 (%rd14) asked for."""
    given = np.stack([np.resize(c, 32) for c in columns], 1)
    wide = given.itemsize == 8
    name, bits = ("%rd1", 64) if wide else ("%r", 32)
    base = 0 if wide else 1
    loads = [
        f"\tld.global.b{bits} {name}{base + i}, [%rd1+{given.itemsize * i}];"
        for i in range(given.shape[1])
    ]
    out = np.zeros_like(given)
    emulator = run("\n".join([*loads, f"\t{text};", f"\tst.global.b{bits} [%rd2], {name}4;"]),
                   given, out)  # fmt: skip
    assert not emulator.findings, emulator.findings[0]
    return out[:, 0]


rng = np.random.default_rng(0)
U = rng.integers(0, 2**32, 32, dtype=np.uint32)
V = rng.integers(0, 2**32, 32, dtype=np.uint32)
S = np.array([0, 1, 5, 31, 32, 40], np.uint32)
F = np.array([1.5, -2.5, 0.5, 1e9, -1e9, np.nan, np.inf, 3e-39, 65504.1, 1 / 3], np.float32)
G = np.array([1.0, np.nan, -7.0, 2.0, np.inf, 1.0, 0.0, 1.0, -0.1, 3.0], np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    return (
        torch.from_numpy(x)
        .to(torch.bfloat16)
        .view(torch.int16)
        .numpy()
        .astype(np.uint16)
        .astype(np.uint32)
    )


I, J, BY, LANE = U.view(np.int32), V.view(np.int32), np.resize(S, 32), np.arange(32)


def unsigned(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int32).view(np.uint32)


WHOLE = [
    ("add.s32 %r4, %r1, %r2", (U, V), U + V),
    ("mul.hi.u32 %r4, %r1, %r2", (U, V), U.astype(np.uint64) * V >> 32),
    ("mul.hi.s32 %r4, %r1, %r2", (U, V), unsigned(I.astype(np.int64) * J >> 32)),
    ("shl.b32 %r4, %r1, %r2", (U, S), np.where(BY < 32, U << BY % 32, 0)),
    ("shr.s32 %r4, %r1, %r2", (U, S), unsigned(I >> np.minimum(BY, 31))),
    ("div.u32 %r4, %r1, %r2", (U, V), U // V),
    ("rem.s32 %r4, %r1, %r2", (U, V), unsigned(np.fmod(I, J))),
    ("bfe.u32 %r4, %r1, 5, 7", (U,), U >> 5 & 127),
    ("bfe.s32 %r4, %r1, 28, 4", (U,), unsigned(I >> 28)),
    ("bfi.b32 %r4, %r1, %r2, 8, 8", (U, V), V & ~np.uint32(0xFF00) | (U & 255) << 8),
    ("lop3.b32 %r4, %r1, %r2, %r1, 0x3c", (U, V), U ^ V),
    ("prmt.b32 %r4, %r1, %r2, 0x5410", (U, V), U & 0xFFFF | V << 16),
    ("shf.l.wrap.b32 %r4, %r1, %r1, 9", (U,), U << 9 | U >> 23),
    ("popc.b32 %r4, %r1", (U,), [bin(u).count("1") for u in U]),
    ("clz.b32 %r4, %r1", (U >> 9,), [32 - int(u >> 9).bit_length() for u in U]),
    ("brev.b32 %r4, %r1", (U,), [int(f"{u:032b}"[::-1], 2) for u in U]),
    ("shfl.sync.bfly.b32 %r4, %r1, 3, 31, -1", (U,), U[LANE ^ 3]),
    ("shfl.sync.down.b32 %r4, %r1, 2, 31, -1", (U,), U[LANE + 2 * (LANE < 30)]),
    ("setp.lt.s32 %p1, %r1, %r2; selp.b32 %r4, %r1, %r2, %p1", (U, V), unsigned(np.minimum(I, J))),
    ("add.cc.u32 %r4, %r1, %r2; addc.u32 %r4, 0, 0", (U, V), U.astype(np.uint64) + V >> 32),
]  # fmt: skip


@pytest.mark.parametrize("text, given, expected", WHOLE, ids=[w[0].split()[0] for w in WHOLE])
def test_integers(text, given, expected):
    assert (one(text, *given) == np.asarray(expected).astype(np.uint32)).all()


CLAMPED = np.nan_to_num(np.trunc(F), nan=0, posinf=2**31, neginf=-(2**31))
FLOATS = [
    ("add.f32 %r4, %r1, %r2", (F, G), F + G),
    ("fma.rn.f32 %r4, %r1, %r1, %r2", (F, G), (F.astype("f8") * F + G).astype("f4")),
    ("max.f32 %r4, %r1, %r2", (F, G), np.fmax(F, G)),
    ("max.NaN.f32 %r4, %r1, %r2", (F, G), np.maximum(F, G)),
    ("min.NaN.f32 %r4, %r1, %r2", (F, G), np.minimum(F, G)),
    ("cvt.rni.f32.f32 %r4, %r1", (F,), np.rint(F)),
    ("cvt.rzi.s32.f32 %r4, %r1; cvt.rn.f32.s32 %r4, %r4", (F,), CLAMPED),
    ("cvt.rn.bf16x2.f32 %r4, %r1, %r2; and.b32 %r4, %r4, -65536", (F, G), bf16(F) << 16),
    ("cvt.rna.tf32.f32 %r4, %r1", (F,), (F.view("u4") + 0x1000 & 0xFFFFE000).view("f4")),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text, given, expected", FLOATS, ids=[f[0].split()[0] for f in FLOATS])
def test_floats(text, given, expected):
    expected = np.resize(expected, 32)
    expected = expected.view(np.float32) if expected.itemsize == 4 else expected
    found = one(text, *(g.view(np.uint32) for g in given)).view(np.float32)
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_products_of_64_bits():
    a, b = U.astype(np.uint64) << 7 | 5, V.astype(np.uint64)
    assert (one("mul.lo.s64 %rd14, %rd10, %rd11", a, b) == a * b).all()
    assert (one("mad.lo.s64 %rd14, %rd10, %rd11, %rd10", a, b) == a * b + a).all()
    x, y = rng.standard_normal((2, 32))
    found = one("fma.rn.f64 %rd14, %rd10, %rd11, %rd11", x.view("u8"), y.view("u8"))
    np.testing.assert_allclose(found.view("f8"), x * y + y, rtol=1e-15)


UNKNOWN = (
    "mad.hi.u32 %r4, %r1, %r2, %r3",
    "tcgen05.cp.cta_group::1.128x256b [%r1], %rd1",
    "atom.global.add.u32 %r4, [%rd1], 1",
)


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_unknown_is_an_error(text):
    with pytest.raises((NotImplementedError, ValueError)):
        one(text, U, V, V)


# -- findings -------------------------------------------------------------------------------------

WORD = "\tld.global.b32 %r1, [%rd1];\n\tshl.b32 %r2, %r0, 2;\n\tadd.s32 %r2, %r2, global_smem;\n"
OTHER = "\txor.b32 %r3, %r2, 128;\n"  # the word of a thread of the other warp
KINDS_OF = {
    "race in shared memory": (WORD + OTHER + "\tst.shared.b32 [%r2], %r1;\n"
                              "\tld.shared.b32 %r4, [%r3];\n\tst.global.b32 [%rd2], %r4;", 64),
    "out of bounds (global)": ("\tst.global.b32 [%rd2+4096], %r0;", 32),
    "misaligned access": ("\tst.global.b32 [%rd2+2], %r0;", 32),
    "outside shared or local memory": (WORD + "\tst.shared.b32 [%r2+4096], %r1;", 32),
    "uninitialised value used": (WORD + "\tld.shared.b32 %r4, [%r2];\n"
                                 "\tst.global.b32 [%rd2], %r4;", 32),
    "race in global memory within a CTA": (
        "\tld.param.b64 %rd4, [k_param_1];\n\tst.global.b32 [%rd4], %r0;", 64),
    "access to data in flight (cp.async, TMA, wgmma)": (
        WORD + "\tcp.async.ca.shared.global [%r2], [%rd1], 4;\n\tcp.async.commit_group;\n"
        "\tld.shared.b32 %r4, [%r2];\n\tcp.async.wait_group 0;", 32),
    "divergence": (
        "\tsetp.lt.u32 %p1, %r0, 7;\n\t@%p1 bra $L1;\n\tbar.sync 0;\n\tbra $L2;\n"
        "$L1:\tbar.sync 0;\n\tnanosleep.u32 1;\n$L2:", 32),
    "deadlock": ("\tmbarrier.init.shared.b64 [%r9], 1;\n".replace("%r9", "global_smem")
                 + "$L1:\n\tmbarrier.try_wait.parity.shared.b64 %p1, [global_smem], 0;\n"
                 "\t@!%p1 bra $L1;", 32),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS_OF)
def test_what_is_wrong_is_found(kind):
    body, threads = KINDS_OF[kind]
    given = rng.integers(0, 99, (threads, 1), dtype=np.uint32)
    emulator = run(body, given, np.zeros_like(given), threads, shared=512)
    assert kind in {KINDS[f.kind] for f in emulator.findings}, emulator.findings


def test_a_barrier_makes_it_right():
    body = WORD + OTHER
    body += "\tst.shared.b32 [%r2], %r1;\n\tbar.sync 0;\n\tld.shared.b32 %r4, [%r3];\n"
    given = rng.integers(0, 99, (64, 1), dtype=np.uint32)
    out = np.zeros_like(given)
    emulator = run(body + "\tst.global.b32 [%rd2], %r4;", given, out, 64, shared=512)
    assert not emulator.findings
    assert (out == np.roll(given, 32, 0)).all()


@pytest.mark.parametrize("taken, open_half", [("{%rs3, _}", False), ("{_, %rs3}", True)])
def test_what_is_packed_beside_nothing_comes_out_as_it_was(taken, open_half):
    """LLVM packs a half beside one that nobody wrote, and takes it out again."""
    body = "\tld.global.b32 %r1, [%rd1];\n\tmov.b32 {%rs1, _}, %r1;\n\tmov.b32 %r2, {%rs1, %rs2};\n"
    body += f"\tmov.b32 {taken}, %r2;\n\tmov.b32 %r4, {{%rs3, %rs3}};\n\tst.global.b32 [%rd2], %r4;"
    given = rng.integers(0, 99, (32, 1), dtype=np.uint32)
    out = np.zeros_like(given)
    emulator = run(body, given, out)
    assert bool(emulator.findings) == open_half
    assert open_half or (out == given * 65537).all()


TENSOR = (
    "\ttcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [global_smem], 32;\n"
    "\tbar.sync 0;\n\tld.shared.b32 %r5, [global_smem];\n\tld.global.b32 %r1, [%rd1];\n"
    "\ttcgen05.st.sync.aligned.32x32b.x2.b32 [%r5 + 0], {%r1, %r0};\n"
    "\ttcgen05.wait::st.sync.aligned;\n"
    "\ttcgen05.ld.sync.aligned.32x32b.x2.b32 {%r6, %r7}, [%r5 + 0];\n"
)
PAIR = "\tcvt.u64.u32 %rd5, %r6;\n\tcvt.u64.u32 %rd6, %r7;\n\tshl.b64 %rd7, %rd6, 32;\n"
PAIR += "\tor.b64 %rd8, %rd5, %rd7;\n"
WAIT, STORE = "\ttcgen05.wait::ld.sync.aligned;\n", "\tst.global.b64 [%rd2], %rd8;"


@pytest.mark.parametrize(
    "order, late",
    [(WAIT + PAIR + STORE, False), (PAIR + WAIT + STORE, False), (PAIR + STORE + WAIT, True)],
    ids=["waits", "packs", "stores"],
)
def test_registers_of_tensor_memory_are_packed_before_the_wait(order, late):
    """LLVM puts that above it, and ptxas makes no instruction of it; other uses are late."""
    given = rng.integers(0, 99, (32, 1), dtype=np.uint64)
    out = np.zeros_like(given)
    emulator = run(TENSOR + order, given, out, shared=64)
    assert [KINDS[f.kind] for f in emulator.findings] == ["register of a wgmma in flight"] * late
    assert (out[:, 0] == given[:, 0] + (np.arange(32, dtype=np.uint64) << 32)).all()

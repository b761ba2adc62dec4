"""A handler for each opcode, which emits operations of the engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .program import BYTES, COMPARISONS, FUNCTIONS, TYPES, split

if TYPE_CHECKING:
    from .decode import Decoder

_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_UNTYPED = {"b16": "u16", "b32": "u32", "b64": "u64"}
_ROUNDING = {"rn": 0, "rni": 0, "rz": 1, "rzi": 1, "rm": 2, "rmi": 2, "rp": 3, "rpi": 3, "rna": 4}

Handler = Callable[["Decoder", list[str]], None]
HANDLERS: dict[str, Handler] = {}


def _of(*opcodes: str) -> Callable[[Handler], Handler]:
    """Registers what decodes the opcodes that start with one of these words."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(opcodes, handler))
        return handler

    return register


def _type(name: str) -> int:
    return TYPES.index(_UNTYPED.get(name, name))


# -- control --------------------------------------------------------------------------------------


@_of("bra")
def _branch(d: Decoder, ops: list[str]) -> None:
    d.jumps.append((len(d.code), d.label(ops[0])))
    d.emit("bra")


@_of("ret", "exit")
def _return(d: Decoder, ops: list[str]) -> None:
    d.emit("ret")


@_of("trap")
def _trap(d: Decoder, ops: list[str]) -> None:
    d.emit("trap")


@_of("bar", "barrier")
def _barrier(d: Decoder, ops: list[str]) -> None:
    if d.parts[1] == "warp":
        return d.emit("warpsync")
    if d.parts[1] != "sync" or ops != ["0"]:
        raise d.unknown()
    return d.emit("barsync")


@_of("nanosleep", "prefetch", "membar")
def _nothing(d: Decoder, ops: list[str]) -> None:
    d.emit("nop")


@_of("fence")
def _fence(d: Decoder, ops: list[str]) -> None:
    d.emit("proxyfence" if d.opcode.startswith("fence.proxy.async") else "nop")


# -- moves ----------------------------------------------------------------------------------------

_SPECIAL = {"%laneid": ("laneid", 0), "%warpid": ("warpid", 0)}
for _k, _axis in enumerate("xyz"):
    _SPECIAL |= {
        f"%tid.{_axis}": ("tid", _k),
        f"%ctaid.{_axis}": ("ctaid", _k),
        f"%nctaid.{_axis}": ("ctaid", 3 + _k),
        f"%ntid.{_axis}": ("ctaid", 6 if _k == 0 else 7),
    }


@_of("mov", "cvta")
def _move(d: Decoder, ops: list[str]) -> None:
    width = d.width
    if d.parts[0] == "cvta":
        width = 4 if d.type.endswith("32") else 8
    to, source = ops
    if to.startswith("{"):
        outs = d.vector(to, 4)
        register, ins, place = d.packed
        if source == register and place == len(d.code) and not d.guard:
            # LLVM packs a value beside one that nothing wrote, and takes it out again: a register
            # knows one answer to whether it was written.
            for out, whole in zip(outs, ins):
                d.emit("mov32", [out], [whole])
            return
        d.emit("unpack", outs, [d.value(source, width)], flags=width * 8 // len(outs))
    elif source.startswith("{"):
        ins = d.vector(source, 4)
        d.emit("pack", [d.value(to, width)], ins, flags=BYTES[d.type] * 8 // len(ins))
        d.packed = to, ins, len(d.code)
    elif source in _SPECIAL:
        op, which = _SPECIAL[source]
        d.emit(op, [d.value(to, 4)], flags=which)
    elif source in d.parameters:
        d.emit("paramaddr", [d.value(to, 8)], imm=d.parameters[source][1])
    elif d.type == "pred":
        d.emit("movp", [d.value(to, 0)], [d.value(source, 0)])
    else:
        d.emit("mov64" if width == 8 else "mov32", [d.value(to, width)], [d.value(source, width)])


@_of("selp")
def _select(d: Decoder, ops: list[str]) -> None:
    sources = [d.value(ops[1], d.width), d.value(ops[2], d.width), d.value(ops[3], 0)]
    d.emit("selp64" if d.width == 8 else "selp32", [d.value(ops[0], d.width)], sources)


@_of("elect")
def _elect(d: Decoder, ops: list[str]) -> None:
    to, _, predicate = ops[0].partition("|")
    d.emit("elect", [d.value(to, 4), d.value(predicate, 0)])


@_of("shfl")
def _shuffle(d: Decoder, ops: list[str]) -> None:
    to, _, predicate = ops[0].partition("|")
    outs = [d.value(to, 4), *([d.value(predicate, 0)] if predicate else [])]
    d.emit(f"shfl_{d.parts[2]}", outs, [d.value(o, 4) for o in ops[1:4]])


@_of("vote")
def _vote(d: Decoder, ops: list[str]) -> None:
    width = 4 if d.parts[2] == "ballot" else 0
    d.emit(f"vote_{d.parts[2]}", [d.value(ops[0], width)], [d.value(ops[1], 0)])


@_of("redux")
def _reduce(d: Decoder, ops: list[str]) -> None:
    function = FUNCTIONS.index(d.parts[2] + "nan" * ("NaN" in d.parts))
    if d.type != "f32" or "abs" in d.parts:
        raise d.unknown()
    d.emit("redux", [d.value(ops[0], 4)], [d.value(ops[1], 4)], function * 32 + _type(d.type))


@_of("activemask")
def _active(d: Decoder, ops: list[str]) -> None:
    d.emit("activemask", [d.value(ops[0], 4)])


# -- memory ---------------------------------------------------------------------------------------


@_of("ld", "st")
def _load_store(d: Decoder, ops: list[str]) -> None:
    load = d.parts[0] == "ld"
    if load and d.parts[1] == "param":
        return _load_parameter(d, ops)
    spaces = ("global", "shared", "local", "const")
    space = next((s for s in spaces if any(p.startswith(s) for p in d.parts[1:-1])), None)
    if space is None:
        raise d.unknown()
    memory, data = (ops[1], ops[0]) if load else (ops[0], ops[1])
    width = {"shared": 4, "global": 8, "const": 8}.get(space, 4)
    if space == "local":  # addressed by registers of either width
        base = re.match(r"\s*\[\s*([^+\s\]]+)", memory)
        found = d.register(base[1]) if base else None
        width = found[2] if found else 4
    address, offset = d.address(memory, width)
    registers = d.vector(data, d.width, wider=True)
    flags = BYTES[d.type] | (16 if d.type[0] == "s" and load else 0)
    op = ("ld" if load else "st") + {"global": "g", "const": "g", "shared": "s", "local": "l"}[
        space
    ]
    if load:
        return d.emit(op, registers, [address], flags, offset)
    return d.emit(op, [], [address, *registers], flags, offset)


def _load_parameter(d: Decoder, ops: list[str]) -> None:
    m = re.fullmatch(r"\[(\w+)(?:\+(\d+))?\]", ops[1])
    if m is None:
        raise d.unknown()
    to, offset = d.value(ops[0], d.width, wider=True), d.parameters[m[1]][1] + int(m[2] or 0)
    if to[3] == 8 and BYTES[d.type] == 4:
        return d.emit("ldparam_s64", [to], flags=d.type[0] == "s", imm=offset)
    return d.emit("ldparam", [to], flags=BYTES[d.type], imm=offset)


@_of("cp")
def _copy(d: Decoder, ops: list[str]) -> None:
    if d.opcode.startswith("cp.async.bulk.tensor"):
        if "shared::cluster.global" not in d.opcode or {"tile", "multicast"} & set(d.parts):
            raise d.unknown()
        descriptor, coordinates = split(ops[1].strip()[1:-1])
        at = d.vector(coordinates, 4)
        sources = [d.address(ops[0], 4)[0], d.value(descriptor, 8), *at, d.address(ops[2], 4)[0]]
        return d.emit("tma", [], sources, flags=len(at))
    if d.opcode == "cp.async.commit_group":
        return d.emit("cpcommit")
    if d.opcode == "cp.async.wait_group":
        return d.emit("cpwait", imm=int(ops[0], 0))
    if d.opcode == "cp.async.wait_all":
        return d.emit("cpwaitall")
    if "shared.global" not in d.opcode.replace("shared::cta", "shared"):
        raise d.unknown()
    (to, to_offset), (source, offset) = d.address(ops[0], 4), d.address(ops[1], 8)
    size = [d.value(ops[3], 4)] if len(ops) > 3 else []
    return d.emit("cpasync", [], [to, source, *size], int(ops[2], 0), to_offset, offset)


@_of("mbarrier")
def _memory_barrier(d: Decoder, ops: list[str]) -> None:
    what = d.parts[1]
    if what in ("init", "inval"):
        at, offset = d.address(ops[0], 4)
        count = [d.value(ops[1], 4)] if what == "init" else []
        return d.emit("mbinit" if count else "mbinval", [], [at, *count], imm=offset)
    at, offset = d.address(ops[1], 4)
    if what == "arrive":
        expected = [d.value(ops[2], 4)] if "expect_tx" in d.parts else []
        return d.emit("mbexpect" if expected else "mbarrive", [], [at, *expected], imm=offset)
    if what in ("try_wait", "test_wait") and "parity" in d.parts:
        return d.emit("mbtry", [d.value(ops[0], 0)], [at, d.value(ops[2], 4)], imm=offset)
    raise d.unknown()


# -- matrices -------------------------------------------------------------------------------------


@_of("ldmatrix", "stmatrix")
def _matrix(d: Decoder, ops: list[str]) -> None:
    if d.type != "b16" or "m8n8" not in d.parts:
        raise d.unknown()
    load, flags = d.parts[0] == "ldmatrix", int("trans" in d.parts)
    at, offset = d.address(ops[1] if load else ops[0], 4)
    registers = d.vector(ops[0] if load else ops[1], 4)
    if load:
        return d.emit("ldmatrix", registers, [at], flags, offset)
    return d.emit("stmatrix", [], [at, *registers], flags, offset)


@_of("mma")
def _mma(d: Decoder, ops: list[str]) -> None:
    m = re.search(r"m(\d+)n8k(\d+)\.row\.col\.(f32|f64)\.(f16|bf16|tf32|f64)\.\w+\.\w+", d.opcode)
    if m is None:
        raise d.unknown()
    to, a, b, c = (d.vector(o, 8 if m[3] == "f64" else 4) for o in ops)
    sizes = len(a) | len(b) << 4 | len(c) << 8 | int(m[1]) << 12 | int(m[2]) << 17
    d.emit(f"mma_{m[4]}", to, [*a, *b, *c], flags=sizes)


@_of("wgmma")
def _wgmma(d: Decoder, ops: list[str]) -> None:
    what = d.parts[1]
    if what == "fence":
        return d.emit("wgfence")
    if what == "commit_group":
        return d.emit("wgcommit")
    if what == "wait_group":
        return d.emit("wgwait", imm=int(ops[0]))
    m = re.search(r"m64n(\d+)k(?:16|8)\.f32\.(f16|bf16|tf32)\.\w+", d.opcode)
    if m is None:
        raise d.unknown()
    in_registers = ops[1].startswith("{")
    a = d.vector(ops[1], 4) if in_registers else [d.value(ops[1], 8)]
    negate_a, negate_b, *turned = (int(t) for t in ops[4:])
    # Of two operands in shared memory both may be transposed, of one only that; tf32 never.
    turn_a, turn_b = (0, 0) if not turned else (0, turned[0]) if in_registers else turned
    flags = int(m[1]) | in_registers << 9 | (m[2] == "bf16") << 10 | turn_a << 11 | turn_b << 12
    flags |= (negate_a < 0) << 13 | (negate_b < 0) << 14 | (m[2] == "tf32") << 15
    to = d.vector(ops[0], 4)
    return d.emit("wgmma", to, [*a, d.value(ops[2], 8), d.value(ops[3], 0)], flags)


_SHAPES = ("32x32b", "16x32bx2", "16x128b", "16x256b")  # of what a warp loads and stores


@_of("tcgen05")
def _tensor(d: Decoder, ops: list[str]) -> None:
    """Tensor memory of sm_100 and its matrix cores, for one CTA."""
    what = d.parts[1]
    if what == "relinquish_alloc_permit" or what.startswith("fence"):
        return d.emit("nop")
    if what.startswith("wait"):
        return d.emit("tmwaitld" if what == "wait::ld" else "tmwaitst")
    if what == "alloc":
        at, offset = d.address(ops[0], 4)
        return d.emit("tmalloc", [], [at], int(ops[1]), offset)
    if what == "dealloc":
        return d.emit("tmfree", [], [d.value(ops[0], 4)])
    if what == "commit":
        if "multicast" in d.opcode or "cta_group::1" not in d.opcode:
            raise d.unknown()
        return d.emit("tmcommit", [], [d.address(ops[0], 8)[0]])
    if what in ("ld", "st"):
        shape = next((i for i, s in enumerate(_SHAPES) if s in d.parts), None)
        if shape is None or d.type != "b32" or {"pack::16b", "unpack::16b"} & set(d.parts):
            raise d.unknown()
        data, memory = (ops.pop(0), ops.pop(0)) if what == "ld" else (ops.pop(), ops.pop(0))
        (at, offset), split = d.address(memory, 4), int(ops[0]) if ops else 0
        to, of = (d.vector(data, 4), []) if what == "ld" else ([], d.vector(data, 4))
        return d.emit(f"tm{what}", to, [at, *of], shape, offset, split)
    kind = re.search(r"mma\.cta_group::1\.kind::(f16|tf32)$", d.opcode)
    if kind is None or len(ops) != 5:
        raise d.unknown()
    (to, offset), in_tensor = d.address(ops[0], 4), ops[1].startswith("[")
    a, a_offset = d.address(ops[1], 4) if in_tensor else (d.value(ops[1], 8), 0)
    sources = [to, a, d.value(ops[2], 8), d.value(ops[3], 4), d.value(ops[4], 0)]
    return d.emit("tmmma", [], sources, in_tensor | (kind[1] == "tf32") << 1, offset, a_offset)


# -- arithmetic -----------------------------------------------------------------------------------


@_of("setp")
def _compare(d: Decoder, ops: list[str]) -> None:
    comparison = COMPARISONS.index(_UNSIGNED.get(d.parts[1], d.parts[1]))
    join = next((i for i, w in enumerate(("and", "or", "xor"), 1) if w in d.parts[2:-1]), 0)
    to, _, other = ops[0].partition("|")
    outs = [d.value(to, 0), *([d.value(other, 0)] if other else [])]
    sources = [d.value(o, d.width) for o in ops[1:3]] + ([d.value(ops[3], 0)] if join else [])
    d.emit("setp", outs, sources, flags=comparison * 32 + _type(d.type), imm=join)


@_of("cvt")
def _convert(d: Decoder, ops: list[str]) -> None:
    to, of = d.parts[-2:]
    if to in ("bf16x2", "f16x2"):
        if of != "f32" or len(ops) != 3:
            raise d.unknown()
        sources = [d.value(o, 4) for o in ops[1:]]
        return d.emit(f"cvt_{to}_f32", [d.value(ops[0], 4)], sources)
    widths = [8 if BYTES.get(t, 4) == 8 else 4 for t in (to, of)]
    target, source = (d.value(o, w, wider=True) for o, w in zip(ops, widths))
    mode = next((p for p in d.parts[1:-2] if p in _ROUNDING), "rn")
    flags = _type(to) | _type(of) << 5 | _ROUNDING[mode] << 10
    flags |= ("sat" in d.parts) << 13 | mode.endswith("i") << 14
    return d.emit("cvt", [target], [source], flags)


@_of("prmt", "lop3", "shf", "bfe", "bfi", "popc", "clz", "brev")
def _bits(d: Decoder, ops: list[str]) -> None:
    base, imm, flags = d.parts[0], 0, 0
    if d.width == 8:
        raise d.unknown()
    if base == "lop3":
        imm = int(ops.pop(), 0)
    elif base == "shf":
        base, flags = f"shf_{d.parts[1]}", int(d.parts[2] == "clamp")
    elif base == "bfe":
        base = f"bfe_{d.type}"
    elif base != "prmt":
        base = f"{base}_b32"
    d.emit(base, [d.value(ops[0], 4)], [d.value(o, 4) for o in ops[1:]], flags, imm)


@_of("addc", "subc", "madc")
def _carry(d: Decoder, ops: list[str]) -> None:
    """With a carry in, out or both."""
    if d.type not in ("u32", "s32"):
        raise d.unknown()
    base = d.parts[0][:3]
    number = {"add": 0, "sub": 1, "mad": 2 + ("hi" in d.parts)}[base]
    flags = number | (d.parts[0] != base) << 4 | ("cc" in d.parts) << 5
    d.emit("carry", [d.value(ops[0], 4)], [d.value(o, 4) for o in ops[1:]], flags)


def arithmetic(d: Decoder, ops: list[str]) -> None:
    base, mods = d.parts[0], d.parts[1:-1]
    if "cc" in mods:
        return _carry(d, ops)
    if base in ("and", "or", "xor", "not") and d.type == "pred":
        return d.emit(f"{base}p", [d.value(ops[0], 0)], [d.value(o, 0) for o in ops[1:]])
    function = base
    if base in ("mul", "mad") and "wide" in mods:
        function = base + "wide"
    elif base == "mul" and "hi" in mods:
        function = "mulhi"
    elif "hi" in mods:
        raise d.unknown()
    elif base in ("min", "max") and "NaN" in mods:
        function = base + "nan"
    if function not in FUNCTIONS:
        raise d.unknown()
    wide = 8 if function.endswith("wide") and BYTES[d.type] == 4 else d.width
    sources = []
    for k, o in enumerate(ops[1:]):
        width = d.width
        if function == "madwide" and k == 2:
            width = wide
        elif function in ("shl", "shr") and k == 1:
            width = 4
        sources.append(d.value(o, width))
    flags = FUNCTIONS.index(function) * 32 + _type(d.type)
    return d.emit("alu", [d.value(ops[0], wide)], sources, flags)

"""Parses PTX text into registers, operands and statements, without their meaning."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANES = 32
SHARED_BASE = 1024  # where shared memory starts, so that address 0 is none of it
BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4,
    "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8,
}  # fmt: skip

# As in engine/layout.h.
TYPES = (
    "u16", "s16", "u32", "s32", "u64", "s64", "f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "u8",
    "s8", "tf32", "f32x2",
)  # fmt: skip
FUNCTIONS = (
    "add", "sub", "mul", "mulhi", "mulwide", "mad", "madwide", "div", "rem", "min", "max", "abs",
    "neg", "and", "or", "xor", "not", "shl", "shr", "fma", "ex2", "lg2", "rcp", "sqrt", "rsqrt",
    "sin", "cos", "tanh", "copysign", "minnan", "maxnan",
)  # fmt: skip
COMPARISONS = (
    "eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan",
)  # fmt: skip


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Members of one type, of a structure that engine/layout.h has, too."""
    return [(name, kind) for name in names.split()]


OPERAND = np.dtype(fields("<i4", "kind id offset width"))
INSTRUCTION = np.dtype(
    fields("<i4", "op guard_offset guard_id guard_negated destinations sources first flags")
    + fields("<i8", "imm imm2")
    + fields("<i4", "target pad")
)
REGISTER, CONSTANT, SINK = range(3)

Operand = tuple[int, int, int, int]
Parameter = tuple[str, int, int]  # type or "bytes", offset, size


@dataclass
class Program:
    """A kernel as the engine executes it."""

    name: str
    text: list[str]
    code: np.ndarray
    operands: np.ndarray
    constants: bytes
    parameters: list[Parameter]
    registers: list[str]
    arena_bytes: int
    local_bytes: int
    threads: int  # of a CTA, where the PTX says
    lines: list[int]  # of the PTX, by instruction
    sites: list[str]  # of the Triton source, by instruction
    opcodes: list[str]  # as written, by instruction
    symbols: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Of the kernel's source: the first that the PTX names."""
        found = re.search(r'\.file\s+1\s+"([^"]+)"', "\n".join(self.text))
        return found[1] if found else ""

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for _, offset, size in self.parameters), default=0) + 128

    def where(self, pc: int) -> str:
        if not 0 <= pc < len(self.lines):
            return f"({pc})"
        text = self.text[self.lines[pc] - 1].strip()[:110]
        return f"PTX line {self.lines[pc]}: {text}  [{self.sites[pc]}]"


def split(text: str) -> list[str]:
    """Operands, by the commas that are not inside brackets."""
    out, depth, current = [], 0, ""
    for ch in text:
        depth += (ch in "{[(") - (ch in ")]}")
        if ch == "," and depth == 0:
            out.append(current.strip())
            current = ""
        else:
            current += ch
    return [*out, current.strip()] if current.strip() else out


class Reader:
    """Registers, constants, symbols and addresses of one kernel, as its text declares them."""

    def __init__(self) -> None:
        self.scopes = [""]
        self.registers: dict[str, tuple[int, int, int]] = {}  # name: id, offset, width
        self.arena = 0
        self.constants = bytearray()
        self._constant_at: dict[tuple[int, int], int] = {}
        self.parameters: dict[str, Parameter] = {}
        self.symbols: dict[str, np.ndarray] = {}
        self.locals: dict[str, int] = {}
        self.local_bytes = 0
        self.opcode = ""

    # declarations

    def declare(self, kind: str, names: str) -> None:
        """``.reg .b32 %r<9>`` or ``.reg .pred p, q``. A predicate is 32 bits, one a lane."""
        width = 0 if kind == "pred" else 8 if kind.endswith("64") else 4
        for name in names.split(","):
            if m := re.fullmatch(r"(\S+)<(\d+)>", name.strip()):
                for k in range(int(m[2])):
                    self._new(f"{m[1]}{k}", width)
            else:
                self._new(name.strip() + self.scopes[-1], width)

    def _new(self, name: str, width: int) -> None:
        self.arena = -(-self.arena // 64) * 64 if width else self.arena
        self.registers[name] = (len(self.registers), self.arena, width)
        self.arena += LANES * width or 4

    def parameter(self, line: str) -> None:
        pattern = r"\.param\s+(?:\.align (\d+) )?\.(\w+)\s.*?(\w+_param_\d+)(?:\[(\d+)\])?,?$"
        if m := re.match(pattern, line):
            size = int(m[4] or BYTES[m[2]])
            align = int(m[1] or size)
            end = max((o + s for _, o, s in self.parameters.values()), default=0)
            kind = "bytes" if m[4] else m[2]
            self.parameters[m[3]] = (kind, -(-end // align) * align, size)

    def symbol(self, line: str) -> None:
        """An array in global or constant memory: read-only tables of sin and cos."""
        pattern = r"(?:\.visible )?\.(?:global|const) \.align \d+ \.b8 (\S+?)\[(\d+)\]"
        if m := re.match(pattern + r"\s*(?:=\s*\{(.*)\})?;", line):
            data = np.zeros(int(m[2]) + 16, np.uint8)
            values = [int(v) for v in m[3].split(",")] if m[3] else []
            data[: len(values)] = values
            self.symbols[m[1]] = data

    def local(self, name: str, size: int) -> None:
        self.locals[name] = self.local_bytes
        self.local_bytes += -(-size // 16) * 16

    # operands

    def register(self, name: str) -> tuple[int, int, int] | None:
        for scope in reversed(self.scopes):
            if name + scope in self.registers:
                return self.registers[name + scope]
        return None

    def constant(self, value: int, width: int) -> Operand:
        value &= (1 << (8 * width or 32)) - 1
        if (value, width) not in self._constant_at:
            while width and len(self.constants) % 64:
                self.constants.append(0)
            self._constant_at[value, width] = len(self.constants)
            self.constants += value.to_bytes(width or 4, "little") * (LANES if width else 1)
        return CONSTANT, -1, self._constant_at[value, width], width

    def value(self, text: str, width: int, wider: bool = False) -> Operand:
        """An operand of ``width`` bytes, 0 for a predicate; ``wider``: the register may have more,
        as PTX allows in conversions, loads and stores."""
        text = text.strip()
        if text == "_":
            return SINK, -1, 0, width
        found = self.register(text)
        if found is not None:
            if found[2] != width and not (wider and found[2] > width > 0):
                raise NotImplementedError(
                    f"{self.opcode}: {text} has {found[2]} bytes, not {width}"
                )
            return REGISTER, *found
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return self.constant(int(m[1], 16), 4)
        if m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return self.constant(int(m[1], 16), 8)
        if text == "global_smem":
            return self.constant(SHARED_BASE, width)
        if text in self.symbols:
            return self.constant(self.symbols[text].ctypes.data, 8)
        if text in self.locals:
            return self.constant(self.locals[text], width)
        number = int(text.rstrip("U"), 0)
        return self.constant(-1 if width == 0 and number else number, width)

    def address(self, text: str, width: int) -> tuple[Operand, int]:
        """``[base+offset]``."""
        m = re.fullmatch(r"\s*([^+\s]+)\s*(?:\+\s*(-?\w+))?\s*", text.strip()[1:-1])
        if m is None:
            raise NotImplementedError(f"{self.opcode}: address {text}")
        offset = int(m[2], 0) if m[2] else 0
        if m[1].lstrip("-").isdigit():
            return self.constant(int(m[1]), width), offset
        return self.value(m[1], width), offset

    def vector(self, text: str, width: int, wider: bool = False) -> list[Operand]:
        """One operand, or several in braces."""
        text = text.strip()
        items = split(text[1:-1]) if text.startswith("{") else [text]
        return [self.value(t, width, wider) for t in items]

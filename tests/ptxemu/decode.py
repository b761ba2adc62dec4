"""Decodes PTX, as Triton writes it, into the arrays that the engine executes.

An instruction without a handler (instructions.py) raises ``NotImplementedError`` with its text;
nothing is skipped.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from .engine import operations
from .instructions import HANDLERS, arithmetic
from .program import BYTES, INSTRUCTION, OPERAND, Operand, Program, Reader, split


class Decoder(Reader):
    """One kernel. ``parts`` are the words of the opcode at hand, ``type`` the last of them."""

    def __init__(self, ptx: str) -> None:
        super().__init__()
        self.text = ptx.splitlines()
        self.operands: list[Operand] = []
        self.code: list[tuple[int, ...]] = []
        self.lines: list[int] = []
        self.sites: list[str] = []
        self.opcodes: list[str] = []
        self.labels: dict[str, int] = {}
        self.jumps: list[tuple[int, str]] = []
        self.name, self.threads = "", 0
        self.line, self.site, self.guard = 0, "", ""
        self.statement = ""
        self.parts: list[str] = []
        self.type = ""
        # The register that was packed last, of what, and the place after it.
        self.packed: tuple[str, list[Operand], int] = ("", [], -1)

    def emit(
        self, op: str, to: Sequence[Operand] = (), of: Sequence[Operand] = (), flags: int = 0,
        imm: int = 0, imm2: int = 0,
    ) -> None:  # fmt: skip
        guard_id, guard_offset = -1, -1
        if self.guard:
            found = self.register(self.guard.lstrip("!"))
            assert found is not None, self.statement
            guard_id, guard_offset, _ = found
        negated = int(self.guard.startswith("!"))
        self.code.append(
            (operations()[op], guard_offset, guard_id, negated, len(to), len(of),
             len(self.operands), int(flags), imm, imm2, -1, 0)
        )  # fmt: skip
        self.operands += [*to, *of]
        self.lines.append(self.line)
        self.sites.append(self.site)
        self.opcodes.append(self.opcode)

    def unknown(self) -> NotImplementedError:
        return NotImplementedError(f"PTX line {self.line}: {self.statement}")

    @property
    def width(self) -> int:
        """Bytes of a register of the opcode's type."""
        return 8 if BYTES.get(self.type, 4) == 8 else 4

    # the text

    def run(self) -> Program:
        lines = enumerate(self.text, 1)
        for _, raw in lines:
            line = re.sub(r"//.*", "", raw).strip()
            if m := re.match(r"\.visible \.entry (\S+)\(", line):
                self.name = m[1]
            elif m := re.match(r"\.reqntid (\d+)", line):
                self.threads = int(m[1])
            elif line == "{" and self.name:
                break
            else:
                self.parameter(line)
                self.symbol(line)
        self._body(lines)
        self.opcode, self.guard = "ret", ""
        self.emit("ret")
        code = np.array(self.code, dtype=INSTRUCTION)
        for at, label in self.jumps:
            code["target"][at] = self.labels[label]
        ids = sorted(self.registers, key=lambda name: self.registers[name][0])
        return Program(
            self.name, self.text, code, np.array(self.operands, dtype=OPERAND),
            bytes(self.constants) + bytes(64), list(self.parameters.values()), ids,
            self.arena + 64, self.local_bytes, self.threads, self.lines, self.sites, self.opcodes,
            self.symbols,
        )  # fmt: skip

    def _body(self, lines: enumerate) -> None:
        scopes = 0
        for self.line, raw in lines:
            if re.match(r"\s*\.loc\s", raw):
                self.site = raw.partition("//")[2].strip()[:160] or self.site
                continue
            line = re.sub(r"//.*", "", raw).strip()
            while m := re.match(r"([$\w]+):\s*", line):
                self.packed = ("", [], -1)
                self.labels[self.label(m[1])] = len(self.code)
                line = line[m.end() :]
            for statement in filter(None, (s.strip() for s in line.split(";"))):
                if statement.startswith("{"):  # a scope, perhaps of one line
                    scopes += 1
                    self.scopes.append(f"@{scopes}")
                    statement = statement[1:].strip()
                if statement == "}":
                    self.scopes.pop()
                    if not self.scopes:
                        return
                elif statement:
                    self._statement(statement)

    def label(self, name: str) -> str:
        return name if name.startswith("$") else name + self.scopes[-1]

    def _statement(self, statement: str) -> None:
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement):
            return self.declare(m[1], m[2])
        if m := re.match(r"\.local\s+\.align \d+ \.b8\s+(\S+)\[(\d+)\]", statement):
            return self.local(m[1], int(m[2]))
        if statement.startswith("."):
            return None  # directives for the debugger and for ptxas
        self.statement, self.guard = statement, ""
        if m := re.match(r"@(!?\S+)\s+(.*)", statement, re.S):
            self.guard, statement = m[1], m[2]
        self.opcode, _, rest = re.sub(r"\s+", " ", statement).partition(" ")
        self.parts = self.opcode.split(".")
        self.type = self.parts[-1]
        handler = HANDLERS.get(self.parts[0], arithmetic)
        return handler(self, split(rest))


@functools.cache
def decode(ptx: str) -> Program:
    return Decoder(ptx).run()

"""What only machine code shows: registers that a running ``wgmma`` still reads are overwritten.

On Hopper a warp-group product with its first operand in registers keeps running after it is issued.
Until the wait that retires it, nothing may write those registers. The hardware does not check, and
Triton and ptxas have both been wrong about it (triton-lang/triton#9433).

    exposed(disassembled(cubin))

``loops`` finds the loops, ``counted`` counts instructions by kind.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_REGISTER = re.compile(r"R(\d+)(?:\.\w+)*$")
_PREDICATE = re.compile(r"!?U?P(?:\d+|T)$")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_PRODUCT = re.compile(r"R\d+, R(\d+)\b")  # accumulator, first operand (otherwise a descriptor)
_OPERANDS = 4  # registers per thread of the first operand, for all types
_NO_RESULT = re.compile(
    "ST|BAR|BRA|BRX|SYNCS|UTMA|DEPBAR|LDGDEPBAR|WARPGROUP|WARPSYNC|LDGSTS|EXIT|.SETP|PLOP|BSSY|BSYNC|"
    "R2UR|R2P|NOP|RED|MEMBAR|FENCE|CALL|RET|ELECT|ERRBAR|CCTL|YIELD|NANOSLEEP|U[A-Z]"
)
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL")
_MOST_PENDING = 8  # most groups that a wait can leave running


@dataclass(frozen=True)
class Instruction:
    predicate: str  # "@!P0", or "" if always executed
    name: str  # with its modifiers, "LDS.128"
    operands: str

    @property
    def writes(self) -> range:
        """The registers of its result."""
        if _NO_RESULT.match(self.name):
            return range(0)
        for operand in self.operands.split(", "):
            if found := _REGISTER.match(operand):
                return range(int(found[1]), int(found[1]) + self._width())
            if not _PREDICATE.match(operand):
                break
        return range(0)

    def _width(self) -> int:
        kind, *more = self.name.split(".")
        if kind == "HGMMA":
            columns = int(more[0].split("x")[1])
            return columns // (4 if "F16" in more[1:2] else 2)
        if kind in ("LDSM", "MOVM"):
            return int(more[-1]) if more[-1] in ("2", "4") else 1
        if "128" in more or kind in ("HMMA", "IMMA", "DMMA"):
            return 4
        double = kind[0] == "D" or ("F64" in more[:2] and kind in ("I2F", "F2F", "MUFU"))
        wide = "64" in more or "WIDE" in more or (kind == "CS2R" and "32" not in more)
        return 2 if double or wide else 1

    def goes_to(self, labels: dict[str, int]) -> int | None:
        found = _TARGET.search(self.operands) if self.name.startswith("BRA") else None
        return labels.get(found[1]) if found else None

    @property
    def may_fall_through(self) -> bool:
        """Whether the next instruction may follow; a branch's condition may also be an operand."""
        if self.name.startswith("BRA"):
            return bool(self.predicate) or not self.operands.startswith("`")
        return bool(self.predicate) or not self.name.startswith(("EXIT", "RET", "BRX"))


def disassembled(cubin: bytes) -> str:
    """Disassemble with the nvdisasm of Triton's wheel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.nvdisasm.path, "-c", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parsed(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and for each label the index of the instruction after it."""
    found, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.search(line):
            found.append(Instruction(match[1] or "", match[2], match[3]))
    return found, labels


def loops(text: str) -> list[range]:
    """The loops as ranges of indices, the longest first; an inner loop lies within another."""
    code, labels = parsed(text)
    ends = ((instruction.goes_to(labels), end) for end, instruction in enumerate(code))
    found = {range(start, end + 1) for start, end in ends if start is not None and start < end}
    return sorted(found, key=lambda loop: (-len(loop), loop.start))


def counted(code: Sequence[Instruction]) -> Counter[str]:
    """Instructions by kind: barriers, matrix products, exponentials, shuffles, and memory accesses
    by type and width in bits."""
    found: Counter[str] = Counter()
    for name in (instruction.name for instruction in code):
        kind, *more = name.split(".")
        if kind in _MEMORY:
            wide = next((m for m in more if m in ("128", "64")), None)
            narrow = next((m[1:] for m in more if m in ("U16", "S16", "U8", "S8")), "32")
            kind = f"{kind}.{wide or narrow}"
        found[kind] += 1
    return found


def exposed(text: str) -> list[str]:
    """The products whose operand registers an instruction may write before their wait, each with
    that instruction."""
    code, labels = parsed(text)
    found = []
    for place, product in enumerate(code):
        operand = _PRODUCT.match(product.operands) if product.name.startswith("HGMMA") else None
        if operand is None:
            continue
        first = int(operand[1])
        reads = set(range(first, first + _OPERANDS))
        for other in _before_its_wait(code, labels, place):
            if reads.intersection(other.writes):
                texts = (f"{i.name} {i.operands}" for i in (product, other))
                found.append(" is overwritten by ".join(texts))
                break
    return found


def _before_its_wait(
    code: list[Instruction], labels: dict[str, int], product: int
) -> Iterator[Instruction]:
    """The instructions that may be executed while the product runs, on any path."""
    # (index, groups closed after the product's own, or None while that is open)
    stack = [(product + 1, 0 if "gsb0" in code[product].operands else None)]
    seen = set(stack)
    while stack:
        place, later = stack.pop()
        if place >= len(code):
            continue
        at = code[place]
        if at.name.startswith("WARPGROUP.DEPBAR") and later is not None:
            left = re.search(r"0x([0-9a-f]+)", at.operands)
            if left is None or later >= int(left[1], 16):
                continue
        yield at
        if at.name.startswith("HGMMA") and "gsb0" in at.operands:
            later = 0 if later is None else min(later + 1, _MOST_PENDING)
        target = at.goes_to(labels)
        following = [place + 1] if at.may_fall_through else []
        for state in [(p, later) for p in (*following, *([] if target is None else [target]))]:
            if state not in seen:
                seen.add(state)
                stack.append(state)

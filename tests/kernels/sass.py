"""The SASS of our Hopper kernels: read from the library, and followed while wgmma.sp are in flight.

A wgmma reads its registers until it is done, and hardware does not hold back a later write to them: the
compiler has to. Accumulators it knows about; that it also keeps the metadata of ``wgmma.sp`` alive is what
:func:`overwritten` checks, on every path through a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import vllm_spense

LIBRARY = next(Path(vllm_spense.__file__).parent.glob("_C*.so"), None)
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
UNKNOWN = {"BRX", "BRXU", "JMP", "JMX", "JMXU"}
NO_RESULT = {"BAR", "WARPSYNC", "BRA", "RET", "NANOSLEEP"}
"""Instructions whose first register is read, beside those that set predicates."""
MOST_GROUPS = 8

Groups = tuple[frozenset[int], ...]
"""Metadata registers of the wgmma groups that may be in flight, oldest first; the last is not committed."""
IDLE: Groups = (frozenset(),)


class Instruction(NamedTuple):
    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def metadata(self) -> int | None:
        """The metadata register of a sparse wgmma: ``QGMMA.SP… D, gdesc[A, B], C, metadata``."""
        found = re.search(r"gdesc\[\w+\], R\d+, R(\d+)", self.operands)
        return int(found[1]) if found and ".SP." in self.opcode else None

    @property
    def written(self) -> range:
        """General registers that it may write; rather too many than too few."""
        first = re.match(r"(?:!?U?P[T\d]+, )*R(\d+)", self.operands)
        if first is None or self.name in NO_RESULT or "SETP" in self.name:
            return range(0)
        return range(int(first[1]), int(first[1]) + self._width())

    def _width(self) -> int:
        if tile := re.match(r"QGMMA\.(?:SP\.)?64x(\d+)x", self.opcode):
            return int(tile[1]) // 2
        if re.search(r"128|M88\.4", self.opcode):
            return 4
        return 2 if re.search(r"64|WIDE|CS2R|^D", self.opcode) else 1

    def next(self, following: int | None) -> Iterator[int]:
        """Addresses that may run after it; ``following``: of the next line."""
        if self.name in UNKNOWN:
            raise ValueError(f"{self.opcode} at {self.address:#x}: a jump that this check cannot follow")
        falls = bool(self.guard) or self.name not in ("BRA", "EXIT", "RET")
        if self.name in ("BRA", "CALL"):
            *conditions, target = self.operands.split(", ")
            yield int(target, 16)
            falls = falls or bool(conditions)
        if falls and following is not None:
            yield following


def tool(name: str) -> str:
    """A CUDA binary tool: from PATH, or the one that Triton carries."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin" if spec and spec.origin else Path()
    found = shutil.which(name) or shutil.which(name, path=str(bundled))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


@functools.cache
def disassembly() -> dict[str, str]:
    """SASS of our sm_90a kernels by template arguments: warpgroups, tokens, multicast, promotion, pair,
    packed."""
    kernels = {}
    for name, text in functions("sm_90a").items():
        found = re.match(r"_ZN6spense4sm9013linear_kernelINS0_5ShapeI(\w+?)EEEE", name)
        if found:
            kernels[found[1]] = text
    return kernels


@functools.cache
def functions(architecture: str) -> dict[str, str]:
    """SASS of the library's functions for an architecture, by mangled name."""
    path = str(Path(tool("nvdisasm")).parent)
    run = subprocess.run(
        [tool("cuobjdump"), "-sass", "-arch", architecture, str(LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": f"{path}:/usr/bin:/bin"},
    )
    return {text.split()[0]: text for text in re.split(r"\n\s+Function : ", run.stdout)[1:]}


def instructions(sass: str) -> list[Instruction]:
    """Instructions of one function, in order."""
    return [Instruction(int(a, 16), guard.strip(), op, x.strip()) for a, guard, op, x in LINE.findall(sass)]


def overwritten(sass: str) -> list[str]:
    """Every instruction that may write a metadata register whose wgmma.sp may still be in flight."""
    code = instructions(sass)
    place = {instruction.address: i for i, instruction in enumerate(code)}
    found: dict[int, str] = {}
    seen: set[tuple[int, Groups]] = set()
    todo = [(code[0].address, IDLE)]
    while todo:
        state = todo.pop()
        if state in seen:
            continue
        seen.add(state)
        address, groups = state
        instruction = code[place[address]]
        hit = frozenset().union(*groups).intersection(instruction.written)
        if hit:
            registers = ", ".join(f"R{r}" for r in sorted(hit))
            found[address] = f"{address:#x} {instruction.opcode} {instruction.operands} writes {registers}"
        after = place[address] + 1
        following = code[after].address if after < len(code) else None
        groups = advance(instruction, groups)
        todo += [(to, groups) for to in instruction.next(following)]
    return [found[address] for address in sorted(found)]


def advance(instruction: Instruction, groups: Groups) -> Groups:
    """What may be in flight behind an instruction. ``gsb0`` on a wgmma commits the group that it ends.

    A call goes on behind it as if it had done nothing, so its body may have nothing in flight.
    """
    if instruction.name in ("CALL", "RET") and groups != IDLE:
        raise ValueError(f"{instruction.address:#x}: {instruction.opcode} with wgmmas in flight")
    if instruction.name == "QGMMA":
        if instruction.metadata is not None:
            groups = (*groups[:-1], groups[-1] | {instruction.metadata})
        if "gsb0" in instruction.operands:
            groups = (*groups, frozenset())
    elif instruction.opcode == "WARPGROUP.DEPBAR.LE":
        left = int(instruction.operands.split(", ")[1], 16)
        groups = groups[max(0, len(groups) - 1 - left) :]
    if len(groups) > MOST_GROUPS:
        raise ValueError(f"{instruction.address:#x}: {len(groups)} groups of wgmma without a wait")
    return groups

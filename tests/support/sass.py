"""Hazards in NVIDIA's assembly of sm_90 that neither the compiler's output nor a small test shows.

A matrix instruction (HGMMA) is asynchronous: until a wait covers it, its registers are not to be touched. A warp waits
for itself alone: the tile that was read is not to be overwritten before a barrier, another warp may still read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", re.MULTILINE)
_MATRIX = re.compile(r"HGMMA\.64x(\d+)x")
# Operations whose first register, if they have one, is no result.
_NO_RESULT = ("ST", "RED", "BAR", "SYNCS", "CCTL", "R2P", "FCHK", "VOTE", "PLOP3", "UTMA", "LDGSTS")
# Groups of matrix instructions are counted up to here, so that a loop without a wait ends.
_MANY = 8
_REFILLS = ("UTMALDG", "LDGSTS")


class Instruction(NamedTuple):
    """One line of an assembly."""

    address: int
    guarded: bool
    operation: str
    operands: str

    def __str__(self) -> str:
        return f"{self.address:04x} {self.operation} {self.operands}"

    @property
    def closes_group(self) -> bool:
        """Whether a wait may count this matrix instruction and those before."""
        return self.operation.startswith("HGMMA") and "gsb0" in self.operands

    @property
    def waits_for(self) -> int | None:
        """How many groups of matrix instructions may be under way after this wait; None: it is none."""
        found = re.search(r"gsb0,\s*0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found and self.operation.startswith("WARPGROUP.DEPBAR") else None

    def results(self) -> frozenset[int]:
        """Return the registers that are written."""
        if self.operation.startswith(_NO_RESULT) or "SETP" in self.operation:
            return frozenset()
        found = re.match(r"(?:!?U?P[\dT]+,\s*)*R(\d+)\b", self.operands)
        if not found:
            return frozenset()
        matrix = _MATRIX.match(self.operation)
        if matrix:
            count = int(matrix[1]) // 2
        elif ".128" in self.operation or re.match(r"LDSM.*\.4$", self.operation):
            count = 4
        elif re.search(r"\.64|\.WIDE|^D(ADD|MUL|FMA)|^CS2R$|LDSM.*\.2$", self.operation):
            count = 2
        else:
            count = 1
        return frozenset(range(int(found[1]), int(found[1]) + count))

    def names(self) -> frozenset[int]:
        """Return the registers that are named, of several in a row the first."""
        return frozenset(map(int, re.findall(r"(?<![A-Z])R(\d+)", self.operands)))

    def matrix_operand(self) -> frozenset[int]:
        """Return the registers that a matrix instruction reads its first operand from; none: from shared memory."""
        found = re.match(r"R\d+,\s*R(\d+)(?:\.reuse)?,\s*gdesc", self.operands)
        return frozenset(range(int(found[1]), int(found[1]) + 4)) if found else frozenset()


def parse(assembly: str) -> list[Instruction]:
    """Return the instructions of `cuobjdump -sass`."""
    return [
        Instruction(int(address, 16), bool(guard), operation, operands)
        for address, guard, operation, operands in _INSTRUCTION.findall(assembly)
    ]


def reached(
    program: list[Instruction], start: int, state: int, step: Callable[[Instruction, int], int | None]
) -> Iterator[tuple[Instruction, int]]:
    """Yield what may be executed after an instruction, each with the state before it, on every path.

    step returns the next state, or None where the path ends.
    """
    places = {instruction.address: i for i, instruction in enumerate(program)}
    waiting, seen = [(start + 1, state)], set()
    while waiting:
        i, state = waiting.pop()
        if i >= len(program) or (i, state) in seen:
            continue
        seen.add((i, state))
        instruction = program[i]
        yield instruction, state
        following = step(instruction, state)
        if following is None:
            continue
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands) if instruction.operation == "BRA" else None
        if target and int(target[1], 16) in places:
            waiting.append((places[int(target[1], 16)], following))
        # a condition may stand before the target, too
        always = not instruction.guarded and not re.match(r"!?U?P\d", instruction.operands)
        if not (always and instruction.operation in ("BRA", "EXIT")):
            waiting.append((i + 1, following))


def register_hazards(assembly: str) -> tuple[str, ...]:
    """Return the instructions that touch registers of a matrix instruction before a wait covers it."""
    program, found = parse(assembly), set()

    def step(instruction: Instruction, groups: int) -> int | None:
        limit = instruction.waits_for
        if limit is not None and limit < groups:
            return None
        return min(_MANY, groups + instruction.closes_group)

    for start, multiply in enumerate(program):
        if not multiply.operation.startswith("HGMMA"):
            continue
        operand, result = multiply.matrix_operand(), multiply.results()
        for other, _ in reached(program, start, int(multiply.closes_group), step):
            if other.operation.startswith("HGMMA"):
                # results are added up in order
                touched = (other.results() & operand) | (other.matrix_operand() & result)
            else:
                touched = (other.results() & operand) | ((other.results() | other.names()) & result)
            if touched:
                found.add(f"{other}; under way: {multiply}")
    return tuple(sorted(found))


def unguarded_refills(assembly: str) -> tuple[str, ...]:
    """Return the loads into shared memory that no barrier separates from a wait for matrix instructions."""
    program, found = parse(assembly), set()
    for start, wait in enumerate(program):
        if wait.waits_for is None:
            continue
        for other, _ in reached(program, start, 0, lambda other, _: None if other.operation.startswith("BAR.") else 0):
            if other.operation.startswith(_REFILLS):
                found.add(f"{other}; after {wait}")
    return tuple(sorted(found))

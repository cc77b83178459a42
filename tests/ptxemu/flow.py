"""Loops of machine code, found in its control flow.

A backward jump alone is no loop: assemblers move rarely taken paths to the end of a kernel, and these jump back.
What remains are natural loops: an edge to a block that every path to the edge's source has passed, and the blocks
that lead to that source.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction, the places that it may jump to, and whether the one after it may follow."""

    opcode: str
    targets: tuple[int, ...] = ()
    falls: bool = True


@dataclass(frozen=True)
class Label:
    """The place of the next instruction, under a name."""

    name: str


@dataclass(frozen=True)
class Line:
    """An instruction of assembly text, and the names of the labels that it may jump to."""

    opcode: str
    labels: tuple[str, ...] = ()
    falls: bool = True


def link(lines: Iterable[Label | Line]) -> tuple[Instruction, ...]:
    """Instructions with their labels resolved; a jump out of the code has no target."""
    places: dict[str, int] = {}
    code: list[Line] = []
    for line in lines:
        if isinstance(line, Label):
            places[line.name] = len(code)
        else:
            code.append(line)
    return tuple(
        Instruction(one.opcode, tuple(places[n] for n in one.labels if n in places), one.falls)
        for one in code
    )


def natural_loops(code: Sequence[Instruction]) -> list[frozenset[int]]:
    """Positions in `code` of the instructions of each loop, the smallest loop first."""
    if not code:
        return []
    starts, follows = _blocks(code)
    dominators = _dominators(follows)
    loops: dict[int, set[int]] = {}
    for block, nexts in enumerate(follows):
        for head in nexts:
            if dominators[block] >> head & 1:
                loops.setdefault(head, {head}).update(_reaching(block, head, follows))
    ends = [*starts[1:], len(code)]
    spans = [{i for b in blocks for i in range(starts[b], ends[b])} for blocks in loops.values()]
    return sorted(map(frozenset, spans), key=len)


def skippable(code: Sequence[Instruction], loop: frozenset[int]) -> list[range]:
    """The basic blocks of a loop that a round of it may pass by.

    A round ends with an edge back to the loop's own head: what lies behind the only exit of an inner loop is passed in
    every round, however often that inner one goes around.
    """
    starts, follows = _blocks(code)
    dominators = _dominators(follows)
    ends = [*starts[1:], len(code)]
    inside = [b for b, start in enumerate(starts) if start in loop]
    heads = [head for head in inside if all(dominators[b] >> head & 1 for b in inside)]
    latches = [b for b in inside if set(follows[b]) & set(heads)]
    return [
        range(starts[b], ends[b])
        for b in inside
        if not all(dominators[latch] >> b & 1 for latch in latches)
    ]


def _blocks(code: Sequence[Instruction]) -> tuple[list[int], list[list[int]]]:
    """Where each basic block starts, and the blocks that may follow it."""
    breaks = {0, *(t for one in code for t in one.targets)}
    breaks |= {i + 1 for i, one in enumerate(code) if one.targets or not one.falls}
    starts = sorted(b for b in breaks if b < len(code))
    block_of = {start: b for b, start in enumerate(starts)}
    follows = []
    for b, end in enumerate([*starts[1:], len(code)]):
        nexts = [block_of[t] for t in code[end - 1].targets if t in block_of]
        if code[end - 1].falls and b + 1 < len(starts):
            nexts.append(b + 1)
        follows.append(nexts)
    return starts, follows


def _dominators(follows: list[list[int]]) -> list[int]:
    """For each block the set, as bits, of blocks on every path to it (only itself where no path leads)."""
    order = _reachable(follows)
    before: list[list[int]] = [[] for _ in follows]
    for block in order:
        for following in follows[block]:
            before[following].append(block)
    everything = (1 << len(follows)) - 1
    dominators = [1 << b for b in range(len(follows))]
    for block in order[1:]:
        dominators[block] = everything
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = everything
            for previous in before[block]:
                common &= dominators[previous]
            common |= 1 << block
            changed |= common != dominators[block]
            dominators[block] = common
    return dominators


def _reachable(follows: list[list[int]]) -> list[int]:
    """Blocks that the first one reaches, itself first."""
    order, seen = [], {0}
    stack = [0] if follows else []
    while stack:
        block = stack.pop()
        order.append(block)
        new = [b for b in follows[block] if b not in seen]
        seen.update(new)
        stack.extend(new)
    return order


def _reaching(block: int, head: int, follows: list[list[int]]) -> set[int]:
    """Blocks from which `block` is reached without passing `head`."""
    found, stack = {head, block}, [block]
    while stack:
        target = stack.pop()
        if target == head:
            continue
        new = {b for b, nexts in enumerate(follows) if target in nexts} - found
        found |= new
        stack.extend(new)
    return found

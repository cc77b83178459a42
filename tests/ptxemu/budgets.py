"""What the machine code of each sample kernel may cost: the table budgets.json, and its check."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptxemu.sass import Code, Gcn, Mix, Sass

TABLE = Path(__file__).with_suffix(".json")

Range = tuple[float, float]


@dataclass(frozen=True)
class Budget:
    """What a kernel's machine code may cost. Keys of `body`, `loop` (the main loop) and `usual` (without what it mostly
    passes by) are opcodes, "issue" for all of them, or these for each tensor-core instruction ("LDSM/mma"); values are
    the least and the most."""

    registers: int
    stack: int = 0
    spills: int = 0  # loads and stores; for AMD, registers
    body: Mapping[str, Range] = field(default_factory=dict)
    loop: Mapping[str, Range] = field(default_factory=dict)
    usual: Mapping[str, Range] = field(default_factory=dict)

    def faults(self, code: Code) -> list[str]:
        """Everything in which `code` is outside of this budget."""
        spills = code.spill_stores + code.spill_loads if isinstance(code, Sass) else 0
        spills += code.vgpr_spills + code.sgpr_spills if isinstance(code, Gcn) else 0
        sizes: list[tuple[str, float, Range]] = [
            ("registers", code.registers, (0, self.registers)),
            ("stack", code.stack, (0, self.stack)),
            ("spills", spills, (0, self.spills)),
        ]
        parts = [("", code.body, self.body), ("loop ", code.main_loop, self.loop)]
        if self.usual:
            parts.append(("usual loop ", code.usual_loop, self.usual))
        for part, mix, ranges in parts:
            sizes += [(part + key, _measure(mix, key), span) for key, span in ranges.items()]
        return [
            f"{code.name}: {name} {value:g}, budget {least:g} to {most:g}"
            for name, value, (least, most) in sizes
            if not least <= value <= most
        ]


def _measure(mix: Mix, key: str) -> float:
    name, _, ratio = key.partition("/")
    names = () if name == "issue" else (name,)
    if ratio:
        return mix.per_mma(*names)
    return mix.count(*names) if names else mix.issue


def load_budgets(path: Path = TABLE) -> dict[tuple[str, str], Budget]:
    """A table, by kernel and architecture."""
    table: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return {
        (kernel, arch): Budget(**limits)
        for kernel, archs in table.items()
        for arch, limits in archs.items()
    }

"""Every opcode that the emulator knows is executed by some test: those of instructions carry their PTX with them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

from ptxemu import emulator

# Tested elsewhere: what is asynchronous or of a cluster. Without effect here: hints to caches.
ELSEWHERE = (
    "wgmma", "mbarrier", "cp.async.bulk", "cp.async.mbarrier", "cp.reduce", "tensormap", "mapa", "getctarank",
    "prefetch", "createpolicy", "multimem",
)  # fmt: skip
_WORD = re.compile(r"(?:^|[;{}:]|@!?%?\w+)\s*([a-z][a-z0-9_]*(?:\.[\w:]+)*)(?=[\s;])", re.MULTILINE)


def texts() -> Iterator[str]:
    """The PTX of all test_opcodes files, whichever of them are selected to run."""
    for path in sorted(Path(__file__).parent.glob("test_opcodes_*.py")):
        module = importlib.import_module(f"ptxemu.{path.stem}")
        for name, test in vars(module).items():
            if name.startswith("test_") and hasattr(test, "texts"):
                yield from test.texts()


def opcodes_of(text: str, known: set[str]) -> set[str]:
    """The longest known name that each statement begins with, as the emulator's loader takes it."""
    found = set()
    for match in _WORD.finditer(text):
        words = match[1].split(".")
        names = (".".join(words[:count]) for count in range(len(words), 0, -1))
        found.add(next((name for name in names if name in known), ""))
    return found


def test_every_opcode_is_executed() -> None:
    known = set(emulator._native.opcodes())
    executed: set[str] = set()
    for text in texts():
        executed |= opcodes_of(text, known)
    missing = {name for name in known - executed if not name.startswith(ELSEWHERE)}
    assert not missing, f"no test_opcodes file executes {sorted(missing)}"


def test_a_new_opcode_would_be_missed() -> None:
    known = {"add", "add.cc", "mad.lo.cc", "frob"}
    found = opcodes_of(
        "{\nadd.cc.u32 %r0, %r1, %r2;\n@!%p mad.lo.cc.u32 a, b, c, d; L: add.u32 a, b, c;\n}", known
    )
    assert found - {""} == {"add", "add.cc", "mad.lo.cc"}

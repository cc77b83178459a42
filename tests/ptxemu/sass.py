"""What the assembler made of a kernel: registers, spills, and the instructions of its main loop.

    python -m ptxemu.sass kernel.cubin        # a table; or the assembly text of a kernel for gfx90a or gfx942

These are counts of the machine code, not times: they show a spill, a lost ldmatrix, address arithmetic that crept
into the loop. A cubin is read by cuobjdump and nvdisasm, which come with Triton and with the CUDA toolkit.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptxemu.flow import Instruction, Label, Line, link, natural_loops, skippable

# Instructions by what they do. wgmma's HGMMA and its like work for four warps, mma.sync's HMMA for one.
MMA = ("HMMA", "IMMA", "QMMA", "OMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "v_mfma")
FP32 = ("FFMA", "FMUL", "FADD", "FMNMX", "FMNMX3", "FSEL", "FSETP", "F2FP", "FFMA2", "FMUL2", "FADD2")  # fmt: skip
INT = ("IMAD", "IADD", "IADD3", "LOP3", "ISETP", "LEA", "SHF", "SEL", "PRMT", "MOV", "VIADD", "IMNMX")  # fmt: skip


class ToolNotFound(FileNotFoundError):
    """cuobjdump or nvdisasm is neither in Triton's package nor in PATH."""


@dataclass(frozen=True)
class Mix:
    """Instructions of a stretch of code, counted by opcode with modifiers."""

    opcodes: Counter[str]

    @property
    def issue(self) -> int:
        """All instructions."""
        return sum(self.opcodes.values())

    def count(self, *names: str) -> int:
        """Instructions named so, whatever their modifiers: LDS counts LDS.128, but not LDSM."""
        stems = tuple(name + mark for name in names for mark in "._")
        return sum(n for op, n in self.opcodes.items() if op in names or op.startswith(stems))

    @property
    def mma(self) -> int:
        """Tensor-core instructions."""
        return self.count(*MMA)

    def per_mma(self, *names: str) -> float:
        """Instructions (all, or those named) for each tensor-core instruction; infinite without any."""
        return (
            (self.count(*names) if names else self.issue) / self.mma if self.mma else float("inf")
        )


@dataclass(frozen=True)
class Code:
    """One kernel's machine code. Sizes in bytes."""

    name: str
    registers: int
    stack: int
    shared: int  # static; what a launch adds is not in the binary
    instructions: tuple[Instruction, ...]

    @property
    def body(self) -> Mix:
        return Mix(Counter(i.opcode for i in self.instructions))

    @property
    def spills(self) -> int:
        """Registers, or accesses to memory in their place."""
        raise NotImplementedError

    @property
    def in_registers(self) -> bool:
        return self.stack == 0 and self.spills == 0

    @property
    def main_loop(self) -> Mix:
        """The innermost loop with most tensor-core instructions (the shorter of two equals); without any, the longest.

        Loops that only wait (no tensor-core instruction) may lie inside of one that works. Empty if nothing loops.
        """
        return self._mix(self.main_loop_places)

    @property
    def usual_loop(self) -> Mix:
        """The main loop without blocks that it may pass by and that only compute (no memory, no tensor cores), such as
        the correction of an online softmax: what is issued in the rounds that pass them by."""
        rare: set[int] = set()
        for block in skippable(self.instructions, self.main_loop_places):
            opcodes = {self.instructions[i].opcode.partition(".")[0] for i in block}
            if not opcodes & {*MMA, "UTMALDG", "LDGSTS", "LDSM", "LDG", "LDS", "STG", "STS"}:
                rare.update(block)
        return self._mix(self.main_loop_places - rare)

    def _mix(self, places: Iterable[int]) -> Mix:
        return Mix(Counter(self.instructions[i].opcode for i in places))

    @property
    def main_loop_places(self) -> frozenset[int]:
        """Positions of the main loop in `instructions`."""
        loops = natural_loops(self.instructions)
        mixes = {loop: self._mix(loop) for loop in loops}
        working = [loop for loop in loops if mixes[loop].mma] or loops
        inner = [a for a in working if not any(b < a for b in working)]
        longer = 1 if working is loops else -1
        return max(
            inner, key=lambda a: (mixes[a].mma, longer * mixes[a].issue), default=frozenset()
        )


@dataclass(frozen=True)
class Sass(Code):
    """A kernel for NVIDIA's GPUs. Spills are all accesses to local memory, those of local arrays included."""

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads

    @property
    def spill_stores(self) -> int:
        return self.body.count("STL")

    @property
    def spill_loads(self) -> int:
        return self.body.count("LDL")


@dataclass(frozen=True)
class Gcn(Code):
    """A kernel for AMD's GPUs; `registers` are VGPRs with the accumulators, `stack` is scratch, `shared` is LDS."""

    accumulators: int
    scalars: int
    vgpr_spills: int
    sgpr_spills: int  # into lanes of vector registers

    @property
    def spills(self) -> int:
        return self.vgpr_spills


def read_cubin(cubin: bytes | Path) -> dict[str, Sass]:
    """Kernels of a cubin by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = cubin if isinstance(cubin, Path) else Path(folder, "kernel.cubin")
        if isinstance(cubin, bytes):
            path.write_bytes(cubin)
        return parse_sass(_run("cuobjdump", "-res-usage", path), _run("nvdisasm", "-c", path))


def find_tool(name: str) -> Path:
    """Path of `name`: Triton's own copy first, then PATH."""
    spec = importlib.util.find_spec("triton")
    for package in spec.submodule_search_locations or [] if spec else []:
        path = Path(package, "backends", "nvidia", "bin", name)
        if path.exists():
            return path
    found = shutil.which(name)
    if found is None:
        raise ToolNotFound(f"{name}: neither in Triton's package nor in PATH")
    return Path(found)


def _run(tool: str, option: str, path: Path) -> str:
    program = find_tool(tool)
    # cuobjdump looks for its sister in PATH.
    env = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run([program, option, path], capture_output=True, text=True, env=env)
    if done.returncode:
        raise ValueError(f"{tool} {path}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*) *(.*);")
_SASS_LABEL = re.compile(r"(\.L\w+):")


def parse_sass(usage: str, text: str) -> dict[str, Sass]:
    """Kernels by name, from what `cuobjdump -res-usage` and `nvdisasm -c` print."""
    kernels = {}
    for name, *sizes in _USAGE.findall(usage):
        code = re.search(rf"^\.text\.{re.escape(name)}:\n(.*?)(?=^//-----|\Z)", text, re.M | re.S)
        if code is None:
            raise ValueError(f"{name}: no code of that name in the disassembly")
        registers, stack, shared = map(int, sizes)
        kernels[name] = Sass(name, registers, stack, shared, link(_sass_lines(code[1])))
    return kernels


def _sass_lines(text: str) -> Iterator[Label | Line]:
    for line in text.splitlines():
        if label := _SASS_LABEL.match(line):
            yield Label(label[1])
        elif found := _SASS.match(line):
            guard, opcode, operands = found.groups()
            root = opcode.partition(".")[0]
            jumps = root in ("BRA", "BRX", "JMP", "JMX")
            # BRA.U UP0, `(.L_x_1): the condition may stand among the operands.
            sure = not guard and (operands.startswith("`(") or root not in ("BRA", "JMP"))
            ends = sure and (jumps or root in ("EXIT", "RET"))
            labels = re.findall(r"\.L\w+", operands) if jumps else ()
            yield Line(opcode, tuple(labels), not ends)


_GCN = re.compile(r"\t([a-z]\w+)\b *(.*)")
_GCN_FIELD = re.compile(r"^\s+(?:- )?\.(\w+): +(\S+)$", re.M)


def parse_gcn(text: str) -> dict[str, Gcn]:
    """Kernels by name, from the assembly text that LLVM writes for AMD's GPUs (Triton's "amdgcn")."""
    kernels = {}
    metadata = re.search(r"^amdhsa\.kernels:$(.*?)^amdhsa\.", text, re.M | re.S)
    for entry in re.split(r"^  - ", metadata[1], flags=re.M)[1:] if metadata else []:
        fields = dict(_GCN_FIELD.findall("    " + entry))
        name = fields["name"]
        code = re.search(rf"^{re.escape(name)}:.*?$(.*?)^\.Lfunc_end", text, re.M | re.S)
        if code is None:
            raise ValueError(f"{name}: no code of that name in the assembly text")
        sizes = ("vgpr_count", "private_segment_fixed_size", "group_segment_fixed_size")
        registers, stack, shared = (int(fields[size]) for size in sizes)
        names = ("agpr_count", "sgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        more = (int(fields.get(field, 0)) for field in names)
        kernels[name] = Gcn(name, registers, stack, shared, link(_gcn_lines(code[1])), *more)
    return kernels


def _gcn_lines(text: str) -> Iterator[Label | Line]:
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            yield Label(label[1])
        elif found := _GCN.match(line):
            opcode, operands = found.groups()
            ends = opcode in ("s_branch", "s_endpgm", "s_setpc_b64")
            labels = re.findall(r"\.LBB\w+", operands) if "branch" in opcode else ()
            yield Line(opcode, tuple(labels), not ends)


def _table(kernels: Iterable[Code]) -> str:
    lines = []
    for kernel in kernels:
        lines.append(f"{kernel.name}: {', '.join(_facts(kernel))}")
        lines.append(f"{'':16}{'all':>8}{'main loop':>11}{'per mma':>9}")
        body, loop = kernel.body, kernel.main_loop
        rows: list[tuple[str, tuple[str, ...]]] = [("issue", ()), ("fp32", FP32), ("int", INT)]
        roots = Counter[str]()
        for opcode, n in body.opcodes.items():
            roots[opcode.partition(".")[0]] += n
        rows += [(root, (root,)) for root, _ in roots.most_common(24)]
        for title, names in rows:
            total, inner = (mix.count(*names) if names else mix.issue for mix in (body, loop))
            ratio = f"{loop.per_mma(*names):9.2f}" if loop.mma else ""
            lines.append(f"  {title:<14}{total:>8}{inner:>11}{ratio}")
    return "\n".join(lines)


def _facts(kernel: Code) -> Iterator[str]:
    yield f"{kernel.registers} registers"
    yield f"stack {kernel.stack} B"
    yield f"static shared {kernel.shared} B"
    if isinstance(kernel, Sass):
        yield f"spills {kernel.spill_stores} stores, {kernel.spill_loads} loads"
    if isinstance(kernel, Gcn):
        yield f"{kernel.accumulators} accumulators, {kernel.scalars} scalars"
        yield f"spilled {kernel.vgpr_spills} vector, {kernel.sgpr_spills} scalar registers"


def main(arguments: Sequence[str]) -> int:
    """Print a table of each file's kernels."""
    if not arguments:
        print(f"usage: python -m ptxemu.sass FILE...\n\n{__doc__}", file=sys.stderr)
        return 2
    for path in map(Path, arguments):
        is_elf = path.read_bytes()[:4] == b"\x7fELF"
        print(_table((read_cubin(path) if is_elf else parse_gcn(path.read_text())).values()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

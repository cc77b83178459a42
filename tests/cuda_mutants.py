"""Bugs seeded into the kernels of csrc/cuda, and the calls through which they have to show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from emulated import SOURCES, CudaOfCpuTensors, available
from ptxemu import EmulationError
from ptxemu.gpu import Emulator
from ptxemu.mutations import FOLDER, Mutant, Wrong, judged, mutant
from torch import Tensor

import pyfuse
from pyfuse.backends import cuda_device

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """An attention call on sm_80. nan: keys from there on are NaN, their values infinite."""

    m: int
    n: int
    d: int = 64
    heads: tuple[int, int] = (2, 1)
    options: tuple[tuple[str, Any], ...] = ()
    nan: int | None = None
    dtype: torch.dtype = BF16

    def tensors(self) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        sizes = zip((self.heads[0], *self.heads[1:] * 2), (self.m, self.n, self.n), strict=True)
        q, k, v = (torch.randn(1, h, rows, self.d).to(self.dtype) for h, rows in sizes)
        if self.nan is not None:
            k[:, :, self.nan :], v[:, :, self.nan :] = torch.nan, torch.inf
        return q, k, v

    def run(self, tensors: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # of dropout
        o, lse = pyfuse.attention(*tensors, **dict(self.options), return_lse=True, backend=backend)
        return o, lse


def options(**given: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(given.items())


CALLS = (
    Call(130, 197, options=options(causal=True)),
    Call(5, 320, heads=(1, 1), options=options(scale=2.0)),  # maxima grow by more than 2^8
    Call(3, 150, options=options(seqlens_k=torch.tensor([70])), nan=70),
    Call(20, 40, options=options(causal=True), nan=39),
    Call(65, 130, 40, options=options(causal=True, window=50)),
    Call(33, 70, options=options(dropout_p=0.3, softcap=5.0)),
    Call(17, 70, heads=(1, 1), dtype=torch.float32),
)

# (name, file, text, what it becomes, what has to turn up)
_BUGS = [
    ("no barrier before keys are read", "attention_fwd.cu",
     "    __syncthreads();  // the keys are there for all, and nobody reads values any more\n", "", "race"),
    ("values are not waited for", "attention_fwd.cu",
     "    cp_async_wait<0>();\n    __syncthreads();  // the values are there", "    __syncthreads();  // the values are there",
     "async-unwaited race undefined"),
    ("a chunk's swizzle that does not undo itself", "tile.cuh", "(((chunk % CHUNKS) ^ swizzle) << 4)",
     "((chunk + swizzle) % CHUNKS << 4)", "numerics"),
    ("no swizzle", "tile.cuh", "const int swizzle = CHUNKS == 8 ? row & 7 : row >> 1 & 3;", "const int swizzle = 0;",
     "conflicts"),
    ("rows beyond the end are read", "tile.cuh", "cp_async_or_zero(place, from + c * 16, row() + i < inside);",
     "cp_async(place, from + c * 16);", "out-of-bounds"),
    ("rows beyond the end are written", "tile.cuh", "r < min(rows, inside); r += 32 / Tile::CHUNKS",
     "r < rows; r += 32 / Tile::CHUNKS", "out-of-bounds"),
    ("columns beyond a small head are not cleared", "tile.cuh", "if (c * Tile::PER_CHUNK >= elements)\n",
     "if (c * Tile::PER_CHUNK > elements)\n", "undefined numerics"),
    ("sums do not shrink with o", "softmax.cuh", "        l[i][row] *= by[i][row];\n", "", "numerics"),
    ("o does not shrink", "softmax.cuh", "o[i][n][j] *= by[i][j / 2];", "o[i][n][j] *= 1.0f;", "numerics"),
    ("the query's own key is hidden", "mask.cuh", "max(place(m) + right + 1, 0)", "max(place(m) + right, 0)", "numerics"),
    ("a window that is a key too wide", "mask.cuh", "max(place(m) - left, 0)", "max(place(m) - left - 1, 0)", "numerics"),
    ("infinite values are weighed with 0", "attention_fwd.cu", "KeptRows{~spoilt}", "KeptRows{~uint64_t(0)}", "numerics"),
    ("dropout's words go to the wrong lane", "dropout.cuh", "words[0] = odd ? first : own.x;",
     "words[0] = odd ? own.x : first;", "numerics"),
    ("a low part of 3xTF32 is lost", "product.cuh", "    mma(step, low, b0_high, b1_high, float());", "    //", "numerics"),
]  # fmt: skip


def mutants() -> list[Mutant]:
    return [mutant(name, "cuda", *rest) for name, *rest in _BUGS]


def outcome(seeded: Mutant | None) -> Wrong:
    """What is wrong in the calls, up to the first that shows what was expected."""
    folder = _copy(seeded)
    wrong: Wrong = set()
    for case in _cases(folder):
        wrong |= case
        if seeded is not None and wrong & seeded.expected:
            break
    return wrong


def _copy(seeded: Mutant | None) -> Path:
    name = seeded.name if seeded else "as it is"
    folder = FOLDER / ("cuda_" + "".join(c if c.isalnum() else "_" for c in name))
    shutil.copytree(SOURCES, folder, dirs_exist_ok=True)
    if seeded:
        path = folder / seeded.file
        text = path.read_text()
        assert text.count(seeded.before) == 1, f"{seeded.name}: {seeded.file} has it not once"
        path.write_text(text.replace(seeded.before, seeded.after))
    return folder


def _cases(folder: Path) -> Iterator[Wrong]:
    for call in CALLS:
        tensors = call.tensors()
        gpu = CudaOfCpuTensors(Emulator(80), folder, check=False)
        with available(cuda_device.stand_in(gpu)):
            try:
                actual = call.run(tensors, "cuda")
            except EmulationError as error:
                yield set(error.report.kinds())
                continue
        exact = call.run(tuple(t.double() for t in tensors), "eager")
        eager = call.run(tensors, "eager")
        for report in gpu.reports:
            yield judged(report, {})
        results = zip(("o", "lse"), zip(actual, exact, eager, strict=True), strict=True)
        yield judged(gpu.reports[-1], dict(results))

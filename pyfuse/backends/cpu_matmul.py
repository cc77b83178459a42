"""Products a·bᵀ + bias in float32 on the CPU: per shape, the faster of two ways on this machine.

    a [R, S], b [C, S], bias [C] -> [R, C]: each element is a sum over S

- ``torch``: what torch does by itself. In float32 that is MKL, which on AMD CPUs with AVX-512 reaches less than
  half of the peak.
- ``onednn``: the oneDNN inside torch, in true float32. Its kernels add up all of S in one chain, whose rounding
  errors from about 500 terms on are larger than the accuracy rule allows (measured: mean error 1.6 x MKL's at 576
  terms, 2.1 x at 4096). So S is cut into parts of at most MOST_SUMMED, each added to the sum of those before
  (1.15 x at any length). It takes b densely in either memory order; any other order is a thousand times slower, so
  that parts of rows are copied first.

A linear layer is three such products, called "forward" (y = x·Wᵀ + bias), "input" (dx = dy·W) and "weight"
(dW = dyᵀ·x). They differ in the memory order of a and b, and so are calibrated apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pyfuse.calibration import take_turns, winner

KINDS = ("forward", "input", "weight")
WAYS = ("torch", "onednn")
MOST_SUMMED = 320  # elements of S that oneDNN adds up in one chain
PART = 16  # such a part is a multiple of this: whole registers
MIN_FLOPS = 4e6  # of 50 µs or less the overhead of a call is a large part: not calibrated
MAX_FLOPS = 2.5e8  # a larger product behaves as one cut down to this
NARROW = 16  # of a result with fewer rows or columns MKL adds up each element in several chains: more exactly
SECONDS = 0.06  # for the calibration of one product
# Of torch's time: less gain than this is noise, of which such short measurements have more.
WORTH_IT = 0.9
# Of a result that is made in blocks of columns: all that belongs to a block stays in a cache.
BLOCK_BYTES = 2 * 2**20
LEAST_COLUMNS = 256

Way = str


class Choice(NamedTuple):
    """The way of one product, and the best milliseconds of each on the shape that stood in for it."""

    way: Way
    # rows, N, K; None for a product that is too small or narrow to be measured.
    measured: tuple[int, int, int] | None = None
    milliseconds: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.way} (too small or narrow to measure)"
        times = ", ".join(f"{way} {ms:.3g} ms" for way, ms in self.milliseconds)
        rows, n, k = self.measured
        return f"{self.way} (measured with {rows} rows, N = {n}, K = {k}: {times})"


def multiply(
    way: Way, a: Tensor, b: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """a·bᵀ + bias in one of the ways. Values only.

    out: memory for the result, which is returned then.
    """
    if way == "onednn":
        return _onednn(a, b, bias, out)
    if bias is None:
        return torch.mm(a, b.t(), out=out)
    return torch.addmm(bias, a, b.t(), out=out)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
    length = a.shape[1]
    parts = -(-length // MOST_SUMMED)
    step = -(-length // (parts * PART)) * PART
    bias = None if bias is None else bias.contiguous()
    if b.t().is_contiguous() or (step >= length and out is None):
        y = _in_parts(a, b, bias, step)
        return y if out is None else out.copy_(y)
    y = a.new_empty(a.shape[0], b.shape[0]) if out is None else out
    columns = max(LEAST_COLUMNS, BLOCK_BYTES // (4 * a.shape[0]))
    for i in range(0, b.shape[0], columns):
        some = slice(i, i + columns)
        y[:, some] = _in_parts(a, b[some], None if bias is None else bias[some], step)
    return y


def _in_parts(a: Tensor, b: Tensor, bias: Tensor | None, step: int) -> Tensor:
    """The product as a sum of products over `step` elements of S each."""
    first = torch.ops.mkldnn._linear_pointwise.default
    further = torch.ops.mkldnn._linear_pointwise.binary
    y: Tensor = first(a[:, :step], _dense(b[:, :step]), bias, "none", [], "")
    for i in range(step, a.shape[1], step):
        y = further(a[:, i : i + step], y, _dense(b[:, i : i + step]), None, "add")
    return y


def _dense(b: Tensor) -> Tensor:
    return b if b.is_contiguous() or b.t().is_contiguous() else b.contiguous()


def ways() -> tuple[Way, ...]:
    """Those that can run in this build and under torch.backends.mkldnn.enabled."""
    return WAYS if _may_use_onednn() and _has_onednn else WAYS[:1]


def choose(kind: str, rows: int, n: int, k: int) -> Choice:
    """The way for this product of a layer with W [n, k] and `rows` rows of x, calibrated if it has to be."""
    if 2.0 * rows * n * k < MIN_FLOPS or min(_RESULT[kind](rows, n, k)) < NARROW:
        return _STOCK
    shape, threads, able = _stand_in(rows, n, k), torch.get_num_threads(), ways()
    if _remembered is None:
        return _calibrate(kind, *shape, threads, able)
    key = (kind, *shape, threads)
    if _remembered.get(key) not in able:
        _remembered[key] = _calibrate(kind, *shape, threads, able).way
    return Choice(_remembered[key], shape)


@contextmanager
def remembering(known: dict[Key, Way]) -> Iterator[None]:
    """Within: what `known` has is not measured, and what is measured is added to it. So a program that goes on in
    another process can take the products that it began with, whose last bits are others'.

    It holds for the whole process, backward passes having threads of their own.
    """
    global _remembered
    before, _remembered = _remembered, known
    try:
        yield
    finally:
        _remembered = before


Key = tuple[str, int, int, int, int]  # kind, rows, N, K of the shape measured, threads
_remembered: dict[Key, Way] | None = None
_STOCK = Choice("torch")
_RESULT: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "forward": lambda rows, n, k: (rows, n),
    "input": lambda rows, n, k: (rows, k),
    "weight": lambda rows, n, k: (n, k),
}
_may_use_onednn = torch._C._get_mkldnn_enabled  # the flag alone: cheap
_has_onednn = torch.backends.mkldnn.is_available()


def _stand_in(rows: int, n: int, k: int) -> tuple[int, int, int]:
    """The shape to measure: the next power of two of rows, then the longest side halved as often as needed."""
    sides = [1 << (rows - 1).bit_length(), n, k]
    while 2.0 * sides[0] * sides[1] * sides[2] > MAX_FLOPS:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return sides[0], sides[1], sides[2]


@cache
def _calibrate(kind: str, rows: int, n: int, k: int, threads: int, able: tuple[Way, ...]) -> Choice:
    """Times the ways; once per process, since `threads` and `able` are what else the answer depends on."""
    del threads
    with torch.inference_mode():
        a, b = operands(kind, *_random(rows, n, k))
        calls: dict[str, Callable[[], object]] = {
            way: lambda way=way: multiply(way, a, b)  # type: ignore[misc]
            for way in able
        }
        milliseconds = take_turns(calls, SECONDS)
    return Choice(winner(milliseconds, WORTH_IT), (rows, n, k), tuple(milliseconds.items()))


def _random(rows: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, W and dy, of a generator of their own: a user's random numbers stay as they are."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = ((rows, k), (n, k), (rows, n))
    x, weight, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        for shape in shapes
    )
    return x, weight, dy


def operands(kind: str, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of a product of a linear layer: views of its x [rows, K], W [N, K] and dy [rows, N]."""
    if kind == "forward":
        return x, weight
    if kind == "input":
        return dy, weight.t()
    return dy.t(), x.t()

"""Linear layers in inference: per shape and number of rows, the fastest of three ways on this machine.

    y = act(x·Wᵀ + b) · multiply + residual          x [..., K], W [N, K], y [..., N]

- ``torch``: what torch does by itself (fp32 on AMD CPUs: MKL at less than half of the peak).
- ``rows``: pyfuse's kernel for few rows, which is as fast as memory delivers W. Costs no memory.
- ``packed``: pyfuse's kernel for many rows, on a second copy of W laid out for it.

Which one is a matter of measurement: :func:`plan` times the three on the very shape, once per process.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import (
    linear as torch_linear,  # also where override_torch has put another there
)

from pyfuse.activations import FORMULA
from pyfuse.backends.cpu_linear import (
    MOST_TOGETHER,
    PackedWeight,
    RowsWeight,
    rows_together,
    why_not_linear,
)
from pyfuse.calibration import take_turns, winner

# Numbers of rows that are measured; a call takes the choice made for the next larger one.
ROWS = (1, 2, 4, 8, 16, 64, 256)
HARDLY_ANY_ROWS = 2  # up to here the rows kernel reads as much as the packed one and computes less
FEW_ROWS = 64  # beyond, reading W only once is no merit any more
COLD_ROWS = 8  # up to here the weight is read from memory, as in a model, where it is not cached
SECONDS = 0.3  # for each number of rows
WORTH_IT = 0.95  # of torch's time: less gain than this is noise
MAX_FLOPS = 4e9  # a larger product is not timed, it behaves as the largest one that was
COLD_BYTES = 40 * 2**20  # of copies of W that stand in for the rest of the model


def _finish(
    y: Tensor, activation: str | None, multiply: Tensor | None, residual: Tensor | None
) -> Tensor:
    if activation is not None:
        y = FORMULA[activation](y)
    if multiply is not None:
        y = y * multiply
    return y if residual is None else y + residual


class Choice:
    """The fastest way per number of rows, for one (N, K, dtype): the result of a calibration."""

    def __init__(self, ways: tuple[str, ...], milliseconds: dict[int, dict[str, float]]) -> None:
        self.ways = ways  # for up to ROWS[i] rows; the last also for more
        self.milliseconds = milliseconds

    def way(self, rows: int) -> str:
        i = bisect_left(ROWS, rows)
        return self.ways[i if i < len(self.ways) else -1]

    @property
    def description(self) -> str:
        """``rows up to 8, then packed``: the ways in order of the number of rows."""
        parts = []
        for i, way in enumerate(self.ways):
            if i + 1 == len(self.ways):
                parts.append(way)
            elif self.ways[i + 1] != way:
                parts.append(f"{way} up to {ROWS[i]}")
        return ", then ".join(parts)


class _Trial:
    """The three ways on random weights of one shape: on one, and on enough of them that none stays in a cache."""

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        self.dtype, self.k = dtype, k
        self.generator = torch.Generator("cpu").manual_seed(
            0
        )  # not the one that a program's own numbers come from
        weight = torch.randn(n, k, generator=self.generator, device="cpu").to(dtype)
        copies = min(15, COLD_BYTES // max(weight.numel() * weight.element_size(), 1))
        self.weights = [weight, *(weight.clone() for _ in range(copies))]
        able = why_not_linear(weight) is None
        self.rows = [RowsWeight(w, None) for w in self.weights] if able else []
        self.packed = [PackedWeight(w, None) for w in self.weights] if able else []

    def run(self, rows: int, activation: str | None) -> dict[str, float]:
        """Best milliseconds of each way for one product with this many rows."""
        x = torch.randn(rows, self.k, generator=self.generator, device="cpu").to(self.dtype)
        count = len(self.weights) if rows <= COLD_ROWS else 1
        calls: dict[str, Callable[[], object]] = {
            "torch": lambda: [
                _finish(torch_linear(x, w), activation, None, None) for w in self.weights[:count]
            ]
        }
        if self.packed and rows > HARDLY_ANY_ROWS:
            calls["packed"] = lambda: [w(x, activation) for w in self.packed[:count]]
        if self.rows and rows <= FEW_ROWS:
            calls["rows"] = lambda: [w(x, activation) for w in self.rows[:count]]
        return {way: ms / count for way, ms in take_turns(calls, SECONDS).items()}


@cache
def calibrate(
    n: int, k: int, dtype: torch.dtype, threads: int, activation: str | None = None
) -> Choice:
    """Times the ways for W [n, k] on `threads` threads, followed by an activation if one is named."""
    del threads  # part of the key: the answer depends on it
    ways: list[str] = []
    milliseconds: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        trial = _Trial(n, k, dtype)
        for rows in ROWS:
            if rows > 1 and 2.0 * rows * n * k > MAX_FLOPS:
                ways.append(ways[-1])
                continue
            best = milliseconds[rows] = trial.run(rows, activation)
            ways.append(winner(best, WORTH_IT))
    return Choice(tuple(ways), milliseconds)


class PackedLinear:
    """One linear layer run by a :class:`Choice`. Values only: it has no gradient.

    ``weight`` [N, K] ([K, N] if ``transposed``, as GPT-2's Conv1D keeps it) stays the model's own tensor.
    Copies of it (packed, or transposed) are made again when it has been written to.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, choice: Choice, *, transposed: bool = False
    ) -> None:
        self.weight, self.bias, self.choice, self.transposed = weight, bias, choice, transposed
        self._refresh()

    def _refresh(self) -> None:
        weight = self.weight.detach()
        weight = weight.t() if self.transposed else weight
        bias = None if self.bias is None else self.bias.detach()
        ways = self.choice.ways
        self._stock = (weight, bias)
        self._kernels: dict[str, RowsWeight] = {}
        if "rows" in ways:
            in_rows = weight if weight.stride(1) == 1 else weight.contiguous()
            self._kernels["rows"] = RowsWeight(in_rows, bias)
        if "packed" in ways:
            self._kernels["packed"] = PackedWeight(weight, bias)
        self._seen = self._state()

    def _state(self) -> tuple[int, ...]:
        weight, bias = self.weight, self.bias
        seen = (0 if weight.is_inference() else weight._version, weight.data_ptr())
        if bias is None:
            return seen
        return (*seen, 0 if bias.is_inference() else bias._version, bias.data_ptr())

    @property
    def outputs(self) -> int:
        """N."""
        return self._stock[0].shape[0]

    def is_current(self) -> bool:
        """Whether the weight is unchanged since its copies were made."""
        return self._state() == self._seen

    @property
    def memory_bytes(self) -> int:
        """Memory of the copies of W."""
        size = self.weight.numel() * self.weight.element_size()
        transposed = "rows" in self._kernels and self._stock[0].stride(1) != 1
        return size * (int("packed" in self._kernels) + int(transposed))

    @property
    def description(self) -> str:
        return self.choice.description

    def __deepcopy__(self, memo: dict[int, object]) -> PackedLinear:
        weight = self.weight.detach().clone()
        bias = None if self.bias is None else self.bias.detach().clone()
        return PackedLinear(weight, bias, self.choice, transposed=self.transposed)

    def kernel_for(self, x: Tensor) -> RowsWeight | None:
        """The kernel that x [..., K] takes, with the weight as it is now; None for torch's own way."""
        if self._state() != self._seen:
            self._refresh()
        k = x.shape[-1]
        kernel = self._kernels.get(self.choice.way(x.numel() // k if k else 0))
        if kernel is not None:
            if k != kernel.k:
                raise ValueError(f"x: K is {k}, but the weight has K = {kernel.k}")
            if x.dtype != kernel.dtype:
                raise TypeError(f"x: got {x.dtype}, but the weight is {kernel.dtype}")
        return kernel

    def __call__(
        self,
        x: Tensor,
        *,
        activation: str | None = None,
        multiply: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """act(x·Wᵀ + b) · multiply + residual; multiply and residual have the shape of the result.

        out: contiguous memory for it, else new memory is taken.
        """
        kernel = self.kernel_for(x)
        if kernel is not None:
            return kernel(x, activation, multiply, residual, out)
        if activation is not None and activation not in FORMULA:
            known = ", ".join(FORMULA)
            raise ValueError(f"activation: got {activation!r}, needs one of {known}")
        y = _finish(torch_linear(x, *self._stock), activation, multiply, residual)
        return y if out is None else out.copy_(y)


def together(
    x: Tensor, layers: Sequence[PackedLinear], activations: Sequence[str | None]
) -> list[Tensor]:
    """act(x·Wᵀ + b) of each layer. Where all take the rows kernel it is one call: for a single row,
    waking the threads costs as much as a small layer."""
    kernels = [layer.kernel_for(x) for layer in layers]
    rows = [kernel for kernel in kernels if type(kernel) is RowsWeight]
    if len(rows) == len(layers) <= MOST_TOGETHER:
        return rows_together(x, rows, activations)
    return [layer(x, activation=a) for layer, a in zip(layers, activations, strict=True)]


def plan(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    transposed: bool = False,
    activation: str | None = None,
) -> PackedLinear | None:
    """A PackedLinear for this layer, or None where nothing beats torch on this machine for its shape.

    activation: the one that its calls will ask for; what is fused with the product weighs in.
    """
    k, n = weight.shape if transposed else weight.shape[::-1]
    if n == 0 or k == 0 or weight.device.type != "cpu" or not weight.is_floating_point():
        return None
    choice = calibrate(n, k, weight.dtype, torch.get_num_threads(), activation)
    if set(choice.ways) == {"torch"}:
        return None
    return PackedLinear(weight, bias, choice, transposed=transposed)

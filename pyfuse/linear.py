"""Linear layers in inference: per shape and number of rows, the fastest of three ways on this machine.

    y = act(x·Wᵀ + b) · multiply + residual          x [..., K], W [N, K], y [..., N]

- ``torch``: what torch does by itself (on AMD CPUs MKL, at a quarter of the fp32 peak).
- ``rows``: pyfuse's kernel for few rows, which is as fast as memory delivers W. Costs no memory.
- ``packed``: the oneDNN inside torch, with W laid out once as it likes it. True fp32 (no bf16 passes
  unless torch is told to allow them); costs a second copy of W.

Which one is a matter of measurement: :func:`plan` times the three on the very shape, once per process.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pyfuse.backends.cpu_linear import ACTIVATION, linear_rows, why_not_linear_rows

# Numbers of rows that are measured; a call takes the choice made for the next larger one.
ROWS = (1, 2, 4, 8, 16, 32, 64, 256)
ROUNDS = 5
MAX_FLOPS = 4e9  # a larger product is not timed, it behaves as the largest one that was
COLD_BYTES = 48 * 2**20  # few rows are timed on copies of W of this size in all: in a model W is not cached
WORTH_IT = 0.95  # of torch's time: less gain than this is noise

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}
# oneDNN's names: (attribute, algorithm).
_POINTWISE: dict[str | None, tuple[str, str]] = {
    None: ("none", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
}


def _finish(y: Tensor, activation: str | None, multiply: Tensor | None, residual: Tensor | None) -> Tensor:
    if activation is not None:
        y = _ACTIVATIONS[activation](y)
    if multiply is not None:
        y = y * multiply
    return y if residual is None else y + residual


def _packed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    multiply: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """oneDNN takes either an activation or one binary operation along; the rest follows."""
    ops = torch.ops.mkldnn
    if activation is None and multiply is not None:
        y = ops._linear_pointwise.binary(x, multiply, weight, bias, "mul")
        return y if residual is None else y + residual
    if activation is None and residual is not None:
        y = ops._linear_pointwise.binary(x, residual, weight, bias, "add")
        return y  # type: ignore[no-any-return]
    attribute, algorithm = _POINTWISE[activation]
    y = ops._linear_pointwise(x, weight, bias, attribute, [], algorithm)
    return _finish(y, None, multiply, residual)


def pack(weight: Tensor) -> Tensor:
    """W [N, K] in oneDNN's own layout, as its linear wants it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), ROWS[-1])  # type: ignore[no-any-return]


def why_not_packed(weight: Tensor) -> str | None:
    """Why oneDNN cannot take this weight; None if it can."""
    if weight.device.type != "cpu":
        return f"the weight is on {weight.device}, not on the CPU"
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if weight.dtype == torch.float32:
        return None
    if weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return f"oneDNN has no fast {weight.dtype} on this CPU"


class Choice:
    """The fastest way per number of rows, for one (N, K, dtype): the result of a calibration."""

    def __init__(self, ways: tuple[str, ...], milliseconds: dict[int, dict[str, float]]) -> None:
        self.ways = ways  # for ROWS[i] rows; the last also for more
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


def _copies(weight: Tensor, rows: int) -> list[Tensor]:
    if rows > ROWS[3]:
        return [weight]
    size = weight.numel() * weight.element_size()
    return [weight] + [weight.clone() for _ in range(min(15, COLD_BYTES // max(size, 1)))]


def _measure(weight: Tensor, rows: int) -> dict[str, float]:
    """Best time of each way for one pass over the copies, interleaved."""
    x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
    weights = _copies(weight, rows)
    calls: dict[str, Callable[[], object]] = {"torch": lambda: [F.linear(x, w) for w in weights]}
    if why_not_linear_rows(weight) is None:
        calls["rows"] = lambda: [linear_rows(x, w, None) for w in weights]
    if why_not_packed(weight) is None:
        packs = [pack(w) for w in weights]
        calls["packed"] = lambda: [_packed(x, w, None, None, None, None) for w in packs]
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS + 1):  # the first round warms up; a minimum does not mind it
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            best[way] = min(best[way], (time.perf_counter() - start) * 1e3 / len(weights))
    return best


@lru_cache(maxsize=None)
def calibrate(n: int, k: int, dtype: torch.dtype, threads: int) -> Choice:
    """Times the ways for W [n, k] with `threads` threads; well under a second for most shapes."""
    del threads  # part of the key: the answer depends on it
    ways: list[str] = []
    milliseconds: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        weight = torch.randn(n, k).to(dtype)
        for rows in ROWS:
            if rows > 1 and 2.0 * rows * n * k > MAX_FLOPS:
                ways.append(ways[-1])
                continue
            best = milliseconds[rows] = _measure(weight, rows)
            winner = min(best, key=best.__getitem__)
            ways.append(winner if best[winner] < WORTH_IT * best["torch"] else "torch")
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
        self._copy_rows = transposed and "rows" in choice.ways
        self._refresh()

    def _refresh(self) -> None:
        weight = self.weight.detach()
        weight = weight.t() if self.transposed else weight
        self._rows_weight = weight.contiguous() if self._copy_rows or weight.stride(-1) != 1 else weight
        self._torch_weight = weight
        self._packed_weight = pack(weight) if "packed" in self.choice.ways else None
        self._bias = None if self.bias is None else self.bias.detach()
        self._seen = self._state()

    def _state(self) -> tuple[int, int, int]:
        version = 0 if self.weight.is_inference() else self.weight._version
        return (version, self.weight.data_ptr(), 0 if self.bias is None else self.bias.data_ptr())

    def is_current(self) -> bool:
        """Whether the weight is unchanged since its copies were made."""
        return self._state() == self._seen

    @property
    def memory_bytes(self) -> int:
        """Memory of the copies of W."""
        size = self.weight.numel() * self.weight.element_size()
        copies = int(self._packed_weight is not None)
        copies += int(self._rows_weight.data_ptr() != self.weight.data_ptr())
        return size * copies

    @property
    def description(self) -> str:
        return self.choice.description

    def __call__(
        self,
        x: Tensor,
        *,
        activation: str | None = None,
        multiply: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """act(x·Wᵀ + b) · multiply + residual; multiply and residual have the shape of the result."""
        if activation not in ACTIVATION:
            known = ", ".join(str(name) for name in ACTIVATION)
            raise ValueError(f"activation: got {activation!r}, needs one of {known}")
        if self._state() != self._seen:
            self._refresh()
        way = self.choice.way(x.numel() // x.shape[-1] if x.shape[-1] else 0)
        if way == "rows":
            return linear_rows(x, self._rows_weight, self._bias, activation, multiply, residual)
        if way == "packed":
            return _packed(x, self._packed_weight, self._bias, activation, multiply, residual)  # type: ignore[arg-type]
        y = F.linear(x, self._torch_weight, self._bias)
        return _finish(y, activation, multiply, residual)


def plan(weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> PackedLinear | None:
    """A PackedLinear for this layer, or None where nothing beats torch on this machine for its shape."""
    k, n = weight.shape if transposed else weight.shape[::-1]
    if n == 0 or k == 0 or weight.device.type != "cpu" or not weight.is_floating_point():
        return None
    choice = calibrate(n, k, weight.dtype, torch.get_num_threads())
    if set(choice.ways) == {"torch"}:
        return None
    return PackedLinear(weight, bias, choice, transposed=transposed)

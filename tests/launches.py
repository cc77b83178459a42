"""The launches that a call makes, recorded and not run: what to compile ahead of time for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from ptxemu import triton_run
from torch import Tensor

from pyfuse.backends import triton_device, triton_gpu
from pyfuse.backends.triton_device import Arch


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compiled(self, arch: Arch) -> triton_run.Compiled:
        return triton_run.compile_kernel(self.kernel, *self.args, arch=arch, **self.options)


class Recorder:
    """A device that starts nothing. Results of what it records are whatever memory holds."""

    def __init__(self, arch: Arch) -> None:
        self.arch, self.name = arch, f"recorder of {arch}"
        self.launches: list[Launch] = []

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        self.launches.append(Launch(kernel, grid, args, options))

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        raise AssertionError("nothing runs here")


def record(arch: Arch, call: Callable[[], Any]) -> list[Launch]:
    recorder = Recorder(arch)
    with triton_device.stand_in(recorder):
        call()
    return recorder.launches


def attention_launches(
    arch: Arch, d: int, dtype: torch.dtype, length: int = 2048, **options: Any
) -> dict[str, Launch]:
    """Forward and backward of attention of [1, 8, length, d] in [B, M, H, D] memory, by the kernels' names."""
    q, k, v = (torch.empty(1, length, 8, d, dtype=dtype).transpose(1, 2).detach() for _ in range(3))
    given: dict[str, Any] = {
        "causal": False, "window": None, "softcap": None, "sinks": None, "alibi_slopes": None, "scale": d**-0.5,
        "return_lse": False, "mask": None, "seqlens_k": None, "dropout_p": 0.0, "dropout_seed": None, **options,
    }  # fmt: skip
    needs = frozenset("qkv") | {
        n for n in ("mask", "sinks", "alibi_slopes") if _differentiable(given[n])
    }

    def both() -> None:
        gradient = triton_gpu.OPS["attention"].gradient
        assert gradient is not None
        _, saved = gradient.forward(q, k, v, **given)
        gradient.backward((saved[0],), (q, k, v), given, saved, needs)

    return {launch.kernel.__name__: launch for launch in record(arch, both)}


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()

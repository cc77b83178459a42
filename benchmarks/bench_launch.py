"""What Python costs in a call of the Triton kernels: pyfuse's part and Triton's, without the driver's.

    python -m benchmarks.bench_launch

Needs no GPU. Every step of a call runs, up to the launch itself, which is empty; nothing is compiled. On a GPU this is
time that only a busy GPU hides. CPU time of the process is counted, best of several rounds: other load hardly shows.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

import pyfuse
from benchmarks import command
from pyfuse.backends import triton_device


class Device:
    """One that would run kernels for sm_80. passes_on: to Triton, whose driver and compiled kernels are empty."""

    arch, name, multiprocessors = 80, "empty", 108

    def __init__(self, passes_on: bool) -> None:
        self.passes_on = passes_on

    def launch(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        if self.passes_on:
            kernel[grid](*args, **options)

    def time(self, launch: Callable[[Any], None], tiles: Any) -> None:
        raise NotImplementedError("an empty launch takes no time")


def empty_triton() -> None:
    """From here on Triton is as on a GPU for sm_80, but kernels are compiled to nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    def nothing(*_: Any) -> None:
        return None

    kernel = SimpleNamespace(
        function=0, packed_metadata=(), launch_metadata=nothing, run=nothing, name="nothing"
    )

    def compile_nothing(self: Any, key: str, *_: Any) -> Any:
        self.device_caches[0][0][key] = kernel
        return kernel

    JITFunction._do_compile = compile_nothing
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", 80, 32),
        )
    )


def calls() -> dict[str, Callable[[], object]]:
    """Of sizes that do not matter: they are not computed."""
    bf16 = torch.bfloat16
    q = torch.randn(1, 16, 8, 64, dtype=bf16).transpose(1, 2)
    leaf, upstream = q.detach().requires_grad_(), torch.randn_like(q)
    k_cache, v_cache = torch.randn(2, 2, 8, 1024, 64, dtype=bf16)
    one, lengths = torch.randn(2, 8, 1, 64, dtype=bf16), torch.tensor([100, 90])
    x, w, ids = torch.randn(64, 768, dtype=bf16), torch.randn(768), torch.randint(0, 64, (4, 16))
    cos, sin = torch.rand(2, 16, 32)
    attention = partial(pyfuse.attention, causal=True, backend="triton")
    return {
        "attention": lambda: attention(q, q, q),
        "attention and its gradient": lambda: attention(leaf, leaf, leaf).backward(upstream),
        "decode_attention": lambda: pyfuse.decode_attention(
            one, k_cache, v_cache, seqlens_k=lengths, backend="triton"
        ),
        "rms_norm": lambda: pyfuse.rms_norm(x, w, backend="triton"),
        "layer_norm, residual, prenorm": lambda: pyfuse.layer_norm(
            x, w, w, residual=x, prenorm=True, backend="triton"
        ),
        "rope": lambda: pyfuse.rope(q, cos, sin, layout="half", backend="triton"),
        "embed": lambda: pyfuse.embed(ids, x, backend="triton"),
    }


def microseconds(call: Callable[[], object], passes_on: bool, number: int = 1000) -> float:
    with triton_device.stand_in(Device(passes_on)):
        call()
        rounds = timeit.repeat(call, number=number, repeat=9, timer=time.process_time)
    return 1e6 * min(rounds) / number


def main() -> int:
    command.begin(command.parser("bench_launch"))
    try:
        import triton
    except ImportError:
        print("bench_launch: triton is not installed", file=sys.stderr)
        return 1
    print(
        f"triton {triton.__version__}; microseconds of Python in each call, of pyfuse and of Triton"
    )
    empty_triton()
    for name, call in calls().items():
        ours = microseconds(call, passes_on=False)
        tritons = microseconds(call, passes_on=True) - ours
        print(f"{name:32}{ours:7.1f}{tritons:7.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The Triton kernels on a GPU against torch SDPA, FlexAttention, flash-attn and Liger, those that are installed.

    make bench-gpu      or      python -m benchmarks.bench_gpu [--dtype bfloat16] [--quick]

A line for each case and contender: median time of many runs with cold L2 (triton.testing.do_bench), TFLOP/s or GB/s,
and pyfuse's gain over it. Attention counts the products of what is visible: 4·B·Hq·M·N·D forward, 2.5 times that
backward, half of it when causal; the others count bytes read and written. Nothing is timed before its result was
compared with the eager formula in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import pyfuse
from benchmarks.command import require
from pyfuse import dispatch

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One line's work; contenders by name, pyfuse first. amount: floating-point operations, or bytes."""

    name: str
    unit: str  # TFLOP/s or GB/s
    amount: float
    contenders: dict[str, Run]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: tuple[int, int]
    length: int
    d: int
    causal: bool

    def __str__(self) -> str:
        heads = self.heads[0] if self.heads[0] == self.heads[1] else "{}/{}".format(*self.heads)
        kind = " causal" if self.causal else ""
        return f"B{self.batch} H{heads} N{self.length} D{self.d}{kind}"

    @property
    def flops(self) -> float:
        products = 4.0 * self.batch * self.heads[0] * self.length**2 * self.d
        return products / 2 if self.causal else products


SHAPES = [
    Shape(batch, heads, length, d, causal)
    for causal in (False, True)
    for d in (64, 128)
    for batch, length in ((16, 1024), (4, 4096), (1, 16384))
    for heads in ((16, 16), (32, 8))
]
QUICK = [Shape(4, (16, 16), 4096, d, True) for d in (64, 128)]


def attention(shape: Shape, dtype: torch.dtype) -> Iterator[Case]:
    """Forward, then forward and backward together."""
    (hq, hk), n, d = shape.heads, shape.length, shape.d
    q, k, v = (
        torch.randn(shape.batch, n, h, d, device="cuda", dtype=dtype).transpose(1, 2)
        for h in (hq, hk, hk)
    )
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "pyfuse": partial(pyfuse.attention, causal=shape.causal, backend="triton"),
        "SDPA": partial(
            F.scaled_dot_product_attention, is_causal=shape.causal, enable_gqa=hq != hk
        ),
        "FlexAttention": _flex(shape),
    }
    if _installed("flash_attn"):
        calls["flash-attn"] = _flash_attn(shape)
    one = (q[:1, :, :512], k[:1, :, :512], v[:1, :, :512])
    exact = pyfuse.attention(*(x.double() for x in one), causal=shape.causal, backend="eager")
    eager = pyfuse.attention(*one, causal=shape.causal, backend="eager")
    require(f"attention {shape}", calls["pyfuse"](*one), eager, exact)
    forward: dict[str, Run] = {name: partial(call, q, k, v) for name, call in calls.items()}
    yield Case(f"attention {shape}", "TFLOP/s", shape.flops, forward)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    upstream = torch.randn_like(q)

    def both(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(call(*leaves), leaves, upstream)

    backward: dict[str, Run] = {name: partial(both, call) for name, call in calls.items()}
    yield Case(f"attention and gradient {shape}", "TFLOP/s", 3.5 * shape.flops, backward)


def _flex(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if shape.causal:
        n = shape.length
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cuda")
    return partial(compiled, block_mask=block_mask, enable_gqa=shape.heads[0] != shape.heads[1])


def _flash_attn(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=shape.causal)
        return o.transpose(1, 2)

    return call


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def norms(dtype: torch.dtype) -> Iterator[Case]:
    """RMSNorm and LayerNorm with the residual add before it, rows of a model's size."""
    for rows, d in ((16384, 1024), (8192, 4096), (4096, 8192)):
        x, residual = (torch.randn(rows, d, device="cuda", dtype=dtype) for _ in range(2))
        w, b = (torch.randn(d, device="cuda", dtype=dtype) for _ in range(2))
        size = x.element_size() * rows * d
        for name, ours, torchs in (
            ("rms_norm", partial(pyfuse.rms_norm, x, w), partial(F.rms_norm, x, (d,), w, 1e-6)),
            ("layer_norm", partial(pyfuse.layer_norm, x, w, b), partial(F.layer_norm, x, (d,), w, b)),
        ):  # fmt: skip
            runs: dict[str, Run] = {"pyfuse": partial(ours, backend="triton"), "torch": torchs}
            if name == "rms_norm" and _installed("liger_kernel"):
                from liger_kernel.transformers.functional import liger_rms_norm

                runs["Liger"] = partial(liger_rms_norm, x, w, 1e-6)
            check = partial(getattr(pyfuse, name), backend="eager")
            parameters = (w,) if name == "rms_norm" else (w, b)
            exact = check(x[:64].double(), *(t.double() for t in parameters))
            require(name, ours(backend="triton")[:64], check(x[:64], *parameters), exact)
            yield Case(f"{name} {rows} x {d}", "GB/s", 2.0 * size, runs)
        prenorm = partial(pyfuse.rms_norm, x, w, residual=residual, prenorm=True, backend="triton")

        def apart(x: Tensor = x, residual: Tensor = residual, w: Tensor = w) -> Tensor:
            return F.rms_norm(x + residual, (x.shape[1],), w, 1e-6)

        yield Case(
            f"add and rms_norm {rows} x {d}",
            "GB/s",
            4.0 * size,
            {"pyfuse": prenorm, "torch": apart},
        )


def measure(case: Case) -> None:
    from triton.testing import do_bench

    times = {}
    for name, run in case.contenders.items():
        try:
            times[name] = float(do_bench(run, return_mode="median"))
        except (RuntimeError, NotImplementedError) as error:
            print(f"{case.name:44}{name:15}cannot: {str(error).splitlines()[0][:70]}")
    ours = times["pyfuse"]
    scale = {"TFLOP/s": 1e9, "GB/s": 1e6}[case.unit]
    for name, ms in times.items():
        gain = "" if name == "pyfuse" else f"   pyfuse is {ms / ours:5.2f} x as fast"
        rate = case.amount / ms / scale
        print(f"{case.name:44}{name:15}{ms:9.3f} ms {rate:8.1f} {case.unit}{gain}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two shapes of attention only")
    arguments = parser.parse_args()
    reason = dispatch.backend_status()["triton"]
    if reason is not None:
        print(f"bench_gpu: {reason}", file=sys.stderr)
        return 1
    import triton

    dtype = getattr(torch, arguments.dtype)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {dtype}"
    )
    for shape in QUICK if arguments.quick else SHAPES:
        for case in attention(shape, dtype):
            measure(case)
    if not arguments.quick:
        for case in norms(dtype):
            measure(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())

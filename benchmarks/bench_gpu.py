"""GPU kernels, Triton's or CUDA's, against torch SDPA, FlexAttention, flash-attn and Liger, those that are installed.

    make bench-gpu      or      python -m benchmarks.bench_gpu [--backend cuda]
        [--dtype bfloat16] [--quick]

A line for each case and contender: median time of many runs with cold L2 (triton.testing.do_bench), TFLOP/s or GB/s,
and pyfuse's gain over it. Attention counts the products of what is visible: 4·B·Hq·M·N·D forward, 2.5 times that
backward, half of it when causal; the loss counts its three products; the others count bytes read and written. Nothing
is timed before its result was compared with the eager formula in float64. What Python costs in each launch:
python -m benchmarks.bench_launch.
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
DEVICE = "cuda"
BACKEND = "triton"  # whose kernels are "pyfuse"; --backend says another


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
        torch.randn(shape.batch, n, h, d, device=DEVICE, dtype=dtype).transpose(1, 2)
        for h in (hq, hk, hk)
    )
    calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "pyfuse": partial(pyfuse.attention, causal=shape.causal, backend=BACKEND),
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

    torch.compiler.reset()  # after some shapes torch would compile no more, and run the formula
    compiled = torch.compile(flex_attention, dynamic=False)
    block_mask = None
    if shape.causal:
        n = shape.length
        block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=DEVICE)
    return partial(compiled, block_mask=block_mask, enable_gqa=shape.heads[0] != shape.heads[1])


def _flash_attn(shape: Shape) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from flash_attn import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=shape.causal)
        return o.transpose(1, 2)

    return call


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# Sequences, heads of queries and of keys, keys, head size: one query each.
DECODING = [(1, (32, 8), 8192, 128), (16, (32, 8), 8192, 128), (64, (32, 32), 2048, 64)]


def decoding(dtype: torch.dtype) -> Iterator[Case]:
    """Contiguous caches against SDPA, which has no lengths; pages of 16 against that."""
    for batch, (hq, hk), n, d in DECODING:
        q = torch.randn(batch, hq, 1, d, device=DEVICE, dtype=dtype)
        caches = torch.randn(2, batch, hk, n, d, device=DEVICE, dtype=dtype)
        lengths = torch.full((batch,), n, device=DEVICE)
        pages = torch.randperm(batch * n // 16, device=DEVICE).to(torch.int32).view(batch, -1)
        paged = torch.empty(2, pages.numel(), hk, 16, d, device=DEVICE, dtype=dtype)
        paged[:, pages.flatten()] = caches.unflatten(3, (-1, 16)).transpose(2, 3).flatten(1, 2)
        decode = partial(pyfuse.decode_attention, q, seqlens_k=lengths)
        runs: dict[str, Run] = {
            "pyfuse": partial(decode, *caches, backend=BACKEND),
            "pyfuse, paged": partial(decode, *paged, block_table=pages, backend=BACKEND),
            "SDPA": partial(
                F.scaled_dot_product_attention, q, caches[0], caches[1], enable_gqa=hq != hk
            ),
        }
        exact = pyfuse.decode_attention(
            q.double(), *caches.double(), seqlens_k=lengths, backend="eager"
        )
        eager = decode(*caches, backend="eager")
        for name in ("pyfuse", "pyfuse, paged"):
            result = runs[name]()
            assert isinstance(result, Tensor)
            require(f"decode, {name}", result, eager, exact)
        heads = f"{hq}/{hk}" if hq != hk else str(hq)
        yield Case(
            f"decode B{batch} H{heads} N{n} D{d}", "GB/s", caches.numel() * q.element_size(), runs
        )


ROWS = [(16384, 1024), (8192, 4096), (4096, 8192)]


def norms(dtype: torch.dtype) -> Iterator[Case]:
    """RMSNorm and LayerNorm, rows of a model's size; the former with the residual add before it, too."""
    liger = _installed("liger_kernel")
    for rows, d in ROWS:
        x, residual = (torch.randn(rows, d, device=DEVICE, dtype=dtype) for _ in range(2))
        w, b = (torch.randn(d, device=DEVICE, dtype=dtype) for _ in range(2))
        size = x.element_size() * rows * d
        calls: dict[str, dict[str, Run]] = {
            "rms_norm": {"torch": partial(F.rms_norm, x, (d,), w, 1e-6)},
            "layer_norm": {"torch": partial(F.layer_norm, x, (d,), w, b)},
        }
        if liger:
            from liger_kernel.transformers.functional import liger_layer_norm, liger_rms_norm

            calls["rms_norm"]["Liger"] = partial(liger_rms_norm, x, w, 1e-6)
            calls["layer_norm"]["Liger"] = partial(liger_layer_norm, x, w, b, 1e-5)
        for name, others in calls.items():
            parameters = (w,) if name == "rms_norm" else (w, b)
            ours = partial(getattr(pyfuse, name), x, *parameters, backend=BACKEND)
            eager = partial(getattr(pyfuse, name), backend="eager")
            exact = eager(x[:64].double(), *(t.double() for t in parameters))
            require(name, ours()[:64], eager(x[:64], *parameters), exact)
            yield Case(f"{name} {rows} x {d}", "GB/s", 2.0 * size, {"pyfuse": ours} | others)
        prenorm = partial(pyfuse.rms_norm, x, w, residual=residual, prenorm=True, backend=BACKEND)

        def apart(x: Tensor = x, residual: Tensor = residual, w: Tensor = w) -> Tensor:
            return F.rms_norm(x + residual, (x.shape[1],), w, 1e-6)

        runs: dict[str, Run] = {"pyfuse": prenorm, "torch": apart}
        yield Case(f"add and rms_norm {rows} x {d}", "GB/s", 4.0 * size, runs)


# Batch, heads of queries and of keys, rows, head size; tokens, vocabulary, columns.
ROTATED = [(4, (32, 8), 4096, 128), (16, (16, 16), 1024, 64)]
EMBEDDED = [(16384, 50257, 768), (16384, 128256, 4096)]


def positions(dtype: torch.dtype) -> Iterator[Case]:
    """RoPE of q and k in place, and the embedding of tokens with their LayerNorm."""
    for batch, (hq, hk), n, d in ROTATED:
        q, k = (
            torch.randn(batch, n, h, d, device=DEVICE, dtype=dtype).transpose(1, 2)
            for h in (hq, hk)
        )
        angles = torch.rand(n, d // 2, device=DEVICE)
        cos, sin = angles.cos(), angles.sin()
        rope = partial(pyfuse.rope, layout="half")
        require(
            "rope",
            rope(q, cos, sin, backend=BACKEND),
            rope(q, cos, sin, backend="eager"),
            rope(q.double(), cos.double(), sin.double(), backend="eager"),
        )
        whole = (torch.cat((t, t), -1)[None].to(dtype) for t in (cos, sin))
        pair = partial(pyfuse.rope_pair, q, k, cos, sin, layout="half", inplace=True)
        contenders: dict[str, Run] = {"pyfuse": partial(pair, backend=BACKEND)}
        if _installed("liger_kernel"):
            from liger_kernel.transformers.rope import liger_rotary_pos_emb

            contenders["Liger"] = partial(liger_rotary_pos_emb, q, k, *whole)
        heads = f"{hq}/{hk}" if hq != hk else str(hq)
        moved = 2.0 * (q.numel() + k.numel()) * q.element_size()
        yield Case(f"rope B{batch} H{heads} N{n} D{d}", "GB/s", moved, contenders)
    for tokens, vocabulary, d in EMBEDDED:
        table = torch.randn(vocabulary, d, device=DEVICE, dtype=dtype)
        ids = torch.randint(0, vocabulary, (1, tokens), device=DEVICE)
        w, b = (torch.randn(d, device=DEVICE, dtype=dtype) for _ in range(2))
        embed = partial(pyfuse.embed, norm_weight=w, norm_bias=b)

        def two(ids: Tensor = ids, table: Tensor = table, w: Tensor = w, b: Tensor = b) -> Tensor:
            return F.layer_norm(F.embedding(ids, table), (w.shape[0],), w, b)

        few = ids[:, :64]
        exact = pyfuse.embed(
            few, table.double(), norm_weight=w.double(), norm_bias=b.double(), backend="eager"
        )
        require(
            "embed", embed(few, table, backend=BACKEND), embed(few, table, backend="eager"), exact
        )
        yield Case(
            f"embed and layer_norm {tokens} x {d}",
            "GB/s",
            2.0 * tokens * d * table.element_size(),
            {"pyfuse": partial(embed, ids, table, backend=BACKEND), "torch": two},
        )


# Tokens, vocabulary, columns.
LOSSES = [(8192, 49152, 2048), (8192, 128256, 4096)]


def losses(dtype: torch.dtype) -> Iterator[Case]:
    """The loss of the last layer with its gradients: three products of the logits' size, 6·T·V·K together."""
    for tokens, vocabulary, k in LOSSES:
        x = torch.randn(tokens, k, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = torch.randn(vocabulary, k, device=DEVICE, dtype=dtype) / k**0.5
        target = torch.randint(vocabulary, (tokens,), device=DEVICE)
        few = slice(0, 64)
        eager = partial(pyfuse.ops.linear_cross_entropy, target=target[few], backend="eager")
        ours = partial(pyfuse.ops.linear_cross_entropy, backend=BACKEND)
        sample = x.detach()[few]
        exact = eager(sample.double(), weight.double())
        require("loss", ours(sample, weight, target[few]), eager(sample, weight), exact)
        calls: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
            "pyfuse": ours,
            "torch": lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target),
        }
        if _installed("liger_kernel"):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            calls["Liger"] = liger_fused_linear_cross_entropy
        leaves = (x, weight.requires_grad_())

        def step(
            call: Callable[[Tensor, Tensor, Tensor], Tensor],
            leaves: tuple[Tensor, Tensor] = leaves,
            target: Tensor = target,
        ) -> None:
            torch.autograd.grad(call(*leaves, target), leaves)

        runs: dict[str, Run] = {name: partial(step, call) for name, call in calls.items()}
        name = f"loss and gradients {tokens} x {vocabulary} x {k}"
        yield Case(name, "TFLOP/s", 6.0 * tokens * vocabulary * k, runs)


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
    global BACKEND
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu")
    parser.add_argument("--backend", choices=("triton", "cuda"), default=BACKEND)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="two shapes of attention only")
    arguments = parser.parse_args()
    BACKEND = arguments.backend
    reason = dispatch.backend_status()[BACKEND]
    if reason is not None:
        print(f"bench_gpu: {reason}", file=sys.stderr)
        return 1
    import triton

    dtype = getattr(torch, arguments.dtype)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, {BACKEND}, {dtype}")
    for shape in QUICK if arguments.quick else SHAPES:
        for case in attention(shape, dtype):
            measure(case)
    if not arguments.quick:
        for case in (*decoding(dtype), *norms(dtype), *positions(dtype)):
            measure(case)
        for case in losses(dtype) if BACKEND == "triton" else ():  # CUDA has no kernel of it
            measure(case)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The promised figures of norms and positions, and of a padded batch through a whole model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import pyfuse
from benchmarks.bar import Bar, times_bar, unmeasured
from benchmarks.command import require
from benchmarks.turns import in_turns, ratio
from pyfuse.cli import measure
from pyfuse.models import zoo

BUDGET = 4.0
Call = Callable[[], object]


def against(name: str, theirs: Call, ours: Call, target: float) -> Bar:
    both = {"theirs": measure.stopwatch(theirs), "pyfuse": measure.stopwatch(ours)}
    return times_bar(name, ratio(in_turns(both, budget=BUDGET), "theirs", "pyfuse"), target)


def norms() -> Iterator[Bar]:
    """Rows of a Transformer's width, in float32."""
    rows, d = 4096, 768
    x, residual, upstream = (torch.randn(rows, d) for _ in range(3))
    weight, bias = torch.randn(d), torch.randn(d)
    size = f"{rows} x {d}"

    def layer_norm(t: Tensor, w: Tensor = weight, b: Tensor = bias) -> Tensor:
        return pyfuse.layer_norm(t, w, b, 1e-5)

    def rms_norm(t: Tensor) -> Tensor:
        return pyfuse.rms_norm(t, weight, 1e-6)

    def torch_layer(t: Tensor, w: Tensor = weight, b: Tensor = bias) -> Tensor:
        return F.layer_norm(t, (d,), w, b, 1e-5)

    def torch_rms(t: Tensor, w: Tensor = weight) -> Tensor:
        return F.rms_norm(t, (d,), w, 1e-6)

    wide = (t.double() for t in (x, weight, bias))
    require("layer_norm", layer_norm(x), torch_layer(x), torch_layer(*wide))
    require("rms_norm", rms_norm(x), torch_rms(x), torch_rms(x.double(), weight.double()))
    with torch.inference_mode():
        yield against(
            f"LayerNorm {size}: against torch", lambda: torch_layer(x), lambda: layer_norm(x), 1.6
        )
        yield against(
            f"RMSNorm {size}: against torch", lambda: torch_rms(x), lambda: rms_norm(x), 4.5
        )
        yield from _fused(x, residual, weight, bias, size)
    yield _backward(layer_norm, torch_layer, (x, weight, bias), upstream, size)


def _fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, size: str) -> Iterator[Bar]:
    def fused() -> tuple[Tensor, Tensor]:
        return pyfuse.layer_norm(x, weight, bias, residual=residual, prenorm=True)

    def apart() -> tuple[Tensor, Tensor]:
        z = x + residual
        return pyfuse.layer_norm(z, weight, bias), z

    for ours, theirs in zip(fused(), apart(), strict=True):
        if not torch.equal(ours, theirs):
            raise AssertionError("layer_norm with a residual differs from the sum and its norm")
    yield against(f"add and LayerNorm {size}: against the two apart", apart, fused, 1.4)


def _backward(
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    upstream: Tensor,
    size: str,
) -> Bar:
    def gradients(
        norm: Callable[..., Tensor], wide: bool = False
    ) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in inputs]
        y = norm(*leaves)
        return lambda: torch.autograd.grad(y, leaves, upstream.to(y.dtype), retain_graph=True)

    run, peer = gradients(ours), gradients(theirs)
    exact = gradients(theirs, wide=True)
    for name, actual, own, truth in zip("xwb", run(), peer(), exact(), strict=True):
        require(f"layer_norm d{name}", actual, own, truth, factor=3)
    return against(f"LayerNorm backward {size}: against torch", peer, run, 2.0)


def rope() -> Iterator[Bar]:
    """q and k of SmolLM2's heads, against Hugging Face's formula."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (torch.randn(1, 2048, heads, 64).transpose(1, 2) for heads in (9, 3))
    inv_freq, _ = pyfuse.rope_frequencies(64)
    angles = torch.outer(torch.arange(2048).float(), inv_freq.float())
    cos, sin = angles.cos(), angles.sin()  # [M, D/2]
    doubled = [
        torch.cat((t, t), -1)[None] for t in (cos, sin)
    ]  # as the model makes them, [1, M, D]

    def ours() -> list[Tensor]:
        return [pyfuse.rope(t, cos, sin, layout="half") for t in (q, k)]

    def theirs() -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, *doubled)

    exact = apply_rotary_pos_emb(q.double(), k.double(), *(t.double() for t in doubled))
    for name, *three in zip("qk", ours(), theirs(), exact, strict=True):
        require(f"rope of {name}", *three)
    with torch.inference_mode():
        yield against("RoPE of q 1x9x2048x64, k 1x3x2048x64: against Hugging Face", theirs, ours, 4)


def padded_batch() -> Iterator[Bar]:
    """MiniLM end to end on 32 sentences of up to 256 tokens, two fifths of the positions padding."""
    name, target = "MiniLM 32 x 256, 60 % real tokens, fp32: against stock", 3
    missing = zoo.problem("minilm")
    if missing is not None:
        yield unmeasured(name, missing, f">= {target} x")
        return
    from transformers import AutoModel

    stock = AutoModel.from_pretrained(zoo.path("minilm")).eval()
    ours = copy.deepcopy(stock)
    pyfuse.accelerate(ours)  # raises AccuracyError past the accuracy rule
    ids = measure.random_tokens(stock, 32, 256)
    mask = measure.right_padding(32, 256, 0.6)
    ids = ids.masked_fill(mask == 0, stock.config.pad_token_id)

    def embed(model: torch.nn.Module) -> Call:
        return lambda: measure.mean_pool(model(input_ids=ids, attention_mask=mask)[0], mask)

    runs = {"stock": measure.stopwatch(embed(stock)), "pyfuse": measure.stopwatch(embed(ours))}
    with torch.no_grad():
        rounds = in_turns(runs, budget=20.0)
    yield times_bar(name, ratio(rounds, "stock", "pyfuse"), target)

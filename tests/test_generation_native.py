"""The compiled step (csrc/cpu/decode_step.cpp) alone: accuracy, bits, refusals. See test_generation_runner.py too."""

from __future__ import annotations

import copy
from typing import Any

import numerics
import pytest
import torch
from conftest import Target, at_threads
from generation_cases import large
from hf_cases import small_models
from torch import Tensor

from pyfuse.backends.cpu_step import NativeStep, why_not_step
from pyfuse.generation.runner import Runner
from pyfuse.models import stock
from pyfuse.models.transformer import Config, Transformer

__all__ = ["small_models"]
pytestmark = pytest.mark.backends("cpu")

# No size is a multiple of a panel, nor of a vector.
SIZES: dict[str, Any] = {
    "vocabulary": 133, "width": 71, "layers": 2, "hidden": 99, "max_positions": 128,
}  # fmt: skip
GATED: dict[str, Any] = {
    "norm": "rms",
    "gated": True,
    "attention_bias": False,
    "hidden_bias": False,
}
CONFIGS = {
    "gpt2": Config(**SIZES, heads=3, head_dim=19),
    "llama": Config(**SIZES, **GATED, heads=6, kv_heads=2, head_dim=12, position="rope", activation="silu"),
    "window": Config(
        **SIZES, **GATED | {"attention_bias": True, "hidden_bias": True}, heads=4, kv_heads=1, head_dim=16,
        position="rope", activation="gelu", window=9, tied=False, head_bias=True, head_scale=0.7, embedding_scale=1.3,
    ),
    "sinusoidal": Config(**SIZES, heads=2, head_dim=33, position="sinusoidal", activation="relu", attention_scale=0.3),
}  # fmt: skip
B, T, PAGE = 3, 70, 16
PARTS = [(40, True), (1, False), (3, False), (26, True)]  # tokens, and whether they are a prompt's


def made(name: str, dtype: torch.dtype) -> Transformer:
    return large(CONFIGS[name], 0.15).to(dtype)


class Cache:
    """Pages in a random order, NaN where nothing has been written."""

    def __init__(self, c: Config, dtype: torch.dtype, batch: int = B) -> None:
        pages = -(-T // PAGE)
        shape = c.layers, batch * pages + 1, c.kv_heads or c.heads, PAGE, c.d
        self.k, self.v = (torch.full(shape, torch.nan, dtype=dtype) for _ in "kv")
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(3))
        self.table = order[: batch * pages].view(batch, pages).int()

    def run(
        self, step: NativeStep, ids: Tensor, parts: list[tuple[int, bool]] | None = None
    ) -> Tensor:
        """Logits [B, T, V] of all tokens, in parts."""
        at, found = 0, []
        for count, prompt in PARTS if parts is None else parts:
            some, at = ids[:, at : at + count].contiguous(), at + count
            ends = torch.full((len(ids),), at)
            y = step(some, ends, self.table, self.k, self.v, prompt=prompt, every=True)
            found.append(y.view(len(ids), count, -1))
        return torch.cat(found, 1)


def texts(c: Config) -> Tensor:
    return torch.randint(c.vocabulary, (B, T), generator=torch.Generator().manual_seed(2))


def of_modules(model: Transformer, ids: Tensor, dtype: torch.dtype) -> Tensor:
    other = Transformer(model.config, stock).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        y: Tensor = other.to(dtype)(ids)
    return y if dtype == torch.float64 else y.float()


def exact(model: Transformer, ids: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = copy.deepcopy(model).double()(ids)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits(target: Target, name: str, dtype: torch.dtype) -> None:
    model, ids = made(name, dtype), texts(CONFIGS[name])
    actual = Cache(model.config, dtype).run(NativeStep(model), ids)
    numerics.check(actual, exact(model, ids), of_modules(model, ids, dtype), name)


def rounded_to_int8(model: Transformer) -> Transformer:
    """Its matrices as int8 has them, in float64: an untied head, since the embedding is not rounded."""
    c = Config(**vars(model.config) | {"tied": False})
    other = Transformer(c).double().eval()
    state = {k: v.double() for k, v in model.state_dict().items()}
    state.setdefault("matrix", state["decoder.embedding.token.weight"])
    for name, w in state.items():
        if w.dim() == 2 and ".embedding." not in name:
            scale = w.float().abs().amax(1, keepdim=True) / 127
            state[name] = (w.float() / scale).round().double() * scale.double()
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_int8_costs_the_rounding_of_weights_alone(
    target: Target, name: str, dtype: torch.dtype
) -> None:
    """Against the model of the rounded weights. Activations have 16 bits: more than bfloat16's eight, less than
    float32's."""
    model, ids = made(name, dtype), texts(CONFIGS[name])
    rounded = rounded_to_int8(model)
    actual = Cache(model.config, dtype).run(NativeStep(model, weights=torch.int8), ids)
    truth = exact(rounded, ids)
    if dtype == torch.bfloat16:
        numerics.check(actual, truth, of_modules(rounded, ids, dtype), name)
    else:
        error = (actual - truth).abs().max() / truth.abs().max()
        assert error < 2**-12, error


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("name", ["llama", "window"])
def test_bits_are_a_sequences_own(target: Target, name: str, weights: torch.dtype) -> None:
    """Whatever rows are beside it, however its tokens are cut into calls, and for every number of threads."""
    dtype = torch.bfloat16 if weights == torch.int8 else weights
    model, ids = made(name, dtype), texts(CONFIGS[name])
    step = NativeStep(model, weights=weights)
    start = [(31, True)]
    expected = Cache(model.config, dtype).run(step, ids, [*start, *[(1, False)] * 39])
    for parts in ([13, 5, 7, 14], [2, 3, 4, 5, 6, 8, 9, 2], [16, 10, 12, 1]):
        sizes = [(n, False) for n in parts]
        numerics.assert_bitwise_equal(
            Cache(model.config, dtype).run(step, ids, [*start, *sizes]), expected, str(parts)
        )
    sizes = [(31, True), (8, False), (16, False), (15, False)]
    prompts = Cache(model.config, dtype).run(step, ids, [(10, True), (21, True), *sizes[1:]])
    numerics.assert_bitwise_equal(prompts, expected, "a prompt in chunks")
    for b in range(B):
        alone = Cache(model.config, dtype, 1).run(step, ids[b : b + 1], sizes)
        numerics.assert_bitwise_equal(alone[0], expected[b], f"sequence {b} alone")
    for threads in at_threads(1, 3, 7):
        again = Cache(model.config, dtype).run(step, ids, sizes)
        numerics.assert_bitwise_equal(again, expected, f"{threads} threads")


@pytest.mark.parametrize("weights", [torch.float32, torch.int8], ids=str)
def test_what_is_not_finite_reaches_the_logits(target: Target, weights: torch.dtype) -> None:
    model = made("llama", torch.float32)
    with torch.no_grad():
        model.decoder.embedding.token.weight[5, 0] = torch.inf
    ids = texts(model.config)
    ids[ids == 5] = 6
    ids[0, 50] = 5
    y = Cache(model.config, torch.float32).run(NativeStep(model, weights=weights), ids)
    assert y[0, 50:].isnan().any(1).all()
    assert y[0, :50, :5].isfinite().all() and y[1:, :, :5].isfinite().all()


def test_many_query_heads_to_a_key_head(target: Target) -> None:
    config = Config(vocabulary=31, width=64, layers=1, heads=64, kv_heads=1, head_dim=4, hidden=16)
    torch.manual_seed(0)
    model = Transformer(config).eval()
    step = NativeStep(model)
    assert step.most == 1
    text = torch.randint(31, (40,)).tolist()
    runner = Runner(model, kernel=True, page_size=4, max_tokens=64)
    slot = runner.begin(text[:20])
    parts = [runner.forward([(slot, text[slot.length : n])], every=True) for n in (20, 33, 40)]
    truth = exact(model, torch.tensor([text]))[0]
    eager = of_modules(model, torch.tensor([text]), torch.float32)[0]
    numerics.check(torch.cat(parts), truth, eager, "64 heads")


# ---- refusals ------------------------------------------------------------------------------------

REFUSED = {
    "norms come last": {"norm_first": False},
    "encoder": {"encoder_layers": 1, "norm_first": False},
    "not causal": {"causal": False},
    "head is": {"head": None},
    "relative": {"position": "relative"},
    "embedding has a norm": {"embedding_norm": True},
    "follow the length": {
        "position": "rope", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_models_that_it_cannot_run(reason: str) -> None:
    config = Config(vocabulary=31, width=16, layers=1, heads=2, hidden=16, **REFUSED[reason])
    model = Transformer(config).eval()
    assert reason in str(why_not_step(model))
    with pytest.raises(ValueError, match=reason):
        NativeStep(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes_that_it_has_not(dtype: torch.dtype) -> None:
    model = made("llama", dtype)
    with pytest.raises(ValueError, match=r"kernel: the compiled step cannot run .*dtype"):
        Runner(model, kernel=True)
    with pytest.raises(ValueError, match=r"weights: the compiled step cannot run .*dtype"):
        Runner(model, weights="int8")


def test_options_that_do_not_fit() -> None:
    model = made("llama", torch.float32)
    with pytest.raises(ValueError, match="weights: 'int8' is the kernel's"):
        Runner(model, weights="int8", kernel=False)
    with pytest.raises(ValueError, match=r"weights: the compiled step .* int8 cache"):
        Runner(model, weights="int8", cache="int8")
    with pytest.raises(ValueError, match="weights: got 'int4', needs 'model' or 'int8'"):
        Runner(model, weights="int4")
    with pytest.raises(ValueError, match=r"weights: got torch.bfloat16, needs torch.float32 or"):
        NativeStep(model, weights=torch.bfloat16)


def test_what_lies_outside_of_the_cache_or_the_tables() -> None:
    model = made("llama", torch.float32)
    step, cache = NativeStep(model), Cache(model.config, torch.float32, 1)

    def run(ids: list[int], end: int, prompt: bool = False) -> None:
        step(torch.tensor([ids]), torch.tensor([end]), cache.table, cache.k, cache.v, prompt=prompt)

    for bad in (-1, 133):
        with pytest.raises(IndexError, match=f"ids: got {bad}, but the vocabulary has 133"):
            run([bad], 1)
    for end in (0, 129):
        with pytest.raises(ValueError, match=f"lengths: got {end} with 1 new tokens"):
            run([1], end)
    with pytest.raises(ValueError, match="ids: 17 tokens of a sequence, more than a step takes"):
        run([1] * 17, 17)
    with pytest.raises(ValueError, match="block_table: too short for a sequence of 81"):
        run([1], 81)
    cache.table[0, 1] = 99
    with pytest.raises(ValueError, match=r"block_table: entry \[0, 1\] is 99, but the cache has 6"):
        run([1], 17)

"""Draws beside the exact distribution; the native kernel, on every ISA, beside the definition in tensors."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor

from pyfuse.backends import cpu_module, cpu_sample
from pyfuse.generation import Options, sampling
from pyfuse.generation.sampling import Drawn, Seeds

ISAS = [] if cpu_module.why_unavailable() else cpu_module.available_isas()


@pytest.fixture(params=["tensors", *ISAS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How tokens are chosen: in tensors, or by the kernel of an ISA."""
    name: str = request.param
    if name == "tensors":
        monkeypatch.setattr(cpu_sample, "why_not_sample", lambda *_: "tensors are tested")
        yield name
        return
    before = cpu_module.isa()
    cpu_module.select_isa(name)
    yield name
    cpu_module.select_isa(before)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_tensors(logits: Tensor, options: Options, seeds: Seeds, steps: list[int]) -> Drawn:
    return sampling.by_tensors(logits, options, seeds, steps, logits)


# ---- the distribution -----------------------------------------------------------------------------

DRAWS = 20_000
# Of χ² with 1 to 40 degrees of freedom, what it exceeds once in 10,000 times (Wilson and Hilferty, 1931).
_QUANTILE = 3.719


def chi_squared(counts: Tensor, p: Tensor) -> tuple[float, float]:
    """Of counts [V] where p [V] is expected, and what it rarely exceeds. Tokens that are expected less than ten times
    count as one."""
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0
    often = expected >= 10
    groups = [
        torch.cat([t[often], t[~often].sum()[None]]) for t in (counts.double(), expected.double())
    ]
    seen, wanted = (g[groups[1] > 0] for g in groups)
    degrees = len(seen) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + _QUANTILE * math.sqrt(2 / (9 * degrees))) ** 3
    return float(((seen - wanted) ** 2 / wanted).sum()), limit


@pytest.mark.parametrize(
    "knobs",
    [{}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.9, "min_p": 0.02}],
    ids=str,
)
def test_chi_squared(way: str, knobs: dict[str, Any]) -> None:
    """Over the steps of a sequence."""
    check_chi_squared(Options(temperature=0.8, **knobs), [(5, 0)] * DRAWS, list(range(DRAWS)))


@pytest.mark.parametrize("of", ["sequences", "seeds", "high-seeds"])
def test_chi_squared_of_one_step(of: str) -> None:
    seeds = {
        "sequences": [(5, i) for i in range(DRAWS)],
        "seeds": [(i, 1) for i in range(DRAWS)],
        "high-seeds": [(i << 32, 1) for i in range(DRAWS)],
    }
    check_chi_squared(Options(temperature=0.8), seeds[of], [3] * DRAWS)


def check_chi_squared(options: Options, seeds: Seeds, steps: list[int]) -> None:
    logits = randn(1, 40, seed=1) * 2
    exact = sampling.warp(logits, options).double().softmax(1)[0]
    tokens = sampling.sample(logits.expand(DRAWS, -1), options, seeds, steps).tokens
    counts = torch.tensor(tokens).bincount(minlength=40)
    value, limit = chi_squared(counts, exact)
    assert value < limit
    little = exact * (1 + 0.1 * (-1.0) ** torch.arange(40))  # a wrong one, of the same tokens
    assert chi_squared(counts, little / little.sum())[0] > limit, "the test sees no difference"


def test_weights_are_probabilities() -> None:
    for scale, offset in ((1.0, 0.0), (5.0, 50.0), (30.0, -1000.0), (0.0, 3.0)):
        x = randn(3, 10_001) * scale + offset
        w = sampling.weights(x)
        d = x.double() - x.double().amax(1, keepdim=True)
        assert (w.double() / sampling.ONE - d.exp()).abs().max() <= 1e-7
        assert (w.double() / w.sum(1, keepdim=True) - x.double().softmax(1)).abs().max() <= 1e-7
        assert (w.amax(1) == sampling.ONE).all()
    assert (
        sampling.weights(torch.tensor([[0.0, -28.5, -1e30, -math.inf]])).tolist()[0][1:] == [0] * 3
    )


def test_random_words() -> None:
    """By the published algorithm in plain integers."""
    seeds = [(0, 0), (1, 2), ((1 << 64) - 1, (1 << 32) - 1), (0x123456789ABCDEF0, 7)]
    steps = [0, 5, (1 << 32) - 1, 9]
    for word, (seed, sequence), step in zip(
        sampling.random_words(seeds, steps), seeds, steps, strict=True
    ):
        high, low, _, _ = oracle.philox((step, 0, 0, seed >> 32), (seed & 0xFFFFFFFF, sequence))
        assert word == high << 32 | low


def test_first_and_last_of_the_sum(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of weight 0 is never drawn, wherever it stands."""
    logits = torch.full((1, 9), -math.inf)
    logits[0, 3] = logits[0, 5] = 1.0
    logits[0, 4] = -60.0
    steps = list(range(64))
    tokens = sampling.draw(logits.expand(64, -1), [(0, 0)] * 64, steps)
    words = sampling.random_words([(0, 0)] * 64, steps)
    assert tokens == [3 if u < 1 << 63 else 5 for u in words]


# ---- what a token depends on ------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, {"top_k": 50, "top_p": 0.9}, {"typical_p": 0.9}], ids=str)
def test_batch_and_threads(way: str, knobs: dict[str, Any]) -> None:
    """Neither the other rows nor their order, nor the number of threads."""
    options = Options(temperature=0.9, logprobs=2, **knobs)
    rows, size = 12, 12_007  # enough for the kernel to share them among threads
    logits = randn(rows, size, seed=2) * 2
    seeds = [(i % 3, i) for i in range(rows)]
    steps = [7 * i for i in range(rows)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = sampling.sample(logits, options, seeds, steps)
        torch.set_num_threads(1)
        assert sampling.sample(logits, options, seeds, steps) == together
    finally:
        torch.set_num_threads(threads)
    order = random.Random(0).sample(range(rows), rows)
    mixed = sampling.sample(
        logits[order], options, [seeds[i] for i in order], [steps[i] for i in order]
    )
    assert mixed.logprobs is not None and together.logprobs is not None
    for at, i in enumerate(order):
        assert mixed.tokens[at] == together.tokens[i]
        assert mixed.logprobs[at] == together.logprobs[i]
    for i in range(rows):
        alone = sampling.sample(logits[i : i + 1], options, seeds[i : i + 1], steps[i : i + 1])
        assert alone.tokens == together.tokens[i : i + 1]


def test_seeds_sequences_and_steps_differ(way: str) -> None:
    logits = torch.zeros(1, 1 << 16)

    def token(seed: int, sequence: int, step: int) -> int:
        return sampling.draw(logits, [(seed, sequence)], [step])[0]

    grid = [
        token(seed, sequence, step)
        for seed in (0, 1, 1 << 32, 1 << 63)
        for sequence in (0, 1)
        for step in (0, 1)
    ]
    assert len(set(grid)) == len(grid)


# ---- the kernel beside the definition ---------------------------------------------------------------

SIZES = (1, 2, 3, 7, 8, 9, 17, 63, 65, 255, 513, 1025, 4099)
KINDS = ("plain", "coarse", "banned", "equal", "huge", "tiny")


def some_logits(chance: random.Random, kind: str, rows: int, size: int) -> Tensor:
    x = randn(rows, size, seed=chance.getrandbits(32)) * chance.choice([0.3, 1, 3, 10])
    if kind == "coarse":
        return (x * 2).round() / 2  # many equals
    if kind == "banned":
        x[randn(rows, size, seed=chance.getrandbits(32)) < 0.5] = -math.inf
        x[:, chance.randrange(size)] = 0.0
    if kind == "equal":
        x[:] = chance.choice([0.0, -0.0, 3.0])
        x[:, :: chance.choice([2, 3])] = -0.0
    if kind == "huge":
        return x * 100 + chance.choice([-1e4, 1e4])
    return x * 1e-6 if kind == "tiny" else x


def some_options(chance: random.Random, size: int) -> Options:
    pool = {
        "top_k": [1, 2, 5, 50, 700, size, max(1, size - 1)],
        "top_p": [1e-9, 0.1, 0.5, 0.9, 0.99, 1 - 1e-9, 1.0],
        "min_p": [0.0, 1e-9, 0.01, 0.3, 1.0],
    }
    knobs: dict[str, Any] = {}
    if chance.random() < 0.9:
        knobs = {name: chance.choice(v) for name, v in pool.items() if chance.random() < 0.5}
        knobs["temperature"] = chance.choice([1e-6, 0.01, 0.3, 0.7, 1, 1.0001, 2.0, 1e6])
    if chance.random() < 0.5:
        knobs["logprobs"] = min(size, chance.choice([0, 1, 3, 20, size]))
    return Options(**knobs)


@pytest.mark.skipif(not ISAS, reason=cpu_module.NOT_BUILT)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_equals_definition(isa: str, kind: str) -> None:
    """The same tokens, and log-probabilities to the last bit; rows in memory of any stride, NaN around them."""
    chance = random.Random(kind)
    before = cpu_module.isa()
    cpu_module.select_isa(isa)
    try:
        for size in SIZES * 4:
            rows = chance.choice([1, 1, 2, 5])
            options = some_options(chance, size)
            x = some_logits(chance, kind, rows, size)
            raw = x if chance.random() < 0.7 else some_logits(chance, "plain", rows, size)
            seeds = [(chance.getrandbits(64), chance.getrandbits(32)) for _ in range(rows)]
            steps = [chance.getrandbits(32) for _ in range(rows)]
            wide = torch.full((rows, size + 5), math.nan)
            given = wide[:, 2 : size + 2].copy_(x)
            found = sampling.sample(given, options, seeds, steps, raw=given if raw is x else raw)
            assert found == sampling.by_tensors(x, options, seeds, steps, raw), (size, options)
            assert wide[:, :2].isnan().all() and wide[:, -3:].isnan().all()
    finally:
        cpu_module.select_isa(before)


@pytest.mark.skipif(not ISAS, reason=cpu_module.NOT_BUILT)
def test_kernel_is_what_runs() -> None:
    x = randn(2, 50)
    assert cpu_sample.why_not_sample(x, x) is None
    assert "stride" in str(cpu_sample.why_not_sample(x.t()))
    assert "not on the CPU" in str(cpu_sample.why_not_sample(x.to("meta")))


def test_other_strides(way: str) -> None:
    x = randn(50, 3, seed=4)
    options, seeds, steps = Options(temperature=1.0, top_p=0.9), [(1, 0)] * 3, [0, 1, 2]
    expected = by_tensors(x.t().contiguous(), options, seeds, steps)
    assert sampling.sample(x.t(), options, seeds, steps) == expected
    assert sampling.sample(x.t()[:1].expand(3, -1), options, seeds, steps).tokens == [
        sampling.sample(x.t()[:1], options, seeds[:1], [step]).tokens[0] for step in steps
    ]


# ---- greedy and log-probabilities -------------------------------------------------------------------


def test_greedy(way: str) -> None:
    x = randn(7, 1031, seed=5)
    assert sampling.greedy(x) == x.argmax(1).tolist()
    x = x.round()
    assert sampling.greedy(x) == [int((row == row.max()).nonzero()[0]) for row in x]
    assert sampling.greedy(torch.zeros(1, 1)) == [0]
    assert sampling.greedy(torch.tensor([[-0.0, 0.0]])) == [0]


@pytest.mark.parametrize("top", [0, 1, 5, 777])
def test_log_probabilities(way: str, top: int) -> None:
    """Of the model's own distribution, whatever the temperature and the bans."""
    raw = randn(4, 777, seed=6) * 4
    x = raw.clone()
    x[:, ::2] = -math.inf
    options = Options(temperature=0.5, top_k=20, logprobs=top)
    tokens, logprobs = sampling.sample(x, options, [(9, i) for i in range(4)], [0] * 4, raw=raw)
    exact = raw.double().log_softmax(1)
    assert logprobs is not None and all(token % 2 == 1 for token in tokens)
    for r, (token, logprob, best) in enumerate(logprobs):
        assert token == tokens[r]
        assert abs(logprob - exact[r, token]) <= 1e-6
        assert [i for i, _ in best] == raw[r].sort(descending=True).indices[:top].tolist()
        assert all(abs(value - exact[r, i]) <= 1e-6 for i, value in best)
    assert sampling.log_probabilities(raw, tokens, top) == logprobs
    assert sampling.sample(x, Options(temperature=0.5), [(9, 0)] * 4, [0] * 4).logprobs is None


def test_log_probabilities_of_equals_and_banned(way: str) -> None:
    x = torch.tensor([[1.0, 2.0, -math.inf, 2.0, 1.0, 1.0]])
    options = Options(logprobs=4)
    (row,) = sampling.sample(x, options, [(0, 0)], [0]).logprobs or []
    assert [i for i, _ in row.top] == [1, 3, 0, 4]
    (row,) = sampling.log_probabilities(x, [2], 6)
    assert row.logprob == -math.inf and row.top[5] == (2, -math.inf)


# ---- errors -----------------------------------------------------------------------------------------

BAD = {
    "NaN": math.nan,
    r"\+inf": math.inf,
}


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_k": 3}], ids=str
)
@pytest.mark.parametrize("at", [0, 7, 8, 700, 1030])
@pytest.mark.parametrize("what", BAD)
def test_bad_logits(way: str, knobs: dict[str, Any], at: int, what: str) -> None:
    x = randn(3, 1031)
    x[1, at] = BAD[what]
    with pytest.raises(ValueError, match=rf"^logits: {what} in row 1"):
        sampling.sample(x, Options(**knobs), [(0, 0)] * 3, [0] * 3)


@pytest.mark.parametrize(
    "knobs", [{}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.9}], ids=str
)
def test_nothing_left(way: str, knobs: dict[str, Any]) -> None:
    x = randn(3, 70)
    x[2] = -math.inf
    with pytest.raises(ValueError, match=r"^logits: nothing but -inf.* in row 2"):
        sampling.sample(x, Options(**knobs), [(0, 0)] * 3, [0] * 3)


def test_bad_raw(way: str) -> None:
    x, raw = randn(2, 70), randn(2, 70)
    raw[1, 69] = math.nan
    with pytest.raises(ValueError, match=r"^logits: NaN in row 1"):
        sampling.sample(x, Options(logprobs=1), [(0, 0)] * 2, [0] * 2, raw=raw)
    with pytest.raises(ValueError, match=r"^raw: got shape \(2, 69\)"):
        sampling.sample(x, Options(logprobs=1), [(0, 0)] * 2, [0] * 2, raw=raw[:, 1:])


def test_temperature_that_overflows(way: str) -> None:
    with pytest.raises(ValueError, match=r"^logits: \+inf in row 0"):
        sampling.sample(torch.full((1, 4), 1e38), Options(temperature=1e-6), [(0, 0)], [0])


def test_bad_arguments(way: str) -> None:
    x = randn(2, 70)
    with pytest.raises(TypeError, match=r"^logits: expected a torch.Tensor"):
        sampling.greedy([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^logits: got torch.bfloat16"):
        sampling.greedy(x.bfloat16())
    for shape in ((70,), (1, 2, 3), (1, 0)):
        with pytest.raises(ValueError, match=r"^logits: got shape"):
            sampling.greedy(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"^seeds: got 1, but logits has 2 rows"):
        sampling.draw(x, [(0, 0)], [0, 0])
    with pytest.raises(ValueError, match=r"^steps: got 3, but logits has 2 rows"):
        sampling.draw(x, [(0, 0)] * 2, [0, 0, 0])
    for seed in ((-1, 0), (1 << 64, 0), (0, -1), (0, 1 << 32)):
        with pytest.raises(ValueError, match=r"^seeds: got \("):
            sampling.draw(x, [(0, 0), seed], [0, 0])
    with pytest.raises(ValueError, match=r"^steps: got -1"):
        sampling.draw(x, [(0, 0)] * 2, [0, -1])


def test_no_rows(way: str) -> None:
    x = torch.zeros(0, 5)
    assert sampling.greedy(x) == [] and sampling.draw(x, [], []) == []
    assert sampling.sample(x, Options(temperature=1.0, top_p=0.5, logprobs=2), [], []) == ([], [])
    assert sampling.log_probabilities(x, []) == []

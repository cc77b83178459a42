"""The random numbers of dropout: the published vectors, and the mask that is made of them."""

from __future__ import annotations

from itertools import product

import oracle
import pytest
import torch

from pyfuse.backends import eager_attention as eager
from pyfuse.ops._random import draw_seed
from pyfuse.philox import dropout_mask, keep_mask, philox4x32

# Known answers for philox4x32 with 10 rounds, from the authors' Random123 (kat_vectors).
KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_known_answers(counter: str, key: str, expected: str) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor(w) for w in words(counter) + words(key))
    result = philox4x32((c0, c1, c2, c3), (k0, k1))
    assert [int(word) for word in result] == words(expected)
    c = words(counter)
    k = words(key)
    assert oracle.philox((c[0], c[1], c[2], c[3]), (k[0], k[1])) == tuple(words(expected))


def test_mask_counts_the_elements() -> None:
    seed, p = torch.tensor([2**40 + 5, 9]), 0.3
    mask = dropout_mask(seed, (2, 3, 4, 5), p)
    for index in product(range(2), range(3), range(4), range(5)):
        kept = (oracle.philox_word(index, (5, 9)) >> 8) / 2**24 >= p
        assert bool(mask[index]) == kept
    larger = dropout_mask(seed, (3, 4, 6, 9), p)
    assert torch.equal(larger[:2, :3, :4, :5], mask)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 63, 65])
def test_mask_of_gathered_elements(size: int) -> None:
    """Elements in any order, as the packed sequences of varlen_attention count them."""
    seed, p = torch.tensor([11, 2**33 + 1]), 0.4
    mask = dropout_mask(seed, (2, 3, 4, size), p)
    b, h, m, n = (torch.randint(0, max(high, 1), (50 * min(size, 1),)) for high in mask.shape)
    assert torch.equal(keep_mask(seed, (b, h, m, n), p), mask[b, h, m, n])
    columns = torch.arange(size).flip(0)
    zero = torch.zeros(1, dtype=torch.int64)
    rows = torch.arange(4)[:, None]
    assert torch.equal(keep_mask(seed, (zero, zero, rows, columns), p), mask[0, 0].flip(-1))


def test_mask_compiles_and_maps() -> None:
    seed = torch.tensor([3, 4])

    def call(seed: torch.Tensor) -> torch.Tensor:
        return dropout_mask(seed, (1, 2, 3, 7), 0.5)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(seed), call(seed))
    seeds = torch.stack((seed, seed + 1))
    assert torch.equal(torch.vmap(call)(seeds), torch.stack([call(one) for one in seeds]))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_share_of_dropped_elements(p: float) -> None:
    """Within 5 standard deviations of p, and the same along each dimension."""
    mask = dropout_mask(torch.tensor([1, 2]), (4, 4, 64, 64), p).double()
    for dims in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        share = mask.mean(dims)
        count = mask.numel() / share.numel()
        assert ((share - (1 - p)).abs() <= 5 * (p * (1 - p) / count) ** 0.5).all(), dims


def test_threshold_is_exact() -> None:
    """Of float32 and float64 0.7, one would keep a number that the other drops; integers do not."""
    index = torch.arange(2**18)
    zero = torch.zeros(1, dtype=torch.int64)
    word = philox4x32((zero, zero, zero, index), (zero, zero))[0] >> 8
    uniform = word.double() / 2**24
    some = uniform[100].item()
    for p in (some, some + 2**-30, some - 2**-30):
        mask = keep_mask(torch.zeros(2, dtype=torch.int64), (zero, zero, zero, 4 * index), p)
        assert torch.equal(mask, uniform >= p)


def test_seed_follows_the_default_generator() -> None:
    torch.manual_seed(3)
    first, second = draw_seed(), draw_seed()
    torch.manual_seed(3)
    assert torch.equal(draw_seed(), first) and not torch.equal(first, second)
    assert first.dtype == torch.int64 and first.shape == (2,)


def test_expectation_of_dropped_attention() -> None:
    """Over many seeds the mean of o is o without dropout."""
    q, k, v = (torch.randn(1, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    expected = eager.attention(q, k, v)
    samples = torch.stack(
        [
            eager.attention(q, k, v, dropout_p=0.3, dropout_seed=torch.tensor([seed, 0]))
            for seed in range(1000)
        ]
    )
    error = samples.std(0) / 1000**0.5
    assert ((samples.mean(0) - expected).abs() <= 5 * error).all()

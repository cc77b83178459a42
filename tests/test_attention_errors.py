"""Every wrong argument of the attention operations: its error says what it is and should be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import pyfuse

Bad = tuple[dict[str, Any], type[Exception], str]
INT = torch.zeros(2, 4, 5, 8, dtype=torch.int64)


def good() -> dict[str, Tensor]:
    return {
        "q": torch.randn(2, 4, 5, 8),
        "k": torch.randn(2, 2, 7, 8),
        "v": torch.randn(2, 2, 7, 6),
    }


ATTENTION: list[Bad] = [
    ({"q": [1.0]}, TypeError, "q: expected a torch.Tensor, got list"),
    (
        {"q": torch.zeros(4, 5, 8)},
        ValueError,
        "q: expected 4 dimensions [B, Hq, M, D], got shape (4, 5, 8)",
    ),
    ({"k": torch.zeros(2, 2, 7, 9)}, ValueError, "k: D is 9, but q has D = 8"),
    ({"k": torch.zeros(3, 2, 7, 8)}, ValueError, "k: B is 3, but q has B = 2"),
    ({"v": torch.zeros(2, 1, 7, 8)}, ValueError, "v: Hk is 1, but k has Hk = 2"),
    ({"v": torch.zeros(2, 2, 6, 8)}, ValueError, "v: N is 6, but k has N = 7"),
    (
        {"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 8)},
        ValueError,
        "k: Hk is 3, but q has Hq = 4, needs a divisor of it",
    ),
    (
        {"k": torch.zeros(2, 0, 7, 8), "v": torch.zeros(2, 0, 7, 8)},
        ValueError,
        "k: Hk is 0, but q has Hq = 4",
    ),
    ({"q": INT}, TypeError, "q: dtype torch.int64, needs float64, float32, bfloat16 or float16"),
    (
        {"k": torch.zeros(2, 2, 7, 8).bfloat16()},
        TypeError,
        "k: dtype torch.bfloat16, but q has torch.float32",
    ),
    (
        {"v": torch.zeros(2, 2, 7, 6, device="meta")},
        ValueError,
        "v: on meta, but q is on cpu",
    ),
    (
        {"k": torch.zeros(2, 2, 8, 7).transpose(2, 3)},
        ValueError,
        "k: stride 7 in the last dimension, needs 1",
    ),
    (
        {"mask": torch.zeros(5, 6)},
        ValueError,
        "mask: shape (5, 6) does not broadcast to [B, Hq, M, N] = (2, 4, 5, 7)",
    ),
    ({"mask": torch.zeros(2, 2, 5, 7)}, ValueError, "mask: shape (2, 2, 5, 7) does not broadcast"),
    ({"mask": torch.zeros(1, 1, 1, 1, 7)}, ValueError, "mask: shape (1, 1, 1, 1, 7) does not"),
    (
        {"mask": torch.ones(5, 7, dtype=torch.int64)},
        TypeError,
        "mask: dtype torch.int64, needs torch.bool (True = attend), or q's torch.float32",
    ),
    ({"mask": torch.zeros(5, 7).double()}, TypeError, "mask: dtype torch.float64"),
    ({"mask": [[True]]}, TypeError, "mask: expected a torch.Tensor, got list"),
    ({"mask": torch.zeros(5, 7, device="meta")}, ValueError, "mask: on meta, but q is on cpu"),
    ({"window": 0}, ValueError, "window: got 0, needs 1 or more keys"),
    ({"window": -2}, ValueError, "window: got -2"),
    ({"window": (3, -2)}, ValueError, "window: got (3, -2), needs sides of 0 or more"),
    ({"window": (1, 2, 3)}, TypeError, "window: expected None, an int or (left, right)"),
    ({"window": 1.5}, TypeError, "window: expected None, an int or (left, right), got 1.5"),
    ({"window": (1.5, 0)}, TypeError, "window: expected two ints (or None), got (1.5, 0)"),
    ({"softcap": 0.0}, ValueError, "softcap: got 0.0, needs a finite number above 0"),
    ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
    ({"softcap": float("nan")}, ValueError, "softcap: got nan"),
    ({"softcap": float("inf")}, ValueError, "softcap: got inf"),
    ({"sinks": torch.zeros(2)}, ValueError, "sinks: expected shape [Hq] = (4,), got (2,)"),
    ({"sinks": torch.zeros(4).long()}, TypeError, "sinks: dtype torch.int64, needs q's"),
    ({"sinks": 0.5}, TypeError, "sinks: expected a torch.Tensor, got float"),
    ({"alibi_slopes": torch.zeros(2, 4)}, ValueError, "alibi_slopes: expected shape [Hq] = (4,)"),
    ({"alibi_slopes": torch.zeros(4).half()}, TypeError, "alibi_slopes: dtype torch.float16"),
    (
        {"seqlens_k": torch.zeros(3).long()},
        ValueError,
        "seqlens_k: expected shape [B] = (2,), got (3,)",
    ),
    (
        {"seqlens_k": torch.zeros(2)},
        TypeError,
        "seqlens_k: dtype torch.float32, needs torch.int32 or",
    ),
    ({"seqlens_k": [7, 7]}, TypeError, "seqlens_k: expected a torch.Tensor, got list"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0, needs 0 <= dropout_p < 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p: got -0.1"),
    ({"dropout_p": float("nan")}, ValueError, "dropout_p: got nan"),
    ({"scale": torch.tensor(0.5)}, TypeError, "scale: expected a float, got a Tensor"),
    ({"backend": "fast"}, ValueError, "'fast'"),
]


def first_words(bad: Bad) -> str:
    return bad[2][:40]


@pytest.mark.parametrize("bad", ATTENTION, ids=first_words)
def test_attention(bad: Bad) -> None:
    change, error, message = bad
    with pytest.raises(error, match=re.escape(message)):
        pyfuse.attention(**(good() | change))


def test_attention_takes_what_is_right() -> None:
    """The same calls without the fault: the table above fails for the reason that it names."""
    o = pyfuse.attention(
        **good(),
        mask=torch.zeros(7),
        window=(3, None),
        softcap=1,
        sinks=torch.zeros(4),
        alibi_slopes=torch.zeros(4),
        seqlens_k=torch.tensor([7, 7], dtype=torch.int32),
        scale=1,
    )
    assert o.shape == (2, 4, 5, 6)


def test_strides_of_one_element_do_not_matter() -> None:
    q, k = torch.randn(1, 1, 3, 4).transpose(2, 3)[..., :1], torch.randn(1, 1, 5, 1)
    assert q.stride(-1) != 1
    assert pyfuse.attention(q, k, k).shape == (1, 1, 4, 1)


PACKED = {
    "q": torch.zeros(5, 4, 8),
    "k": torch.zeros(7, 2, 8),
    "v": torch.zeros(7, 2, 6),
    "cu_seqlens_q": torch.tensor([0, 5]),
    "cu_seqlens_k": torch.tensor([0, 7]),
}
VARLEN: list[Bad] = [
    ({"q": torch.zeros(1, 5, 4, 8)}, ValueError, "q: expected 3 dimensions [T, Hq, D]"),
    ({"v": torch.zeros(6, 2, 6)}, ValueError, "v: Tk is 6, but k has Tk = 7"),
    ({"k": torch.zeros(7, 3, 8), "v": torch.zeros(7, 3, 8)}, ValueError, "k: Hk is 3, but q has"),
    (
        {"cu_seqlens_k": torch.tensor([0, 3, 7])},
        ValueError,
        "cu_seqlens_k: B+1 is 3, but cu_seqlens_q has B+1 = 2",
    ),
    ({"cu_seqlens_q": torch.zeros(2)}, TypeError, "cu_seqlens_q: dtype torch.float32"),
    (
        {"cu_seqlens_q": torch.tensor([]).long(), "cu_seqlens_k": torch.tensor([]).long()},
        ValueError,
        "cu_seqlens_q: got no value, needs B + 1",
    ),
    ({"dropout_p": 1.0}, ValueError, "dropout_p: got 1.0"),
    ({"window": 0}, ValueError, "window: got 0"),
    ({"softcap": 0}, ValueError, "softcap: got 0"),
    ({"sinks": torch.zeros(3)}, ValueError, "sinks: expected shape [Hq] = (4,)"),
]


@pytest.mark.parametrize("bad", VARLEN, ids=first_words)
def test_varlen_attention(bad: Bad) -> None:
    change, error, message = bad
    with pytest.raises(error, match=re.escape(message)):
        pyfuse.varlen_attention(**(PACKED | change))
    assert pyfuse.varlen_attention(**PACKED).shape == (5, 4, 6)


CACHED = {
    "q": torch.zeros(2, 4, 1, 8),
    "k_cache": torch.zeros(2, 2, 7, 8),
    "v_cache": torch.zeros(2, 2, 7, 6),
    "seqlens_k": torch.tensor([3, 7]),
}
TABLE = torch.zeros(2, 3, dtype=torch.int32)
DECODE: list[Bad] = [
    ({"k_cache": torch.zeros(3, 2, 7, 8)}, ValueError, "k_cache: B is 3, but q has B = 2"),
    ({"v_cache": torch.zeros(2, 2, 8, 6)}, ValueError, "v_cache: N is 8, but k_cache has N = 7"),
    ({"seqlens_k": torch.tensor([3])}, ValueError, "seqlens_k: expected shape [B] = (2,)"),
    ({"seqlens_k": None}, TypeError, "seqlens_k: expected a torch.Tensor, got NoneType"),
    ({"block_table": TABLE.float()}, TypeError, "block_table: dtype torch.float32"),
    (
        {"block_table": TABLE[:1]},
        ValueError,
        "block_table: expected shape [B, pages_per_seq] = (2, ...), got (1, 3)",
    ),
    (
        {"block_table": TABLE, "v_cache": torch.zeros(3, 2, 7, 6)},
        ValueError,
        "v_cache: pages is 3, but k_cache has pages = 2",
    ),
    (
        {"k_cache": torch.zeros(2, 3, 7, 8), "v_cache": torch.zeros(2, 3, 7, 6)},
        ValueError,
        "k_cache: Hk is 3, but q has Hq = 4",
    ),
]


@pytest.mark.parametrize("bad", DECODE, ids=first_words)
def test_decode_attention(bad: Bad) -> None:
    change, error, message = bad
    with pytest.raises(error, match=re.escape(message)):
        pyfuse.decode_attention(**(CACHED | change))
    assert pyfuse.decode_attention(**CACHED).shape == (2, 4, 1, 6)


def test_decode_needs_the_lengths() -> None:
    with pytest.raises(TypeError, match="seqlens_k"):
        pyfuse.decode_attention(CACHED["q"], CACHED["k_cache"], CACHED["v_cache"])  # type: ignore[call-arg]


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_too_small_is_named(paged: bool) -> None:
    q, cache = torch.randn(2, 4, 1, 8), torch.randn(3, 2, 5, 8)
    table = torch.zeros(2, 2, dtype=torch.int32) if paged else None
    cache = cache if paged else cache[:2]
    room = 10 if paged else 5
    full = torch.tensor([1, room])
    assert (
        pyfuse.decode_attention(q, cache, cache, seqlens_k=full, block_table=table).shape == q.shape
    )
    with pytest.raises(ValueError, match=f"seqlens_k: a sequence has {room + 1} keys, .* {room}$"):
        pyfuse.decode_attention(q, cache, cache, seqlens_k=full + 1, block_table=table)
    with pytest.raises(ValueError, match="seqlens_k: a sequence has -1 keys"):
        pyfuse.decode_attention(q, cache, cache, seqlens_k=torch.tensor([-1, 2]), block_table=table)

"""The compact mask means what the dense mask means, for every pattern that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyfuse.hf.attention import NAMES, _biases, _prepared, pyfuse_attention
from pyfuse.hf.masks import CompactMask, pyfuse_mask

LLAMA = SimpleNamespace(model_type="llama")
PATTERNS: dict[str, tuple[Callable[..., Any], int | None, bool]] = {  # function, its window, causal
    "causal": (causal_mask_function, None, True),
    "bidirectional": (bidirectional_mask_function, None, False),
    "sliding": (sliding_window_causal_mask_function(4), 4, True),
    "sliding_bidirectional": (sliding_window_bidirectional_mask_function(4), 4, False),
}
PADDINGS = ("none", "full", "right", "left", "holes", "short")


def padding_mask(kind: str, length: int) -> Tensor | None:
    mask = torch.ones(3, length, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "right":
        mask[1, length // 2 :] = False
    elif kind == "left":
        mask[1, : length // 2] = False
    elif kind == "holes":
        mask[1, 1::3] = False
    elif kind == "short":  # transformers pads it with False
        mask = mask[:, : length - 1]
    return mask


def arguments(
    pattern: str, padding: str, m: int, q_offset: int, kv_offset: int, n: int
) -> dict[str, Any]:
    function, window, causal = PATTERNS[pattern]
    return {
        "batch_size": 3,
        "q_length": m,
        "kv_length": n,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding_mask(padding, kv_offset + n),
        "allow_is_causal_skip": causal,
        "allow_is_bidirectional_skip": not causal,
        **({} if window is None else {"local_size": window}),
    }


def attend(mask: Any, is_causal: bool, m: int, n: int, bias: Tensor | None = None) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(3, heads, rows, 8, generator=draw) for heads, rows in ((4, m), (2, n), (2, n))
    )
    module = SimpleNamespace(is_causal=is_causal)
    return pyfuse_attention(module, q, k, v, mask, scaling=0.5, position_bias=bias)[0]


def visible_rows(dense: Tensor | None) -> Tensor | slice:
    """[B, M]: the queries that see a key at all; what the others give is nobody's business."""
    return slice(None) if dense is None else dense.any(-1)[:, 0]


SHAPES = {  # M, q_offset, kv_offset, N
    "prefill": (9, 0, 0, 9),
    "one token": (1, 8, 0, 9),
    "chunk": (4, 7, 0, 11),
    "window cache": (1, 12, 10, 3),
    "window cache, chunk": (3, 12, 10, 5),
    "static prefill": (6, 0, 0, 13),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_compact_means_dense(pattern: str, padding: str, shape: str) -> None:
    m, q_offset, kv_offset, n = SHAPES[shape]
    given = arguments(pattern, padding, m, q_offset, kv_offset, n)
    dense = sdpa_mask(
        **{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    mask = pyfuse_mask(**given, config=LLAMA)
    causal = PATTERNS[pattern][2]
    rows = visible_rows(dense)
    ours, expected = attend(mask, causal, m, n)[rows], attend(dense, False, m, n)[rows]
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    if isinstance(
        mask, CompactMask
    ):  # what stock attention gets instead: exactly stock's own masks
        theirs = sdpa_mask(**given)
        assert (mask.dense() is None) == (theirs is None)
        assert theirs is None or torch.equal(mask.dense(), theirs)
        assert torch.equal(mask.additive(torch.float32), eager_mask(**given, dtype=torch.float32))
    if padding in ("right", "left", "holes") and shape in ("prefill", "chunk"):
        assert isinstance(mask, CompactMask)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("shape", ["prefill", "one token", "static prefill"])
@pytest.mark.parametrize("pattern", ["causal", "bidirectional"])
def test_position_bias(pattern: str, shape: str, padding: str) -> None:
    m, q_offset, kv_offset, n = SHAPES[shape]
    given = arguments(pattern, padding, m, q_offset, kv_offset, n)
    dense = sdpa_mask(
        **{**given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    )
    bias = torch.randn(4, m, n).permute(1, 2, 0).contiguous().permute(2, 0, 1)[None]  # as T5 has it
    combined = torch.where(dense, bias, float("-inf"))
    rows = visible_rows(dense)
    ours = attend(pyfuse_mask(**given, config=LLAMA), pattern == "causal", m, n, bias)[rows]
    torch.testing.assert_close(ours, attend(combined, False, m, n)[rows], rtol=1e-5, atol=1e-6)


def test_a_bias_is_made_contiguous_once_and_zeros_are_dropped() -> None:
    strided = torch.randn(5, 5, 4).permute(2, 0, 1)[None]
    first = _prepared(strided)
    assert first is not None and first.is_contiguous() and torch.equal(first, strided)
    assert _prepared(strided) is first
    strided[0, 0, 0, 0] = 7.0
    again = _prepared(strided)
    assert again is not None and again[0, 0, 0, 0] == 7.0
    zeros = torch.zeros(1, 4, 5, 5)
    assert _prepared(zeros) is None
    zeros.add_(1.0)
    assert _prepared(zeros) is zeros
    count = len(_biases)
    del strided, first, again, zeros
    assert len(_biases) == count - 2


def test_right_padding_becomes_lengths_and_left_padding_a_row() -> None:
    right = pyfuse_mask(**arguments("causal", "right", 9, 0, 0, 9), config=LLAMA)
    assert right.key_mask is None and right.seqlens_k.tolist() == [9, 4, 9] and right.causal
    left = pyfuse_mask(**arguments("causal", "left", 9, 0, 0, 9), config=LLAMA)
    assert left.seqlens_k is None and left.key_mask.shape == (3, 1, 1, 9)


def test_no_mask_where_stock_has_none() -> None:
    for padding in ("none", "full"):
        assert pyfuse_mask(**arguments("causal", padding, 9, 0, 0, 9), config=LLAMA) is None
        assert pyfuse_mask(**arguments("bidirectional", padding, 9, 0, 0, 9), config=LLAMA) is None


@pytest.mark.parametrize(
    "change",
    [
        {"config": SimpleNamespace(model_type="a model that may index its mask")},
        {"q_offset": torch.tensor(0)},
        {"allow_is_causal_skip": False},
        {"mask_function": chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int64))},
        {"mask_function": lambda b, h, q, k: (k <= q) & (k != 2)},
        {"attention_mask": torch.ones(3, 1, 9, dtype=torch.bool)},
    ],
    ids=[
        "unknown model",
        "tensor offset",
        "tensor wanted",
        "chunked",
        "custom",
        "three dimensions",
    ],
)
def test_otherwise_it_is_the_dense_mask(change: dict[str, Any]) -> None:
    given = {**arguments("causal", "left", 9, 0, 0, 9), **change}
    mask = pyfuse_mask(**{"config": LLAMA, **given})
    given.pop("config", None)
    expected = sdpa_mask(**given)
    assert not isinstance(mask, CompactMask)
    assert torch.equal(mask, expected) if expected is not None else mask is None


def test_both_interfaces_know_the_names() -> None:
    for name in NAMES:
        assert ALL_ATTENTION_FUNCTIONS[name] is pyfuse_attention
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is pyfuse_mask


def test_an_unknown_argument_goes_to_the_stock_function(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stock(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        seen.update(kwargs, mask=mask)
        return q.transpose(1, 2), None

    monkeypatch.setattr("pyfuse.hf.attention.sdpa_attention_forward", stock)
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation="pyfuse"))
    x = torch.randn(3, 2, 9, 8)
    mask = pyfuse_mask(**arguments("causal", "left", 9, 0, 0, 9), config=LLAMA)
    pyfuse_attention(
        module, x, x, x, mask, indices=torch.arange(3), position_ids=None, use_cache=True
    )
    assert torch.equal(seen["indices"], torch.arange(3)) and torch.equal(seen["mask"], mask.dense())


def test_a_foreign_mask_object_is_refused() -> None:
    x = torch.randn(1, 2, 9, 8)
    with pytest.raises(TypeError, match="attention_mask: got SimpleNamespace"):
        pyfuse_attention(SimpleNamespace(is_causal=True), x, x, x, SimpleNamespace())


def test_output_is_contiguous_and_rows_first() -> None:
    q = torch.randn(2, 9, 4, 8).transpose(1, 2)
    out, weights = pyfuse_attention(SimpleNamespace(is_causal=True), q, q, q, None)
    assert out.shape == (2, 9, 4, 8) and out.is_contiguous() and weights is None

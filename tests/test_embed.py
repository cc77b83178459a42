"""The embedding sum, against the models that begin with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import check
from torch import Tensor

import pyfuse
from pyfuse.backends import eager_position

B, T, V, D = 2, 7, 30, 12


def tables(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "weight": torch.randn(V, D).to(dtype),
        "position_weight": torch.randn(20, D).to(dtype),
        "segment_weight": torch.randn(2, D).to(dtype),
        "norm_weight": torch.randn(D).to(dtype),
        "norm_bias": torch.randn(D).to(dtype),
    }


def ids(high: int = V) -> Tensor:
    return torch.randint(0, high, (B, T))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_equals_bert(dtype: torch.dtype) -> None:
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertEmbeddings

    config = BertConfig(
        vocab_size=V, hidden_size=D, max_position_embeddings=20, hidden_dropout_prob=0.0
    )
    bert = BertEmbeddings(config).eval()
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter)
    bert.to(dtype)
    token_ids, segments = ids(), ids(2)
    theirs = bert(token_ids, token_type_ids=segments)

    def ours(kind: torch.dtype) -> Tensor:
        bert.to(kind)
        return pyfuse.embed(
            token_ids,
            bert.word_embeddings.weight,
            position_weight=bert.position_embeddings.weight,
            segment_ids=segments,
            segment_weight=bert.token_type_embeddings.weight,
            norm_weight=bert.LayerNorm.weight,
            norm_bias=bert.LayerNorm.bias,
            eps=config.layer_norm_eps,
        )

    check(ours(dtype), ours(torch.float64), theirs, "BERT")


def test_learned_positions_at_an_offset() -> None:
    table, token_ids = tables(), ids()
    positions = torch.arange(5, 5 + T)
    expected = table["weight"][token_ids] + table["position_weight"][positions]
    for given in (positions, positions.expand(B, T), positions.int()):
        e = pyfuse.embed(
            token_ids,
            table["weight"],
            position_weight=table["position_weight"],
            positions=given,
        )
        assert torch.equal(e, expected)


def test_vaswani() -> None:
    table, token_ids = tables(), ids()
    e = pyfuse.embed(token_ids, table["weight"], position_weight="sinusoidal", scale=math.sqrt(D))
    expected = table["weight"][token_ids] * math.sqrt(D) + pyfuse.sinusoidal_encoding(T, D)
    torch.testing.assert_close(e, expected)
    later = pyfuse.embed(
        token_ids, table["weight"], position_weight="sinusoidal", positions=torch.arange(T) + 3
    )
    positions = pyfuse.sinusoidal_encoding(T + 3, D)[3:]
    torch.testing.assert_close(later, table["weight"][token_ids] + positions)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (5,), (2, 3, 4)])
def test_any_shape_of_ids(shape: tuple[int, ...]) -> None:
    table = tables()
    token_ids = torch.randint(0, V, shape, dtype=torch.int32)
    e = pyfuse.embed(token_ids, table["weight"])
    assert torch.equal(e, table["weight"][token_ids.long()]) and e.shape == (*shape, D)


def test_sum_is_rounded_once() -> None:
    table, token_ids = tables(torch.bfloat16), ids()
    e = pyfuse.embed(
        token_ids, table["weight"], position_weight=table["position_weight"], scale=3.3
    )
    wide = table["weight"][token_ids].double() * 3.3 + table["position_weight"][:T].double()
    assert e.dtype == torch.bfloat16 and torch.equal(e, wide.bfloat16())


def test_dropout_is_drawn_and_scaled() -> None:
    weight = torch.ones(V, 100)
    token_ids = torch.randint(0, V, (4, 50))
    torch.manual_seed(3)
    first = pyfuse.embed(token_ids, weight, dropout_p=0.25)
    torch.manual_seed(3)
    assert torch.equal(pyfuse.embed(token_ids, weight, dropout_p=0.25), first)
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_derivatives() -> None:
    token_ids, segments = ids(), ids(2)
    table = {name: t.requires_grad_() for name, t in tables(torch.float64).items()}

    def call(*point: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(table, point, strict=True))
        return eager_position.embed(
            token_ids,
            **given,
            segment_ids=segments,
            scale=2.0,
            dropout_p=0.3,
            dropout_seed=torch.tensor([1, 2]),
        )

    torch.autograd.gradcheck(call, tuple(table.values()), fast_mode=True)
    torch.autograd.gradgradcheck(call, tuple(table.values()), fast_mode=True)


def test_compiles() -> None:
    table = tables()

    def call(token_ids: Tensor) -> Tensor:
        return pyfuse.embed(
            token_ids,
            table["weight"],
            position_weight="sinusoidal",
            norm_weight=table["norm_weight"],
        )

    token_ids = ids()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_ids), call(token_ids), rtol=0, atol=0)
    torch.testing.assert_close(torch.vmap(call)(token_ids), call(token_ids))


W = torch.zeros(V, D)  # any table
IDS = torch.zeros(B, T, dtype=torch.long)


def bad_call(token_ids: Tensor = IDS, weight: Tensor = W, **o: Any) -> Callable[[], Tensor]:
    return lambda: pyfuse.embed(token_ids, weight, **o)


BAD: list[tuple[str, type[Exception], Callable[[], Any]]] = [
    (r"token_ids: expected int64 or int32, got .*float32", TypeError, bad_call(IDS.float())),
    (r"token_ids: expected \[\.\.\., T\]", ValueError, bad_call(IDS[0, 0])),
    (r"weight: expected 2 dimensions", ValueError, bad_call(weight=W[0])),
    (r"weight: .*int64", TypeError, bad_call(weight=W.long())),
    (r"position_weight: got 'rotary'", ValueError, bad_call(position_weight="rotary")),
    (r"position_weight: D is 5, but weight has", ValueError, bad_call(position_weight=W[:, :5])),
    (r"position_weight: .*weight's dtype", TypeError, bad_call(position_weight=W.double())),
    (r"position_weight: has 4 rows, .* 7 tokens", ValueError, bad_call(position_weight=W[:4])),
    (r"positions: given, but position_weight is None", ValueError, bad_call(positions=IDS)),
    (r"positions: expected shape", ValueError, bad_call(position_weight=W, positions=IDS[:, 1:])),
    (r"positions: .*float32", TypeError, bad_call(position_weight=W, positions=IDS.float())),
    (r"segment_ids, segment_weight: got one", ValueError, bad_call(segment_ids=IDS)),
    (r"segment_ids: .*' shape", ValueError, bad_call(segment_ids=IDS[0], segment_weight=W)),
    (r"segment_weight: D is 3", ValueError, bad_call(segment_ids=IDS, segment_weight=W[:, :3])),
    (r"norm_bias: given, but norm_weight", ValueError, bad_call(norm_bias=W[0])),
    (r"norm_weight: expected shape \(12,\)", ValueError, bad_call(norm_weight=W[0, :3])),
    (r"norm_weight: .*int64", TypeError, bad_call(norm_weight=W[0].long())),
    (r"eps: ", ValueError, bad_call(norm_weight=W[0], eps=-1.0)),
    (r"dropout_p: .*got 1", ValueError, bad_call(dropout_p=1.0)),
    (r"index out of range", IndexError, bad_call(IDS + V)),
    (r"index out of range", IndexError, bad_call(IDS - 1)),
    (r"index out of range", IndexError, bad_call(position_weight=W, positions=IDS + V)),
    (r"index out of range", IndexError, bad_call(segment_ids=IDS + 2, segment_weight=W[:2])),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "call"), BAD)
def test_bad_input(message: str, kind: type[Exception], call: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=message):
        call()

"""Encoders without padding: equal to stock at every token, zeros at the padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import build, exact, small_models  # noqa: F401 (small_models is a fixture)
from numerics import check
from torch import Tensor, nn
from unpad_cases import (  # noqa: F401 (unpads is a fixture)
    DTYPES,
    LENGTH,
    NAMES,
    SIDES,
    accelerate,
    batch,
    close,
    computed,
    example,
    packed_rows,
    states,
    unpads,
    with_head,
)

from pyfuse.hf import attention as hf_attention
from pyfuse.hf.packing import PackedMask, Packing
from pyfuse.models import zoo


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_states(name: str, dtype: str, side: str) -> None:
    model = build(name, DTYPES[dtype], seed=1)
    inputs, kept, stock = example(model, side)
    truth = states(exact(model), inputs)[kept]
    receipt = accelerate(model)
    assert receipt.patched["unpadding"] == 1 and "unpadding" not in receipt.skipped
    ours = states(model, inputs)
    check(ours[kept], truth, stock, name)
    if name == "modernbert" and side != "right":  # its windows count the padding in between
        assert not packed_rows
    else:
        assert packed_rows == [int(kept.sum())] * 2
        assert not ours[~kept].any() and (~kept).sum() > 30


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_everything_that_is_asked_of_the_embeddings(name: str) -> None:
    model = build(name)
    inputs = batch(model, "right")
    inputs["position_ids"] = torch.arange(LENGTH).flip(0).expand(4, LENGTH) + 2
    if name == "bert":
        inputs["token_type_ids"] = (torch.arange(LENGTH) % 2).expand(4, LENGTH)
    kept = computed(model, inputs)
    stock = states(model, inputs)
    accelerate(model)
    close(states(model, inputs)[kept], stock[kept])
    assert packed_rows
    plain = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    assert (states(model, plain)[kept] - stock[kept]).abs().max() > 0.1  # they do something


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32]
)
@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_masks_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    model = build(name)
    inputs = batch(model, "right")
    accelerate(model)
    expected = states(model, inputs)
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    if dtype == torch.float32:
        inputs["attention_mask"] *= 0.5  # what is not 0 is a token, as for transformers
    assert torch.equal(states(model, inputs), expected) and len(packed_rows) == 4


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta"])
def test_a_row_of_nothing_but_padding(name: str) -> None:
    model = build(name)
    inputs = batch(model, "right", [24, 0, 9])
    kept = computed(model, inputs)
    with accelerate(model, unpad=False):
        padded = states(model, inputs)
    accelerate(model)
    ours = states(model, inputs)
    assert packed_rows == [34, 34] and ours.isfinite().all()
    close(ours[kept], padded[kept])
    assert not ours[1, 1:].any()


def test_every_row_nothing_but_padding() -> None:
    model = build("bert")
    accelerate(model)
    ours = states(model, batch(model, "right", [0, 0]))
    assert packed_rows == [2, 2] and ours.isfinite().all() and not ours[:, 1:].any()


@pytest.mark.parametrize("side", SIDES)
def test_one_row(side: str) -> None:
    model = build("bert")
    inputs = {k: v[1:2] for k, v in batch(model, side).items()}
    kept = computed(model, inputs)
    stock = states(model, inputs)
    accelerate(model)
    close(states(model, inputs)[kept], stock[kept])
    assert packed_rows == [int(kept.sum())] * 2


@pytest.mark.parametrize("lengths", [None, [24, 24], [24, 20]], ids=["no mask", "ones", "little"])
def test_nothing_changes_without_much_padding(lengths: list[int] | None) -> None:
    model = build("bert")
    inputs = batch(model, "right", lengths or [24, 24])
    if lengths is None:
        del inputs["attention_mask"]
    with accelerate(model, unpad=False):
        expected = states(model, inputs)
    accelerate(model)
    assert torch.equal(states(model, inputs), expected) and not packed_rows


def test_hidden_tokens_that_are_no_padding_are_computed() -> None:
    """ColBERT reads the states of mask tokens that no other token sees."""
    model = build("bert")
    inputs = batch(model, "right")
    inputs["input_ids"][1, 9:14] = 5
    stock = states(model, inputs)
    accelerate(model)
    ours = states(model, inputs)
    close(ours[1, :14], stock[1, :14])
    assert packed_rows and not ours[1, 14:].any()
    close(stock[1, :9], states(model, batch(model, "right"))[1, :9])  # hidden indeed


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["bert", "xlm_roberta"])
def test_pooling(name: str, side: str) -> None:
    """Means over the mask, and the first position, which with left padding is padding."""
    model = build(name)
    inputs = batch(model, side)
    weight = inputs["attention_mask"][:, :, None]
    with torch.no_grad():
        stock = model(**inputs)
        accelerate(model)
        ours = model(**inputs)
    assert packed_rows
    close(ours.pooler_output, stock.pooler_output)
    close(ours.last_hidden_state[:, 0], stock.last_hidden_state[:, 0])
    means = [(o.last_hidden_state * weight).sum(1) / weight.sum(1) for o in (ours, stock)]
    close(*means)


HEADS = {
    "bert": (hf.BertForSequenceClassification, hf.BertForTokenClassification),
    "distilbert": (hf.DistilBertForSequenceClassification, hf.DistilBertForTokenClassification),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaForTokenClassification),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraForTokenClassification),
    "modernbert": (hf.ModernBertForSequenceClassification, hf.ModernBertForTokenClassification),
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [0, 1], ids=["sequence", "token"])
@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str, kind: int, side: str) -> None:
    model = with_head(HEADS[name][kind], name)
    inputs = batch(model, side)
    stock = model(**inputs).logits
    receipt = accelerate(model)
    assert receipt.patched["unpadding"] == 1
    ours = model(**inputs).logits
    kept = computed(model, inputs) if kind else ...
    close(ours[kept], stock[kept])
    assert bool(packed_rows) == (name != "modernbert" or side == "right")


@pytest.mark.parametrize(
    "cls", [hf.BertForQuestionAnswering, hf.BertForMaskedLM], ids=lambda cls: cls.__name__
)
def test_heads_that_may_read_the_padding(cls: Any) -> None:
    model = with_head(cls, "bert")
    inputs = batch(model, "right")
    stock = model(**inputs)[0]
    with accelerate(model) as receipt:
        why = (
            f"{cls.__name__} may read its states at the padding; unpad=True if that does not matter"
        )
        assert receipt.skipped["unpadding"] == {why: 1}
        close(model(**inputs)[0], stock)
        assert not packed_rows
    receipt = accelerate(model, unpad=True)
    assert receipt.patched["unpadding"] == 1
    kept = computed(model, inputs)
    close(model(**inputs)[0][kept], stock[kept])
    assert packed_rows


class Mean(hf.BertPreTrainedModel):
    """A head of one's own: the mean over everything, padding included."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = hf.BertModel(config)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        output = self.bert(input_ids, attention_mask)
        return type(output)(last_hidden_state=output.last_hidden_state.mean(1))


def test_heads_of_ones_own() -> None:
    model = with_head(Mean, "bert")
    inputs = batch(model, "right")
    stock = states(model, inputs)
    with accelerate(model) as receipt:
        assert "unpadding" not in receipt.patched
        close(states(model, inputs), stock)
    accelerate(model, unpad=True)
    assert (states(model, inputs) - stock).abs().max() > 0.1 and packed_rows


def test_arguments_by_position_and_a_tuple_back() -> None:
    for name in ("bert", "distilbert", "modernbert"):
        model = build(name)
        inputs = batch(model, "right")
        accelerate(model)
        expected = states(model, inputs)
        with torch.no_grad():
            ours = model(*inputs.values(), return_dict=False)
        assert isinstance(ours, tuple) and torch.equal(ours[0], expected)
        model.config.return_dict = False
        with torch.no_grad():
            assert torch.equal(model(*inputs.values())[0], expected)
    assert len(packed_rows) == 3 * 6


# The mask of packed rows, where another attention function runs after all.


@pytest.mark.parametrize("implementation", ["pyfuse", "pyfuse-eager"])
@pytest.mark.parametrize(
    ("window", "only"),
    [(None, False), ((2, 2), False), (None, True)],
    ids=["", "window", "only queries"],
)
def test_stock_attention_on_packed_rows(
    implementation: str, window: tuple[int, int] | None, only: bool
) -> None:
    keys = torch.arange(9) < torch.tensor([9, 4, 0, 7])[:, None]
    kept = keys.clone()
    if only:
        kept[:, 5] = True
    else:
        kept[2, 0] = keys[2, 0] = True
    mask = PackedMask(Packing.of(kept, keys), window)
    model = build("bert")
    model.config._attn_implementation_internal = implementation
    layer = model.encoder.layer[0].attention.self
    q, k, v = torch.randn(3, 1, 4, int(kept.sum()), 12).unbind(0)
    ours, _ = hf_attention.pyfuse_attention(layer, q, k, v, mask, scaling=0.3)
    stock, _ = hf_attention.stock(layer, q, k, v, mask, 0.0, 0.3, {})
    sees = mask.dense().any(-1)[0, 0]
    close(ours[:, sees], stock[:, sees])
    assert sees.all() != only


def test_packing_there_and_back() -> None:
    kept = torch.tensor([[True, False, True], [False, False, True], [True, True, True]])
    keys = kept & torch.tensor([True, True, False])
    packing = Packing.of(kept, keys)
    x = torch.randn(3, 3, 5, 2)
    packed = packing.pack(x)
    assert torch.equal(packed, x[kept][None]) and packed.shape == (1, 6, 5, 2)
    assert torch.equal(packing.unpack(packed), torch.where(kept[:, :, None, None], x, 0.0))
    assert packing.cu_queries.tolist() == [0, 2, 3, 6] and packing.cu_keys.tolist() == [0, 1, 1, 3]
    assert packing.key_rows is not None and packing.key_rows.tolist() == [0, 3, 4]
    assert not packing.right_padded() and Packing.of(keys, keys).right_padded()
    assert not Packing.of(kept, kept).right_padded()


# A real model.


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sentences(dtype: str) -> None:
    reason = zoo.problem("minilm")
    if reason is not None:
        pytest.skip(f"model minilm is {reason}; `pyfuse models fetch minilm` makes this test run")
    tokenizer = hf.AutoTokenizer.from_pretrained(zoo.path("minilm"))
    model = hf.AutoModel.from_pretrained(zoo.path("minilm"), dtype=DTYPES[dtype])
    texts = [
        "A cat sits on the mat.",
        "A cat is sitting on a rug.",
        "Stocks fell on Monday.",
        "Rain had fallen all night, so that when the market opened in the morning the farmers had "
        "to drag their carts through mud that came up to the axles.",
    ]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    kept = inputs["attention_mask"].bool()
    truth, stock = states(exact(model), inputs), states(model, inputs)
    receipt = accelerate(model)
    assert receipt.patched["unpadding"] == 1
    ours = states(model, inputs)
    check(ours[kept], truth[kept], stock[kept], "minilm")
    assert packed_rows == [int(kept.sum())] * 6 and not ours[~kept].any()
    weight = inputs["attention_mask"][:, :, None]
    unit = nn.functional.normalize((ours * weight).sum(1) / weight.sum(1))
    same, unrelated = (unit[0] @ unit[1]).item(), (unit[0] @ unit[2]).item()
    assert same > 0.5 and abs(unrelated) < 0.2

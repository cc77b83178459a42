"""What is saved: Hugging Face reads it whole, with the same logits, and `from_pretrained` bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
import transformers as hf
from torch import Tensor

from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.export import hf_config, save_pretrained
from pyfuse.models.transformer import Config, Transformer

SIZES: dict[str, Any] = {
    "vocabulary": 31, "width": 24, "layers": 2, "heads": 4, "hidden": 40, "max_positions": 40,
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "position": "rope", "norm": "rms", "gated": True, "activation": "silu", "attention_bias": False,
    "hidden_bias": False,
}  # fmt: skip
BERT: dict[str, Any] = {
    "causal": False, "norm_first": False, "embedding_norm": True, "segments": 2, "activation": "gelu",
    "norm_eps": 1e-12,
}  # fmt: skip
BART: dict[str, Any] = {
    "encoder_layers": 1, "norm_first": False, "embedding_norm": True, "head_bias": True, "activation": "gelu",
}  # fmt: skip
PAPER: dict[str, Any] = BART | {
    "embedding_norm": False, "activation": "relu", "position": "sinusoidal", "embedding_scale": 24**0.5,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2-untied": ("GPT2LMHeadModel", {"tied": False, "activation": "relu"}),
    "gpt2-headless": ("GPT2Model", {"head": None}),
    "llama": ("LlamaForCausalLM", LLAMA | {"kv_heads": 2, "tied": False}),
    "mistral": ("MistralForCausalLM", LLAMA | {"window": 5, "head_dim": 8}),
    "masked": ("BertForMaskedLM", BERT | {"head": "mlm"}),
    "masked-untied": ("BertForMaskedLM", BERT | {"head": "mlm", "tied": False}),
    "classes": ("BertForSequenceClassification", BERT | {"head": "classes", "labels": ("a", "b", "c")}),
    "unnamed": ("BertForSequenceClassification", BERT | {"head": "classes", "classes": 2}),
    "embedding": ("BertModel", BERT | {"head": None}),
    "bart": ("BartForConditionalGeneration", BART),
    "bart-scaled": ("BartForConditionalGeneration", BART | {"embedding_scale": 24**0.5}),
    "bart-untied": ("BartForConditionalGeneration", BART | {"tied": False}),
    "bart-headless": ("BartModel", BART | {"head": None}),
    "paper": ("MarianMTModel", PAPER),
    "marian": ("MarianMTModel", PAPER | {"position": "learned"}),
}  # fmt: skip


def made(fields: dict[str, Any]) -> Transformer:
    """Parameters large enough that every part matters."""
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES, **fields)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape, generator=torch.Generator().manual_seed(1))


def results(ours: Transformer, theirs: Any) -> tuple[Tensor, Tensor]:
    """Of one call of both."""
    ids, source, mask = tokens(2, 9), tokens(2, 7), torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    if ours.encoder is None:
        return ours(ids), theirs(ids)[0]
    memory = ours.encode(source, mask)
    there = theirs(source, attention_mask=mask, decoder_input_ids=ids)
    return ours(ids, memory=memory, memory_mask=mask), there[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hugging_face_reads_it_whole(name: str, tmp_path: Path) -> None:
    kind, fields = MODELS[name]
    model = made(fields)
    save_pretrained(model, tmp_path, end=2, begin=1, pad=0)
    theirs, report = getattr(hf, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    actual, eager = results(model, theirs.eval())
    exact = results(model, theirs.double())[1]
    numerics.check(actual, exact, eager, name)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (1, 2)
    if model.encoder is not None:
        assert theirs.config.decoder_start_token_id == 1
    if name == "classes":
        assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert theirs.config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize("name", MODELS)
def test_it_comes_back(name: str, tmp_path: Path) -> None:
    model = made(MODELS[name][1])
    save_pretrained(model, tmp_path)
    back = from_pretrained(tmp_path, position=model.config.position)
    assert back.config.labels == model.config.labels
    state = back.state_dict()
    assert state.keys() == model.state_dict().keys()
    for n, t in model.state_dict().items():
        numerics.assert_bitwise_equal(state[n], t, n)
    again = from_pretrained(tmp_path, **vars(model.config))
    assert again.config == model.config


def test_sinusoids_become_a_table_that_is_the_same(tmp_path: Path) -> None:
    model = made(PAPER)
    save_pretrained(model.bfloat16(), tmp_path)
    read = from_pretrained(tmp_path)
    assert read.config.position == "learned" and next(read.parameters()).dtype == torch.bfloat16
    model = made(PAPER)
    save_pretrained(model, tmp_path)
    learned = from_pretrained(tmp_path)
    with torch.no_grad():
        memory = model.encode(tokens(2, 7))
        torch.testing.assert_close(learned.encode(tokens(2, 7)), memory, rtol=1e-5, atol=1e-6)


def test_positions_that_were_learnt_are_not_dropped(tmp_path: Path) -> None:
    save_pretrained(made(BART), tmp_path / "bart")
    with pytest.raises(ValueError, match=r"position: encoder\.embed_positions .* no sinusoids"):
        from_pretrained(tmp_path / "bart", position="sinusoidal")
    save_pretrained(made({}), tmp_path / "gpt2")
    with pytest.raises(ValueError, match=r"weights without a place: transformer\.wpe"):
        from_pretrained(tmp_path / "gpt2", position="rope")
    theirs = hf.MarianMTModel(
        hf.MarianConfig(
            vocab_size=31, d_model=24, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, max_position_embeddings=40,
            pad_token_id=0, decoder_start_token_id=0, scale_embedding=True,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match="no sinusoids like ours"):  # its cosines are behind
        from_pretrained(theirs, position="sinusoidal")
    with torch.no_grad():
        actual, eager = results(from_pretrained(theirs), theirs)
        numerics.check(
            actual, results(from_pretrained(theirs), theirs.double())[1], eager, "marian"
        )


@pytest.mark.parametrize("name", ["masked", "embedding", "classes"])
def test_a_new_head_follows_from_the_seed(name: str, tmp_path: Path) -> None:
    """Labels of its own, or BERT's head of masked tokens, on the same encoder."""
    model = made(MODELS[name][1])
    save_pretrained(model, tmp_path)
    kept = {n: t for n, t in model.state_dict().items() if n.startswith("decoder.")}
    for changes, rows in (
        ({"head": "classes", "labels": ("ham", "spam")}, 2),
        ({"head": "mlm"}, 31),
    ):
        found = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            found.append(from_pretrained(tmp_path, **changes))
        assert found[0](tokens(2, 9)).shape == ((2, 2) if rows == 2 else (2, 9, 31))
        first, second, other = (m.state_dict() for m in found)
        assert all(torch.equal(first[n], t) for n, t in kept.items())
        assert all(torch.equal(first[n], t) for n, t in second.items())
        drawn = "classifier.weight" if rows == 2 else "transform.weight"
        if not (name == "masked" and rows == 31):  # it has one already
            assert not torch.equal(first[drawn], other[drawn])
            assert first[drawn].std().item() == pytest.approx(0.02, rel=0.3)
        else:
            assert torch.equal(first[drawn], model.state_dict()[drawn])


def test_a_classifier_is_kept_for_its_own_labels(tmp_path: Path) -> None:
    model = made(MODELS["classes"][1])
    save_pretrained(model, tmp_path / "named")
    weight, pooler = model.classifier.weight, model.pooler.weight
    for changes, same in (
        ({}, True), ({"labels": ("a", "b", "c")}, True), ({"classes": 3}, True),
        ({"labels": ("c", "b", "a")}, False), ({"labels": ("x", "y")}, False), ({"classes": 5}, False),
    ):  # fmt: skip
        read = from_pretrained(tmp_path / "named", **changes)
        assert torch.equal(read.classifier.weight, weight) == same, changes
        assert torch.equal(read.pooler.weight, pooler)
        named = changes.get("labels", ("a", "b", "c"))
        assert read.config.labels == (() if changes == {"classes": 5} else named)
    model = made(MODELS["unnamed"][1])
    save_pretrained(model, tmp_path / "unnamed")
    assert from_pretrained(tmp_path / "unnamed").config.labels == ()
    read = from_pretrained(tmp_path / "unnamed", labels=("no", "yes"))  # names for what it knows
    assert torch.equal(read.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize(
    "fields",
    [
        {"causal": False},
        {"norm_first": False},
        {"position": "sinusoidal"},
        {"norm_eps": 1e-6, **BART},
        {**BERT, "head": "mlm", "position": "sinusoidal"},
        {**BART, "norm_first": True},
        {**BART, "head_bias": False},
        {**BART, "embedding_scale": 2.0},
        {**LLAMA, "activation": "silu", "gated": False},
    ],
)
def test_what_no_form_is_like_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    model = Transformer(Config(**SIZES | fields))
    with pytest.raises(ValueError, match="config: none of gpt2, llama"):
        save_pretrained(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_rates_of_dropout_are_no_obstacle() -> None:
    rates: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.3}
    assert hf_config(Config(**SIZES, **BERT, head="mlm", **rates))["hidden_dropout_prob"] == 0.1
    assert hf_config(Config(**SIZES, **BART, **rates))["activation_dropout"] == 0.3


@torch.no_grad()
def test_masked_tokens_alone_pass_through_the_head() -> None:
    """The loss is that of all logits, of which only those of targets are computed."""
    model = made(MODELS["masked"][1])
    ids, targets = tokens(2, 9), torch.full((2, 9), -100)
    targets[0, 3], targets[1, 5:7] = 4, torch.tensor([7, 30])
    wanted = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    rows: list[int] = []
    model.transform.register_forward_hook(lambda _, given, out: rows.append(out.numel() // 24))
    torch.testing.assert_close(model(ids, targets=targets), wanted, rtol=1e-5, atol=1e-6)
    assert rows == [3]
    assert model(ids, targets=torch.full_like(ids, -100)).isnan()  # as the mean of nothing is

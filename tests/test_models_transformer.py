"""The reference Transformer: its logits, losses and gradients are those of the models that it is filled from."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numerics
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from hf_cases import _SIZES, VOCAB, build, padded, tokens
from model_cases import minis
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5Attention

import pyfuse.ops
from pyfuse.models import stock, zoo
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.transformer import Config, RelativeBias, Transformer

LENGTH = 33
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SIZES: dict[str, Any] = {"vocabulary": 31, "width": 24, "layers": 2, "heads": 4, "hidden": 40}


def made(name: str) -> hf.PreTrainedModel:
    """A small random model of Hugging Face's; parameters large enough that every part matters."""
    if name in ("gpt2", "llama", "mistral", *PAIRS):
        return build(name)
    torch.manual_seed(0)
    if name == "llama3":
        config = hf.LlamaConfig(
            **_SIZES, num_key_value_heads=1, rope_parameters=SCALED, attention_bias=True, mlp_bias=True,
            tie_word_embeddings=True,
        )  # fmt: skip
        model: hf.PreTrainedModel = hf.LlamaForCausalLM(config)
    else:
        model = getattr(hf, name)(hf.BertConfig(**_SIZES, num_labels=3))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


DECODERS = ["gpt2", "llama", "llama3", "mistral"]
PAIRS = ["bart", "t5", "t5_gated"]
ENCODERS = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"]


def both(name: str, mask: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The arguments of one call, for theirs and for ours."""
    ids = tokens(3, LENGTH)
    theirs, ours = {"input_ids": ids, "attention_mask": mask}, {"ids": ids, "mask": mask}
    if name in DECODERS:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        theirs["position_ids"], ours["positions"] = positions, positions
    elif name in ENCODERS:
        segments = torch.arange(LENGTH).gt(20).long().expand(3, -1)
        theirs["token_type_ids"], ours["segments"] = segments, segments
    else:
        theirs["decoder_input_ids"] = ours["ids"] = tokens(3, 9, seed=2)
        ours["mask"] = None  # type: ignore[assignment]
    return theirs, ours


def result(model: Any, name: str, theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> Tensor:
    """Of either kind of model."""
    if not isinstance(model, Transformer):
        found: Tensor = model(**theirs)[0]
        return found
    if name in PAIRS:
        mask = theirs["attention_mask"]
        memory = model.encode(theirs["input_ids"], mask)
        return model(ours["ids"], memory=memory, memory_mask=mask)
    return model(**ours)


@pytest.mark.parametrize("ops", [pyfuse.ops, stock], ids=["pyfuse", "stock"])
@pytest.mark.parametrize("side", ["none", "right", "left"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *PAIRS])
def test_logits_are_those_of_hugging_face(name: str, side: str, ops: Any) -> None:
    model = made(name)
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    if side != "none":
        mask = padded(tokens(3, LENGTH), side)["attention_mask"]
    arguments = both(name, mask)
    with torch.no_grad():
        ours = from_pretrained(model, ops=ops)
        actual, eager = result(ours, name, *arguments), result(model, name, *arguments)
        exact = result(model.double(), name, *arguments)
    if name == "BertForSequenceClassification" and side == "left":
        actual, eager, exact = (t[mask[:, 0] == 1] for t in (actual, eager, exact))
    elif name not in (*PAIRS, "BertForSequenceClassification"):
        seen = mask.bool()
        actual, eager, exact = actual[seen], eager[seen], exact[seen]
    numerics.check(actual, exact, eager, name)


@pytest.mark.parametrize("name", ["gpt2", "llama", "BertForMaskedLM", *PAIRS])
def test_losses_and_gradients_are_those_of_hugging_face(name: str) -> None:
    model = made(name).eval()
    ours = from_pretrained(model)
    theirs, given = both(name, torch.ones(3, LENGTH, dtype=torch.int64))
    targets = tokens(3, given["ids"].shape[1], seed=5)
    targets[:, :3] = -100
    stock = F.cross_entropy(result(model, name, theirs, given).flatten(0, 1), targets.flatten())
    if name in PAIRS:
        memory = ours.encode(theirs["input_ids"], theirs["attention_mask"])
        given = {"ids": given["ids"], "memory": memory, "memory_mask": theirs["attention_mask"]}
    loss = ours(**given, targets=targets)
    torch.testing.assert_close(loss, stock, rtol=1e-5, atol=1e-6)
    stock.backward()
    loss.backward()
    table = ours.decoder.embedding.token.weight.grad
    expected = model.get_input_embeddings().weight.grad
    assert table is not None and isinstance(expected, Tensor)
    if expected.shape == table.shape and ours.matrix is None:
        torch.testing.assert_close(table, expected, rtol=1e-3, atol=1e-5)
    if name == "bart":  # its bias of the logits is no parameter
        assert ours.bias is not None
        ours.bias.grad = None
    ours_total, theirs_total = (
        sum(p.grad.square().sum() for p in m.parameters() if p.grad is not None)
        for m in (ours, model)
    )
    torch.testing.assert_close(ours_total, theirs_total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "BertForMaskedLM", *PAIRS])
def test_a_folder_is_read(name: str, tmp_path: Path) -> None:
    model = made(name)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "several", max_shard_size="20KB")
    assert (tmp_path / "several" / "model.safetensors.index.json").is_file()
    state = from_pretrained(model).state_dict()
    for folder in ("one", "several"):
        read = from_pretrained(tmp_path / folder).state_dict()
        assert read.keys() == state.keys() and all(torch.equal(read[n], state[n]) for n in state)
    for p in from_pretrained(tmp_path / "one", dtype=torch.bfloat16).parameters():
        assert p.dtype == torch.bfloat16


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    made("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        from_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a pickle .* can run any code"):
        from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of a model"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no such file"):
        from_pretrained(tmp_path / "nothing.gguf")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'distilbert', needs one of gpt2, llama"):
        from_pretrained(build("distilbert"))
    model = made("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx=True"):
        from_pretrained(model)
    model.config.scale_attn_by_inverse_layer_idx = False
    model.config.activation_function = "tanh"
    with pytest.raises(ValueError, match="activation_function='tanh', needs one of"):
        from_pretrained(model)
    model = made("gpt2")
    with pytest.raises(ValueError, match="layers"):
        from_pretrained(model, layers=0)
    with pytest.raises(ValueError, match=r"no weights for decoder\.blocks\.2"):
        from_pretrained(model, layers=3)
    with pytest.raises(ValueError, match=r"weights without a place: transformer\.h\.1"):
        from_pretrained(model, layers=1)
    with pytest.raises(ValueError, match=r"shape \(48, 192\)|shape"):
        from_pretrained(model, hidden=100)


def test_another_head_begins_anew() -> None:
    """A pre-trained encoder, and a classifier that is still to be trained."""
    encoder = made("BertForMaskedLM")
    with pytest.raises(ValueError, match=r"weights without a place: bert\.encoder\.layer\.1"):
        from_pretrained(encoder, head="classes", classes=5, layers=1)
    model = from_pretrained(encoder, head="classes", classes=5, dropout=0.3)
    assert model.config.dropout == 0.3 and not model.training
    ids = tokens(2, 7)
    assert model(ids).shape == (2, 5)
    with torch.no_grad():
        x = encoder.bert(ids).last_hidden_state
    torch.testing.assert_close(model.hidden(ids), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["smollm2", "minilm"])
def test_real_models(name: str) -> None:
    if zoo.problem(name) is not None:
        pytest.skip(f"{name} is not fetched: make models")
    kind = hf.AutoModelForCausalLM if name == "smollm2" else hf.AutoModel
    model = kind.from_pretrained(zoo.path(name), dtype=torch.float32).eval()
    ours = from_pretrained(zoo.path(name))
    ids = torch.randint(3, 5000, (2, 48))
    with torch.no_grad():
        actual, eager = ours(ids), model(ids)[0]
        exact = model.double()(ids)[0]
    numerics.check(actual, exact, eager, name)


def test_sentences_are_means_over_the_real_tokens() -> None:
    model = from_pretrained(made("BertModel"))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    with torch.no_grad():
        y = model.sentence(ids, mask)
        x = model.hidden(ids[1:, :5]).mean(1)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(y[1:], F.normalize(x, dim=-1), rtol=1e-4, atol=1e-6)


# ---- from a configuration alone ------------------------------------------------------------------

CONFIGS = minis(**SIZES) | {"norms first": Config(**SIZES, encoder_layers=1)}


def call(model: Transformer, ids: Tensor, **more: Any) -> Tensor:
    if model.encoder is not None:
        more["memory"] = model.encode(ids.flip(1))
    y: Tensor = model(ids, **more)
    return y


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_the_next_one_unless_it_is_an_encoders(name: str) -> None:
    torch.manual_seed(1)
    model = Transformer(CONFIGS[name]).eval()
    ids = torch.randint(31, (2, 11))
    other = ids.clone()
    other[:, 7:] = (ids[:, 7:] + 1) % 31
    with torch.no_grad():
        more = {} if model.encoder is None else {"memory": model.encode(ids)}
        a, b = model(ids, **more), model(other, **more)
    assert a.shape == (2, 11, 31)
    seen = (a[:, :7] - b[:, :7]).abs().max().item()
    assert (seen > 1e-4) == (not model.config.causal) and (a[:, 7:] - b[:, 7:]).abs().max() > 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_it_learns(name: str) -> None:
    """A batch by heart: loss and gradients are of one another."""
    torch.manual_seed(1)
    model = Transformer(CONFIGS[name]).train()
    ids = torch.randint(31, (2, 12))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = call(model, ids[:, :-1], targets=ids[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(31.0).log().item(), abs=0.4)
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputing_changes_no_gradient(name: str) -> None:
    fields = {"dropout": 0.2, "attention_dropout": 0.1, "hidden_dropout": 0.1}
    model = Transformer(Config(**vars(CONFIGS[name]) | fields)).train()
    ids, found = torch.randint(31, (2, 12)), []
    for on in (False, True):
        model.recompute(on)
        model.zero_grad()
        torch.manual_seed(4)
        call(model, ids, targets=ids).backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        numerics.assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_and_compiled_models_are_the_same(name: str) -> None:
    model = Transformer(CONFIGS[name], stock).eval()
    ids = torch.randint(31, (2, 12))
    with torch.no_grad():
        y = call(model, ids)
        assert torch.equal(call(copy.deepcopy(model), ids), y)
        assert torch.equal(call(pickle.loads(pickle.dumps(model)), ids), y)
        ours = Transformer(CONFIGS[name]).eval()
        ours.load_state_dict(model.state_dict())
        torch.testing.assert_close(call(ours, ids), y, rtol=1e-4, atol=1e-5)
    if model.encoder is None:
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        compiled(ids, targets=ids).backward()
        found = [p.grad for p in ours.parameters()]
        ours.zero_grad()
        ours(ids, targets=ids).backward()
        for a, p in zip(found, ours.parameters(), strict=True):
            assert a is not None and p.grad is not None
            torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_padding_is_not_computed(name: str) -> None:
    """Losses and gradients are those of the texts alone, and an id that stands there is not looked at."""
    torch.manual_seed(1)
    model = Transformer(CONFIGS[name]).train()
    ids, targets = torch.randint(31, (3, 12)), torch.randint(31, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 5:], mask[1] = 0, 0
    ids[mask == 0] = 10**6
    targets[mask == 0] = -100
    x = model.hidden(ids, mask)
    assert x.shape == (3, 12, 24) and not x[mask == 0].any()
    found = []
    for loss in (
        model(ids, mask, targets=targets),
        (5 * model(ids[:1, :5], targets=targets[:1, :5]) + 12 * model(ids[2:], targets=targets[2:]))
        / 17,
    ):
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("buckets, distance", [(32, 128), (8, 16), (6, 200)])
def test_buckets_of_distances_are_those_of_hugging_face(
    causal: bool, buckets: int, distance: int
) -> None:
    config = Config(**SIZES, position="relative", buckets=buckets, max_distance=distance)
    bias = RelativeBias(config)
    ahead = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(ahead, not causal, buckets, distance)
    assert torch.equal(bias._bucket(ahead, causal), theirs)


def test_nothing_but_padding() -> None:
    model = Transformer(CONFIGS["bert"])
    ids = torch.randint(31, (2, 5))
    assert not model.hidden(ids, torch.zeros_like(ids)).any()


def test_the_table_is_one() -> None:
    model = Transformer(CONFIGS["encoder-decoder"])
    assert model.encoder is not None
    assert model.encoder.embedding.token is model.decoder.embedding.token
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())


@pytest.mark.parametrize(
    "fields, text",
    [
        ({"width": 0}, "width: expected a positive number, got 0"),
        ({"heads": 5}, "width: 24 is no multiple of heads = 5"),
        ({"kv_heads": 3}, "heads: 4 is no multiple of kv_heads = 3"),
        ({"position": "alibi"}, "position: got 'alibi'"),
        ({"norm": "batch"}, "norm: got 'batch'"),
        ({"head": "reward"}, "head: got 'reward'"),
        ({"activation": "tanh"}, "activation: got 'tanh'"),
        ({"head": "classes"}, "classes: got 0 with head='classes'"),
        ({"classes": 2}, "classes: got 2 with head='lm'"),
        ({"labels": ("a", "b")}, "classes: got 2 with head='lm'"),
        ({"head": "classes", "labels": ("a", "a")}, "labels: needs 2 different names"),
        (
            {"head": "classes", "classes": 3, "labels": ("a", "b")},
            "labels: needs 3 different names",
        ),
        ({"buckets": 3}, "needs at least 4 buckets"),
        ({"max_distance": 16}, "buckets, max_distance: got 32 and 16"),
        ({"head_scale": 0.0}, "head_scale: expected a positive number"),
        ({"encoder_layers": 1, "causal": False}, "encoder_layers: what follows"),
    ],
)
def test_errors_of_a_configuration(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Config(**SIZES | fields)


def test_errors_of_a_call() -> None:
    ids = torch.zeros(1, 5, dtype=torch.int64)
    plain, pair = Transformer(CONFIGS["gpt2"]), Transformer(CONFIGS["encoder-decoder"])
    with pytest.raises(ValueError, match="memory: needed with an encoder"):
        pair(ids)
    with pytest.raises(ValueError, match="memory: needed with an encoder"):
        plain(ids, memory=torch.zeros(1, 5, 24))
    with pytest.raises(ValueError, match="encode: the model has no encoder"):
        plain.encode(ids)
    short = Transformer(Config(**SIZES, max_positions=4))
    with pytest.raises(ValueError, match="ids: 5 tokens, the model has 4 positions"):
        short(ids)
    with pytest.raises(ValueError, match=r"ops: needs pyfuse\.ops or pyfuse\.models\.stock"):
        Transformer(CONFIGS["gpt2"], torch)
    with pytest.raises(ValueError, match="targets: the model has no head"):
        Transformer(Config(**SIZES, head=None))(ids, targets=ids)
    with pytest.raises(IndexError):
        plain(ids + VOCAB)
    relative = Transformer(CONFIGS["t5"])
    with pytest.raises(
        ValueError, match="positions: got a tensor, but those of the model are relative"
    ):
        relative(ids, memory=relative.encode(ids), positions=ids)


def test_a_configuration_reads_back() -> None:
    config = CONFIGS["llama"]
    assert Config(**json.loads(json.dumps(vars(config)))) == config

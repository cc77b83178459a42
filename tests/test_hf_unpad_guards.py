"""Which calls and models stay padded, what a live model keeps, and what the receipt says of it."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import VOCAB, build, small_models  # noqa: F401 (small_models is a fixture)
from torch import Tensor, nn
from unpad_cases import (  # noqa: F401 (unpads is a fixture)
    LENGTH,
    NAMES,
    SIDES,
    Double,
    accelerate,
    attributes,
    batch,
    close,
    computed,
    example,
    packed_rows,
    states,
    unpads,
    with_head,
)

import pyfuse
from pyfuse.hf import AccuracyError, entry
from pyfuse.hf import attention as hf_attention
from pyfuse.hf.encoders import CHUNKS, MODELS, TOKEN_BY_TOKEN
from pyfuse.hf.fingerprint import fingerprint

# What stays padded.


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_recorded_states_are_those_of_the_padded_batch(name: str, option: str) -> None:
    model = build(name)
    inputs = batch(model, "right")
    kept = computed(model, inputs)
    stock_model = copy.deepcopy(model)
    stock_model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = stock_model(**inputs, **{option: True})
        accelerate(model)
        states(model, inputs)
        count = len(packed_rows)
        ours = model(**inputs, **{option: True})
        assert count and len(packed_rows) == count
        field = option.removeprefix("output_")
        assert len(ours[field]) == len(stock[field]) >= 2
        for a, b in zip(ours[field], stock[field], strict=True):
            rows = kept if field == "hidden_states" else kept[:, None].expand(a.shape[:3])
            close(a[rows], b[rows])
        close(ours.last_hidden_state[kept], stock.last_hidden_state[kept])
        close(states(model, inputs)[kept], ours.last_hidden_state[kept])
        assert len(packed_rows) == 2 * count  # its hooks are still there, and nothing is asked
        if field == "hidden_states":  # attentions need attn_implementation="eager"
            model.config.output_hidden_states = True
            assert model(**inputs)[field] and len(packed_rows) == 2 * count


def test_a_hook_inside_sees_the_padded_batch() -> None:
    model = build("bert")
    accelerate(model)
    inputs, kept, expected = example(model)
    seen: list[Any] = []
    for path in ("encoder", "encoder.layer.1.attention.self", "encoder.layer.0.output.dense"):
        module = model.get_submodule(path)
        before = len(packed_rows)
        handles = [
            module.register_forward_hook(lambda m, a, out: seen.append(a)),
            module.register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True),
        ]
        for handle in handles:
            close(states(model, inputs)[kept], expected)
            handle.remove()
        assert len(packed_rows) == before and seen.pop()[0].shape[:2] == (4, LENGTH)
        states(model, inputs)
        assert len(packed_rows) == before + 2
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: None)
    try:
        close(states(model, inputs)[kept], expected)
    finally:
        handle.remove()
    assert len(packed_rows) == 2 * 4


def test_training_and_gradients_stay_padded() -> None:
    model = build("bert")
    inputs = batch(model, "right")
    accelerate(model)

    model(**inputs).last_hidden_state.sum().backward()
    model.requires_grad_(False)
    model.encoder.layer[1].output.dense.weight.requires_grad_(True)
    model(**inputs).last_hidden_state.sum().backward()
    model.requires_grad_(False).train()
    model(**inputs)
    model.eval()
    model.encoder.layer[0].attention.self.dropout.train()  # dropout while predicting
    model(**inputs)
    assert not packed_rows
    model.eval()
    model(**inputs)
    assert packed_rows


def test_other_calls_stay_padded() -> None:
    model = build("bert")
    inputs, kept, stock = example(model)
    accelerate(model)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embedded = model.embeddings.word_embeddings(ids).detach()
    close(states(model, {"inputs_embeds": embedded, "attention_mask": mask})[kept], stock)
    dense = mask[:, None, None, :].bool().expand(4, 1, LENGTH, LENGTH)
    close(states(model, {"input_ids": ids, "attention_mask": dense})[kept], stock)
    with torch.autocast("cpu", torch.bfloat16):
        states(model, inputs)
    model.config.is_causal = True
    states(model, inputs)
    del model.config.is_causal
    model.set_attn_implementation("eager")
    close(states(model, inputs)[kept], stock)
    assert not packed_rows


def test_chunked_feed_forward_blocks() -> None:
    """Chunks have to divide the length, which that of a packed row does not."""
    model = build("bert")
    inputs, kept, stock = example(model)
    accelerate(model)
    for layer in model.encoder.layer:
        layer.chunk_size_feed_forward = 6
    close(states(model, inputs)[kept], stock)
    assert not packed_rows


class Narrow(hf.BertModel):
    """One that hides more than its padding."""

    def _create_attention_masks(self, attention_mask: Tensor, **kwargs: Any) -> Any:
        hidden = attention_mask.clone()
        hidden[:, 3] = 0
        return super()._create_attention_masks(attention_mask=hidden, **kwargs)


def test_a_mask_of_ones_own_stays_padded() -> None:
    model = with_head(Narrow, "bert")
    inputs, kept, stock = example(model)
    assert accelerate(model).patched["unpadding"] == 1
    close(states(model, inputs)[kept], stock)
    assert not packed_rows


def test_modules_put_in_later_see_the_padded_batch() -> None:
    model = build("bert")
    accelerate(model)
    inputs, kept, expected = example(model)
    count = len(packed_rows)
    dense = model.encoder.layer[0].output.dense
    model.encoder.layer[0].output.dense = Double(dense).eval()
    close(states(model, inputs)[kept], expected)
    model.encoder.layer[0].output.dense = dense
    dense.forward = lambda x: nn.Linear.forward(dense, x)
    close(states(model, inputs)[kept], expected)
    assert len(packed_rows) == count


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert"])
def test_graphs_stay_padded(name: str) -> None:
    """Whatever graph is made holds for other padding too."""
    model = build(name).requires_grad_(False)
    inputs, other = batch(model, "right"), batch(model, "left")
    stock = [states(model, i)[computed(model, i)] for i in (inputs, other)]
    accelerate(model)
    torch._dynamo.reset()
    graphs = [
        torch.compile(model, fullgraph=True, backend="aot_eager"),
        torch.export.export(model, (), inputs, strict=False).module(),
    ]
    if name != "modernbert":  # stock does not give what it gave either
        graphs.append(
            torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False, check_trace=False)
        )
    for graph in graphs:
        for given, want in zip((inputs, other), stock, strict=True):
            close(graph(**given)["last_hidden_state"][computed(model, given)], want)
    assert not packed_rows


# One live model.


def test_undo_and_switching_off() -> None:
    for name in ("bert", "distilbert", "modernbert"):
        model = build(name)
        inputs = batch(model, "right")
        before = attributes(model)
        stock = states(model, inputs)
        receipt = accelerate(model)
        assert not torch.equal(states(model, inputs), stock)
        receipt.undo()
        assert torch.equal(states(model, inputs), stock)
        assert attributes(model) == before
        with accelerate(model, unpad=False) as receipt:
            assert receipt.skipped["unpadding"] == {"unpad=False": 1}
            close(states(model, inputs), stock)


def test_a_deepcopy_unpads_by_itself() -> None:
    model = build("bert")
    inputs = batch(model, "right")
    receipt = accelerate(model)
    expected = states(model, inputs)
    twin = copy.deepcopy(model)
    receipt.undo()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.mul_(2)
    count = len(packed_rows)
    assert torch.equal(states(twin, inputs), expected) and len(packed_rows) == 2 * count


def test_signatures_stay() -> None:
    for name in ("bert", "distilbert", "modernbert"):
        model = build(name)
        parts = [
            part for path, part in model.named_children() if path in ("encoder", "transformer")
        ]
        modules = (model, *parts)
        before = [inspect.signature(module.forward) for module in modules]
        accelerate(model)
        assert [inspect.signature(module.forward) for module in modules] == before


def test_threads() -> None:
    model = build("bert")
    accelerate(model)
    inputs = [batch(model, side) for side in SIDES * 3]
    expected = [states(model, i) for i in inputs]
    ours: list[list[Tensor]] = [[] for _ in inputs]

    def work(n: int) -> None:
        for _ in range(5):
            ours[n].append(states(model, inputs[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(ours, expected, strict=True):
        assert len(got) == 5 and all(torch.equal(x, want) for x in got)


# The receipt.


def test_the_receipt_says_so() -> None:
    receipt = pyfuse.accelerate(build("bert"), linear=False)
    text = str(receipt)
    for part in (
        "unpadding              1",
        "unpadding: the encoder leaves out padding where that is a tenth of a batch or more",
        "last_hidden_state is zero there, not stock's values; unpad=False keeps them",
        "speed, forward 4 x 62, 40 % padding: ",
    ):
        assert part in text
    assert {"right padding", "left padding"} <= set(receipt.errors)


@pytest.mark.parametrize("name", [*NAMES, "bert with a head"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["f32", "bf16"])
def test_verification(
    name: str,
    dtype: torch.dtype | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pyfuse.hf.verify.TIMED_SECONDS", 0.0)
    model = build(name) if name in NAMES else with_head(hf.BertForSequenceClassification, "bert")
    receipt = pyfuse.accelerate(model, linear=False, dtype=dtype, unpad=True)
    assert all(error <= budget for error, budget in receipt.errors.values()) and packed_rows


def test_a_wrong_result_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as sequences that are not kept apart."""

    def mixed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, **options: Any) -> Any:
        ends = torch.tensor([0, len(q)])
        return pyfuse.varlen_attention(q, k, v, ends, torch.tensor([0, len(k)]), **options)

    monkeypatch.setattr(hf_attention, "varlen_attention", mixed)
    with pytest.raises(AccuracyError, match="with right padding"):
        pyfuse.accelerate(build("bert"), linear=False)


def _vit() -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
    return hf.ViTModel(hf.ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8))


def _mpnet() -> Any:
    return hf.MPNetModel(
        hf.MPNetConfig(
            vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=64,
        )
    )  # fmt: skip


def _bert(**more: Any) -> Any:
    config = build("bert").config.to_dict()
    return hf.BertModel(hf.BertConfig(**{**config, **more}))


def _tampered() -> Any:
    model = build("bert")
    model.encoder.layer[0].output.dense = Double(model.encoder.layer[0].output.dense)
    return model


def _replaced() -> Any:
    model = build("bert")
    dense = model.encoder.layer[0].output.dense
    dense.forward = lambda x: nn.Linear.forward(dense, x)
    return model


def _modernbert_by_length() -> Any:
    config = build("modernbert").config
    config.rope_parameters["full_attention"].update(rope_type="dynamic", factor=2.0)
    return hf.ModernBertModel(config)


REASONS = {
    "llama": (lambda: build("llama"), "it is a decoder"),
    "gpt2": (lambda: build("gpt2"), "it is a decoder"),
    "bert decoder": (lambda: _bert(is_decoder=True), "it is a decoder"),
    "t5": (lambda: build("t5"), "only encoders alone are unpadded"),
    "bart": (lambda: build("bart"), "only encoders alone are unpadded"),
    "t5 encoder": (
        lambda: hf.T5EncoderModel(build("t5").config),
        "its attention adds a bias that belongs to two positions",
    ),
    "mpnet": (_mpnet, "its attention adds a bias that belongs to two positions"),
    "an encoder with a norm after it": (
        lambda: build("prelayernorm"),
        "RobertaPreLayerNormModel is none of the encoders that are known to allow it",
    ),
    "vit": (_vit, "it takes pixel_values, not padded token ids"),
    "no padding token": (lambda: _bert(pad_token_id=None), "its config has no pad_token_id"),
    "another module": (_tampered, "its Double is not known to treat each token by itself"),
    "a replaced forward": (_replaced, "the forward of its Linear is replaced already"),
    "dynamic rope": (_modernbert_by_length, "its rotary frequencies depend on the length"),
}


@pytest.mark.parametrize("case", REASONS)
def test_why_not(case: str) -> None:
    make, why = REASONS[case]
    receipt = accelerate(make())
    (reason,) = receipt.skipped["unpadding"]
    assert reason.startswith(why) and reason in str(receipt)
    assert "unpadding" not in receipt.patched and "leaves out padding" not in str(receipt)
    model = make()
    with pytest.raises(ValueError, match=r"unpad: True, but .* cannot: ") as error:
        accelerate(model, unpad=True)
    assert reason in str(error.value)
    assert not any("_pyfuse" in module.__dict__ for module in model.modules())


def test_without_a_kernel_nothing_is_unpadded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula computes every row with every key: that would be slower, not faster."""
    monkeypatch.setattr(entry, "_objections", lambda _: {"packed attention": "cpu: not built"})
    assert accelerate(build("bert")).skipped["unpadding"] == {"cpu: not built": 1}
    with pytest.raises(ValueError, match="unpad: True, but BertModel cannot: cpu: not built"):
        accelerate(build("bert"), unpad=True)


def test_a_wrong_option_is_refused() -> None:
    with pytest.raises(ValueError, match="unpad: got 'yes', needs 'auto', True or False"):
        accelerate(build("bert"), unpad="yes")


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_fit_the_installed_transformers(name: str) -> None:
    """A failure after an update: read the new method, and whether it still allows unpadding."""
    model = build(name)
    family = MODELS[fingerprint(type(model).forward, decorated=True) or ""]
    inside = model if family.encoder is None else model.get_submodule(family.encoder)
    for module in inside.modules():
        cls = type(module)
        if cls.__module__.startswith("transformers.models.") and module is not model:
            assert fingerprint(cls.forward, decorated=True) in TOKEN_BY_TOKEN, cls
            for method in CHUNKS:
                if hasattr(cls, method):
                    assert fingerprint(getattr(cls, method)) == CHUNKS[method]

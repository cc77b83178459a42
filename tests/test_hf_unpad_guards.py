"""Which calls stay padded, and what a live model keeps."""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import build, small_models  # noqa: F401 (small_models is a fixture)
from torch import Tensor, nn
from unpad_cases import (  # noqa: F401 (unpads is a fixture)
    LENGTH,
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

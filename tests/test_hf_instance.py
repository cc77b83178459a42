"""accelerate() and one live model: what stays, what undo() brings back, what other tools see."""

from __future__ import annotations

import copy
import io
import pickle
from types import MethodType
from typing import Any

import pytest
import torch
import transformers as hf
from hf_cases import (  # noqa: F401 (small_models is a fixture)
    MODELS,
    VOCAB,
    build,
    inputs_for,
    logits,
    small_models,
    tokens,
)
from torch import Tensor, nn

import pyfuse
from pyfuse.hf import undo
from pyfuse.linear import Choice


@pytest.fixture(autouse=True)
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """linear="auto" takes the fast ways for every shape, whatever a calibration would say."""
    choice = Choice(("rows",) * 4 + ("packed",) * 4, {})
    monkeypatch.setattr("pyfuse.linear.calibrate", lambda *_: choice)


def accelerate(model: nn.Module, **options: Any) -> pyfuse.Receipt:
    return pyfuse.accelerate(model, **{"verify": False, **options})


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a module holds, by identity."""
    return {
        f"{path}.{name}": (id(value), dict(value) if isinstance(value, dict) else None)
        for path, module in model.named_modules()
        for name, value in module.__dict__.items()
    }


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_undo_restores_everything(name: str) -> None:
    model = build(name)
    inputs = inputs_for(model, "left")
    before, expected = snapshot(model), logits(model, inputs)
    receipt = accelerate(model, dtype=torch.bfloat16)
    assert snapshot(model) != before and not torch.equal(logits(model, inputs).float(), expected)
    receipt.undo()
    assert snapshot(model) == before
    assert torch.equal(logits(model, inputs), expected)
    receipt.undo()  # again: nothing happens
    assert receipt.undone and snapshot(model) == before


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_state_dict_and_types_stay(name: str) -> None:
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    parameters = [id(parameter) for parameter in model.parameters()]
    with accelerate(model):
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert [type(module) for module in model.modules()] == types
        assert [id(parameter) for parameter in model.parameters()] == parameters
        fresh = build(name, seed=3)
        fresh.load_state_dict(after)
    inputs = inputs_for(model, "none")
    assert torch.equal(logits(fresh, inputs), logits(model, inputs))


def test_other_models_of_the_same_config_object_stay_stock() -> None:
    config = hf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    first, second = hf.LlamaForCausalLM(config).eval(), hf.LlamaForCausalLM(config).eval()
    before, inputs = snapshot(second), inputs_for(second, "left")
    expected = logits(second, inputs)
    with accelerate(first):
        assert first.config._attn_implementation == "pyfuse"
        assert config._attn_implementation == second.config._attn_implementation == "sdpa"
        assert snapshot(second) == before
        assert torch.equal(logits(second, inputs), expected)
    assert first.config is config


def test_two_models_at_once() -> None:
    models = [build("llama", seed=0), build("llama", seed=5), build("gpt2")]
    inputs = [inputs_for(model, "right") for model in models]
    expected = [logits(model, i) for model, i in zip(models, inputs, strict=True)]
    receipts = [accelerate(model) for model in models]
    receipts[1].undo()
    for model, i, want in zip(models, inputs, expected, strict=True):
        close(logits(model, i), want)
    assert torch.equal(logits(models[1], inputs[1]), expected[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_deepcopy_is_accelerated_and_bound_to_itself(name: str) -> None:
    model = build(name)
    inputs = inputs_for(model, "left")
    expected = logits(model, inputs)
    receipt = accelerate(model)
    twin = copy.deepcopy(model)
    for a, b in zip(model.modules(), twin.modules(), strict=True):
        assert all(
            value.__self__ is b for value in b.__dict__.values() if isinstance(value, MethodType)
        )
        assert ("forward" in a.__dict__) == ("forward" in b.__dict__)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.25)
    changed = logits(twin, inputs)
    close(logits(model, inputs), expected)
    receipt.undo()
    assert (changed - expected).abs().max() > 1e-2
    close(logits(twin, inputs), changed)
    undo(twin)
    close(logits(twin, inputs), changed)
    assert not any("forward" in module.__dict__ for module in twin.modules())


def test_a_pickled_model_comes_back_as_stock() -> None:
    model = build("llama")
    inputs = inputs_for(model, "left")
    expected = logits(model, inputs)
    with accelerate(model, linear=False):
        buffer = io.BytesIO()
        pickle.dump(model, buffer)
    buffer.seek(0)
    close(logits(pickle.load(buffer), inputs), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_weights_loaded_later_are_used(name: str) -> None:
    model, other = build(name), build(name, seed=4)
    inputs = inputs_for(model, "right")
    first, second = logits(model, inputs), logits(other, inputs)
    accelerate(model)
    close(logits(model, inputs), first)
    model.load_state_dict(other.state_dict())
    close(logits(model, inputs), second)
    model.load_state_dict(build(name).state_dict(), assign=True)  # other tensors, not other values
    close(logits(model, inputs), first)


def test_a_cast_after_accelerate() -> None:
    model = build("llama")
    inputs = inputs_for(model, "left")
    accelerate(model)
    logits(model, inputs)
    model.to(torch.bfloat16)
    expected = logits(build("llama", torch.bfloat16), inputs)
    assert logits(model, inputs).dtype == torch.bfloat16
    assert (logits(model, inputs) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_training_is_stock(name: str) -> None:
    """Dropout and all: the same gradients, bit for bit, since the model's own code runs; products as small as these
    are torch's."""

    def gradients(model: hf.PreTrainedModel) -> list[Tensor | None]:
        model.train()
        model.zero_grad()
        torch.manual_seed(11)
        output = model(**inputs_for(model, "left"))
        values = output.logits if "logits" in output else output.last_hidden_state
        values.square().mean().backward()
        return [p.grad for p in model.parameters()]

    model = build(name)
    expected = gradients(model)
    with accelerate(model):
        actual = gradients(model)
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_a_single_parameter_in_eval_mode(name: str) -> None:
    """Whichever one it is: before it pyfuse runs, after it the model's own code."""
    model = build(name).requires_grad_(False)
    inputs = inputs_for(model, "left", 9)

    def gradient(parameter: nn.Parameter) -> Tensor | None:
        output = model(**inputs)
        values = output.logits if "logits" in output else output.last_hidden_state
        return torch.autograd.grad(values.square().mean(), [parameter], allow_unused=True)[0]

    used = {}
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(True)
        if "pooler" not in path:
            used[path] = gradient(parameter)
        parameter.requires_grad_(False)
    with accelerate(model):
        for path, expected in used.items():
            parameter = model.get_parameter(path).requires_grad_(True)
            actual = gradient(parameter)
            assert actual is not None and expected is not None, path
            assert (actual - expected).abs().max() <= 1e-3 * expected.abs().max() + 1e-6, path
            parameter.requires_grad_(False)


def test_gradient_checkpointing() -> None:
    model = build("llama").train()
    model.activation_checkpointing_enable()
    with accelerate(model):
        model(**inputs_for(model, "left")).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class LoRA(nn.Module):
    """What PEFT does to a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.3)
        self.b = nn.Parameter(torch.randn(base.out_features, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + x @ self.a.T @ self.b.T
        return y


@pytest.mark.parametrize("order", ["before", "after"])
def test_wrapped_linear_layers(order: str) -> None:
    def wrap(model: hf.PreTrainedModel) -> None:
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
            layer.mlp.up_proj = LoRA(layer.mlp.up_proj)

    model, reference = build("llama"), build("llama")
    wrap(reference)
    inputs = inputs_for(model, "left")
    if order == "before":
        wrap(model)
    accelerate(model)
    if order == "after":
        wrap(model)
    close(logits(model, inputs), logits(reference, inputs))
    model(**inputs).logits.square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.b.grad is not None


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "distilbert", "t5", "bart"])
def test_hooks_inside_fused_blocks_are_called(name: str) -> None:
    model = build(name)
    accelerate(model)
    seen: dict[str, Tensor] = {}
    inputs = inputs_for(model, "none", 9)
    leaves = {
        path: module for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.LayerNorm) or "RMSNorm" in type(module).__name__
    }  # fmt: skip
    handles = [
        module.register_forward_hook(lambda m, a, out, path=path: seen.__setitem__(path, out))
        for path, module in leaves.items()
    ]
    hooked = logits(model, inputs)
    copies = {path: value.clone() for path, value in seen.items()}
    assert set(seen) == {path for path in leaves if "pooler" not in path or name == "bert"}
    assert all(torch.equal(seen[path], copies[path]) for path in seen)
    for handle in handles:
        handle.remove()
    close(logits(model, inputs), hooked)


def test_captured_projections_are_not_rotated_in_place() -> None:
    model = build("llama")
    inputs = inputs_for(model, "none", 9)
    projection = model.model.layers[0].self_attn.q_proj
    seen: list[Tensor] = []
    projection.register_forward_hook(lambda m, a, out: seen.append(out))
    logits(model, inputs)
    with accelerate(model):
        logits(model, inputs)
    close(seen[1], seen[0])


def test_choosing_another_attention_later_is_honoured() -> None:
    model = build("llama")
    inputs = inputs_for(model, "left")
    accelerate(model)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        assert model(**inputs, output_attentions=True).attentions[0].shape == (3, 4, 40, 40)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "bert", "t5"])
def test_compiled_equals_eager(name: str) -> None:
    model = build(name)
    inputs = inputs_for(model, "left", 13)
    expected = logits(model, inputs)
    accelerate(model)
    if name != "bert":
        inputs["use_cache"] = False
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(logits(compiled, inputs), expected)
    ops = _graph_ops(model, inputs)
    assert any("pyfuse.attention" in op for op in ops)


def _graph_ops(model: nn.Module, inputs: dict[str, Any]) -> list[str]:
    found: list[str] = []

    def backend(graph: torch.fx.GraphModule, _example: Any) -> Any:
        found.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, fullgraph=True, backend=backend)(**inputs)
    return found


def test_autocast_is_stock() -> None:
    model = build("llama")
    inputs = inputs_for(model, "left")
    with torch.autocast("cpu", torch.bfloat16):
        expected = logits(model, inputs)
        with accelerate(model):
            assert torch.equal(logits(model, inputs), expected)


def test_functorch_sees_through() -> None:
    model = build("llama").requires_grad_(False)
    ids = tokens(1, 7)
    embeddings = model.get_input_embeddings()(ids)

    def total(x: Tensor) -> Tensor:
        return model(inputs_embeds=x, use_cache=False).logits.square().mean()

    expected = torch.func.grad(total)(embeddings)
    with accelerate(model):
        close(torch.func.grad(total)(embeddings), expected)


def test_dtype_casts_and_keeps_ties() -> None:
    model = build("bart")
    assert model.lm_head.weight is model.model.shared.weight
    tensors = {name: id(p) for name, p in model.named_parameters()}
    with accelerate(model, dtype=torch.bfloat16):
        assert model.dtype == torch.bfloat16 and model.config.dtype in (None, torch.bfloat16)
        assert model.lm_head.weight is model.model.shared.weight
        assert logits(model, inputs_for(model, "left")).dtype == torch.bfloat16
    assert model.dtype == torch.float32
    assert {name: id(p) for name, p in model.named_parameters()} == tensors
    llama = build("llama")
    with accelerate(llama, dtype=torch.bfloat16):  # as from_pretrained: frequencies stay exact
        assert llama.model.rotary_emb.inv_freq.dtype == torch.float32

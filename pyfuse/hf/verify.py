"""The proof in a receipt: logits against the stock model and a float64 truth, and a quick measurement of the gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from pyfuse.hf.attention import NAMES, eager_forward
from pyfuse.hf.receipt import AccuracyError
from pyfuse.hf.state import patched_modules, switch_off, switch_on

PROBE_TOKENS = 24
TIMED_TOKENS = 128
TIMED_SECONDS = 3.0  # no new round after this
_FLOAT64_ULPS, _ULPS = 64.0, 2.0

EXACT = "pyfuse-exact"  # the eager attention of models that have no other, in float64

Inputs = dict[str, Any]


def _exact_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return eager_forward(module)(module, *args, **kwargs)


def _exact_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # With float64's lowest number, eager attention that takes its softmax in float32 would make NaN of empty rows.
    return eager_mask(*args, **{**kwargs, "dtype": torch.float32})


AttentionInterface.register(EXACT, _exact_attention)
AttentionMaskInterface.register(EXACT, _exact_mask)


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """(error, budget) for each probe batch; AccuracyError if one is past its budget.

    Truth is the stock model in float64. error = max |ours - truth| <= 2 max |stock - truth| + 2 ulp of the
    largest value, over the tokens that are no padding.
    """
    with _evaluating(model):
        batches = _batches(model)
        ours = {name: _run(model, inputs) for name, inputs in batches.items()}
        decoded = _decode(model, batches["left padding"]) if _decodes(model) else None
        with _stock(model):
            stock = {name: _run(model, inputs) for name, inputs in batches.items()}
        with _exact(model):
            truth = {name: _run(model, inputs).double() for name, inputs in batches.items()}
    results = {}
    for name, inputs in batches.items():
        results[name] = _compare(ours[name], stock[name], truth[name], inputs)
    if decoded is not None:
        inputs, tokens = batches["left padding"], slice(-decoded.shape[1], None)
        mask = {"attention_mask": inputs["attention_mask"][:, tokens]}
        results["left padding, token by token"] = _compare(
            decoded, stock["left padding"][:, tokens], truth["left padding"][:, tokens], mask
        )
    for name, (error, budget) in results.items():
        if not error <= budget:  # NaN included
            raise AccuracyError(
                f"{type(model).__name__}: logit error {error:.2e} with {name}, the accuracy rule allows {budget:.2e}; "
                "the model has been restored"
            )
    return results


def _compare(ours: Tensor, stock: Tensor, truth: Tensor, inputs: Inputs) -> tuple[float, float]:
    mask = inputs.get("attention_mask")
    if mask is not None and "decoder_input_ids" not in inputs and ours.shape[:2] == mask.shape:
        real = mask.bool()
        ours, stock, truth = ours[real], stock[real], truth[real]
    ulps = _FLOAT64_ULPS if ours.dtype == torch.float64 else _ULPS
    slack = ulps * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    own, error = (stock.double() - truth).abs().max().item(), (ours.double() - truth).abs().max().item()
    return error, 2 * own + slack


def _batches(model: PreTrainedModel) -> dict[str, Inputs]:
    """Without padding, with right and with left padding."""
    if model.main_input_name == "pixel_values" and hasattr(model.config, "image_size"):
        return {"an image": _image(model)}
    if model.main_input_name != "input_ids" or _vocabulary(model) is None:
        raise ValueError(
            f"verify: no probe batch for the main input {model.main_input_name!r} of {type(model).__name__}; "
            "call accelerate(model, verify=False)"
        )
    length = _length(model, PROBE_TOKENS)
    rows = 1 if _classifies_one_row(model) else 2
    ids = _tokens(model, rows, length)
    padding = torch.ones_like(ids)
    padding[-1, length - length // 3 :] = 0
    batches: dict[str, Inputs] = {"no padding": {"input_ids": ids}}
    for name, mask in (("right padding", padding), ("left padding", padding.flip(1))):
        pad = getattr(model.config, "pad_token_id", None) or 0
        batches[name] = {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        for inputs in batches.values():
            inputs["decoder_input_ids"] = _tokens(model, rows, max(length // 3, 1), seed=1)
    return batches


def _length(model: PreTrainedModel, wanted: int) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or wanted
    return max(min(wanted, limit - 2), 1)  # RoBERTa's positions start at 2


def _classifies_one_row(model: PreTrainedModel) -> bool:
    """Classifiers on a decoder refuse several rows unless they know the padding token."""
    return getattr(model.config, "pad_token_id", None) is None and "Classification" in type(model).__name__


def _tokens(model: PreTrainedModel, rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids without the special ones, drawn from a generator of their own."""
    config = model.config
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "decoder_start", "mask")}
    usable = torch.tensor([i for i in range(min(_vocabulary(model) or 1, 50_000)) if i not in special])
    draw = torch.Generator().manual_seed(seed)
    picked = usable[torch.randint(len(usable), (rows, length), generator=draw)]
    return picked.to(model.device)


def _vocabulary(model: PreTrainedModel) -> int | None:
    """The number of token ids; None where the model has no one table of token embeddings."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # what transformers raises for several towers
        return None
    weight = getattr(embedding, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) else None


def _image(model: PreTrainedModel) -> Inputs:
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, getattr(model.config, "num_channels", 3), height, width)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels.to(model.device, model.dtype)}


def _run(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    inputs = {
        k: v.to(model.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()
    }
    return _logits(model(**inputs))


def _logits(output: Any) -> Tensor:
    for name in ("logits", "start_logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    first = next((v for v in output.to_tuple() if isinstance(v, Tensor) and v.is_floating_point()), None)
    if first is None:
        raise ValueError("verify: the model returns no tensor to compare; call accelerate(model, verify=False)")
    return first


def _decodes(model: PreTrainedModel) -> bool:
    return bool(model.can_generate() and not model.config.is_encoder_decoder and model._supports_default_dynamic_cache())


def _decode(model: PreTrainedModel, inputs: Inputs, steps: int = 3) -> Tensor:
    """The logits of the last ``steps`` tokens, fed one by one after the rest: the way of generate()."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    start = max(ids.shape[1] - steps, 1)
    output = model(input_ids=ids[:, :start], attention_mask=mask[:, :start], use_cache=True)
    logits = []
    for i in range(start, ids.shape[1]):
        output = model(
            input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], use_cache=True,
            past_key_values=output.past_key_values,
        )  # fmt: skip
        logits.append(output.logits)
    return torch.cat(logits, 1)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _stock(model: nn.Module) -> Iterator[None]:
    switch_off(model)
    try:
        yield
    finally:
        switch_on(model)


@contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """The stock model in float64, layer by layer, so that a second model need not fit in memory.

    Attention is torch's sdpa, which keeps to float64 where many a model's eager attention rounds to float32.
    """
    switch_off(model, configs=False)
    configs = {
        id(config): config
        for _path, module, state in patched_modules(model)
        for config in (module.__dict__[name] for name in state.configs)
    }
    implementations = {key: config._attn_implementation for key, config in configs.items()}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {m for layer in layers for m in layer.modules()}
    saved = _widen(module for module in model.modules() if module not in inside)
    held: dict[nn.Module, list[tuple[dict[str, Any], str, Tensor]]] = {}
    handles = []

    def before(layer: nn.Module, _args: Any) -> None:
        held[layer] = _widen(layer.modules())

    def after(layer: nn.Module, _args: Any, _output: Any) -> None:
        _restore(held.pop(layer))

    try:
        for config in configs.values():
            if config._attn_implementation in NAMES:
                eager = config._attn_implementation == NAMES[1]
                config._attn_implementation_internal = EXACT if eager else "sdpa"
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(before, prepend=True))
            handles.append(layer.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensors in (*held.values(), saved):
            _restore(tensors)
        for key, config in configs.items():
            config._attn_implementation_internal = implementations[key]
        switch_on(model)


def _widen(modules: Any) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Replace the floating-point tensors of these modules by float64 ones; what to :func:`_restore`."""
    saved = []
    wide: dict[int, Tensor] = {}
    for module in modules:
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64:
                    saved.append((store, name, tensor))
                    if id(tensor) not in wide:
                        new = tensor.detach().double()
                        wide[id(tensor)] = nn.Parameter(new, False) if store is module._parameters else new
                    store[name] = wide[id(tensor)]
    return saved


def _restore(saved: list[tuple[dict[str, Any], str, Tensor]]) -> None:
    for store, name, tensor in saved:
        store[name] = tensor


@torch.no_grad()
def measure(model: PreTrainedModel) -> dict[str, float]:
    """Stock time / accelerated time on one forward pass and, for a language model, on one token after it."""
    if model.main_input_name != "input_ids":
        inputs = _image(model)
        return {"one batch": _ratio(model, lambda: model(**inputs))}
    length = _length(model, TIMED_TOKENS)
    ids = _tokens(model, 1, length)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : max(length // 4, 1)]
    with _evaluating(model):
        found = {f"forward 1 x {length}": _ratio(model, lambda: model(**inputs))}
        if _decodes(model) and length > 8:
            found["decoding"] = _ratio(model, *_decode_timer(model, ids))
    return found


def _decode_timer(model: PreTrainedModel, ids: Tensor) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the last eight tokens one by one, the prefill before them): the second is not timed."""
    past: list[Any] = []

    def prefill() -> None:
        past[:] = [model(input_ids=ids[:, :-8], use_cache=True).past_key_values]

    def steps() -> None:
        for i in range(ids.shape[1] - 8, ids.shape[1]):
            model(input_ids=ids[:, i : i + 1], past_key_values=past[0], use_cache=True)

    return steps, prefill


def _ratio(model: nn.Module, run: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> float:
    best = {"stock": float("inf"), "ours": float("inf")}
    end = time.perf_counter() + TIMED_SECONDS
    for round_ in range(4):  # the first one only warms up
        for name in best:
            if name == "stock":
                switch_off(model)
            try:
                prepare()
                start = time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
            finally:
                switch_on(model)
            if round_ or time.perf_counter() > end:
                best[name] = min(best[name], elapsed)
        if time.perf_counter() > end:
            break
    return best["stock"] / best["ours"]

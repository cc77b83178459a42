"""The proof in a receipt: the error of the logits, and a quick measurement of the gain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyfuse.hf.exact import exact
from pyfuse.hf.probes import Inputs, decode, decodes, image, length, probe_batches, run, tokens
from pyfuse.hf.receipt import AccuracyError
from pyfuse.hf.state import patched_modules, switch_off, switch_on

TIMED_TOKENS = 128
TIMED_SECONDS = 3.0  # no new round after this
_FLOAT64_ULPS, _ULPS = 64.0, 2.0


@torch.no_grad()
def probe(model: PreTrainedModel) -> dict[str, tuple[float, float]]:
    """(error, budget) for each probe batch; AccuracyError if one is past its budget.

    Truth is the stock model in float64. Over the tokens that are no padding,
    error = max |ours - truth| <= 2 max |stock - truth| + 2 ulp of the largest value.
    """
    with _evaluating(model):
        batches = probe_batches(model)
        ours = {name: run(model, inputs) for name, inputs in batches.items()}
        decoded = decode(model, batches["left padding"]) if decodes(model) else None
        with _stock(model):
            stock = {name: run(model, inputs) for name, inputs in batches.items()}
        with exact(model):
            truth = _truth(model, batches)
    results = {
        name: _compare(ours[name], stock[name], truth[name], inputs)
        for name, inputs in batches.items()
    }
    if decoded is not None:
        last = slice(-decoded.shape[1], None)
        name, padding = "left padding", batches["left padding"]["attention_mask"]
        results["left padding, token by token"] = _compare(
            decoded,
            stock[name][:, last],
            truth[name][:, last],
            {"attention_mask": padding[:, last]},
        )
    for name, (error, budget) in results.items():
        if not error <= budget:  # NaN included
            raise AccuracyError(
                f"{type(model).__name__}: logit error {error:.2e} with {name}, the accuracy rule "
                f"allows {budget:.2e}; the model has been restored"
            )
    return results


def _truth(model: PreTrainedModel, batches: dict[str, Inputs]) -> dict[str, Tensor]:
    """The logits of each batch, from one pass over all of them: float64 weights are made once."""
    first = next(iter(batches.values()))
    if len(batches) == 1 or len(first["input_ids"]) == 1:  # an image; a classifier of single rows
        return {name: run(model, inputs) for name, inputs in batches.items()}
    whole = {"attention_mask": torch.ones_like(first["input_ids"])}
    rows = [{**whole, **inputs} for inputs in batches.values()]
    merged = {key: torch.cat([inputs[key] for inputs in rows]) for key in rows[0]}
    return dict(zip(batches, run(model, merged).chunk(len(batches)), strict=True))


def _compare(ours: Tensor, stock: Tensor, truth: Tensor, inputs: Inputs) -> tuple[float, float]:
    mask = inputs.get("attention_mask")
    if mask is not None and "decoder_input_ids" not in inputs and ours.shape[:2] == mask.shape:
        real = mask.bool()
        ours, stock, truth = ours[real], stock[real], truth[real]
    ulps = _FLOAT64_ULPS if ours.dtype == torch.float64 else _ULPS
    slack = ulps * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    error, own = ((x.double() - truth).abs().max().item() for x in (ours, stock))
    return error, 2 * own + slack


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


@torch.no_grad()
def measure(model: PreTrainedModel) -> dict[str, float]:
    """Stock time / accelerated time: one forward pass and, for a decoder, the next tokens."""
    if model.main_input_name != "input_ids":
        inputs = image(model)
        return {"one batch": _ratio(model, lambda: model(**inputs))}
    count = length(model, TIMED_TOKENS)
    ids = tokens(model, 1, count)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : max(count // 4, 1)]
    with _evaluating(model):
        found = {f"forward 1 x {count}": _ratio(model, lambda: model(**inputs))}
        if any(state.unpad is not None for _path, _module, state in patched_modules(model)):
            batch = _two_fifths_padding(model, count)
            found[f"forward 4 x {count}, 40 % padding"] = _ratio(model, lambda: model(**batch))
        if decodes(model) and count > 8:
            found["decoding"] = _ratio(model, *_decode_timer(model, ids))
    return found


def _two_fifths_padding(model: PreTrainedModel, count: int) -> Inputs:
    """Four rows with as many tokens as texts of different lengths have: all, and then fewer."""
    lengths = torch.tensor([1.0, 0.6, 0.5, 0.3]) * count
    mask = torch.arange(count) < lengths[:, None]
    ids = tokens(model, 4, count).masked_fill(~mask, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask.long()}


def _decode_timer(
    model: PreTrainedModel, ids: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(the last eight tokens one by one, the prefill before them): the second is not timed."""
    past: list[Any] = []

    def prefill() -> None:
        past[:] = [model(input_ids=ids[:, :-8], use_cache=True).past_key_values]

    def steps() -> None:
        for i in range(ids.shape[1] - 8, ids.shape[1]):
            model(input_ids=ids[:, i : i + 1], past_key_values=past[0], use_cache=True)

    return steps, prefill


def _ratio(
    model: nn.Module, run: Callable[[], Any], prepare: Callable[[], Any] = lambda: None
) -> float:
    best = {"stock": float("inf"), "ours": float("inf")}
    end = time.perf_counter() + TIMED_SECONDS
    for round_ in range(5):
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
            best[name] = elapsed if round_ < 2 else min(best[name], elapsed)  # round 0 warms up
        if time.perf_counter() > end:
            break
    return best["stock"] / best["ours"]

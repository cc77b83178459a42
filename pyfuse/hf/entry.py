"""accelerate(): the order in which a live model is patched, checked and measured."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from pyfuse import ops
from pyfuse.dispatch import explain
from pyfuse.hf import cache
from pyfuse.hf.attention import NAMES
from pyfuse.hf.encoders import patch_encoders
from pyfuse.hf.patches import patch_modules
from pyfuse.hf.receipt import Receipt, Tally
from pyfuse.hf.state import (
    add_pre_hook,
    bind,
    patched_modules,
    remove,
    set_attribute,
    state_of,
    swap_tensor,
)
from pyfuse.hf.verify import measure, probe

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accelerate(
    model: PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    linear: Literal["auto"] | bool = "auto",
    unpad: Literal["auto"] | bool = "auto",
    verify: bool = True,
) -> Receipt:
    """Put pyfuse's kernels into this live Hugging Face model; the :class:`Receipt` says how.

    Attention, norms, rotary embedding, the cache of generate(), feed-forward blocks and, in
    inference on the CPU, linear layers are routed to pyfuse, module by module, on this instance
    only: classes, parameters, state_dict and other models stay as they are. The model gets a copy
    of its config, since others may share the object; changes to the copy go with undo(). Where
    gradients, autocast, torch.compile or training ask for it, the model's own code runs (under
    torch.compile attention stays pyfuse's, and where gradients are wanted the patched linear layers
    are :func:`pyfuse.ops.linear`). ``receipt.undo()`` restores everything; a deepcopy of the model
    is accelerated too, and :func:`pyfuse.hf.undo` restores it.

    dtype: cast parameters and persistent buffers first, as from_pretrained(dtype=...) does; what
      the model wants kept in float32 stays. undo() brings the original tensors back.
    linear: "auto" packs a linear layer's weight where a calibration on this machine shows that it
      is faster; True does the same and raises where none is; False leaves linear layers alone.
    unpad: let an encoder (BERT, RoBERTa, DistilBERT, ModernBERT and kin) compute, of a batch with
      padding, the tokens only. At the padding (attention_mask 0 and the padding token, not first
      in its row) last_hidden_state is then zero, where stock has values that pooling masks out;
      everywhere else it is stock's, within the accuracy rule. "auto" does so where the padding is
      nobody's business: in a model without a head, and under transformers' heads that classify
      sequences or single tokens. True does it under any head, and raises where the encoder cannot;
      False never. Calls in training, with gradients, autocast or torch.compile, for hidden_states
      or attentions, by inputs_embeds, or with hooks inside the encoder are not unpadded.
    verify: compare the logits with the stock model's and with a float64 truth, on batches without
      padding, with right and with left padding, and measure the speed. False skips all of this.
    TypeError: no PreTrainedModel. ValueError: accelerated already (undo() first), nothing to patch,
    or no probe batch can be made for this kind of model (pass verify=False). AccuracyError: past
    the accuracy rule. After an error the model is as before.
    """
    _check(model, dtype, linear, unpad)
    tally = Tally()
    try:
        notes = _own_configs(model)
        if dtype is not None:
            _cast(model, dtype)
        blocked = _objections(model)
        _patch_attention(model, tally, blocked.get("attention"))
        patch_modules(model, tally, blocked, linear is not False)
        _patch_cache(model, tally)
        notes += patch_encoders(model, tally, blocked.get("packed attention"), unpad)
        _require_something(model, tally, linear)
        receipt = Receipt(
            model,
            type(model).__name__,
            dict(tally.patched),
            {kind: dict(reasons) for kind, reasons in tally.skipped.items()},
            memory_bytes=_packed_bytes(model),
            notes=notes,
        )
        if verify:
            receipt.errors = probe(model)
            receipt.speedups = measure(model)
    except BaseException:
        remove(model)
        raise
    return receipt


def undo(model: nn.Module) -> None:
    """Restore an accelerated model without its receipt (a deepcopy has none). Stock stays stock."""
    remove(model)


def _check(model: Any, dtype: Any, linear: Any, unpad: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, needs a transformers.PreTrainedModel")
    if dtype is not None and dtype not in FLOATING:
        raise ValueError(
            f"dtype: got {dtype}, needs None or one of {', '.join(map(str, FLOATING))}"
        )
    for name, value in (("linear", linear), ("unpad", unpad)):
        if value not in ("auto", True, False):
            raise ValueError(f"{name}: got {value!r}, needs 'auto', True or False")
    for path, _module, _state in patched_modules(model):
        raise ValueError(
            f"model: {path or type(model).__name__} is accelerated already; "
            "call undo() on its receipt first"
        )
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model: its parameters are on the meta device, needs loaded weights")


def _own_configs(model: PreTrainedModel) -> list[str]:
    """Give the model copies of its configurations: models made from one config object share it."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            if isinstance(value, PreTrainedConfig):
                set_attribute(module, name, copy.deepcopy(value, copies))
                state_of(module).configs.add(name)
    previous = model.config._attn_implementation
    return [f"attention was {previous!r} before: so is the stock that this is compared with"] * (
        previous in NAMES
    )


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    patterns = list(getattr(model, "_keep_in_fp32_modules_strict", None) or [])
    if dtype == torch.float16:
        patterns += list(getattr(model, "_keep_in_fp32_modules", None) or [])
    keep = (
        re.compile("|".join(rf"((^|\.){re.escape(p)}($|\.))" for p in patterns))
        if patterns
        else None
    )
    cast: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for path, module in model.named_modules():
        for store in ("_parameters", "_buffers"):
            for name, old in list(module.__dict__[store].items()):
                if old is None or not old.is_floating_point() or old.dtype == dtype:
                    continue
                if name in module._non_persistent_buffers_set or (
                    keep and keep.search(f"{path}.{name}")
                ):
                    continue
                if id(old) not in cast:
                    new = old.detach().to(dtype)
                    cast[id(old)] = (
                        nn.Parameter(new, old.requires_grad) if store == "_parameters" else new
                    )
                swap_tensor(module, store, name, cast[id(old)])
    for _path, module, state in patched_modules(model):
        for name in state.configs:
            if getattr(module.__dict__[name], "dtype", None) is not None:
                module.__dict__[name].dtype = dtype


@torch.no_grad()
def _objections(model: PreTrainedModel) -> dict[str, str]:
    """For each kind of operation, by name: why only plain torch, no kernel, could run them here."""
    device, dtype = model.device, model.dtype
    x = torch.zeros((1, 2, 2, 8), device=device, dtype=dtype)
    table, weight = x[0, 0, :, :4], x[0, 0, 0]
    bounds = torch.tensor([0, 2], dtype=torch.int32, device=device)
    calls: dict[str, tuple[Any, ...]] = {
        "attention": (ops.attention, x, x, x),
        "packed attention": (ops.varlen_attention, x[0], x[0], x[0], bounds, bounds),
        "norm": (ops.rms_norm, x, weight),
        "rope": (ops.rope, x, table, table),
    }
    found = {}
    for name, (op, *args) in calls.items():
        answer = explain(op, *args, **({"layout": "half"} if name == "rope" else {}))
        if (
            answer.chosen == "eager" and len(answer.candidates) > 1
        ):  # and nobody asked for eager by name
            found[name] = "; ".join(
                f"{c.backend}: {c.reason}" for c in answer.candidates if c.reason
            )
    return found


def _patch_attention(model: PreTrainedModel, tally: Tally, blocked: str | None) -> None:
    if blocked is None:
        for module in model.modules():
            if isinstance(module, PreTrainedModel) and module._can_set_attn_implementation():
                config = module.config
                if config._attn_implementation not in NAMES:
                    config._attn_implementation_internal = NAMES[
                        config._attn_implementation == "eager"
                    ]
    for module in model.modules():
        if _calls_interface(module):
            own: Any = getattr(module, "config", None)
            reason = blocked
            if reason is None and getattr(own, "_attn_implementation", None) not in NAMES:
                reason = "its model does not let the attention be replaced"
            tally.add("attention", reason)
        elif _is_attention(module):
            tally.add("attention", "it does not go through transformers' AttentionInterface")


def _calls_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_attention(module: nn.Module) -> bool:
    """An attention layer, and not a block around one."""
    if "Attention" not in type(module).__name__ or next(module.parameters(), None) is None:
        return False
    return not any(
        "Attention" in type(m).__name__ or _calls_interface(m)
        for m in module.modules()
        if m is not module
    )


def _patch_cache(model: PreTrainedModel, tally: Tally) -> None:
    config = model.config
    encoder = getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder
    if encoder or "past_key_values" not in inspect.signature(type(model).forward).parameters:
        return
    add_pre_hook(model, cache.adopt_before_forward)
    if model.can_generate():
        bind(model, "_prepare_cache_for_generation", cache.prepare_cache_for_generation)
    tally.add("KV cache", None)


def _require_something(model: PreTrainedModel, tally: Tally, linear: Any) -> None:
    if not tally.patched:
        reasons = [f"{kind}: {why}" for kind, counts in tally.skipped.items() for why in counts]
        raise ValueError(
            f"model: nothing in {type(model).__name__} can be accelerated"
            + "".join(f"\n  {reason}" for reason in reasons)
        )
    if linear is True and not tally.patched["Linear"] and not tally.patched["Conv1D"]:
        raise ValueError(
            "linear: True, but no linear layer of this model is faster when packed; use 'auto'"
        )


def _packed_bytes(model: nn.Module) -> int:
    slots = [
        state.linear for _path, _module, state in patched_modules(model) if state.linear is not None
    ]
    return sum(slot.packed.memory_bytes for slot in slots)

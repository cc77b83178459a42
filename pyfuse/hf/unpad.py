"""Unpadding: an encoder runs on the tokens of a padded batch, without its padding.

The model's forward looks at the attention mask and decides (:func:`plan`); its encoder then packs
the embeddings [B, S, D] into one row [1, T, D], runs its own layers on that, and unpacks. Linear
layers, norms and activations treat every token by itself; attention keeps sequences apart by a
PackedMask. Whatever is not known to be so, is asked to record, or wants gradients, stays padded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from pyfuse.hf.attention import NAMES
from pyfuse.hf.guards import values_only
from pyfuse.hf.masks import CompactMask
from pyfuse.hf.packing import PackedMask, Packing
from pyfuse.hf.state import ATTRIBUTE

# Of a batch's positions: with more than this to compute, packing costs what it saves.
MOST_KEPT = 0.9
_PACKING = "pyfuse_packing"  # the argument that hands a plan from the model to its encoder
# What a call may pass and still be unpadded; anything else that is set may want all positions.
_TOKENS = frozenset(
    [
        "attention_mask",
        "input_ids",
        "position_ids",
        "return_dict",
        "task_type_ids",
        "token_type_ids",
    ]
)


def plan(model: Any, given: dict[str, Any]) -> Packing | None:
    """How to pack the batch of this call of ``model``; None: it stays as it is.

    Left out are the positions that the mask hides and that hold the padding token. A hidden token
    of another kind, which somebody may have put there to read its state (as ColBERT does), is
    computed, and so is the first position of each row, which pooling layers read.
    """
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if (
        type(mask) is not Tensor
        or type(ids) is not Tensor
        or not (mask.is_cpu and ids.is_cpu and values_only(mask))
        or mask.ndim != 2
        or mask.shape != ids.shape
        or model.training
        or any(v is not None and v is not False and k not in _TOKENS for k, v in given.items())
    ):
        return None
    keys = mask.bool()  # as transformers reads it
    if bool(keys.all()) or not _configured(model.config):
        return None
    kept = keys | (ids != model.config.pad_token_id)
    kept[:, 0] = True
    if int(kept.sum()) > MOST_KEPT * kept.numel():
        return None
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return None
    slot = model.__dict__[ATTRIBUTE].unpad
    parts = [model._modules[name] for name in slot.parts]
    return Packing.of(kept, keys) if _undisturbed(parts, slot.known) else None


def _configured(config: Any) -> bool:
    """The attention is still pyfuse's, the padding token known, and nothing is to be recorded."""
    return (
        config._attn_implementation in NAMES
        and isinstance(config.pad_token_id, int)
        and not getattr(config, "output_hidden_states", False)
        and not getattr(config, "is_causal", False)
    )


def _undisturbed(modules: Iterable[nn.Module], known: frozenset[type]) -> bool:
    """These modules, and those inside, are of known classes, in eval mode, and nobody looks in."""
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return False
    todo = list(modules)
    while todo:
        module = todo.pop()
        attributes = module.__dict__
        if (
            type(module) not in known
            or attributes["training"]
            or attributes.get("chunk_size_feed_forward")  # it would have to divide T
            or attributes["_forward_pre_hooks"]
            or not all(map(_records, attributes["_forward_hooks"].values()))
            or replaced_by_others(module)
        ):
            return False
        todo += [child for child in attributes["_modules"].values() if child is not None]
    return True


def _records(hook: Any) -> bool:
    """transformers' own hook, which stays for good once hidden states have been asked for.

    It does nothing in the calls that get here: they ask for none.
    """
    return (
        getattr(hook, "__module__", "") == "transformers.utils.output_capturing"
        and hook.__qualname__ == "install_output_capuring_hook.<locals>.output_capturing_hook"
    )


def replaced_by_others(module: nn.Module) -> bool:
    """Whether this instance has a forward of its own that is not pyfuse's."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    state = module.__dict__.get(ATTRIBUTE)
    return state is None or state.after.get("forward") is not forward


@cache
def planning(cls: Any) -> Callable[..., Any]:
    """The forward of a model whose encoder is a module of its own: BERT and its kin."""
    own, names = cls.forward, _names(cls)

    @wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        packing = plan(self, {**dict(zip(names, args, strict=False)), **kwargs})
        if packing is not None:
            kwargs[_PACKING] = packing
        return own(self, *args, **kwargs)

    return forward


@cache
def packing_encoder(cls: Any) -> Callable[..., Any]:
    """The forward of that encoder: pack, run the layers, unpack."""
    own = cls.forward

    @wraps(own)
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        packing: Packing | None = kwargs.pop(_PACKING, None)
        if packing is None or not _is_about(attention_mask, packing):
            return own(self, hidden_states, attention_mask, *args, **kwargs)
        packed, mask = packing.pack(hidden_states), PackedMask(packing)
        output = own(self, packed, mask, *args, **kwargs)
        output.last_hidden_state = packing.unpack(output.last_hidden_state)
        return output

    return forward


def _is_about(mask: Any, packing: Packing) -> bool:
    """Whether the mask that the model made says no more than that the padding is hidden."""
    return (
        type(mask) is CompactMask
        and not mask.causal
        and mask.window is None
        and mask.padding is not None
        and torch.equal(mask.padding, packing.keys)
    )


@cache
def modernbert(cls: Any) -> Callable[..., Any]:
    """ModernBERT's model runs its layers itself, and takes positions and ready-made masks."""
    own, names = cls.forward, _names(cls)

    @wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        packing = plan(self, given)
        # Its windows count positions, which are those of the padded batch if nothing is left out
        # before a token.
        if packing is None or not packing.right_padded():
            return own(self, *args, **kwargs)
        ids, positions = given["input_ids"], given.get("position_ids")
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        half = self.config.sliding_window
        output = own(
            self,
            input_ids=packing.pack(ids),
            position_ids=packing.pack(positions.expand(ids.shape)),
            attention_mask={
                "full_attention": PackedMask(packing),
                "sliding_attention": PackedMask(packing, (half, half)),
            },
            return_dict=True,
        )
        output.last_hidden_state = packing.unpack(output.last_hidden_state)
        as_tuple = given.get("return_dict", self.config.return_dict) is False
        return output.to_tuple() if as_tuple else output

    return forward


def _names(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]

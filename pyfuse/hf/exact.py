"""The truth: a stock model run in float64."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import AttentionInterface

from pyfuse.hf.attention import NAMES, eager_forward
from pyfuse.hf.state import patched_modules, switch_off, switch_on

EXACT = "pyfuse-exact"  # the eager attention of models that have no other, in float64
Saved = list[tuple[dict[str, Any], str, Tensor]]


def _exact_attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return eager_forward(module)(module, *args, **kwargs)


def _exact_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    # With float64's lowest number, a softmax taken in float32 would make NaN of empty rows.
    return eager_mask(*args, **{**kwargs, "dtype": torch.float32})


AttentionInterface.register(EXACT, _exact_attention)
AttentionMaskInterface.register(EXACT, _exact_mask)


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """The stock model in float64, layer by layer: a second model need not fit in memory.

    Attention is torch's sdpa, exact there, where many a model's eager attention goes to float32.
    """
    switch_off(model, configs=False)
    chosen = _choose_exact(model)
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {m for layer in layers for m in layer.modules()}
    held: dict[nn.Module | None, Saved] = {}
    handles = []

    def before(layer: nn.Module, _args: Any) -> None:
        held[layer] = _widen(layer.modules())

    def after(layer: nn.Module, _args: Any, _output: Any) -> None:
        _restore(held.pop(layer))

    try:
        held[None] = _widen(m for m in model.modules() if m not in inside)
        for layer in layers:
            handles.append(layer.register_forward_pre_hook(before, prepend=True))
            handles.append(layer.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for saved in held.values():
            _restore(saved)
        for config, attention, experts in chosen:
            config._attn_implementation_internal = attention
            config._experts_implementation_internal = experts
        switch_on(model)


def _choose_exact(model: nn.Module) -> list[tuple[Any, Any, Any]]:
    """Have the model's configurations ask for code that keeps to float64; what they asked for."""
    configs: dict[int, Any] = {}
    for _path, module, state in patched_modules(model):
        for name in state.configs:
            config = module.__dict__[name]
            configs[id(config)] = config
    chosen = [(c, c._attn_implementation, c._experts_implementation) for c in configs.values()]
    for config, attention, _experts in chosen:
        config._experts_implementation_internal = "eager"  # the grouped products have no float64
        if attention in ("eager", NAMES[1]):
            config._attn_implementation_internal = EXACT
        elif attention == NAMES[0]:
            config._attn_implementation_internal = "sdpa"
    return chosen


def _widen(modules: Iterable[nn.Module]) -> Saved:
    """Replace the floating-point tensors of these modules by float64 ones; what to restore."""
    saved: Saved = []
    wide: dict[int, Tensor] = {}  # tied weights stay tied
    for module in modules:
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in list(store.items()):
                if tensor is None or not tensor.is_floating_point():
                    continue
                if id(tensor) not in wide:
                    new = tensor.detach().double()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    wide[id(tensor)] = nn.Parameter(new, False) if is_parameter else new
                saved.append((store, name, tensor))
                store[name] = wide[id(tensor)]
    return saved


def _restore(saved: Saved) -> None:
    for store, name, tensor in saved:
        store[name] = tensor

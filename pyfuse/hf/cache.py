"""The key/value cache of generate(), written in place: no torch.cat of the whole cache for each token and layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

SLACK = 64  # tokens: the least room to grow


def _may_write(buffer: Tensor) -> bool:
    return not buffer.is_inference() or torch.is_inference_mode_enabled()


class _Buffers:
    """Room for keys and values beyond what is used; ``keys`` and ``values`` of the layer are views into it.

    A view that is not ours (somebody assigned layer.keys: offloading, beam selection) means that the buffers are stale.
    """

    _key_buffer: Tensor | None = None
    _value_buffer: Tensor | None = None
    _key_view: Tensor | None = None
    _value_view: Tensor | None = None
    _expected_length = 0  # tokens that generate() will come to, if known
    keys: Tensor | None
    values: Tensor | None

    def _fits(self, key_states: Tensor, value_states: Tensor, end: int) -> bool:
        """Whether the buffers hold the layer's present keys and values, and have room up to ``end``."""
        kb, vb = self._key_buffer, self._value_buffer
        return (
            kb is not None
            and vb is not None
            and self.keys is self._key_view
            and self.values is self._value_view
            and end <= kb.shape[2]
            and _may_write(kb)
        )

    def _allocate(self, key_states: Tensor, value_states: Tensor, capacity: int) -> None:
        b, h, _, d = key_states.shape
        bv, hv, _, dv = value_states.shape
        self._key_buffer = key_states.new_empty((b, h, capacity, d))
        self._value_buffer = value_states.new_empty((bv, hv, capacity, dv))

    def _drop(self) -> None:
        self._key_buffer = self._value_buffer = self._key_view = self._value_view = None


def _appendable(layer: Any, key_states: Tensor, value_states: Tensor) -> bool:
    """Whether appending in place means what torch.cat means: values only, and shapes and dtypes that agree."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or key_states.ndim != 4:
        return False
    keys, values = layer.keys, layer.values
    return bool(
        keys.dtype == key_states.dtype
        and values.dtype == value_states.dtype
        and keys.device == key_states.device
        and keys.shape[:2] == key_states.shape[:2]
        and values.shape[:2] == value_states.shape[:2]
        and keys.shape[3] == key_states.shape[3]
        and values.shape[3] == value_states.shape[3]
        and type(key_states) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
    )


class InPlaceLayer(_Buffers, DynamicLayer):
    """DynamicLayer that appends into a growing buffer. With gradients or under torch.compile it is DynamicLayer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        used = self.keys.shape[2] if self.keys.ndim == 4 else 0
        if used == 0:
            return self._first(key_states, value_states)
        if not _appendable(self, key_states, value_states):
            self._drop()
            return super().update(key_states, value_states, *args, **kwargs)
        end = used + key_states.shape[2]
        if not self._fits(key_states, value_states, end):
            self._grow(key_states, value_states, used, end)
        return self._write(key_states, value_states, used, end)

    def _first(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens: with room for the rest if generate() announced one, else exactly as stock."""
        rows = key_states.shape[2]
        ready = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and key_states.ndim == 4
        if not ready or self._expected_length <= rows or type(key_states) is not Tensor:
            self._drop()
            return super().update(key_states, value_states)
        self._allocate(key_states, value_states, self._capacity(rows))
        return self._write(key_states, value_states, 0, rows)

    def _capacity(self, needed: int) -> int:
        if self._expected_length >= needed:
            return min(self._expected_length, needed + max(needed, 1024))
        return needed + max(needed // 2, SLACK)

    def _grow(self, key_states: Tensor, value_states: Tensor, used: int, end: int) -> None:
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        self._allocate(key_states, value_states, self._capacity(end))
        assert self._key_buffer is not None and self._value_buffer is not None
        self._key_buffer[:, :, :used].copy_(keys)
        self._value_buffer[:, :, :used].copy_(values)

    def _write(self, key_states: Tensor, value_states: Tensor, used: int, end: int) -> tuple[Tensor, Tensor]:
        kb, vb = self._key_buffer, self._value_buffer
        assert kb is not None and vb is not None
        kb.narrow(2, used, end - used).copy_(key_states)
        vb.narrow(2, used, end - used).copy_(value_states)
        self.keys = self._key_view = kb.narrow(2, 0, end)
        self.values = self._value_view = vb.narrow(2, 0, end)
        return self.keys, self.values

    def _owned(self) -> bool:
        return self.keys is not None and self.keys is self._key_view and self.values is self._value_view

    def crop(self, tokens_to_remove: int) -> None:
        owned = self._owned()
        super().crop(tokens_to_remove)
        if owned:  # still a prefix of the buffers
            self._key_view, self._value_view = self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._drop()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As stock, but straight into a buffer with room for the next tokens: one copy per step instead of two."""
        kb, vb = self._key_buffer, self._value_buffer
        if not self._owned() or kb is None or vb is None or torch.is_grad_enabled() or not _may_write(kb):
            super().reorder_cache(beam_idx)
            return
        assert self.keys is not None and self.values is not None
        index = beam_idx.to(kb.device)
        keys, values, used = self.keys, self.values, self.keys.shape[2]
        shape, value_shape = (index.shape[0], *kb.shape[1:]), (index.shape[0], *vb.shape[1:])
        self._key_buffer, self._value_buffer = kb.new_empty(shape), vb.new_empty(value_shape)
        self.keys = self._key_view = self._key_buffer.narrow(2, 0, used)
        self.values = self._value_view = self._value_buffer.narrow(2, 0, used)
        torch.index_select(keys, 0, index, out=self.keys)
        torch.index_select(values, 0, index, out=self.values)


class InPlaceSlidingLayer(_Buffers, DynamicSlidingWindowLayer):
    """DynamicSlidingWindowLayer whose window slides along a buffer of about two windows."""

    _end = 0  # where the next token goes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        window = self.sliding_window - 1  # what is kept from step to step
        rows = key_states.shape[-2]
        if (
            not self.is_initialized
            or self.record_past
            or self.keys.ndim != 4
            or not 0 < rows <= window
            or not _appendable(self, key_states, value_states)
        ):
            self._drop()
            return super().update(key_states, value_states, *args, **kwargs)
        used = self.keys.shape[2]
        if not self._fits(key_states, value_states, self._end + rows):
            self._make_room(key_states, value_states, used, rows)
        kb, vb, end = self._key_buffer, self._value_buffer, self._end + rows
        assert kb is not None and vb is not None
        kb.narrow(2, self._end, rows).copy_(key_states)
        vb.narrow(2, self._end, rows).copy_(value_states)
        start, kept = self._end - used, min(used + rows, window)
        self.keys = self._key_view = kb.narrow(2, end - kept, kept)
        self.values = self._value_view = vb.narrow(2, end - kept, kept)
        self._end = end
        self.cumulative_length += rows
        return kb.narrow(2, start, end - start), vb.narrow(2, start, end - start)

    def _make_room(self, key_states: Tensor, value_states: Tensor, used: int, rows: int) -> None:
        """Move the window to the front of the buffers, or of new ones."""
        keys, values = self.keys, self.values
        capacity = 2 * (self.sliding_window - 1) + rows
        if used < self.sliding_window - 1:
            capacity = min(capacity, used + rows + max(used, SLACK))
        kb, start = self._key_buffer, self._end - used
        same = self._fits(key_states, value_states, 0) and kb is not None and kb.shape[2] >= capacity
        if not same or start < used:  # the second: source and target would overlap
            self._allocate(key_states, value_states, capacity)
        assert self._key_buffer is not None and self._value_buffer is not None
        self._key_buffer.narrow(2, 0, used).copy_(keys)
        self._value_buffer.narrow(2, 0, used).copy_(values)
        self._end = used

    def reset(self) -> None:
        super().reset()
        self._drop()


_REPLACEMENTS: dict[type, type] = {DynamicLayer: InPlaceLayer, DynamicSlidingWindowLayer: InPlaceSlidingLayer}


def adopt(cache: Any, expected_length: int = 0) -> None:
    """Make the layers of a DynamicCache write in place from now on; what they hold stays. Others are left alone.

    expected_length: tokens that the cache will come to hold, so that room for them is made at once.
    """
    if type(cache) is EncoderDecoderCache:  # the cross-attention cache is written once: nothing to gain
        cache = cache.self_attention_cache
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = InPlaceLayer
    for layer in cache.layers:
        replacement = _REPLACEMENTS.get(type(layer))
        if replacement is not None:
            layer.__class__ = replacement
        if expected_length and isinstance(layer, InPlaceLayer):
            layer._expected_length = expected_length


def adopt_before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model: adopt the cache that it is given."""
    cache = kwargs.get("past_key_values")
    if cache is not None and not torch.compiler.is_compiling():
        adopt(cache)


def prepare_cache_for_generation(
    self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """GenerationMixin._prepare_cache_for_generation, and the new cache then learns how long it will get."""
    stock: Callable[..., Any] = type(self)._prepare_cache_for_generation
    result = stock(self, generation_config, model_kwargs, *args, **kwargs)
    adopt(model_kwargs.get("past_key_values"), generation_config.max_length)
    return result

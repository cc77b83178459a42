"""The key/value cache of generate(), written in place: no torch.cat of all of it for each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

SLACK = 64  # tokens: the least room to grow


class Room:
    """Buffers [B, H, capacity, D]; ``keys`` and ``values`` of the layer are views into them.

    If the layer holds something else (offloading and beam selection assign layer.keys), the room is
    stale.
    """

    __slots__ = ("key_view", "keys", "value_view", "values")

    def __init__(self, key_states: Tensor, value_states: Tensor, capacity: int) -> None:
        b, h, _, d = key_states.shape
        self.keys = key_states.new_empty((b, h, capacity, d))
        b, h, _, d = value_states.shape
        self.values = value_states.new_empty((b, h, capacity, d))
        self.key_view: Tensor | None = None
        self.value_view: Tensor | None = None

    def holds(self, layer: Any) -> bool:
        """Whether the layer's present keys and values lie here, and may be written to."""
        if layer.keys is not self.key_view or layer.values is not self.value_view:
            return False
        return not self.keys.is_inference() or torch.is_inference_mode_enabled()

    def write(self, key_states: Tensor, value_states: Tensor, start: int, end: int) -> None:
        self.keys.narrow(2, start, end - start).copy_(key_states)
        self.values.narrow(2, start, end - start).copy_(value_states)

    def show(self, layer: Any, start: int, end: int) -> None:
        """Make the tokens from start to end the layer's keys and values."""
        layer.keys = self.key_view = self.keys.narrow(2, start, end - start)
        layer.values = self.value_view = self.values.narrow(2, start, end - start)


def _appendable(layer: Any, key_states: Tensor, value_states: Tensor) -> bool:
    """Whether appending in place does what torch.cat does: values only, equal shapes and dtypes."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or key_states.ndim != 4:
        return False
    for old, new in ((layer.keys, key_states), (layer.values, value_states)):
        b, h, _, d = new.shape
        n = old.shape
        if n[0] != b or n[1] != h or n[3] != d or old.dtype is not new.dtype:
            return False
        if old.device != new.device or type(new) is not Tensor:
            return False
    return torch._C._len_torch_dispatch_stack() == 0


class InPlaceLayer(DynamicLayer):
    """DynamicLayer that appends into a growing buffer (not with gradients or torch.compile)."""

    keys: Any
    values: Any
    _room: Room | None = None
    _expected_length = 0  # tokens that generate() will come to, if known

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        used = self.keys.shape[2] if self.keys.ndim == 4 else 0
        end, room = used + key_states.shape[-2], self._room
        if used == 0:  # with room for the rest if generate() announced one, else exactly as stock
            announced = (
                self._expected_length > end and key_states.ndim == 4 and type(key_states) is Tensor
            )
            if not announced or torch.is_grad_enabled() or torch.compiler.is_compiling():
                return super().update(key_states, value_states, *args, **kwargs)
            room = self._room = Room(key_states, value_states, self._capacity(end))
        elif not _appendable(self, key_states, value_states):
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        elif room is None or end > room.keys.shape[2] or not room.holds(self):
            room = self._room = Room(key_states, value_states, self._capacity(end))
            room.write(self.keys, self.values, 0, used)
        room.write(key_states, value_states, used, end)
        room.show(self, 0, end)
        return self.keys, self.values

    def _capacity(self, needed: int) -> int:
        if self._expected_length >= needed:
            return min(self._expected_length, needed + max(needed, 1024))
        return needed + max(needed // 2, SLACK)

    def crop(self, tokens_to_remove: int) -> None:
        room = self._room
        owned = room is not None and self.is_initialized and room.holds(self)
        super().crop(tokens_to_remove)
        if owned and room is not None:
            room.show(self, 0, self.keys.shape[2])  # still the beginning of the buffers

    def reset(self) -> None:
        super().reset()
        self._room = None

    def reorder_cache(self, beam_idx: Any) -> None:
        """As stock, but straight into a buffer with room for the next tokens: one copy, not two."""
        room = self._room
        if (
            room is None
            or torch.is_grad_enabled()
            or not self.is_initialized
            or not room.holds(self)
        ):
            super().reorder_cache(beam_idx)
            return
        index = beam_idx.to(self.keys.device)
        keys, values = self.keys, self.values
        rows, used = index.shape[0], keys.shape[2]
        self._room = Room(
            keys[:1].expand(rows, -1, -1, -1),
            values[:1].expand(rows, -1, -1, -1),
            room.keys.shape[2],
        )
        self._room.show(self, 0, used)
        torch.index_select(keys, 0, index, out=self.keys)
        torch.index_select(values, 0, index, out=self.values)


class InPlaceSlidingLayer(DynamicSlidingWindowLayer):
    """DynamicSlidingWindowLayer whose window slides along a buffer of about two windows."""

    keys: Any
    values: Any
    _room: Room | None = None
    _end = 0  # where the next token goes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        window = self.sliding_window - 1  # what is kept from step to step
        rows = key_states.shape[-2]
        if (
            not self.is_initialized
            or self.record_past
            or self.keys.ndim != 4
            or not 0 < rows <= window
            or not _appendable(self, key_states, value_states)
        ):
            self._room = None
            return super().update(key_states, value_states, *args, **kwargs)
        used = self.keys.shape[2]
        room = self._room
        if room is None or self._end + rows > room.keys.shape[2] or not room.holds(self):
            room = self._make_room(key_states, value_states, used, rows)
        start, end = self._end - used, self._end + rows
        room.write(key_states, value_states, self._end, end)
        room.show(self, end - min(used + rows, window), end)
        self._end = end
        self.cumulative_length += rows
        return room.keys.narrow(2, start, end - start), room.values.narrow(2, start, end - start)

    def _make_room(self, key_states: Tensor, value_states: Tensor, used: int, rows: int) -> Room:
        """Move the window to the front of the buffers, or of new ones."""
        window, room = self.sliding_window - 1, self._room
        capacity = 2 * window + rows
        if used < window:
            capacity = min(capacity, used + rows + max(used, SLACK))
        stays = room is not None and room.holds(self) and room.keys.shape[2] >= capacity
        if (
            room is None or not stays or self._end - used < used
        ):  # the last: source and target would overlap
            room = self._room = Room(key_states, value_states, capacity)
        room.write(self.keys, self.values, 0, used)
        room.show(self, 0, used)
        self._end = used
        return room

    def reset(self) -> None:
        super().reset()
        self._room = None


_REPLACEMENTS: dict[type, type] = {
    DynamicLayer: InPlaceLayer,
    DynamicSlidingWindowLayer: InPlaceSlidingLayer,
}


def adopt(cache: Any, expected_length: int = 0) -> None:
    """Make the layers of a DynamicCache write in place from now on; what they hold stays.

    Other caches are left alone. expected_length: the number of tokens that the cache will come to
    hold, so that room for them is made at once.
    """
    if (
        type(cache) is EncoderDecoderCache
    ):  # the cross-attention cache is written once: nothing to gain
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
    """GenerationMixin._prepare_cache_for_generation; the new cache learns how long it will get."""
    stock: Callable[..., Any] = type(self)._prepare_cache_for_generation
    result = stock(self, generation_config, model_kwargs, *args, **kwargs)
    adopt(model_kwargs.get("past_key_values"), generation_config.max_length)
    return result

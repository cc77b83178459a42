"""The mask function: transformers calls it once per forward pass to ask who may attend to whom.

Where it can, it returns a :class:`CompactMask` (causal or not, window, the 2-D key padding), so
that no [B, 1, M, N] tensor is built and none is read in every layer. Where it cannot (a graph is
being traced, the cache is static, the pattern is another one, or the model is not known to hand the
mask through untouched), it returns what stock would: ``sdpa_mask``'s boolean tensor, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
)
from transformers.utils.import_utils import is_tracing

# Models that only pass the mask on to the attention function: they never index it or add to it.
COMPACT_MODELS = frozenset(
    [
        "bart",
        "bert",
        "camembert",
        "data2vec-text",
        "distilbert",
        "electra",
        "ernie",
        "gpt2",
        "gpt_neox",
        "llama",
        "marian",
        "mbart",
        "mistral",
        "modernbert",
        "mt5",
        "phi3",
        "qwen2",
        "qwen3",
        "roberta",
        "roberta-prelayernorm",
        "smollm3",
        "t5",
        "xlm-roberta",
    ]
)


class CompactMask:
    """Query i of M sees key j of the first ``keys`` where the pattern and the padding allow it.

    causal and window align with the end: the last query stands on the last of the ``keys`` keys.
    """

    __slots__ = (
        "_arguments",
        "_bias",
        "_dense",
        "causal",
        "key_mask",
        "keys",
        "kv_length",
        "padding",
        "seqlens_k",
        "window",
    )

    def __init__(
        self,
        causal: bool,
        window: tuple[int, int] | None,
        keys: int,
        padding: Tensor | None,
        arguments: dict[str, Any],
    ) -> None:
        self.causal = causal
        self.window = window
        self.keys = keys
        self.kv_length: int = arguments["kv_length"]
        self.padding = padding  # [B, keys] bool, False where hidden; None: no padding
        self.seqlens_k: Tensor | None = None  # [B]: pure right padding
        self.key_mask: Tensor | None = None  # [B, 1, 1, keys] bool: any other padding
        if padding is not None:
            self.seqlens_k, self.key_mask = _describe_padding(padding)
        self._arguments = arguments
        self._dense: Tensor | None = None
        self._bias: tuple[Tensor, Tensor] | None = None

    def dense(self) -> Tensor | None:
        """The mask that sdpa gets from stock transformers: bool [B, 1, M, N], or None."""
        if self._dense is None:
            self._dense = sdpa_mask(**self._arguments)
        return self._dense

    def contiguous(self) -> Tensor | None:
        """generate() calls this where the decoding step may be compiled: it gets the tensor."""
        dense = self.dense()
        return None if dense is None else dense.contiguous()

    def additive(self, dtype: torch.dtype) -> Tensor | None:
        """The mask that eager attention gets: 0 and the lowest number of ``dtype``."""
        return eager_mask(**{**self._arguments, "dtype": dtype})

    def biased(self, bias: Tensor) -> Tensor:
        """``bias`` [1, H, M, keys] with -inf at padded keys; made once, as layers share it."""
        assert self.key_mask is not None
        if self._bias is None or self._bias[0] is not bias:
            self._bias = (bias, torch.where(self.key_mask, bias, float("-inf")))
        return self._bias[1]


def _describe_padding(padding: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(seqlens_k, key_mask) of a bool padding [B, N]: the first if it is all on the right."""
    lengths = padding.sum(1)
    right_padded = torch.arange(padding.shape[1], device=padding.device) < lengths[:, None]
    if torch.equal(right_padded, padding):
        return lengths, None
    return None, padding[:, None, None, :]


def _closure(function: Callable[..., Any], name: str) -> Any:
    """The one value captured by ``function`` if that is transformers' inner function ``name``."""
    if (
        getattr(function, "__qualname__", "") == name
        and getattr(function, "__module__", "") == "transformers.masking_utils"
        and function.__closure__ is not None
        and len(function.__closure__) == 1
    ):
        return function.__closure__[0].cell_contents
    return None


def _pattern(mask_function: Callable[..., Any]) -> tuple[bool, tuple[int, int] | None] | None:
    """(causal, window) of a mask function of transformers; None for any other pattern."""
    if mask_function is causal_mask_function:
        return True, None
    if mask_function is bidirectional_mask_function:
        return False, None
    parts = _closure(mask_function, "and_masks.<locals>.and_mask")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    overlay, base = parts
    if base is causal_mask_function:
        width = _closure(overlay, "sliding_window_overlay.<locals>.inner_mask")
        return (True, (width - 1, 0)) if isinstance(width, int) else None
    if base is bidirectional_mask_function:
        width = _closure(overlay, "sliding_window_bidirectional_overlay.<locals>.inner_mask")
        return (False, (width, width)) if isinstance(width, int) else None
    return None


def pyfuse_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **options: Any,
) -> CompactMask | Tensor | None:
    """The function registered in AttentionMaskInterface; arguments as those of ``sdpa_mask``."""
    arguments = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        **options,
    }
    # A tensor offset: a static cache, whose step may be compiled after the mask is made.
    if (
        is_tracing(attention_mask)
        or isinstance(q_offset, Tensor)
        or (attention_mask is not None and attention_mask.ndim != 2)
        or getattr(config, "model_type", None) not in COMPACT_MODELS
    ):
        return sdpa_mask(**arguments)
    pattern = _pattern(mask_function)
    allow = "allow_is_causal_skip" if pattern and pattern[0] else "allow_is_bidirectional_skip"
    if pattern is None or not options.get(allow, allow == "allow_is_causal_skip"):
        return sdpa_mask(**arguments)  # another pattern, or the model asks for a tensor
    return _compact(*pattern, arguments)


def _compact(
    causal: bool, window: tuple[int, int] | None, arguments: dict[str, Any]
) -> CompactMask | Tensor | None:
    q_length, q_offset = arguments["q_length"], arguments["q_offset"]
    kv_length, kv_offset = arguments["kv_length"], arguments["kv_offset"]
    keys = kv_length
    if causal or window is not None:
        keys = q_offset + q_length - kv_offset  # where the last query stands on the last key
        if not 0 < keys <= kv_length or (not causal and keys != kv_length):
            return sdpa_mask(**arguments)
    may_skip = window is None or kv_length < arguments["local_size"]
    if causal and window is not None and keys <= window[0] + 1:
        window = None  # it is wider than the keys
    padding = arguments["attention_mask"]
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + keys]
        if padding.shape[1] < keys:  # what lies beyond the 2-D mask is padding
            padding = torch.nn.functional.pad(padding, (0, keys - padding.shape[1]))
        if bool(padding.all()):
            padding = None
    causal = causal and q_length > 1
    if may_skip and padding is None and keys == kv_length and (not causal or keys == q_length):
        return None  # the attention function then decides by the module's is_causal, as for sdpa
    return CompactMask(causal, window, keys, padding, arguments)


AttentionMaskInterface.register("pyfuse", pyfuse_mask)
AttentionMaskInterface.register("pyfuse-eager", pyfuse_mask)

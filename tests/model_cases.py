"""Small reference Transformers of each kind."""

from __future__ import annotations

from typing import Any

from pyfuse.models.transformer import Config


def minis(**sizes: Any) -> dict[str, Config]:
    """sizes: vocabulary, width, layers, heads, hidden."""
    return {
        "gpt2": Config(**sizes),
        "llama": Config(
            **sizes, position="rope", norm="rms", activation="silu", gated=True, kv_heads=2,
            attention_bias=False, hidden_bias=False, tied=False,
        ),
        "bert": Config(
            **sizes, causal=False, norm_first=False, embedding_norm=True, segments=2, head="mlm",
            activation="gelu",
        ),
        "encoder-decoder": Config(
            **sizes, encoder_layers=2, norm_first=False, position="sinusoidal",
            embedding_scale=sizes["width"] ** 0.5, activation="relu",
        ),
        "t5": Config(
            **sizes, encoder_layers=2, position="relative", buckets=8, max_distance=16, attention_scale=1.0,
            norm="rms", activation="relu", attention_bias=False, hidden_bias=False,
            head_scale=sizes["width"] ** -0.5,
        ),
    }  # fmt: skip

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
    }  # fmt: skip

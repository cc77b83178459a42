"""Rotary frequencies against Hugging Face's, sinusoids and ALiBi slopes against their papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import pyfuse

LONG = [1.0 + 0.1 * i for i in range(32)]
SHORT = [1.0 + 0.01 * i for i in range(32)]
ORIGINAL = {"original_max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-partial": {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn-betas": {"rope_type": "yarn", "factor": 40.0, "beta_fast": 16, "beta_slow": 2},
    "yarn-mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        **ORIGINAL,
    },
    "yarn-untruncated": {"rope_type": "yarn", "factor": 8.0, "truncate": False, **ORIGINAL},
    "yarn-attention": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.9, **ORIGINAL},
    "yarn-no-factor": {"rope_type": "yarn", "factor": None, **ORIGINAL},
    "yarn-shrinking": {"rope_type": "yarn", "factor": 0.5, **ORIGINAL},
    "llama3": {"rope_type": "llama3", **LLAMA3, **ORIGINAL},
    "llama3-default-length": {"rope_type": "llama3", **LLAMA3},
    "longrope": {"rope_type": "longrope", "long_factor": LONG, "short_factor": SHORT, **ORIGINAL},
    "longrope-factor": {
        "rope_type": "longrope",
        "long_factor": LONG,
        "short_factor": SHORT,
        "factor": 1.0,
        **ORIGINAL,
    },
    "longrope-attention": {
        "rope_type": "longrope",
        "long_factor": LONG,
        "short_factor": SHORT,
        "attention_factor": 1.19,
        **ORIGINAL,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional-factor": {"rope_type": "proportional", "factor": 8.0},
}


@pytest.mark.parametrize("seq_len", [None, 1000, 100_000])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_hugging_face(name: str, theta: float, seq_len: int | None) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        head_dim=64,
        max_position_embeddings=16384,
        rope_parameters={**SCALINGS[name], "rope_theta": theta},
    )
    functions = {
        "default": LlamaRotaryEmbedding.compute_default_rope_parameters,
        **ROPE_INIT_FUNCTIONS,
    }
    expected, expected_scaling = functions[SCALINGS[name]["rope_type"]](
        config, device="cpu", seq_len=seq_len
    )
    ours, scaling = pyfuse.rope_frequencies(
        64,
        theta=theta,
        scaling=SCALINGS[name],
        seq_len=seq_len,
        max_position_embeddings=16384,
    )
    assert ours.dtype == torch.float32 and ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=3e-7, atol=0)
    assert scaling == pytest.approx(expected_scaling, rel=1e-12)
    # The standardised dictionary of a configuration says the same by itself.
    again, _ = pyfuse.rope_frequencies(
        64, scaling=config.rope_parameters, seq_len=seq_len, max_position_embeddings=16384
    )
    assert torch.equal(again, ours)


def test_older_spelling_of_the_type() -> None:
    new, _ = pyfuse.rope_frequencies(64, scaling={"rope_type": "linear", "factor": 2.0})
    old, _ = pyfuse.rope_frequencies(64, scaling={"type": "linear", "factor": 2.0})
    assert torch.equal(new, old)
    assert not torch.equal(new, pyfuse.rope_frequencies(64)[0])


def test_dynamic_grows_only_past_the_trained_length() -> None:
    def at(seq_len: int | None) -> torch.Tensor:
        scaling = {"rope_type": "dynamic", "factor": 2.0}
        inv_freq, _ = pyfuse.rope_frequencies(
            64, scaling=scaling, seq_len=seq_len, max_position_embeddings=2048
        )
        return inv_freq

    assert torch.equal(at(None), at(2048)) and torch.equal(at(17), at(2048))
    assert (at(4096)[1:] < at(2048)[1:]).all()


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_sinusoids_are_the_papers(dim: int) -> None:
    table = pyfuse.sinusoidal_encoding(30, dim, dtype=torch.float64)
    for p in range(30):
        for i in range(dim):
            angle = p / 10000 ** ((i - i % 2) / dim)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert table[p, i].item() == pytest.approx(expected, abs=1e-12)


def test_sinusoids_of_given_positions() -> None:
    positions = torch.tensor([[3, 0], [100_000, 7]], dtype=torch.int32)
    table = pyfuse.sinusoidal_encoding(100_001, 16, base=500.0)
    got = pyfuse.sinusoidal_encoding(positions, 16, base=500.0)
    assert got.shape == (2, 2, 16) and got.dtype == torch.float32
    assert torch.equal(got, table[positions.long()])
    half = pyfuse.sinusoidal_encoding(torch.tensor([0.5]), 2)
    assert half.tolist() == [pytest.approx([math.sin(0.5), math.cos(0.5)])]
    wide = pyfuse.sinusoidal_encoding(positions, 16, base=500.0, dtype=torch.float64)
    low = pyfuse.sinusoidal_encoding(positions, 16, base=500.0, dtype=torch.bfloat16)
    assert torch.equal(low, wide.bfloat16())  # rounded once
    assert pyfuse.sinusoidal_encoding(0, 4).shape == (0, 4)
    assert pyfuse.sinusoidal_encoding(3, 0).shape == (3, 0)
    assert pyfuse.sinusoidal_encoding(3, 4, device="meta").device.type == "meta"


def test_alibi_slopes_of_the_paper() -> None:
    assert pyfuse.alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert pyfuse.alibi_slopes(16).tolist() == pytest.approx([2 ** (-i / 2) for i in range(1, 17)])
    assert pyfuse.alibi_slopes(0).shape == (0,)


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12, 16, 20, 25, 40, 112])
def test_alibi_slopes_equal_blooms(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    alibi = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    slopes = pyfuse.alibi_slopes(heads)
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, alibi[:, 0, 1], rtol=1e-5, atol=0)


YARN = {"rope_type": "yarn", "factor": 4.0}
BAD: list[tuple[str, Callable[[], Any]]] = [
    (r"head_dim: 7 .*gives 7 rotated", lambda: pyfuse.rope_frequencies(7)),
    (r"head_dim: 0 ", lambda: pyfuse.rope_frequencies(0)),
    (
        r"partial_rotary_factor 1.5",
        lambda: pyfuse.rope_frequencies(64, scaling={"partial_rotary_factor": 1.5}),
    ),
    (
        r"rope_type is 'ntk', but must be one of default, linear",
        lambda: pyfuse.rope_frequencies(64, scaling={"rope_type": "ntk"}),
    ),
    (
        r"linear needs factor",
        lambda: pyfuse.rope_frequencies(64, scaling={"rope_type": "linear"}),
    ),
    (
        r"llama3 needs high_freq_factor, low_freq_factor",
        lambda: pyfuse.rope_frequencies(64, scaling={"rope_type": "llama3", "factor": 8.0}),
    ),
    (
        r"linear does not know beta_fast",
        lambda: pyfuse.rope_frequencies(
            64, scaling={"rope_type": "linear", "factor": 2.0, "beta_fast": 3}
        ),
    ),
    (
        r"original_max_position_embeddings needed by rope_type yarn",
        lambda: pyfuse.rope_frequencies(64, scaling=YARN),
    ),
    (
        r"max_position_embeddings: needed by rope_type dynamic",
        lambda: pyfuse.rope_frequencies(64, scaling={"rope_type": "dynamic", "factor": 2.0}),
    ),
    (
        r"theta: 5000.0, but scaling has rope_theta = 1000.0",
        lambda: pyfuse.rope_frequencies(64, theta=5000.0, scaling={"rope_theta": 1000.0}),
    ),
    (
        r"short_factor has 32 numbers, but needs 16",
        lambda: pyfuse.rope_frequencies(32, scaling=SCALINGS["longrope-factor"]),
    ),
    (r"positions: expected a length", lambda: pyfuse.sinusoidal_encoding(-1, 4)),
    (r"dim: expected at least 0, got -2", lambda: pyfuse.sinusoidal_encoding(3, -2)),
    (r"base: expected a positive", lambda: pyfuse.sinusoidal_encoding(3, 4, base=0.0)),
    (
        r"device: positions is a tensor",
        lambda: pyfuse.sinusoidal_encoding(torch.arange(3), 4, device="cpu"),
    ),
    (r"heads: expected at least 0, got -1", lambda: pyfuse.alibi_slopes(-1)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[m for m, _ in BAD])
def test_bad_input(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_positions_must_be_numbers() -> None:
    with pytest.raises(TypeError, match=r"positions: .*bool"):
        pyfuse.sinusoidal_encoding(torch.tensor([True]), 4)

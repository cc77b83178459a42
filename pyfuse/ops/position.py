"""Tables that say where a token stands: rotary frequencies, sinusoids, ALiBi slopes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyfuse.sinusoids import sinusoids

# What each rope_type needs and may have, beside the keys that every type may have.
ROPE_KEYS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "default": (frozenset(), frozenset()),
    "linear": (frozenset({"factor"}), frozenset()),
    "dynamic": (frozenset({"factor"}), frozenset()),
    "yarn": (
        frozenset(),
        frozenset({"attention_factor", "beta_fast", "beta_slow", "factor", "mscale"})
        | {"mscale_all_dim", "original_max_position_embeddings", "truncate"},
    ),
    "longrope": (
        frozenset({"long_factor", "short_factor"}),
        frozenset({"attention_factor", "factor", "original_max_position_embeddings"}),
    ),
    "llama3": (
        frozenset({"factor", "high_freq_factor", "low_freq_factor"}),
        frozenset({"original_max_position_embeddings"}),
    ),
    "proportional": (frozenset(), frozenset({"factor"})),
}
COMMON_ROPE_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def rope_frequencies(
    head_dim: int,
    *,
    theta: float = 10000.0,
    scaling: Mapping[str, Any] | None = None,
    seq_len: int | None = None,
    max_position_embeddings: int | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """Radians per position of each rotated pair, and the factor for cos and sin.

    inv_freq[i] = theta^(-2i/R) for i < R/2 (Su et al., arXiv:2104.09864), stretched as `scaling`
    says; then cos = attention_scaling · cos(position · inv_freq), and sin alike, are what
    `pyfuse.rope` takes.

    head_dim: the size D of a head. R = D, or int(D · scaling["partial_rotary_factor"]).
    theta: the base; scaling["rope_theta"], where given, replaces the default.
    scaling: Hugging Face's `config.rope_parameters` (older: `config.rope_scaling`), or None. Its
      rope_type (older: type) is "default", "linear", "dynamic" (NTK, by seq_len), "yarn"
      (Peng et al., arXiv:2309.00071), "longrope" (Ding et al., arXiv:2402.13753), "llama3", or
      "proportional" (R = D, the pairs that do not turn have frequency 0). The other keys have
      their Hugging Face names and meaning; a key that the type does not know is an error.
    seq_len: the longest sequence to be met, which "dynamic" and "longrope" adapt to.
    max_position_embeddings: the model's length. Needed by "dynamic"; elsewhere the default of
      scaling["original_max_position_embeddings"], and where factor is None its numerator.

    Returns (inv_freq [R/2] float32 on `device`, attention_scaling), both equal to those of
    transformers' ROPE_INIT_FUNCTIONS.
    ValueError: an unknown rope_type or key, a missing key, an odd or negative size.
    """
    scaling = dict(scaling or {})
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    _check_scaling(rope_type, scaling)
    base = _one_theta(theta, scaling.get("rope_theta"))
    share = scaling.get("partial_rotary_factor")
    share = 1.0 if share is None else float(share)
    dim = head_dim if rope_type == "proportional" else int(head_dim * share)
    if head_dim <= 0 or not 0 <= share <= 1 or dim % 2:
        raise ValueError(
            f"head_dim: {head_dim} with partial_rotary_factor {share} gives {dim} rotated elements,"
            " which must be even and between 0 and head_dim"
        )
    if rope_type == "default":
        return 1.0 / base ** _exponents(dim, device), 1.0
    if rope_type == "proportional":
        return _proportional(dim, share, base, scaling, device), 1.0
    if max_position_embeddings is not None:
        scaling["max_position_embeddings"] = max_position_embeddings
        scaling.setdefault("original_max_position_embeddings", max_position_embeddings)
    return _SCALED[rope_type](dim, base, scaling, seq_len, device)


def sinusoidal_encoding(
    positions: int | Tensor,
    dim: int,
    *,
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """PE[p, 2i] = sin(p / base^(2i/dim)), PE[p, 2i+1] = cos(p / base^(2i/dim)).

    Vaswani et al. 2017, section 3.5 (arXiv:1706.03762). positions: a length T, for 0 … T-1, or a
    tensor of any shape with one (also fractional) position in each element. Returns
    [*positions.shape, dim] in dtype, of angles taken in float64. An odd dim ends with a sine.
    device: where a length's table goes (default: the current default device); a tensor's own stays.
    ValueError: a negative length or dim, base ≤ 0, a device beside a tensor of positions.
    """
    if dim < 0:
        raise ValueError(f"dim: expected at least 0, got {dim}")
    if base <= 0:
        raise ValueError(f"base: expected a positive number, got {base}")
    if isinstance(positions, Tensor):
        if device is not None:
            raise ValueError("device: positions is a tensor, and the result lies on its device")
        if positions.is_complex() or positions.dtype == torch.bool:
            raise TypeError(f"positions: expected integers or real numbers, got {positions.dtype}")
        return sinusoids(positions, dim, base, dtype)
    if positions < 0:
        raise ValueError(f"positions: expected a length of at least 0, got {positions}")
    return sinusoids(torch.arange(positions, device=device), dim, base, dtype)


def alibi_slopes(heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """Each head's slope of ALiBi (Press et al., arXiv:2108.12409), [heads] float32.

    For heads = 2^a the geometric sequence 2^(-8/heads), 2^(-16/heads), … 2^-8. Otherwise that of
    the power of two below, then every second one of the power of two above, as in the authors'
    code. `pyfuse.attention` takes them as alibi_slopes: bias = -slope · distance.
    ValueError: heads < 0.
    """
    if heads < 0:
        raise ValueError(f"heads: expected at least 0, got {heads}")
    below = 1 << (max(heads, 1).bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(min(below, heads))]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(heads - len(slopes))]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def _check_scaling(rope_type: Any, scaling: Mapping[str, Any]) -> None:
    if rope_type not in ROPE_KEYS:
        known = ", ".join(ROPE_KEYS)
        raise ValueError(f"scaling: rope_type is {rope_type!r}, but must be one of {known}")
    required, optional = ROPE_KEYS[rope_type]
    if missing := [key for key in sorted(required) if scaling.get(key) is None]:
        raise ValueError(f"scaling: {rope_type} needs {', '.join(missing)}")
    if unknown := scaling.keys() - required - optional - COMMON_ROPE_KEYS:
        raise ValueError(f"scaling: {rope_type} does not know {', '.join(sorted(unknown))}")


def _one_theta(theta: float, from_scaling: float | None) -> float:
    if from_scaling is None:
        return theta
    if theta not in (10000.0, from_scaling):
        raise ValueError(f"theta: {theta}, but scaling has rope_theta = {from_scaling}")
    return from_scaling


def _need(scaling: Mapping[str, Any], key: str, rope_type: str) -> Any:
    if scaling.get(key) is None:
        hint = f"{key}: needed" if key == "max_position_embeddings" else f"scaling: {key} needed"
        raise ValueError(f"{hint} by rope_type {rope_type}")
    return scaling[key]


def _exponents(dim: int, device: torch.device | str | None) -> Tensor:
    """2i / dim for i < dim/2, in float32 as Hugging Face computes it."""
    return torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim


def _proportional(
    dim: int,
    share: float,
    base: float,
    scaling: Mapping[str, Any],
    device: torch.device | str | None,
) -> Tensor:
    turning = int(share * dim // 2)
    exponents = _exponents(dim, device)
    inv_freq = torch.where(
        torch.arange(dim // 2, device=device) < turning, 1.0 / base**exponents, 0.0
    )
    factor = scaling.get("factor")
    return inv_freq / (1.0 if factor is None else factor)


def _linear(
    dim: int,
    base: float,
    scaling: Mapping[str, Any],
    seq_len: int | None,
    device: torch.device | str | None,
) -> tuple[Tensor, float]:
    return 1.0 / base ** _exponents(dim, device) / scaling["factor"], 1.0


def _dynamic(
    dim: int,
    base: float,
    scaling: Mapping[str, Any],
    seq_len: int | None,
    device: torch.device | str | None,
) -> tuple[Tensor, float]:
    longest = _need(scaling, "max_position_embeddings", "dynamic")
    factor = scaling["factor"]
    if dim <= 2:
        raise ValueError(f"head_dim: dynamic scaling needs more than 2 rotated elements, got {dim}")
    stretch = factor * max(seq_len or 0, longest) / longest - (factor - 1)
    return 1.0 / (base * stretch ** (dim / (dim - 2))) ** _exponents(dim, device), 1.0


def _yarn(
    dim: int,
    base: float,
    scaling: Mapping[str, Any],
    seq_len: int | None,
    device: torch.device | str | None,
) -> tuple[Tensor, float]:
    original = _need(scaling, "original_max_position_embeddings", "yarn")
    factor = scaling.get("factor")
    if factor is None:
        factor = _need(scaling, "max_position_embeddings", "yarn without factor") / original
    low, high = _yarn_ramp(dim, base, scaling, original)
    ramp = ((torch.arange(dim // 2, device=device).float() - low) / (high - low)).clamp(0, 1)
    keep = 1 - ramp  # 1: turns so often within the trained length that it is left alone
    frequency = base ** _exponents(dim, device)
    inv_freq = 1.0 / (factor * frequency) * (1 - keep) + 1.0 / frequency * keep
    return inv_freq, _yarn_attention_factor(scaling, factor)


def _yarn_ramp(
    dim: int, base: float, scaling: Mapping[str, Any], original: int
) -> tuple[float, float]:
    """The pairs (as fractional indices) between which YaRN passes from keeping to interpolating."""

    def pair_that_turns(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(scaling.get("beta_fast") or 32)
    high = pair_that_turns(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high + 0.001 if low == high else high


def _yarn_attention_factor(scaling: Mapping[str, Any], factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return float(mscale(scaling["mscale"]) / mscale(scaling["mscale_all_dim"]))
    return mscale(1.0)


def _longrope(
    dim: int,
    base: float,
    scaling: Mapping[str, Any],
    seq_len: int | None,
    device: torch.device | str | None,
) -> tuple[Tensor, float]:
    original = _need(scaling, "original_max_position_embeddings", "longrope")
    factor = scaling.get("factor")
    if factor is None:
        longest = _need(scaling, "max_position_embeddings", "longrope without factor")
        factor = longest / original
    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        grown = 1 + math.log(factor) / math.log(original) if factor > 1.0 else 1.0
        attention_factor = math.sqrt(grown)
    name = "long_factor" if seq_len is not None and seq_len > original else "short_factor"
    stretch = torch.tensor(scaling[name], dtype=torch.float32, device=device)
    if stretch.shape != (dim // 2,):
        raise ValueError(f"scaling: {name} has {stretch.numel()} numbers, but needs {dim // 2}")
    return 1.0 / (stretch * base ** _exponents(dim, device)), attention_factor


def _llama3(
    dim: int,
    base: float,
    scaling: Mapping[str, Any],
    seq_len: int | None,
    device: torch.device | str | None,
) -> tuple[Tensor, float]:
    original = _need(scaling, "original_max_position_embeddings", "llama3")
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factor = scaling["factor"]
    inv_freq = 1.0 / base ** _exponents(dim, device)
    wavelength = 2 * math.pi / inv_freq  # in positions
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    stretched = torch.where(wavelength > original / low, inv_freq / factor, between)
    return torch.where(wavelength < original / high, inv_freq, stretched), 1.0


_SCALED: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}

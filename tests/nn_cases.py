"""What torch documents of its attention and Transformer modules, as formulas; and the masks that they take."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from numerics import check
from torch import Tensor, nn

import pyfuse.nn

KINDS: dict[str, Any] = {
    "torch": torch.nn,
    "pyfuse": pyfuse.nn,
}  # what the tests say holds for both


def attention_formula(
    m: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and weights per head of torch.nn.MultiheadAttention's documentation, without dropout."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = query[None], key[None], value[None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    elif not m.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    if m.in_proj_weight is None:
        weights: Any = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
    else:
        weights = m.in_proj_weight.chunk(3)
    biases: Any = (0, 0, 0) if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
    q, k, v = (x @ w.mT + b for x, w, b in zip((query, key, value), weights, biases, strict=True))
    batch = q.shape[0]
    if m.bias_k is not None:
        k = torch.cat([k, m.bias_k.expand(batch, 1, -1)], 1)
        v = torch.cat([v, m.bias_v.expand(batch, 1, -1)], 1)
    if m.add_zero_attn:
        k, v = (torch.cat([x, torch.zeros_like(x[:, :1])], 1) for x in (k, v))
    q, k, v = (x.unflatten(-1, (m.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
    s = q @ k.mT / math.sqrt(m.head_dim)
    s = s + _bias(m, s, key_padding_mask, attn_mask)
    nothing = (s == -math.inf).all(-1, keepdim=True)  # a query without a key
    weights_of = torch.softmax(s.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    y = (weights_of @ v).transpose(1, 2).flatten(-2) @ m.out_proj.weight.mT
    y = y if m.out_proj.bias is None else y + m.out_proj.bias
    if not batched:
        return y[0], weights_of[0]
    return (y if m.batch_first else y.transpose(0, 1)), weights_of


def _bias(
    m: nn.MultiheadAttention, s: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
) -> Tensor:
    """Both masks as what is added to the scores [B, H, M, N]; keys that were appended are seen by all."""
    b = torch.zeros_like(s)
    if attn_mask is not None:
        n = attn_mask.shape[-1]
        added = _added(attn_mask, s.dtype)
        added = added if added.dim() == 2 else added.unflatten(0, (s.shape[0], m.num_heads))
        b[..., :n] += added
    if key_padding_mask is not None:
        n = key_padding_mask.shape[-1]
        b[..., :n] += _added(key_padding_mask, s.dtype)[:, None, None]
    return b


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return mask.to(dtype)


def encoder_layer_formula(
    m: nn.TransformerEncoderLayer, x: Tensor, mask: Tensor | None, padding: Tensor | None
) -> Tensor:
    """torch.nn.TransformerEncoderLayer's documentation (Xiong et al., arXiv:2002.04745, figure 1), without dropout."""

    def attend(x: Tensor) -> Tensor:
        return attention_formula(m.self_attn, x, x, x, padding, mask)[0]

    if m.norm_first:
        x = x + attend(norm(m.norm1, x))
        return x + feed_forward(m, norm(m.norm2, x))
    x = norm(m.norm1, x + attend(x))
    return norm(m.norm2, x + feed_forward(m, x))


def decoder_layer_formula(
    m: nn.TransformerDecoderLayer,
    x: Tensor,
    memory: Tensor,
    mask: Tensor | None,
    padding: Tensor | None,
    memory_mask: Tensor | None,
    memory_padding: Tensor | None,
) -> Tensor:
    """torch.nn.TransformerDecoderLayer's documentation, without dropout."""

    def attend(x: Tensor) -> Tensor:
        return attention_formula(m.self_attn, x, x, x, padding, mask)[0]

    def look_up(x: Tensor) -> Tensor:
        return attention_formula(m.multihead_attn, x, memory, memory, memory_padding, memory_mask)[
            0
        ]

    if m.norm_first:
        x = x + attend(norm(m.norm1, x))
        x = x + look_up(norm(m.norm2, x))
        return x + feed_forward(m, norm(m.norm3, x))
    x = norm(m.norm1, x + attend(x))
    x = norm(m.norm2, x + look_up(x))
    return norm(m.norm3, x + feed_forward(m, x))


def norm(m: nn.LayerNorm, x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    y = (x - mean) / torch.sqrt((x - mean).square().mean(-1, keepdim=True) + m.eps)
    y = y * m.weight
    return y if m.bias is None else y + m.bias


def feed_forward(m: Any, x: Tensor) -> Tensor:
    y = x @ m.linear1.weight.mT
    y = m.activation(y if m.linear1.bias is None else y + m.linear1.bias)
    y = y @ m.linear2.weight.mT
    return y if m.linear2.bias is None else y + m.linear2.bias


def masks(name: str, heads: int, batch: int, m: int, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """key_padding_mask and attn_mask of this name; no query is without a key."""
    hidden = torch.rand(m, n) < 0.4
    hidden[:, 0] = False
    hidden_3d = torch.rand(batch * heads, m, n) < 0.4
    hidden_3d[..., 0] = False
    padding = torch.zeros(batch, n, dtype=torch.bool)
    padding[0, n - n // 2 :] = True
    added = torch.randn(m, n).to(dtype)
    padding_added = torch.randn(batch, n).to(dtype)
    known: dict[str, dict[str, Any]] = {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": added},
        "bool 3d": {"attn_mask": hidden_3d},
        "float 3d": {"attn_mask": torch.randn(batch * heads, m, n).to(dtype)},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": padding_added},
        "both bool": {"attn_mask": hidden, "key_padding_mask": padding},
        "both bool 3d": {"attn_mask": hidden_3d, "key_padding_mask": padding},
        "both float": {"attn_mask": added, "key_padding_mask": padding_added},
    }
    return known[name]


MASKS = (
    "none", "bool", "float", "bool 3d", "float 3d", "padding", "float padding", "both bool", "both bool 3d",
    "both float",
)  # fmt: skip


def check_module(
    module: nn.Module,
    run: Callable[[nn.Module, list[Tensor]], Tensor],
    formula: Callable[[nn.Module, list[Tensor]], Tensor],
    inputs: list[Tensor],
    name: str,
    gradients: bool = True,
) -> None:
    """Output and gradients (of inputs and parameters) of `run` by the accuracy rule: against `formula` in float64, with
    the error of `formula` in the module's dtype as what is allowed; three times that, as these cases are small and
    many: torch's own modules would not pass otherwise."""
    results = []
    for call, wide in ((run, False), (formula, True), (formula, False)):
        used = copy.deepcopy(module).double() if wide else copy.deepcopy(module)
        given = [x.detach().double() if wide else x.detach().clone() for x in inputs]
        for x in given:
            x.requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            y = call(used, given)
            found = {"output": y}
            if gradients:
                (
                    y * torch.linspace(-1.0, 1.0, y.numel()).view(y.shape).to(y.dtype)
                ).sum().backward()
                found |= {f"gradient of input {i}": x.grad for i, x in enumerate(given)}  # type: ignore[misc]
                found |= {f"gradient of {n}": p.grad for n, p in used.named_parameters()}  # type: ignore[misc]
        results.append(found)
    actual, exact, eager = results
    for key, value in actual.items():
        if key != "output" and exact[key] is None:
            assert value is None or not value.any(), f"{name}: {key}"
            continue
        kind: Any = "output" if key == "output" else "gradient"
        check(value, exact[key], eager[key], f"{name}: {key}", kind, random=True)


def randomize(module: nn.Module) -> nn.Module:
    """Biases start at 0 and norms at 1, where mistakes in them would not show."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
    return module

"""Fused forwards of whole transformer layers and of Llama's attention.

As in :mod:`pyfuse.hf.fused`, each replaces one fingerprinted body, for plain values in eval mode.
What they save is passes over memory (the residual is added with the norm or the matrix product next
to it, the rotation is in place) and Python calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyfuse.guards import hooked
from pyfuse.hf.attention import NAMES, pyfuse_attention
from pyfuse.hf.fused import _activation, feed_forward
from pyfuse.hf.guards import values_only, wants_gradient
from pyfuse.hf.linears import packed_of, projected, projected_together
from pyfuse.hf.norms import add_norm, is_norm, norm_of_sum, normed
from pyfuse.hf.rope import rotate


def llama_layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """h = x + attention(norm(x)); h + mlp(norm(h))"""
    m = self._modules
    fused = not self.training and values_only(hidden_states)
    if not fused:
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            position_ids,
            past_key_values,
            use_cache,
            position_embeddings,
            **kwargs,
        )
    attended = m["self_attn"](
        hidden_states=normed(m["input_layernorm"], hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )[0]
    return _add_norm_mlp(m["post_attention_layernorm"], m["mlp"], attended, hidden_states)


def _add_norm_mlp(norm: nn.Module, mlp: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """h = residual + x; h + mlp(norm(h))"""
    pair = add_norm(norm, x, residual)
    if pair is None:
        h = residual + x
        return feed_forward(mlp, norm(h), h)
    return feed_forward(mlp, *pair)


def gpt2_block(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Any = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Any = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Tensor:
    """h = x + attention(norm(x)); h + mlp(norm(h))"""
    if self.training or encoder_hidden_states is not None or not values_only(hidden_states):
        return type(self).forward(
            self, hidden_states, past_key_values, attention_mask, encoder_hidden_states,
            encoder_attention_mask, use_cache, **kwargs,
        )  # fmt: skip
    m = self._modules
    attended = m["attn"](
        normed(m["ln_1"], hidden_states),
        past_key_values=past_key_values,
        attention_mask=attention_mask,
        use_cache=use_cache,
        **kwargs,
    )[0]
    return _add_norm_mlp(m["ln_2"], m["mlp"], attended, hidden_states)


def _norm_of_sum(norm: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """norm(x + residual)"""
    out = norm_of_sum(norm, x, residual)
    return norm(x + residual) if out is None else out


def distilbert_block(
    self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any
) -> Tensor:
    """h = norm(x + attention(x)); norm(h + ffn(h))"""
    if self.training or not values_only(hidden_states):
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
    m = self._modules
    attended = m["attention"](hidden_states, attention_mask=attention_mask, **kwargs)[0]
    h = _norm_of_sum(m["sa_layer_norm"], attended, hidden_states)
    return _norm_of_sum(m["output_layer_norm"], m["ffn"](h), h)


def _bart_feed_forward(self: Any, x: Tensor) -> Tensor:
    """final_layer_norm(x + fc2(act(fc1(x))))"""
    m = self._modules
    first, kind = packed_of(m["fc1"], x), _activation(self, "activation_fn")
    h = (
        self.activation_fn(m["fc1"](x))
        if first is None or kind is None
        else first(x, activation=kind)
    )
    return _norm_of_sum(m["final_layer_norm"], projected(m["fc2"], h), x)


def bart_encoder_layer(
    self: Any, hidden_states: Tensor, attention_mask: Any, **kwargs: Any
) -> Tensor:
    """h = norm(x + attention(x)); norm(h + mlp(h))"""
    if self.training or not values_only(hidden_states):
        return type(self).forward(self, hidden_states, attention_mask, **kwargs)
    m = self._modules
    attended = m["self_attn"](hidden_states, attention_mask=attention_mask, **kwargs)[0]
    out = _bart_feed_forward(self, _norm_of_sum(m["self_attn_layer_norm"], attended, hidden_states))
    if out.dtype == torch.float16 and not torch.isfinite(out).all():
        limit = torch.finfo(out.dtype).max - 1000
        out = out.clamp(min=-limit, max=limit)
    return out


def bart_decoder_layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Any = None,
    past_key_values: Any = None,
    use_cache: bool | None = True,
    **kwargs: Any,
) -> Tensor:
    """h = norm(x + attention(x)); h = norm(h + cross_attention(h)); norm(h + mlp(h))"""
    if self.training or not values_only(hidden_states):
        return type(self).forward(
            self, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask,
            past_key_values, use_cache, **kwargs,
        )  # fmt: skip
    m = self._modules
    attended = m["self_attn"](
        hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
    )[0]
    h = _norm_of_sum(m["self_attn_layer_norm"], attended, hidden_states)
    if encoder_hidden_states is not None:
        attended = m["encoder_attn"](
            h,
            key_value_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )[0]
        h = _norm_of_sum(m["encoder_attn_layer_norm"], attended, h)
    return _bart_feed_forward(self, h)


def _makes_new(module: nn.Module) -> bool:
    """Whether this layer's result is a new tensor that nobody else has got hold of."""
    return (isinstance(module, nn.Linear) or is_norm(module)) and not hooked(module)


def llama_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """o_proj(attention(rope(q_proj(x)), rope(k_proj(x)), v_proj(x))); q_norm and k_norm if any"""
    if (
        self.training
        or not values_only(hidden_states)
        or position_embeddings is None
        or object.__getattribute__(self.config, "_attn_implementation_internal") not in NAMES
    ):
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
        )
    m = self._modules
    leading = hidden_states.shape[:-1]
    shape = (*leading, -1, self.head_dim)
    q, k, v = projected_together((m["q_proj"], m["k_proj"], m["v_proj"]), hidden_states)
    q, k, v = q.view(shape), k.view(shape), v.view(shape).transpose(1, 2)
    q_from, k_from = m["q_proj"], m["k_proj"]
    if "q_norm" in m:
        q_from, k_from = m["q_norm"], m["k_norm"]
        q, k = normed(q_from, q), normed(k_from, k)
    # Rotate in place where q and k belong to this call alone: fresh results that no hook has seen.
    owned = _makes_new(q_from) and _makes_new(k_from)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = position_embeddings
    rotated = None if wants_gradient(q, k) else rotate(q, k, cos, sin, inplace=owned)
    q, k = (
        rotated
        if rotated is not None
        else type(self).forward.__globals__["apply_rotary_pos_emb"](q, k, cos, sin)
    )
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    out, weights = pyfuse_attention(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
    return projected(m["o_proj"], out.reshape(*leading, -1)), weights

"""Fused forwards of feed-forward blocks and of "add the residual, then normalise".

Each function replaces the body of the method whose fingerprint :mod:`pyfuse.hf.patches` lists
beside it. It runs for plain values in eval mode and where the layers inside are patched; otherwise
the class's own method runs, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pyfuse.guards import hooked
from pyfuse.hf.guards import values_only, wants_gradient
from pyfuse.hf.linears import packed_of, projected
from pyfuse.hf.norms import norm_of_sum, normed
from pyfuse.hf.state import ATTRIBUTE

if TYPE_CHECKING:
    from pyfuse.linear import PackedLinear


def _activation(module: nn.Module, name: str) -> str | None:
    """pyfuse's name of the activation ``module.name``, if it is still what was recognised."""
    known, kind = module.__dict__[ATTRIBUTE].activation
    current = module._modules.get(name, None) or module.__dict__.get(name)
    if current is not known or (isinstance(current, nn.Module) and hooked(current)):
        return None
    return kind


# Of the wide result inside a feed-forward block. More would leave the last-level cache, and glibc
# maps results of more than 32 MiB anew each time, which costs as much as a third of the product.
CHUNK_BYTES = 4 * 2**20


def in_chunks(
    run: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    residual: Tensor | None,
    inner: int,
    outer: int,
) -> Tensor:
    """run(x, residual, out) [..., outer] on so many rows at a time that [rows, inner] stays small."""
    rows = x.numel() // x.shape[-1]
    most = max(CHUNK_BYTES // (inner * x.element_size()), 64)
    if rows <= most:
        return run(x, residual, None)
    y = x.new_empty((*x.shape[:-1], outer))
    xs, ys = x.reshape(rows, -1).split(most), y.view(rows, outer).split(most)
    rs = [None] * len(xs) if residual is None else residual.reshape(rows, outer).split(most)
    for x_part, r_part, y_part in zip(xs, rs, ys, strict=True):
        run(x_part, r_part, y_part)
    return y


# Feed-forward blocks. Each takes the residual to add at the end; the layer above passes it.


def gated(
    self: nn.Module, x: Tensor, residual: Tensor | None, gate: str, up: str, down: str, act: str
) -> Tensor | None:
    """down(act(gate(x)) · up(x)) + residual, or None where a part is not packed."""
    kind = None if self.training else _activation(self, act)
    if kind is None:
        return None
    m = self._modules
    g, u, d = packed_of(m[gate], x), packed_of(m[up], x), packed_of(m[down], x)  # type: ignore[arg-type]
    if g is None or u is None or d is None:
        return None
    from pyfuse.linear import FEW_ROWS, together  # loaded: something is packed

    def run(x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        if x.numel() // x.shape[-1] <= FEW_ROWS:
            gate_of_x, up_of_x = together(x, (g, u), (kind, None))
            return d(gate_of_x.mul_(up_of_x), residual=residual, out=out)
        return d(g(x, activation=kind, multiply=u(x)), residual=residual, out=out)

    return in_chunks(run, x, residual, u.outputs, d.outputs)


def plain(
    self: nn.Module, x: Tensor, residual: Tensor | None, first: str, second: str, act: str
) -> Tensor | None:
    """second(act(first(x))) + residual, or None where a part is not packed."""
    kind = None if self.training else _activation(self, act)
    if kind is None:
        return None
    m = self._modules
    a, b = packed_of(m[first], x), packed_of(m[second], x)  # type: ignore[arg-type]
    return None if a is None or b is None else _two_layers(a, kind, b, x, residual)


def _two_layers(
    first: PackedLinear, kind: str, second: PackedLinear, x: Tensor, residual: Tensor | None
) -> Tensor:
    """second(act(first(x))) + residual"""

    def run(x: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
        return second(first(x, activation=kind), residual=residual, out=out)

    return in_chunks(run, x, residual, first.outputs, second.outputs)


FEED_FORWARD: dict[
    str, tuple[Any, tuple[str, ...]]
] = {  # name of the fused forward -> function and its layers
    "llama_mlp": (gated, ("gate_proj", "up_proj", "down_proj", "act_fn")),
    "t5_gated": (gated, ("wi_0", "wi_1", "wo", "act")),
    "t5_dense": (plain, ("wi", "wo", "act")),
    "gpt2_mlp": (plain, ("c_fc", "c_proj", "act")),
    "distilbert_ffn": (plain, ("lin1", "lin2", "activation")),
}


def feed_forward(block: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor:
    """block(x) + residual, in one go where ``block`` is in FEED_FORWARD and has no hooks."""
    state = block.__dict__.get(ATTRIBUTE)
    if (
        state is not None
        and state.fused in FEED_FORWARD
        and state.enabled
        and not hooked(block)
        and (residual is None or residual.dtype == x.dtype)
        and not wants_gradient(residual)
    ):
        function, names = FEED_FORWARD[state.fused]
        out: Tensor | None = function(block, x, residual, *names)
        if out is not None:
            return out
    y: Tensor = block(x)
    return y if residual is None else residual + y


def _own(self: nn.Module, x: Tensor) -> Tensor | None:
    function, names = FEED_FORWARD[self.__dict__[ATTRIBUTE].fused]
    return function(self, x, None, *names) if values_only(x) else None


def llama_mlp(self: Any, x: Tensor) -> Tensor:
    out = _own(self, x)
    return type(self).forward(self, x) if out is None else out


def t5_mlp(self: Any, hidden_states: Tensor) -> Tensor:
    out = _own(self, hidden_states)
    return type(self).forward(self, hidden_states) if out is None else out


def distilbert_ffn(self: Any, input: Tensor) -> Tensor:
    out = _own(self, input)
    return type(self).ff_chunk(self, input) if out is None else out


def bert_intermediate(self: Any, hidden_states: Tensor) -> Tensor:
    """act(dense(x))"""
    if values_only(hidden_states):
        kind = _activation(self, "intermediate_act_fn")
        dense = packed_of(self._modules["dense"], hidden_states)
        if kind is not None and dense is not None:
            return dense(hidden_states, activation=kind)
    return type(self).forward(self, hidden_states)


def bert_feed_forward(self: Any, attention_output: Tensor) -> Tensor:
    """LayerNorm(output.dense(act(intermediate.dense(x))) + x)"""
    x, m = attention_output, self._modules
    inner, outer = m["intermediate"], m["output"]
    if not self.training and values_only(x) and not (hooked(inner) or hooked(outer)):
        kind = _activation(inner, "intermediate_act_fn")
        a, b = packed_of(inner._modules["dense"], x), packed_of(outer._modules["dense"], x)
        if kind is not None and a is not None and b is not None:
            out = norm_of_sum(outer._modules["LayerNorm"], _two_layers(a, kind, b, x, None), x)
            if out is not None:
                return out
    return type(self).feed_forward_chunk(self, x)


# The residual and the norm after it.


def bert_output(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """LayerNorm(dense(x) + residual)"""
    if not self.training and values_only(hidden_states) and values_only(input_tensor):
        m = self._modules
        out = norm_of_sum(m["LayerNorm"], projected(m["dense"], hidden_states), input_tensor)
        if out is not None:
            return out
    return type(self).forward(self, hidden_states, input_tensor)


def t5_layer_ff(self: Any, hidden_states: Tensor) -> Tensor:
    """x + mlp(norm(x))"""
    if self.training or not values_only(hidden_states):
        return type(self).forward(self, hidden_states)
    m = self._modules
    return feed_forward(m["DenseReluDense"], normed(m["layer_norm"], hidden_states), hidden_states)

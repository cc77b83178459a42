"""The Transformer by one configuration: GPT-2, Llama, BERT, and the encoder-decoder of the first paper, BART and T5.

Read from top to bottom: the configuration, the parts of a block, the block, the model. Every part is an operation of
pyfuse between matrix products; `pyfuse.models.checkpoint` fills it with the weights of real models.

    x = embedding(ids)
    for each block:      x = x + attention(norm(x));  x = x + feed_forward(norm(x))        norm_first
                         x = norm(x + attention(x));  x = norm(x + feed_forward(x))        else
    logits = head(x)

Vaswani et al., arXiv:1706.03762. Norms first: Radford et al., "Language models are unsupervised multitask learners",
2019.

Letters: B sequences of T tokens, W width, V vocabulary, H heads of D.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pyfuse import ops as pyfuse_ops
from pyfuse.activations import FORMULA
from pyfuse.models import stock
from pyfuse.models.rows import Rows, row_linear
from pyfuse.nn import InputEmbedding, RotaryEmbedding

NORMS, POSITIONS, HEADS = (
    ("layer", "rms"),
    ("learned", "sinusoidal", "rope", "relative"),
    ("lm", "mlm", "classes", None),
)


@dataclass(frozen=True)
class Config:
    """What a model is made of.

    causal: each token sees those before it (a decoder), else all (an encoder).
    encoder_layers: of an encoder before the decoder, of the same sizes; 0 for none.
    kv_heads: fewer heads of keys and values than of queries (arXiv:2305.13245); None: as many.
    position: "learned" (a table of max_positions rows), "sinusoidal", "rope" (arXiv:2104.09864, with Hugging Face's
      rope_scaling) or "relative" (T5's, arXiv:1910.10683: see `RelativeBias` for buckets and max_distance).
    attention_scale: of the products of queries and keys; None: 1 / √D.
    norm: "layer" (arXiv:1607.06450) or "rms" (arXiv:1910.07467, in Llama's casting order); norm_first: see above.
    activation: of the feed-forward block, by its name in `pyfuse.dropout`; gated: down(act(gate(x)) · up(x))
      (arXiv:2002.05202).
    attention_bias, hidden_bias: of the linear layers. embedding_norm, embedding_scale, segments: of the embedding.
    window: tokens that one sees, itself included; None: all.
    head: "lm", the logits of the next token; "mlm", BERT's of a masked one; "classes", BERT's of `classes` classes
      of a sequence, which may have names, `labels`; None, x itself. tied: the head's matrix is the embedding's;
      head_bias: of the lm head. head_scale: of x before it.
    dropout: of the embedding and of what is added to x; attention_dropout: of the weights of attention;
      hidden_dropout: after the activation.
    """

    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    causal: bool = True
    encoder_layers: int = 0
    kv_heads: int | None = None
    head_dim: int | None = None
    max_positions: int = 1024
    position: str = "learned"
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    buckets: int = 32
    max_distance: int = 128
    attention_scale: float | None = None
    norm: str = "layer"
    norm_eps: float = 1e-5
    norm_first: bool = True
    activation: str = "gelu_tanh"
    gated: bool = False
    attention_bias: bool = True
    hidden_bias: bool = True
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    segments: int = 0
    window: int | None = None
    head: str | None = "lm"
    tied: bool = True
    head_bias: bool = False
    head_scale: float = 1.0
    classes: int = 0
    labels: tuple[str, ...] = ()
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))  # JSON has lists only
        if self.labels and not self.classes:
            object.__setattr__(self, "classes", len(self.labels))
        sizes = ("vocabulary", "width", "layers", "heads", "hidden", "max_positions", "head_scale")
        for name in sizes:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"width: {self.width} is no multiple of heads = {self.heads}")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads: {self.heads} is no multiple of kv_heads = {self.kv_heads}")
        for name, known in (
            ("position", POSITIONS), ("norm", NORMS), ("head", HEADS), ("activation", tuple(FORMULA)),
        ):  # fmt: skip
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, needs one of {known}")
        if self.buckets < 4 or self.max_distance <= self.buckets // 2:
            raise ValueError(
                f"buckets, max_distance: got {self.buckets} and {self.max_distance}, needs at least 4 buckets, "
                "and more distances than half of them"
            )
        if (self.head == "classes") != (self.classes > 0):
            raise ValueError(f"classes: got {self.classes} with head={self.head!r}")
        if self.labels and len(set(self.labels)) != self.classes:
            raise ValueError(f"labels: needs {self.classes} different names, got {self.labels}")
        if self.encoder_layers and not self.causal:
            raise ValueError("encoder_layers: what follows an encoder is a causal decoder")

    @property
    def d(self) -> int:
        """Size of a head."""
        return self.head_dim or self.width // self.heads


class Part(nn.Module):
    """Whatever computes: by pyfuse's operations, or with on_torch by torch's functions for the same."""

    on_torch = False

    @property
    def ops(self) -> Any:
        return stock if self.on_torch else pyfuse_ops


class Linear(nn.Linear, Part):
    """y = x·Wᵀ + b; by_rows: the bits of a row do not depend on how many there are."""

    def forward(self, input: Tensor, by_rows: bool = False) -> Tensor:
        linear = row_linear if by_rows else self.ops.linear
        y: Tensor = linear(input, self.weight, self.bias)
        return y


class Embedding(InputEmbedding, Part):
    """dropout(norm(scale · token row + position row + segment row)), in one operation."""

    def __init__(self, c: Config) -> None:
        table = c.position if c.position in ("learned", "sinusoidal") else None
        super().__init__(
            c.vocabulary, c.width, position=table,
            max_positions=c.max_positions if table == "learned" else None, num_segments=c.segments,
            scale=c.embedding_scale, norm=c.embedding_norm, eps=c.norm_eps, dropout=c.dropout,
        )  # fmt: skip

    def _embed(self, *tensors: Tensor, **options: Any) -> Tensor:
        e: Tensor = self.ops.embed(*tensors, **options)
        return e


class Rope(RotaryEmbedding, Part):
    """Queries and keys turned by the angles of their positions."""

    def __init__(self, c: Config) -> None:
        super().__init__(
            c.d, theta=c.rope_theta, scaling=c.rope_scaling, max_positions=c.max_positions
        )

    @property
    def follows_length(self) -> bool:
        """Whether sequences beyond max_positions have other angles from their first token on."""
        return self._adaptive

    def turn_rows(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """The tables reach as far as the sequences, which are longer than what is new of them."""
        cos, sin = self.tables(rows.longest, q.device)
        return self._turn(q, k, cos, sin, layout=self.layout, positions=rows.positions)

    def _turn(self, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return self.ops.rope_pair(*tensors, **options)


class RelativeBias(Part):
    """What is added to the scores of a query and a key: a number for each head and bucket of the distance between them.

    Near distances have a bucket each, farther ones share them by their logarithm, and from max_distance on all have the
    last one. Keys after the query have half of the buckets for themselves, unless they are not seen at all.
    Raffel et al., "Exploring the limits of transfer learning", arXiv:1910.10683, section 2.1.
    """

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.max_distance = c.max_distance
        self.weight = nn.Parameter(torch.empty(c.buckets, c.heads))

    def forward(self, length: int, causal: bool, mask: Tensor | None) -> Tensor:
        """[1 or B, H, length, length], -inf where the mask [B, 1, 1, length] is False."""
        at = torch.arange(length, device=self.weight.device)
        bucket = self._bucket(at - at[:, None], causal)
        bias = nn.functional.embedding(bucket, self.weight).permute(2, 0, 1)[None]
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def tail(self, first: int, length: int) -> Tensor:
        """[1, H, length - first, length]: of the queries from `first` on, with as many keys as tokens."""
        at = torch.arange(length, device=self.weight.device)
        bucket = self._bucket(at - at[first:, None], causal=True)
        return nn.functional.embedding(bucket, self.weight).permute(2, 0, 1)[None]

    def _bucket(self, ahead: Tensor, causal: bool) -> Tensor:
        buckets = len(self.weight) // (1 if causal else 2)
        distance = (-ahead).clamp_min(0) if causal else ahead.abs()
        near = buckets // 2
        ratio = math.log(self.max_distance / near)
        far = (distance.clamp_min(near) / near).log() / ratio * (buckets - near)
        bucket = distance.where(distance < near, (near + far.long()).clamp_max(buckets - 1))
        return bucket if causal else bucket + buckets * (ahead > 0)


class Norm(Part):
    """Adds, and normalises the sum, in one pass: (norm(z), z) of z = x + dropout(update)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.kind, self.eps, self.dropout = c.norm, c.norm_eps, c.dropout
        self.weight = nn.Parameter(torch.ones(c.width))
        self.bias = nn.Parameter(torch.zeros(c.width)) if c.norm == "layer" else None

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self.dropout if self.training and update is not None else 0.0
        residual = None if update is None else x
        given = x if update is None else update
        if self.kind == "layer":
            return self.ops.layer_norm(
                given,
                self.weight,
                self.bias,
                self.eps,
                residual=residual,
                prenorm=True,
                dropout_p=p,
            )
        return self.ops.rms_norm(
            given, self.weight, self.eps, residual=residual, prenorm=True, dropout_p=p
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {self.kind!r}, eps={self.eps:g}, dropout={self.dropout:g}"


class Attention(Part):
    """softmax(q·kᵀ / √D)·v in H heads, between projections; of x over itself, or over the `memory` of an encoder."""

    def __init__(self, c: Config, cross: bool = False) -> None:
        super().__init__()
        kv = 2 * (c.kv_heads or c.heads) * c.d
        self.d, self.scale, self.is_cross = c.d, c.attention_scale, cross
        self.dropout, self.window = c.attention_dropout, c.window
        self.sizes = [c.heads * c.d, kv // 2, kv // 2]
        if cross:
            self.query = Linear(c.width, c.heads * c.d, c.attention_bias)
            self.key_value = Linear(c.width, kv, c.attention_bias)
        else:
            self.qkv = Linear(c.width, sum(self.sizes), c.attention_bias)
        self.out = Linear(c.heads * c.d, c.width, c.attention_bias)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, causal: bool = True, rope: Rope | None = None,
        positions: Tensor | None = None, memory: Tensor | None = None, bounds: Tensor | None = None,
        rows: Rows | None = None, layer: int = 0,
    ) -> Tensor:  # fmt: skip
        """x [B, T, W], memory [B, S, W]; mask broadcastable to [B, H, T, S], True where a token may look, or a bias.

        bounds: of packed sequences, x being [1, N, W] (`varlen_attention`); memory and mask are None then.
        rows: x [1, N, W] goes on with these cached sequences; the cache has the keys and values of this layer.
        """
        if rows is not None:
            return self._of_rows(x, rows, layer, rope)
        if memory is None:
            q, k, v = map(self._heads, self.qkv(x).split(self.sizes, -1))
        else:
            q = self._heads(self.query(x))
            k, v = map(self._heads, self.key_value(memory).split(self.sizes[1:], -1))
        if rope is not None:
            q, k = rope(q, k, positions)
        p = self.dropout if self.training else 0.0
        options = {"window": self.window, "scale": self.scale, "dropout_p": p}
        if bounds is None:
            o = self.ops.attention(q, k, v, mask=mask, causal=causal, **options).transpose(1, 2)
        else:
            q, k, v = (t.transpose(1, 2)[0] for t in (q, k, v))
            o = self.ops.varlen_attention(q, k, v, bounds, bounds, causal=causal, **options)[None]
        y: Tensor = self.out(o.flatten(2))
        return y

    def _of_rows(self, x: Tensor, rows: Rows, layer: int, rope: Rope | None) -> Tensor:
        if self.is_cross:
            o = rows.look_back(layer, self._heads(self.query(x, by_rows=True)), self.scale)
        else:
            q, k, v = map(self._heads, self.qkv(x, by_rows=True).split(self.sizes, -1))
            if rope is not None:
                q, k = rope.turn_rows(q, k, rows)
            o = rows.attend(layer, q, k, v, self.window, self.scale)
        y: Tensor = self.out(o.transpose(1, 2).flatten(2), by_rows=True)
        return y

    def of_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, Hk, S, D] of an encoder's result, for `Rows.look_back`."""
        k, v = map(self._heads, self.key_value(memory, by_rows=True).split(self.sizes[1:], -1))
        return k, v

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H·D] as [B, H, T, D], in the same memory."""
        return x.unflatten(-1, (-1, self.d)).transpose(1, 2)


class FeedForward(Part):
    """down(dropout(act(up(x)))), or gated: down(act(gate(x)) · up(x))."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.activation, self.gated, self.dropout = c.activation, c.gated, c.hidden_dropout
        self.up = Linear(c.width, (2 if c.gated else 1) * c.hidden, c.hidden_bias)
        self.down = Linear(c.hidden, c.width, c.hidden_bias)

    def forward(self, x: Tensor, by_rows: bool = False) -> Tensor:
        h: Tensor = self.up(x, by_rows)
        p = self.dropout if self.training else 0.0
        if self.gated:
            gate, h = h.chunk(2, -1)
            h = FORMULA[self.activation](gate) * h
        h = self.ops.dropout(h, p, activation=None if self.gated else self.activation)
        y: Tensor = self.down(h, by_rows)
        return y


class Block(nn.Module):
    """Attention, with an encoder's memory once more, and feed-forward, each with its sum and norm."""

    def __init__(self, c: Config, cross: bool = False) -> None:
        super().__init__()
        self.norm_first = c.norm_first
        self.norm1, self.attention = Norm(c), Attention(c)
        if cross:
            self.cross_norm, self.cross = Norm(c), Attention(c, cross=True)
        self.norm2, self.feed_forward = Norm(c), FeedForward(c)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        look: dict[str, Any],
        look_back: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor | None]:
        """update: what is still to be added to x, since the norm after it does both; so is what comes back second.

        look, look_back: the arguments of attention and cross-attention.
        """
        by_rows = "rows" in look
        if not self.norm_first:
            x, _ = self.norm1(x, self.attention(x, **look))
            if look_back is not None:
                x, _ = self.cross_norm(x, self.cross(x, **look_back))
            x, _ = self.norm2(x, self.feed_forward(x, by_rows))
            return x, None
        n, x = self.norm1(x, update)
        update = self.attention(n, **look)
        if look_back is not None:
            n, x = self.cross_norm(x, update)
            update = self.cross(n, **look_back)
        n, x = self.norm2(x, update)
        return x, self.feed_forward(n, by_rows)


class Stack(nn.Module):
    """Embedding, blocks, and the norm after them where norms come first."""

    def __init__(self, c: Config, layers: int, cross: bool = False) -> None:
        super().__init__()
        self.embedding = Embedding(c)
        self.rope = Rope(c) if c.position == "rope" else None
        self.relative = RelativeBias(c) if c.position == "relative" else None
        self.blocks = nn.ModuleList(Block(c, cross) for _ in range(layers))
        self.norm = Norm(c) if c.norm_first else None
        self.recompute = False

    def forward(
        self, ids: Tensor, mask: Tensor | None, causal: bool, positions: Tensor | None = None,
        segments: Tensor | None = None, memory: Tensor | None = None, memory_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        packing = self._packing(mask) if memory is None else None
        if packing is not None:
            if positions is None:
                positions = torch.arange(ids.shape[1], device=ids.device)
            positions = packing.pack(positions.expand_as(ids))
            segments = None if segments is None else packing.pack(segments)
            ids, mask = packing.pack(ids), None
        seen = _keys(mask)
        if self.relative is not None:
            seen = self.relative(ids.shape[1], causal, seen)
        look = {
            "mask": seen, "causal": causal, "rope": self.rope, "positions": positions,
            "bounds": None if packing is None else packing.bounds,
        }  # fmt: skip
        look_back = None
        if memory is not None:
            look_back = {"mask": _keys(memory_mask), "causal": False, "memory": memory}
        x = self.embedding(ids, positions if self.rope is None else None, segments)
        x = self._through_blocks(x, look, look_back)
        return x if packing is None else packing.unpack(x)

    def of_rows(self, ids: Tensor, rows: Rows) -> Tensor:
        """x [1, N, W] of tokens [1, N] that go on with cached sequences."""
        if self.relative is not None:
            spans = zip(rows.slots, rows.ends, strict=True)
            rows.biases = [self.relative.tail(slot.length, end) for slot, end in spans]
        x = self.embedding(ids, rows.positions if self.embedding.kind is not None else None)
        update: Tensor | None = None
        for layer, block in enumerate(self.blocks):
            look = {"rows": rows, "layer": layer}
            back = look if hasattr(block, "cross") else None
            x, update = block(x, update, look | {"rope": self.rope}, back)
        return x if self.norm is None else self.norm(x, update)[0]

    def _packing(self, mask: Tensor | None) -> Packing | None:
        """Not with torch, which has no such attention, and ours of packed sequences takes no bias."""
        if mask is None or self.relative is not None or not _may_look(mask):
            return None
        return None if self.embedding.on_torch or mask.all() else Packing(mask)

    def _through_blocks(
        self, x: Tensor, look: dict[str, Any], look_back: dict[str, Any] | None
    ) -> Tensor:
        update: Tensor | None = None
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x, update = checkpoint(block, x, update, look, look_back, use_reentrant=False)
            else:
                x, update = block(x, update, look, look_back)
        return x if self.norm is None else self.norm(x, update)[0]


class Packing:
    """The real tokens of a padded batch as one sequence [1, N], so that no padding is computed."""

    def __init__(self, mask: Tensor) -> None:
        """bounds: where each text begins, and N."""
        real = mask.bool()
        self.shape, self.index = mask.shape, real.flatten().nonzero()[:, 0]
        self.bounds = nn.functional.pad(real.sum(1).cumsum(0), (1, 0))

    def pack(self, t: Tensor) -> Tensor:
        """[B, T] -> [1, N]"""
        return t.reshape(-1)[self.index][None]

    def unpack(self, x: Tensor) -> Tensor:
        """[1, N, W] -> [B, T, W], 0 where there is padding."""
        everything = x.new_zeros(self.shape.numel(), x.shape[-1])
        return everything.index_copy(0, self.index, x[0]).unflatten(0, self.shape)


def _may_look(t: Tensor) -> bool:
    """Whether sizes may follow from what t holds: not on a GPU, where the host would wait, nor in a compiled graph."""
    return t.is_cpu and not torch.compiler.is_compiling()


def _keys(mask: Tensor | None) -> Tensor | None:
    """[B, S], nonzero for real tokens, as [B, 1, 1, S]: of which keys there are, for every query."""
    return None if mask is None else mask.bool()[:, None, None]


class Transformer(Part):
    """A model of a `Config`.

    `forward` gives logits, or with targets the loss, without ever holding all logits (`linear_cross_entropy`).
    ops: who computes, pyfuse's operations or `pyfuse.models.stock`, torch's functions for the same.
    `recompute()` lets blocks keep only x for the backward pass, which computes the rest again (arXiv:1604.06174).
    """

    def __init__(self, config: Config, ops: Any = pyfuse_ops) -> None:
        super().__init__()
        if ops not in (pyfuse_ops, stock):
            raise ValueError("ops: needs pyfuse.ops or pyfuse.models.stock")
        c = self.config = config
        self.encoder = Stack(c, c.encoder_layers) if c.encoder_layers else None
        self.decoder = Stack(c, c.layers, cross=self.encoder is not None)
        if self.encoder is not None:
            self.encoder.embedding.token = self.decoder.embedding.token  # one table for both
        if c.head == "mlm":
            self.transform, self.transform_norm = Linear(c.width, c.width), Norm(c)
        if c.head == "classes":
            self.pooler, self.classifier = Linear(c.width, c.width), Linear(c.width, c.classes)
        words = c.head in ("lm", "mlm")
        self.matrix = (
            nn.Parameter(torch.empty(c.vocabulary, c.width)) if words and not c.tied else None
        )
        biased = c.head == "mlm" or (c.head == "lm" and c.head_bias)
        self.bias = nn.Parameter(torch.zeros(c.vocabulary)) if biased else None
        self.reset_parameters()
        for part in self.modules():
            if isinstance(part, Part):
                part.on_torch = ops is stock

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's: N(0, 0.02²), divided by √(2·layers) where a block adds to x; biases 0, norms 1.

        The head's matrix is divided by head_scale, so that the logits begin as small with it as without.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                adds = name.endswith(("out.weight", "down.weight")) and self.config.norm_first
                p.normal_(0.0, 0.02 / (2 * self.config.layers) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                p.zero_()
        table = self.decoder.embedding.token.weight if self.matrix is None else self.matrix
        table.div_(self.config.head_scale)

    def recompute(self, on: bool = True) -> None:
        for stack in (self.encoder, self.decoder):
            if stack is not None:
                stack.recompute = on

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoder's result [B, S, W], the decoder's memory. ids, mask [B, S]; mask: nonzero for real tokens."""
        if self.encoder is None:
            raise ValueError("encode: the model has no encoder before its decoder")
        y: Tensor = self.encoder(ids, mask, causal=False)
        return y

    def hidden(
        self, ids: Tensor, mask: Tensor | None = None, *, positions: Tensor | None = None,
        segments: Tensor | None = None, memory: Tensor | None = None, memory_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x [B, T, W] before the head.

        ids [B, T]: 0 … V - 1. mask [B, T]: nonzero for real tokens; None: all are. What padding gives means nothing: on
        a CPU it is 0, and not computed (with relative positions it is). positions [T] or [B, T]: by default 0 … T - 1;
        for padding on the left they count from the first real token. segments [B, T]: 0 by default.
        memory, memory_mask: `encode`'s result, and the mask given there.
        ValueError: memory without an encoder, or none with one; a sequence beyond max_positions.
        """
        if (memory is None) != (self.encoder is None):
            raise ValueError("memory: needed with an encoder (see encode), and only then")
        if self.config.position == "learned" and ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"ids: {ids.shape[1]} tokens, the model has {self.config.max_positions} positions"
            )
        if self.config.position == "relative" and positions is not None:
            raise ValueError("positions: got a tensor, but those of the model are relative")
        y: Tensor = self.decoder(
            ids, mask, self.config.causal, positions, segments, memory, memory_mask
        )
        return y

    def forward(
        self, ids: Tensor, mask: Tensor | None = None, *, targets: Tensor | None = None, z_loss: float = 0.0,
        label_smoothing: float = 0.0, **more: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Logits [B, T, V] (head "classes": [B, classes]; None: x), or the loss if targets are given.

        targets [B, T] ("classes": [B]): what each position should say, -100 where nothing; the mean over the others.
        For a language model they are the ids one further. More arguments are those of `hidden`.
        """
        x = self.hidden(ids, mask, **more)
        if self.config.head is None:
            if targets is not None:
                raise ValueError("targets: the model has no head")
            return x
        if self.config.head == "mlm" and targets is not None and _may_look(targets):
            masked = targets != -100
            x, targets = x[masked], targets[masked]
        x, weight, bias = self.last_layer(x)
        if targets is None:
            return self.ops.linear(x, weight, bias)
        return self.ops.linear_cross_entropy(
            x, weight, targets, bias, label_smoothing=label_smoothing, z_loss=z_loss
        )

    def memory_keys(self, memory: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        """Keys and values [B, Hk, S, D] of `encode`'s result for the cross-attention of each layer (`Slot.memory`)."""
        crosses: list[Attention] = [block.cross for block in self.decoder.blocks]  # type: ignore[misc]
        return tuple(cross.of_memory(memory) for cross in crosses)

    def of_rows(self, ids: Tensor, rows: Rows, logits_of: Tensor) -> Tensor:
        """Logits [R, V] of tokens that go on with cached sequences.

        ids [1, N]: the new tokens of each sequence of `rows`, one sequence after another. Their keys and values are
        written to the cache; `PagedCache.commit` is the caller's. logits_of [R]: of which tokens logits are wanted.
        """
        x, weight, bias = self.last_layer(self.decoder.of_rows(ids, rows)[0, logits_of])
        return row_linear(x, weight, bias)

    def last_layer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the last linear layer of the head takes, and its parameters."""
        c = self.config
        if c.head == "classes":
            pooled = self.pooler(x[:, 0]).tanh()
            pooled = self.ops.dropout(pooled, c.dropout if self.training else 0.0)
            return pooled, self.classifier.weight, self.classifier.bias
        if c.head == "mlm":
            x, _ = self.transform_norm(FORMULA[c.activation](self.transform(x)))
        if c.head_scale != 1.0:
            x = x * c.head_scale
        table: Tensor = self.decoder.embedding.token.weight
        return x, table if self.matrix is None else self.matrix, self.bias

    def sentence(self, ids: Tensor, mask: Tensor | None = None, **more: Tensor | None) -> Tensor:
        """The mean of x over the real tokens [B, W], of length 1: an embedding to compare texts by their products
        (Reimers and Gurevych, arXiv:1908.10084)."""
        x = self.hidden(ids, mask, **more)
        weights = torch.ones_like(ids) if mask is None else mask.bool()
        weights = weights[..., None].to(x.dtype)
        mean = (x * weights).sum(1) / weights.sum(1).clamp_min(1.0)
        return nn.functional.normalize(mean, dim=-1)

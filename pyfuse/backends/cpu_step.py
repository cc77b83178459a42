"""A decoder of GPT-2's or Llama's kind as csrc/cpu/decode_step.cpp runs it: one call for a whole step.

Its matrices are packed once, into panels of 64 outputs: a second copy of the weights, in the model's dtype or as int8.

    int8:  w[n, k] ≈ scale[n] · i[n, k],  scale[n] = max_k |w[n, k]| / 127,  i an integer of -127 … 127

x is taken to 16 bits then (steps of its largest magnitude / 32767), and products are added exactly. What int8 costs is
the rounding of the weights alone: at most scale[n] / 2 for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyfuse.backends.cpu_module import ACTIVATION, DTYPE, module, why_unavailable
from pyfuse.sinusoids import sinusoids

# What lies together in a panel, as one number.
_UNIT = {torch.float32: torch.float32, torch.bfloat16: torch.int32, torch.int8: torch.int16}
WEIGHTS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # pyfuse::StepWeights


def why_not_step(model: Any) -> str | None:
    """Why the native step cannot run this `Transformer`; None if it can."""
    c = model.config
    table = model.decoder.embedding.token.weight
    refusals = (
        (why_unavailable() is not None, str(why_unavailable())),
        (model.on_torch, "the model computes with torch's functions"),
        (not table.is_cpu, f"the model is on {table.device}, not on the CPU"),
        (table.dtype not in (torch.float32, torch.bfloat16), f"dtype {table.dtype} is neither float32 nor bfloat16"),
        (bool(c.encoder_layers), "it has an encoder"),
        (not c.causal, "it is not causal"),
        (not c.norm_first, "its norms come last"),
        (c.head != "lm", f"its head is {c.head!r}, not 'lm'"),
        (c.position == "relative", "its positions are relative"),
        (c.embedding_norm or bool(c.segments), "its embedding has a norm or segments"),
        (_adaptive(model), "its RoPE frequencies follow the length of the sequence"),
        (any(p.dtype != table.dtype for p in model.parameters()), "its weights are of several dtypes"),
    )  # fmt: skip
    return next((reason for refused, reason in refusals if refused), None)


def _adaptive(model: Any) -> bool:
    return model.decoder.rope is not None and bool(model.decoder.rope.follows_length)


def _padded(n: int, panel: int) -> int:
    return (n + panel - 1) // panel * panel


def _memory(size: int) -> Tensor:
    """Bytes, in large pages where the system has them: numpy asks for these, torch does not."""
    import numpy as np  # not before it is needed: `pyfuse doctor` runs without

    line = 64  # of the cache: vectors do not cross them
    room = torch.from_numpy(np.empty(size + line, np.uint8))
    return room[-room.data_ptr() % line :][:size]


def _floats(values: Tensor, size: int) -> Tensor:
    """In float32, zeros up to the size."""
    out = values.new_zeros(size, dtype=torch.float32)
    out[: len(values)] = values.detach()
    return out


class _Matrix:
    """W [N, K] and its bias in panels: [N/64][K][64], or [N/64][K/2][64][2] of elements narrower than float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kind: torch.dtype) -> None:
        self.n, self.k = weight.shape
        panel: int = module().packed_linear_panel
        rows, columns = _padded(self.n, panel), _padded(self.k, panel)
        self.scale: Tensor | None = None
        self.bias = None if bias is None else _floats(bias, rows)
        weight, unit = weight.detach(), _UNIT[kind]
        if kind == torch.int8:
            scale = weight.abs().amax(1).float() / 127
            steps = torch.where(scale > 0, scale, 1.0)
            self.scale = _floats(scale, rows)
        self.packed = _memory(rows * columns * kind.itemsize).view(unit)
        panels = self.packed.view(rows // panel, -1, panel)  # [N/64][units of K][64]
        whole = weight.new_zeros(panel, columns, dtype=kind)
        for i in range(0, self.n, panel):  # one by one: no second copy of a large matrix
            part = weight[i : i + panel]
            if kind == torch.int8:
                part = (part.float() / steps[i : i + panel, None]).round()
            whole[: len(part), : self.k] = part
            whole[len(part) :] = 0
            panels[i // panel] = whole.view(unit).t()

    def arguments(self) -> tuple[int, ...]:
        return (_address(self.packed), _address(self.scale), _address(self.bias), self.n, self.k)

    @property
    def bytes(self) -> int:
        parts = (self.packed, self.scale, self.bias)
        return sum(t.numel() * t.element_size() for t in parts if t is not None)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class NativeStep:
    """A packed `Transformer` (`why_not_step` says of which kind).

    length: of the longest sequence; by default the model's max_positions. weights: torch.int8, or by default the
    model's own dtype. A later change of the model's weights is not seen.
    """

    def __init__(
        self, model: Any, length: int | None = None, weights: torch.dtype | None = None
    ) -> None:
        reason = why_not_step(model)
        if reason is not None:
            raise ValueError(f"model: {reason}")
        c, stack = model.config, model.decoder
        table = stack.embedding.token.weight.detach()
        kind = table.dtype if weights is None else weights
        if kind not in (table.dtype, torch.int8):
            raise ValueError(f"weights: got {weights}, needs {table.dtype} or torch.int8")
        self.vocabulary = c.vocabulary
        self._kept: list[Any] = [table]
        self._kind = kind
        group, limits = c.heads // (c.kv_heads or c.heads), module()
        # Tokens of a sequence in one call that is no prompt's.
        self.most = max(1, min(limits.most_step_queries, limits.most_step_rows // group))
        length = length or c.max_positions
        cos = sin = places = None
        positions = 0
        if stack.rope is not None:
            cos, sin = stack.rope.tables(length, table.device)
            positions = cos.shape[0]
        elif c.position == "learned":
            places = stack.embedding.position.weight.detach().float().contiguous()
        elif c.position == "sinusoidal":
            places = sinusoids(torch.arange(length), c.width, 10000.0, torch.float32)
        if places is not None:
            positions = len(places)
        self._kept += [cos, sin, places]
        sizes = (
            c.width, c.heads, c.kv_heads or c.heads, c.d, c.hidden, c.vocabulary, WEIGHTS[kind], DTYPE[table.dtype],
            positions, 0 if cos is None else 2 * cos.shape[1],
        )  # fmt: skip
        scale = c.d**-0.5 if c.attention_scale is None else c.attention_scale
        activation = ACTIVATION[c.activation]
        window = -1 if c.window is None else c.window - 1
        numbers = (c.embedding_scale, c.head_scale, c.norm_eps, scale, activation, window)
        tables = (_address(table), _address(places), _address(cos), _address(sin))
        matrix = table if model.matrix is None else model.matrix
        head = self._matrix(matrix, model.bias)
        norm = self._norm(stack.norm)
        layers = [self._layer(block) for block in stack.blocks]
        self._model = module().StepModel(sizes, tables, numbers, norm, head, layers)

    @property
    def weight_bytes(self) -> int:
        """What a step reads of the weights."""
        return sum(part.bytes for part in self._kept if isinstance(part, _Matrix))

    def _matrix(self, weight: Tensor, bias: Tensor | None) -> tuple[int, ...]:
        self._kept.append(_Matrix(weight, bias, self._kind))
        arguments: tuple[int, ...] = self._kept[-1].arguments()
        return arguments

    def _norm(self, norm: Any) -> tuple[int, int]:
        parts = [norm.weight.detach().float().contiguous()]
        if norm.bias is not None:
            parts.append(norm.bias.detach().float().contiguous())
        self._kept += parts
        return parts[0].data_ptr(), parts[1].data_ptr() if len(parts) > 1 else 0

    def _layer(self, block: Any) -> tuple[int, ...]:
        up, feed = block.feed_forward.up, block.feed_forward
        ups: list[tuple[int, ...]] = [(0, 0, 0, 0, 0)]
        if feed.gated:
            weights = up.weight.chunk(2)
            biases = (None, None) if up.bias is None else up.bias.chunk(2)
            ups = [self._matrix(w, b) for w, b in zip(weights, biases, strict=True)]
        else:
            ups.append(self._matrix(up.weight, up.bias))
        attention = block.attention
        return (
            *self._norm(block.norm1), *self._norm(block.norm2),
            *self._matrix(attention.qkv.weight, attention.qkv.bias),
            *self._matrix(attention.out.weight, attention.out.bias),
            *ups[0], *ups[1], *self._matrix(feed.down.weight, feed.down.bias),
        )  # fmt: skip

    def __call__(
        self, ids: Tensor, lengths: Tensor, block_table: Tensor, k: Tensor, v: Tensor, *, prompt: bool = False,
        every: bool = False,
    ) -> Tensor:  # fmt: skip
        """Append ids [B, M], int64, to the sequences and give the logits after the last of each, [B, V] float32.

        lengths [B], int64: of the sequences with these tokens. block_table [B, P], int32; k, v [layers, pages, Hk,
        page_size, D]: the cache, written to; all contiguous. prompt: attention by tiles, which pays for many tokens;
        else there are at most `most`. every: logits of all tokens, [B·M, V].

        What a sequence gets does not depend on the others, nor on the number of threads, bit by bit; and with prompt
        or without, not on how many tokens come in one call.
        ValueError, IndexError: a length, page or id that there is not.
        """
        batch, queries = ids.shape
        out = torch.empty(batch * queries if every else batch, self.vocabulary)
        self._model.step((
            batch, queries, ids.data_ptr(), lengths.data_ptr(), block_table.data_ptr(), block_table.stride(0),
            k.shape[3], k.shape[1], k.data_ptr(), v.data_ptr(), DTYPE[k.dtype], prompt, every, out.data_ptr(),
            self.vocabulary, torch.get_num_threads(),
        ))  # fmt: skip
        return out

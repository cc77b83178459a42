"""Small models to generate with, and a runner without a cache, which is the truth for every loop."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import minis
from torch import Tensor

from pyfuse.models.transformer import Config, Transformer

V, CONTEXT = 97, 64
SMALL = 11  # tokens of a vocabulary in which texts often repeat themselves


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For test files that import it: models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mini(name: str, vocabulary: int = V, seed: int = 0) -> Transformer:
    """With weights so large that the likeliest tokens are far apart."""
    config = minis(
        vocabulary=vocabulary, width=32, layers=2, heads=4, hidden=48, max_positions=CONTEXT
    )
    return large(config[name], 0.25, seed)


def large(config: Config, spread: float = 0.2, seed: int = 1) -> Transformer:
    """A model whose parameters are so large that every part matters."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * spread)
    return model


def prompts_of(*lengths: int, seed: int = 0, vocabulary: int = V) -> list[list[int]]:
    """Random ones; no two begin alike."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(n)] for n in lengths]


def repeating(name: str, seed: int = 0) -> Transformer:
    """Of SMALL tokens; mistral: llama with a window."""
    if name != "mistral":
        return mini(name, vocabulary=SMALL, seed=seed)
    model = mini("llama", vocabulary=SMALL, seed=seed)
    other = Transformer(replace(model.config, window=7)).eval()
    other.load_state_dict(model.state_dict())
    return other


def repeating_prompts(*lengths: int) -> list[list[int]]:
    return prompts_of(*lengths, vocabulary=SMALL)


class Recomputed:
    """A slot of RecomputeRunner."""

    def __init__(self, tokens: Sequence[int], memory: Tensor | None) -> None:
        self.tokens, self.memory, self.ended = list(tokens), memory, False

    @property
    def length(self) -> int:
        return len(self.tokens)


class RecomputeRunner:
    """What `pyfuse.generation.runner.Runner` gives to a loop, by the model over all tokens anew in every call.

    alive: slots that nobody has ended. calls: what `forward` was given, as (tokens there, new tokens) of each slot.
    """

    def __init__(self, model: Transformer, sequences: int = 100) -> None:
        self.model, self.max_tokens, self.chunk = model, model.config.max_positions, 512
        room = SimpleNamespace(room=sequences)
        self.cache = SimpleNamespace(page_size=self.max_tokens, window=None, pages=room)
        self.alive: list[Recomputed] = []
        self.calls: list[list[tuple[int, int]]] = []

    @torch.no_grad()
    def encode(self, ids: Sequence[int]) -> Tensor:
        return self.model.encode(torch.tensor([list(ids)]))

    def begin(self, prompt: Sequence[int], memory: Tensor | None = None) -> Recomputed:
        assert len(prompt) <= self.max_tokens
        return self._new([], memory)

    def fork(self, slot: Recomputed) -> Recomputed:
        assert not slot.ended
        return self._new(slot.tokens, slot.memory)

    def end(self, slot: Recomputed) -> None:
        assert not slot.ended
        slot.ended = True
        self.alive.remove(slot)

    @torch.no_grad()
    def forward(self, work: Sequence[tuple[Recomputed, Sequence[int]]]) -> Tensor:
        assert len({id(slot) for slot, _ in work}) == len(work)
        self.calls.append([(slot.length, len(tokens)) for slot, tokens in work])
        rows = []
        for slot, tokens in work:
            assert not slot.ended and tokens
            slot.tokens += tokens
            assert slot.length <= self.max_tokens
            more: dict[str, Any] = {} if slot.memory is None else {"memory": slot.memory}
            rows.append(self.model(torch.tensor([slot.tokens]), **more)[0, -1])
        return torch.stack(rows)

    def _new(self, tokens: Sequence[int], memory: Tensor | None) -> Recomputed:
        self.alive.append(Recomputed(tokens, memory))
        return self.alive[-1]

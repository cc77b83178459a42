"""Side-by-side timing of models: the same work in turns in one process, the best of the rounds.

Machines drift (clock, neighbours, caches), so two runs that follow one another cannot be compared.
Here every round runs each candidate once, every second round in reverse order, and a candidate's
figure is its best round: what the machine does when nothing disturbs it.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Models = Mapping[str, torch.nn.Module]  # label -> model
Milliseconds = dict[str, float]  # label -> best of the rounds


def interleave(
    runs: Mapping[str, Callable[[], float]],
    rounds: int,
    *,
    budget: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The smallest value that each run returns (its own seconds) over that many rounds.

    budget: seconds after which no new round begins; the first two always run, since the first is
    slowed by cold caches. ValueError when rounds < 1 or runs is empty.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, needs at least 1")
    if not runs:
        raise ValueError("runs: got none, needs at least one")
    best = dict.fromkeys(runs, float("inf"))
    start = clock()
    for number in range(rounds):
        if number > 1 and budget is not None and clock() - start > budget:
            break
        order = list(runs) if number % 2 == 0 else list(runs)[::-1]
        for label in order:
            best[label] = min(best[label], runs[label]())
    return best


def stopwatch(work: Callable[[], object]) -> Callable[[], float]:
    """A run for `interleave` that times all of `work`."""

    def run() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return run


def prefill_ms(
    models: Models, tokens: int, *, rounds: int, budget: float | None = None
) -> Milliseconds:
    """Milliseconds from a prompt of `tokens` tokens (batch 1) to its first new token.

    Measured through generate(), so that each model uses the KV cache that its user would get.
    """
    prompt = random_tokens(_any(models), 1, tokens)

    def work(model: torch.nn.Module) -> Callable[[], object]:
        return lambda: _generate(model, prompt, 1)

    runs = {label: stopwatch(work(model)) for label, model in models.items()}
    return _milliseconds(interleave(runs, rounds, budget=budget))


def decode_ms(
    models: Models, context: int, *, steps: int = 16, rounds: int, budget: float | None = None
) -> Milliseconds:
    """Milliseconds for one new token (batch 1) when `context` tokens are in the KV cache.

    Every round generates `steps` tokens from the model's own cache, filled once and cropped back.
    """
    prompt = random_tokens(_any(models), 1, context + 1)
    caches = {
        label: _generate(model, prompt[:, :-1], 1, return_dict_in_generate=True).past_key_values
        for label, model in models.items()
    }

    def run(label: str) -> Callable[[], float]:
        def decode() -> float:
            cache = caches[label]
            cache.crop(context - cache.get_seq_length())  # a negative number of tokens
            start = time.perf_counter()
            _generate(models[label], prompt, steps, past_key_values=cache)
            return (time.perf_counter() - start) / steps

        return decode

    runs = {label: run(label) for label in models}
    return _milliseconds(interleave(runs, rounds, budget=budget))


def encode_ms(
    models: Models,
    *,
    batch: int = 32,
    tokens: int = 256,
    real: float = 1.0,
    rounds: int,
    budget: float | None = None,
) -> Milliseconds:
    """Milliseconds to embed a batch of sentences (encoder and mean pooling).

    real: the share of the positions [batch, tokens] that are no padding. Below 1 the longest
    sentence has all `tokens`, and the lengths of the others are spread evenly.
    """
    ids = random_tokens(_any(models), batch, tokens)
    mask = right_padding(batch, tokens, real)
    if real < 1.0:
        ids = ids.masked_fill(mask == 0, _any(models).config.pad_token_id)  # type: ignore[union-attr, arg-type]

    def work(model: torch.nn.Module) -> Callable[[], object]:
        def embed() -> object:
            with torch.no_grad():
                return mean_pool(model(input_ids=ids, attention_mask=mask)[0], mask)

        return embed

    runs = {label: stopwatch(work(model)) for label, model in models.items()}
    return _milliseconds(interleave(runs, rounds, budget=budget))


def right_padding(batch: int, tokens: int, real: float) -> torch.Tensor:
    """[batch, tokens] attention mask: lengths from `tokens` evenly down, `real * tokens` on average.

    ValueError: real is not above 0.5, where the shortest would have no token.
    """
    if not 0.5 < real <= 1.0:
        raise ValueError(f"real: got {real}, needs a share above 0.5 and up to 1")
    shortest = (2.0 * real - 1.0) * tokens
    lengths = torch.linspace(tokens, shortest, batch).round().clamp(min=1)
    return (torch.arange(tokens) < lengths[:, None]).long()


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[B, M, D] states -> [B, D] means over the tokens where mask [B, M] is 1."""
    weight = mask[:, :, None].to(states.dtype)  # [B, M, 1]
    return (states * weight).sum(1) / weight.sum(1)


def random_tokens(model: torch.nn.Module, batch: int, tokens: int) -> torch.Tensor:
    """[batch, tokens] ids of the model's vocabulary, the same in every run."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (batch, tokens), generator=generator)


def _generate(model: torch.nn.Module, prompt: torch.Tensor, new: int, **options: Any) -> Any:
    """Exactly `new` tokens, greedily: random ids must not end at an early end-of-text."""
    return model.generate(  # type: ignore[operator]
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=new,
        max_new_tokens=new,
        **options,
    )


def _milliseconds(best: dict[str, float]) -> Milliseconds:
    return {label: 1e3 * seconds for label, seconds in best.items()}


def _any(models: Models) -> torch.nn.Module:
    if not models:
        raise ValueError("models: got none, needs at least one")
    return next(iter(models.values()))

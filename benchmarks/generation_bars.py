"""The promised figures of generation: SmolLM2 in two threads against what memory allows, and against itself."""

from __future__ import annotations

import math
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import peaks
from benchmarks.bar import Bar, share_bar, times_bar, unmeasured
from benchmarks.turns import Spread, in_turns, ratio
from pyfuse.cli import measure
from pyfuse.generation import generate
from pyfuse.generation.native import KernelStep
from pyfuse.generation.runner import Runner, Slot
from pyfuse.generation.text import Tokenizer
from pyfuse.models import zoo
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.transformer import Transformer

# Tokens per second: by weights, at the context of so many tokens.
RATES = {("model", 16): 100, ("model", 1024): 85, ("int8", 16): 170}
OF_BANDWIDTH, PREFILL, BATCH, BEAM_PAGES, PERPLEXITY = 0.75, 1.9, 4.0, 1.3, 0.01
SPECULATION, NO_SPECULATION = 1.5, 0.95
NEW = 48  # tokens that a decoding run makes
TEXT_TOKENS, WINDOW = 20_000, 1000

# An edit repeats most of what it edits; the other text has little to look up.
ORIGINAL = """\
The old lighthouse stood at the end of the long pier, and every evening its keeper climbed the narrow stairs to light
the lamp. From the gallery he could see the fishing boats come home, one after another, and he counted them as they
passed the breakwater. When the last of them was safe in the harbour, he wrote the number into a thick book, closed it,
and went down to make his tea. Nobody ever asked him for the book, but he kept it all the same, year after year.
"""
EDIT = (
    "Repeat the following text word for word, but replace 'lamp' by 'lantern':\n\n"
    f"{ORIGINAL}\nHere is the text again, with 'lantern' instead of 'lamp':\n\n"
)
STORY = "Write a short poem about the sea and the people who live beside it:\n\n"


def generation() -> Iterator[Bar]:
    """Decoding, prompts, batches, beams and speculation."""
    reason = zoo.problem("smollm2")
    if reason is not None:
        yield unmeasured("generation", "smollm2 is not fetched: make models", "see generation_bars")
        return
    torch.manual_seed(0)
    model = from_pretrained(zoo.path("smollm2"), dtype=torch.bfloat16)
    yield from _decoding(model)
    yield _prefill(model)
    yield _batch(model)
    yield _beams(model)
    yield from _speculation(model)
    yield _perplexity(model)


# ---- decoding ------------------------------------------------------------------------------------


def _decoding(model: Transformer) -> Iterator[Bar]:
    threads = torch.get_num_threads()
    for (weights, context), target in RATES.items():
        runner = Runner(model, max_tokens=context + NEW + 1, weights=weights)
        prompt = torch.randint(0, model.config.vocabulary, (context,)).tolist()
        # As many bytes as a token takes: all weights, and half of what the new tokens add to the cache.
        step = runner.step
        assert isinstance(step, KernelStep)
        per_token = runner.cache.bytes / (len(runner.cache.k[0]) * runner.cache.page_size)
        size = step.native.weight_bytes + int((context + NEW / 2) * per_token)
        read = peaks.reader(threads, torch.ones(size // 4))
        runs = {"token": _token_seconds(runner, prompt), "memory": read}
        rounds = in_turns(runs, budget=25, least=9)
        name = f"SmolLM2, {'bf16' if weights == 'model' else weights}, a token at context {context}"
        rate = Spread.of(1 / s for s in rounds["token"])
        figure = f"{rate.median:.0f} tok/s ({rate.low:.0f} to {rate.high:.0f})"
        met = rate.median >= target
        yield Bar(name, figure, f">= {target} tok/s", met, rate.holds(target))
        share = ratio(rounds, "memory", "token")
        note = f" of {size / 1e9 / min(rounds['memory']):.1f} GB/s"
        yield share_bar(f"{name}: of the bandwidth", share, OF_BANDWIDTH, note)


def _token_seconds(runner: Runner, prompt: list[int], rows: int = 1) -> Callable[[], float]:
    """Seconds of a step of generate() after the first one: the model's, the choice and the loop around."""

    def run() -> float:
        times: list[float] = []
        generate(
            runner, [prompt] * rows, max_new_tokens=NEW, stop_tokens=(),
            callback=lambda _: times.append(time.perf_counter()),
        )  # fmt: skip
        return (times[-1] - times[rows - 1]) / (NEW - 1)

    return run


def _prefill(model: Transformer) -> Bar:
    from transformers import AutoModelForCausalLM

    stock: Any = AutoModelForCausalLM.from_pretrained(zoo.path("smollm2"), dtype=torch.bfloat16)
    ids = torch.randint(0, model.config.vocabulary, (1, 2048))
    runner = Runner(model, max_tokens=2049)
    prompts = iter(range(1 << 30))

    def theirs() -> object:
        with torch.inference_mode():
            return stock(ids, logits_to_keep=1)

    def ours() -> object:
        prompt = [next(prompts) % 1000, *ids[0].tolist()[1:]]  # none that is known already
        slot = runner.begin(prompt)
        try:
            return runner.forward([(slot, prompt)])
        finally:
            runner.end(slot)

    runs = {"stock": measure.stopwatch(theirs), "pyfuse": measure.stopwatch(ours)}
    spread = ratio(in_turns(runs, budget=60, least=3), "stock", "pyfuse")
    return times_bar("SmolLM2, bf16, prompt of 2048 tokens against Hugging Face", spread, PREFILL)


def _batch(model: Transformer) -> Bar:
    prompt = torch.randint(0, model.config.vocabulary, (16,)).tolist()
    runner = Runner(model, max_tokens=16 + NEW + 1, sequences=8)
    runs = {
        "one": _token_seconds(runner, prompt),
        "eight": _token_seconds(runner, prompt, 8),
    }
    rounds = in_turns(runs, budget=25, least=9)
    spread = Spread.of(8 * a / b for a, b in zip(rounds["one"], rounds["eight"], strict=True))
    return times_bar("tokens per second of 8 sequences against one", spread, BATCH)


# ---- memory --------------------------------------------------------------------------------------


def _beams(model: Transformer) -> Bar:
    """Pages that are held at most, of a prompt of 512 tokens and 64 new ones."""
    prompt, new = torch.randint(0, model.config.vocabulary, (512,)).tolist(), 64
    most = {beams: _most_pages(model, prompt, new, beams) for beams in (1, 4)}
    tails = 3 * math.ceil(
        new / 32 + 1
    )  # of three beams more, with the page that prompt and tail share
    share = (most[4] - tails) / most[1]
    name = "4 beams: pages of the cache, without their own tails, against one beam's"
    figure = f"{share:.2f} x ({most[1]} and {most[4]} pages, {tails} of tails)"
    return Bar(name, figure, f"<= {BEAM_PAGES} x", share <= BEAM_PAGES)


class _Watched:
    """A step that notes how many pages are held."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.step, self.most = runner, runner.step, 0

    def forward_rows(
        self, ids: list[int], slots: Sequence[Slot], counts: Sequence[int], every: bool
    ) -> Tensor:
        logits = self.step.forward_rows(ids, slots, counts, every)
        self.most = max(self.most, self.runner.cache.pages_in_use)
        return logits


def _most_pages(model: Transformer, prompt: list[int], new: int, beams: int) -> int:
    runner = Runner(model, max_tokens=len(prompt) + new + 1, sequences=beams)
    runner.step = watched = _Watched(runner)
    generate(runner, [prompt], max_new_tokens=new, beams=beams, stop_tokens=())
    return watched.most


# ---- speculation ---------------------------------------------------------------------------------


def _speculation(model: Transformer) -> Iterator[Bar]:
    yield _look_up(model, "a text to be edited", EDIT, SPECULATION)
    yield _look_up(model, "a poem", STORY, NO_SPECULATION)


def _look_up(model: Transformer, what: str, text: str, target: float) -> Bar:
    prompt = Tokenizer.of(str(zoo.path("smollm2"))).encode(text)
    runner = Runner(model, max_tokens=len(prompt) + 129)
    texts: dict[Literal["prompt"] | None, list[int]] = {}

    def seconds(how: Literal["prompt"] | None) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            (result,) = generate(
                runner, [prompt], max_new_tokens=128, stop_tokens=(), speculate=how
            )
            texts[how] = result.tokens
            return time.perf_counter() - start

        return run

    runs = {"plain": seconds(None), "look-up": seconds("prompt")}
    spread = ratio(in_turns(runs, budget=30, least=5), "plain", "look-up")
    note = "" if texts[None] == texts["prompt"] else ", but the texts DIFFER"
    return times_bar(f"prompt look-up: {what}, 128 tokens", spread, target, note)


# ---- int8 ----------------------------------------------------------------------------------------


def _perplexity(model: Transformer) -> Bar:
    """Of the standard library's sources."""
    tokenizer = Tokenizer.of(str(zoo.path("smollm2")))
    folder = Path(sysconfig.get_paths()["stdlib"])
    ids: list[int] = []
    for file in sorted(folder.glob("*.py")):
        if len(ids) >= TEXT_TOKENS:
            break
        ids += tokenizer.encode(file.read_text("utf-8")[:8000])
    ids = ids[:TEXT_TOKENS]
    losses = {}
    for weights in ("model", "int8"):
        runner = Runner(model, max_tokens=WINDOW, weights=weights)
        total = 0.0
        for at in range(0, len(ids), WINDOW):
            part = ids[at : at + WINDOW]
            slot = runner.begin(part)
            logits = runner.forward([(slot, part)], every=True)
            runner.end(slot)
            targets = torch.tensor(part[1:])
            total += float(torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum"))
        losses[weights] = total / (len(ids) - math.ceil(len(ids) / WINDOW))
    worse = math.exp(losses["int8"] - losses["model"]) - 1
    name = f"int8 weights: perplexity of {len(ids)} tokens of Python sources against bf16's"
    figure = f"{worse:+.2%} ({math.exp(losses['model']):.3f} in bf16)"
    return Bar(name, figure, f"<= {PERPLEXITY:+.0%}", abs(worse) <= PERPLEXITY)

"""The two real models, stock against accelerated: same values, same text, and how fast."""

import copy
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any, TextIO

import torch

import pyfuse
from pyfuse.cli import machine, measure
from pyfuse.models import zoo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = (
    "Tell me a short story about a lighthouse keeper.",
    "Explain how a bicycle stays upright.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "What are the main causes of the seasons on Earth?",
    "List five tips for writing clear emails, with one sentence for each.",
)
STOCK, FUSED = "stock", "pyfuse"


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    prompts: int  # whose greedy text is compared
    tokens: int  # of each of these texts
    answer: int  # tokens of the streamed answer
    prefill: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int  # tokens of one decoding round
    sentences: tuple[int, int]  # batch, tokens
    rounds: int
    budget: float | None = None  # seconds for one row of the table


FULL = Effort(5, 64, 160, (512, 2048), (16, 1024), 16, (32, 256), 5)
QUICK = Effort(2, 32, 48, (512,), (16, 1024), 8, (32, 256), 3, budget=3.0)


@dataclass(frozen=True)
class Row:
    """One line of the table; stock and fused in `unit`."""

    model: str
    dtype: str
    work: str
    stock: float
    fused: float
    unit: str

    @property
    def gain(self) -> float:
        """How many times the stock speed."""
        return self.fused / self.stock


@dataclass
class Result:
    """Everything that was found out. The keys of errors and receipts are like "smollm2 fp32"."""

    cpu: str
    threads: int
    torch: str
    quick: bool
    prompt: str
    answer: str = ""
    greedy: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)


class NotAccelerated(RuntimeError):
    """accelerate() refused; the message is its reason."""


class Comparison:
    """One run over both models, printing on `out` as it goes; what it finds is in `result`."""

    def __init__(self, prompt: str, dtypes: list[str], quick: bool, out: TextIO) -> None:
        self.dtypes = dtypes
        self.effort = QUICK if quick else FULL
        self.out = out
        self.result = Result(
            cpu=machine.cpu_model(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            quick=quick,
            prompt=prompt,
        )

    def say(self, text: str = "") -> None:
        """Print a line now."""
        print(text, file=self.out, flush=True)

    def run(self) -> Result:
        """All models in all dtypes."""
        r = self.result
        self.say(f"{r.cpu}, {r.threads} threads, torch {r.torch}, pyfuse against stock sdpa")
        for number, dtype in enumerate(self.dtypes):
            self._chat_model(dtype, first=number == 0)
            self._encoder(dtype)
        return r

    def _pair(self, name: str, dtype: str, load: Callable[..., Any]) -> dict[str, Any]:
        """The same model twice; the second one accelerated, and its receipt kept."""
        from pyfuse.hf import AccuracyError

        self.say(f"\n{name} {dtype}: accelerating ...")
        stock = load(zoo.path(name), dtype=DTYPES[dtype]).eval()
        fused = copy.deepcopy(stock)
        label = f"{name} {dtype}"
        try:
            receipt = pyfuse.accelerate(fused)
        except (AccuracyError, ValueError) as error:
            raise NotAccelerated(f"{label} was not accelerated: {error}") from error
        self.result.receipts[label] = {"text": str(receipt), **receipt.as_dict()}
        return {STOCK: stock, FUSED: fused}

    def _chat_model(self, dtype: str, first: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        effort = self.effort
        tokenizer = AutoTokenizer.from_pretrained(zoo.path("smollm2"), padding_side="left")
        pair = self._pair("smollm2", dtype, AutoModelForCausalLM.from_pretrained)
        self._compare_values("smollm2", dtype, pair, tokenizer)
        if first:
            self._answer(pair[FUSED], tokenizer)
        if dtype == "fp32":  # in bf16 a rounding may tip a near tie, for stock kernels as well
            self._compare_texts(pair, tokenizer)
        for tokens in effort.prefill:
            ms = measure.prefill_ms(pair, tokens, rounds=effort.rounds, budget=effort.budget)
            self._row("SmolLM2", dtype, f"prefill {tokens}", ms, tokens, "tokens/s")
        for context in effort.contexts:
            ms = measure.decode_ms(
                pair, context, steps=effort.steps, rounds=effort.rounds, budget=effort.budget
            )
            self._row("SmolLM2", dtype, f"decode at {context}", ms, 1, "tokens/s")

    def _encoder(self, dtype: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        batch, tokens = self.effort.sentences
        tokenizer = AutoTokenizer.from_pretrained(zoo.path("minilm"))
        pair = self._pair("minilm", dtype, AutoModel.from_pretrained)
        self._compare_values("minilm", dtype, pair, tokenizer)
        ms = measure.encode_ms(
            pair, batch=batch, tokens=tokens, rounds=self.effort.rounds, budget=self.effort.budget
        )
        self._row("MiniLM", dtype, f"encode {batch} x {tokens}", ms, batch, "sentences/s")

    def _row(
        self, model: str, dtype: str, work: str, ms: dict[str, float], units: int, unit: str
    ) -> None:
        stock, fused = (1e3 * units / ms[label] for label in (STOCK, FUSED))
        row = Row(model, dtype, work, stock, fused, unit)
        self.result.rows.append(row)
        self.say(f"{model} {dtype} {work}: {row.gain:.2f} x")

    def _answer(self, model: Any, tokenizer: Any) -> None:
        """Stream the answer to the prompt as it is made."""
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = _chat(tokenizer, self.result.prompt)
        self.say(f"\n> {self.result.prompt}")
        with redirect_stdout(self.out):  # where the streamer prints
            new = _greedy(model, inputs, self.effort.answer, streamer=streamer)
        self.result.answer = tokenizer.decode(new, skip_special_tokens=True)

    def _compare_values(self, name: str, dtype: str, pair: dict[str, Any], tokenizer: Any) -> None:
        """The largest difference of the models' outputs on a padded batch of real texts."""
        inputs = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            stock, fused = (pair[label](**inputs)[0][real].float() for label in (STOCK, FUSED))
        largest, error = stock.abs().max().item(), (fused - stock).abs().max().item()
        self.result.errors[f"{name} {dtype}"] = {"error": error, "largest": largest}

    def _compare_texts(self, pair: dict[str, Any], tokenizer: Any) -> None:
        """Greedy continuations of both models, token by token."""
        self.say()
        for prompt in PROMPTS[: self.effort.prompts]:
            inputs = _chat(tokenizer, prompt)
            stock, fused = (
                _greedy(pair[label], inputs, self.effort.tokens) for label in (STOCK, FUSED)
            )
            equal, count = stock == fused, len(stock)
            self.result.greedy.append({"prompt": prompt, "tokens": count, "equal": equal})
            verdict = (
                "the same" if equal else f"DIFFERENT from token {first_difference(stock, fused)}"
            )
            self.say(f"greedy text, {count} tokens, {verdict}: {prompt}")


def first_difference(one: list[int], other: list[int]) -> int:
    """The first place where two different lists differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _chat(tokenizer: Any, prompt: str) -> Any:
    """The prompt as one user message, by the model's own chat template: ids and mask [1, M]."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _greedy(model: Any, inputs: Any, tokens: int, **options: Any) -> list[int]:
    """At most that many new tokens, up to the end of the text."""
    made = model.generate(**inputs, do_sample=False, max_new_tokens=tokens, **options)
    new: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
    return new

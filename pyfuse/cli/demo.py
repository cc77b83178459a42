"""`pyfuse demo`: a chat model and a sentence encoder, stock against accelerated, on this machine."""

import argparse
import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import pyfuse
from pyfuse.cli import machine, measure, models, show
from pyfuse.models import zoo

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEFAULT_PROMPT = "Why is the sky blue? Answer in two sentences."
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
    """How much the demo measures."""

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
QUICK = Effort(2, 32, 48, (512,), (16, 1024), 8, (32, 256), 2, budget=3.0)


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
    """Everything that the demo found out; what --json prints."""

    cpu: str
    threads: int
    torch: str
    quick: bool
    prompt: str
    answer: str = ""
    greedy: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    receipts: dict[str, str] = field(default_factory=dict)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `demo`."""
    parser = commands.add_parser(
        "demo",
        help="run two real models, stock and accelerated, side by side",
        description="Answer a prompt with the accelerated SmolLM2-135M-Instruct, check that its "
        "greedy text is the same as stock, and print one table of speeds, stock against "
        "accelerated, interleaved in this process, best of the rounds. The models are fetched on "
        "first use. The exit status is 1 when a text differs.",
    )
    parser.add_argument("--prompt", default=DEFAULT_PROMPT, metavar="TEXT", help="what to answer")
    parser.add_argument(
        "--quick", action="store_true", help="fewer texts, lengths and rounds: under a minute"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, the rest on stderr")
    parser.add_argument(
        "--threads", type=_threads, metavar="N", help="CPU threads (default: physical cores)"
    )
    parser.add_argument(
        "--dtype",
        type=_dtypes,
        default=list(DTYPES),
        metavar="LIST",
        help=f"what to measure, of {','.join(DTYPES)} (default: all)",
    )
    parser.set_defaults(run=run)


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, needs a number of threads, at least 1")
    return int(text)


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"got {name!r}, needs some of {','.join(DTYPES)}")
    return list(dict.fromkeys(names))


def run(arguments: argparse.Namespace) -> int:
    """The whole demo; 1 when something is missing or a text differs."""
    if importlib.util.find_spec("transformers") is None:
        print("pyfuse demo needs transformers: pip install 'pyfuse[demo]'", file=sys.stderr)
        return 1
    try:
        for name in ("smollm2", "minilm"):
            if zoo.problem(name) is not None:
                print(f"{name} is {zoo.problem(name)}: fetching it once", file=sys.stderr)
            models.fetch(name)
    except zoo.FetchError as error:
        print(f"pyfuse demo: {error}", file=sys.stderr)
        return 1
    _offline()
    torch.set_num_threads(arguments.threads or machine.default_threads())
    out = sys.stderr if arguments.json else sys.stdout
    result = Demo(arguments, QUICK if arguments.quick else FULL, out).run()
    if arguments.json:
        rows = [{**asdict(row), "gain": row.gain} for row in result.rows]
        print(json.dumps({**asdict(result), "rows": rows}, indent=1))
    return 0 if all(text["equal"] for text in result.greedy) else 1


def _offline() -> None:
    """Keep transformers off the network and quiet. It reads the variable when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()


class Demo:
    """One run of the demo, printing on `out` as it goes."""

    def __init__(self, arguments: argparse.Namespace, effort: Effort, out: Any) -> None:
        self.arguments = arguments
        self.effort = effort
        self.out = out
        self.result = Result(
            cpu=machine.cpu_model(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            quick=arguments.quick,
            prompt=arguments.prompt,
        )

    def say(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    def run(self) -> Result:
        r = self.result
        self.say(f"{r.cpu}, {r.threads} threads, torch {r.torch}, pyfuse against stock sdpa")
        for number, dtype in enumerate(self.arguments.dtype):
            self.chat_model(dtype, first=number == 0)
            self.encoder(dtype)
        self.table()
        return r

    def pair(self, name: str, dtype: str, load: Callable[..., Any]) -> dict[str, torch.nn.Module]:
        """The same model twice; the second one accelerated, its receipt kept and printed."""
        stock = load(zoo.path(name), dtype=DTYPES[dtype]).eval()
        fused = copy.deepcopy(stock)
        self.say(f"\n{name} {dtype}: accelerating ...")
        receipt = pyfuse.accelerate(fused)
        label = f"{name} {dtype}"
        self.result.receipts[label] = str(receipt)
        return {STOCK: stock, FUSED: fused}

    def chat_model(self, dtype: str, first: bool) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        effort = self.effort
        tokenizer = AutoTokenizer.from_pretrained(zoo.path("smollm2"))
        pair = self.pair("smollm2", dtype, AutoModelForCausalLM.from_pretrained)
        tokenizer.padding_side = "left"
        self.compare_values("smollm2", dtype, pair, tokenizer)
        if first:
            self.answer(pair[FUSED], tokenizer)
        if dtype == "fp32":  # in bf16 a rounding may tip a near tie, for stock kernels as well
            self.compare_texts(pair, tokenizer)
        for tokens in effort.prefill:
            ms = measure.prefill_ms(pair, tokens, rounds=effort.rounds, budget=effort.budget)
            self.row("SmolLM2", dtype, f"prefill {tokens}", ms, tokens, "tokens/s")
        for context in effort.contexts:
            ms = measure.decode_ms(
                pair, context, steps=effort.steps, rounds=effort.rounds, budget=effort.budget
            )
            self.row("SmolLM2", dtype, f"decode at {context}", ms, 1, "tokens/s")

    def encoder(self, dtype: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        batch, tokens = self.effort.sentences
        pair = self.pair("minilm", dtype, AutoModel.from_pretrained)
        tokenizer = AutoTokenizer.from_pretrained(zoo.path("minilm"))
        self.compare_values("minilm", dtype, pair, tokenizer)
        ms = measure.encode_ms(
            pair, batch=batch, tokens=tokens, rounds=self.effort.rounds, budget=self.effort.budget
        )
        self.row("MiniLM", dtype, f"encode {batch} x {tokens}", ms, batch, "sentences/s")

    def row(
        self, model: str, dtype: str, work: str, ms: dict[str, float], units: int, unit: str
    ) -> None:
        speeds = [1e3 * units / ms[label] for label in (STOCK, FUSED)]
        row = Row(model, dtype, work, *speeds, unit)
        self.result.rows.append(row)
        self.say(f"{model} {dtype} {work}: {row.gain:.2f} x")

    def answer(self, model: Any, tokenizer: Any) -> None:
        """Stream the answer to the prompt as it is made."""
        from transformers import TextStreamer

        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = _chat(tokenizer, self.arguments.prompt)
        self.say(f"\n> {self.arguments.prompt}")
        with redirect_stdout(self.out):  # where the streamer prints
            made = model.generate(
                **inputs, do_sample=False, max_new_tokens=self.effort.answer, streamer=streamer
            )
        new = made[0, inputs["input_ids"].shape[1] :]
        self.result.answer = tokenizer.decode(new, skip_special_tokens=True)

    def compare_values(self, name: str, dtype: str, pair: dict[str, Any], tokenizer: Any) -> None:
        """The largest difference of the models' outputs on a padded batch of real texts."""
        inputs = tokenizer(list(PROMPTS), padding=True, return_tensors="pt")
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            stock, fused = (pair[label](**inputs)[0][real].float() for label in (STOCK, FUSED))
        largest, error = stock.abs().max().item(), (fused - stock).abs().max().item()
        self.result.errors[f"{name} {dtype}"] = {"error": error, "largest": largest}

    def compare_texts(self, pair: dict[str, Any], tokenizer: Any) -> None:
        """Greedy continuations of both models, token by token."""
        self.say()
        for prompt in PROMPTS[: self.effort.prompts]:
            inputs = _chat(tokenizer, prompt)
            made = {
                label: model.generate(
                    **inputs, do_sample=False, max_new_tokens=self.effort.tokens
                )[0, inputs["input_ids"].shape[1] :].tolist()
                for label, model in pair.items()
            }
            equal = made[STOCK] == made[FUSED]
            count = len(made[STOCK])
            self.result.greedy.append({"prompt": prompt, "tokens": count, "equal": equal})
            verdict = "the same" if equal else f"DIFFERENT from token {_differs(*made.values())}"
            self.say(f"greedy text, {count} tokens, {verdict}: {prompt}")

    def table(self) -> None:
        columns = ["model", "dtype", "work", STOCK, FUSED, "unit", "gain"]
        rows = [
            [r.model, r.dtype, r.work, f"{r.stock:.1f}", f"{r.fused:.1f}", r.unit, f"{r.gain:.2f} x"]
            for r in self.result.rows
        ]
        self.say()
        show.table(
            f"{self.result.cpu}, {self.result.threads} threads, best of {self.effort.rounds} "
            "interleaved rounds",
            columns,
            rows,
            right=[STOCK, FUSED, "gain"],
            file=self.out,
        )
        texts = self.result.greedy
        if texts:
            same = sum(text["equal"] for text in texts)
            self.say(f"greedy text the same as stock: {same} of {len(texts)} prompts (fp32)")
        for label, found in self.result.errors.items():
            what = "logit" if label.startswith("smollm2") else "output"
            self.say(
                f"largest {what} error against stock, {label}: {found['error']:.2g} "
                f"(largest {what}: {found['largest']:.3g})"
            )
        for label, receipt in self.result.receipts.items():
            self.say(f"\n{label}: {receipt}")


def _chat(tokenizer: Any, prompt: str) -> Any:
    """The prompt as one user message, by the model's own chat template: ids and mask [1, M]."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


def _differs(one: list[int], other: list[int]) -> int:
    """The first place where the two differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))

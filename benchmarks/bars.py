"""Every promised figure, measured side by side in one run: figure, target, met or missed.

    make bars                               all of them (about 30 minutes on 2 cores)
    python -m benchmarks.bars speed text    some groups only: kernels, loss, modules, training, generation,
                                            speed, text, never_slower, install, tests, emulator, triton,
                                            cuda, cuda_build

Whatever is compared runs in turns in one process: absolute times of a shared machine mean little, these ratios repeat.

kernels: medians of rounds, with where the middle 60 % of them lie, and "in the noise" where the target lies there too.
Peaks are measured in the same rounds (benchmarks/peaks.py). Nothing is timed before it was compared with float64.

The other groups: stock time / accelerated time, best of the rounds; stock is Hugging Face on torch's sdpa attention.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here needs a network

import pyfuse
from benchmarks import (
    attention_bars,
    cuda_bars,
    emulator_bars,
    generation_bars,
    layer_bars,
    loss_bars,
    module_bars,
    training_bars,
    triton_bars,
)
from benchmarks.bar import Bar
from pyfuse.cli import machine, measure
from pyfuse.cli.comparison import PROMPTS
from pyfuse.models import zoo

ROOT = Path(__file__).resolve().parent.parent
STOCK, OURS = "stock", "pyfuse"
NEVER_SLOWER = 0.98


def ratio_bar(name: str, ms: dict[str, float], target: float) -> Bar:
    ratio = ms[STOCK] / ms[OURS]
    figure = f"{ratio:.2f} x  ({ms[STOCK]:.1f} -> {ms[OURS]:.1f} ms)"
    return Bar(name, figure, f">= {target} x", ratio >= target)


def pair(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """A real model and its accelerated copy."""
    from transformers import AutoModel, AutoModelForCausalLM

    load = AutoModelForCausalLM if name == "smollm2" else AutoModel
    stock = load.from_pretrained(zoo.path(name), dtype=dtype).eval()
    ours = copy.deepcopy(stock)
    receipt = pyfuse.accelerate(ours)  # raises AccuracyError past the accuracy rule
    print(receipt, flush=True)
    return {STOCK: stock, OURS: ours}


def kernels() -> Iterator[Bar]:
    """Single operations."""
    yield from attention_bars.arithmetic()
    yield from attention_bars.decoding()
    yield from attention_bars.dropout()
    yield from attention_bars.window()
    yield from layer_bars.norms()
    yield from layer_bars.rope()
    yield from layer_bars.padded_batch()


def speed() -> Iterator[Bar]:
    """The two real models."""
    for dtype, encode, prefill, decode in (
        (torch.float32, 2.3, 1.9, {16: 1.9, 1024: 2.2}),
        (torch.bfloat16, 1.5, 1.7, {1024: 2.0}),
    ):
        kind = "fp32" if dtype == torch.float32 else "bf16"
        models = pair("minilm", dtype)
        ms = measure.encode_ms(models, batch=32, tokens=256, rounds=9)
        yield ratio_bar(f"MiniLM 32 x 256, {kind}", ms, encode)
        models = pair("smollm2", dtype)
        ms = measure.prefill_ms(models, 2048, rounds=5)
        yield ratio_bar(f"SmolLM2 prefill 2048, {kind}", ms, prefill)
        for context, target in decode.items():
            ms = measure.decode_ms(models, context, steps=64, rounds=5)
            yield ratio_bar(f"SmolLM2 decode at {context}, {kind}", ms, target)


def _chat(tokenizer: Any, prompts: list[str]) -> Any:
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False
        )
        for p in prompts
    ]
    return tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)


def text() -> Iterator[Bar]:
    """Greedy text of 64 tokens, fp32: five prompts alone and four of them in one left-padded batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.path("smollm2"), padding_side="left")
    models = pair("smollm2", torch.float32)

    def generate(prompts: list[str]) -> dict[str, torch.Tensor]:
        inputs = _chat(tokenizer, prompts)
        return {
            label: model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
            for label, model in models.items()
        }

    texts = [generate([prompt]) for prompt in PROMPTS]
    equal = sum(torch.equal(t[STOCK], t[OURS]) for t in texts)
    yield Bar("same greedy text, 5 prompts x 64 tokens", f"{equal} of 5", "5 of 5", equal == 5)
    batch = generate(list(PROMPTS[:4]))
    equal = int((batch[STOCK] == batch[OURS]).all(1).sum())
    yield Bar("same greedy text, left-padded batch of 4", f"{equal} of 4", "4 of 4", equal == 4)


def _random_models() -> Iterator[tuple[str, Any, dict[str, torch.Tensor]]]:
    """Random weights at real widths, four layers: name, model, its inputs for batch 2 x 128."""
    import transformers as t

    ids = torch.randint(5, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    one = {"input_ids": ids}
    both = {"input_ids": ids, "decoder_input_ids": ids[:, :64]}
    small: dict[str, Any] = {"vocab_size": 8192}
    yield "GPT-2", t.GPT2LMHeadModel(t.GPT2Config(n_layer=4, **small)), one
    yield "BERT", t.BertModel(t.BertConfig(num_hidden_layers=4, **small)), one
    yield "DistilBERT", t.DistilBertModel(t.DistilBertConfig(n_layers=4, **small)), one
    t5 = t.T5Config(d_model=512, num_layers=4, d_ff=2048, num_heads=8, **small)
    t5.decoder_start_token_id = 0
    yield "T5", t.T5ForConditionalGeneration(t5), both
    width: dict[str, Any] = {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072}
    heads: dict[str, Any] = {"encoder_attention_heads": 12, "decoder_attention_heads": 12}
    bart = t.BartConfig(encoder_layers=4, decoder_layers=4, **width, **heads, **small)
    yield "BART", t.BartForConditionalGeneration(bart), both
    mistral = t.MistralConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        sliding_window=64,
        **small,
    )
    yield "Mistral", t.MistralForCausalLM(mistral), one


def _forward_ms(models: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    def run(model: Any) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return model(**inputs)

        return forward

    seconds = measure.interleave(
        {k: measure.stopwatch(run(m)) for k, m in models.items()}, rounds=15, budget=12.0
    )
    return {label: 1e3 * value for label, value in seconds.items()}


def never_slower() -> Iterator[Bar]:
    """Every model and shape that the tests cover: nothing may lose."""
    target = NEVER_SLOWER
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        models = pair("minilm", dtype)
        for batch, tokens in ((1, 8), (1, 128), (8, 64)):
            ms = measure.encode_ms(models, batch=batch, tokens=tokens, rounds=25, budget=8.0)
            yield ratio_bar(f"MiniLM {batch} x {tokens}, {kind}", ms, target)
        models = pair("smollm2", dtype)
        for tokens in (8, 128, 512):
            ms = measure.prefill_ms(models, tokens, rounds=15, budget=12.0)
            yield ratio_bar(f"SmolLM2 prefill {tokens}, {kind}", ms, target)
        ms = measure.decode_ms(models, 128, steps=64, rounds=4)
        yield ratio_bar(f"SmolLM2 decode at 128, {kind}", ms, target)
        for name, model, inputs in _random_models():
            stock = model.to(dtype).eval()
            ours = copy.deepcopy(stock)
            pyfuse.accelerate(ours)
            ms = _forward_ms({STOCK: stock, OURS: ours}, inputs)
            yield ratio_bar(f"{name} 2 x 128, {kind}", ms, target)


def _seconds(command: list[str], **options: Any) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - start


def install() -> Iterator[Bar]:
    """A clean copy of the last commit, built in an environment of its own; and what importing costs."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pyfuse"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
        pip = [sys.executable, "-m", "pip", "--quiet"]
        # --no-deps: torch is there already. The build's own requirements come from pip's cache after the first time.
        # Without the CUDA kernels, as on a machine that has no nvcc; the group cuda_build has these.
        environment = os.environ | {"PYFUSE_CUDA": "off"}
        wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", folder, str(source)]
        seconds = _seconds(wheel, env=environment)
    yield Bar(
        "pip install . (build of the wheel, without CUDA)",
        f"{seconds:.0f} s",
        "<= 90 s",
        seconds <= 90,
    )
    code = (
        "import torch, time; t = time.perf_counter(); import pyfuse; print(time.perf_counter() - t)"
    )
    times = [
        float(
            subprocess.run(
                [sys.executable, "-c", code], check=True, capture_output=True, text=True
            ).stdout
        )
        for _ in range(5)
    ]
    yield Bar(
        "import pyfuse after torch", f"{1e3 * min(times):.0f} ms", "<= 100 ms", min(times) <= 0.1
    )


def tests() -> Iterator[Bar]:
    """The whole suite."""
    seconds = _seconds(["make", "test"], cwd=ROOT)
    yield Bar("make test", f"{seconds / 60:.1f} min", "<= 10 min", seconds <= 600)


GROUPS: dict[str, Callable[[], Iterator[Bar]]] = {
    "kernels": kernels,
    "loss": loss_bars.loss,
    "modules": module_bars.modules,
    "training": training_bars.training,
    "generation": generation_bars.generation,
    "speed": speed,
    "text": text,
    "never_slower": never_slower,
    "install": install,
    "tests": tests,
    "emulator": emulator_bars.emulator,
    "triton": triton_bars.triton,
    "cuda": cuda_bars.cuda,
    "cuda_build": cuda_bars.cuda_build,
}


def show(bars: list[Bar]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{machine.cpu_model()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    table = Table("bar", "figure", "target", "", title=title)
    for bar in bars:
        table.add_row(
            bar.name,
            bar.figure,
            bar.target,
            bar.verdict if bar.met else f"[bold]{bar.verdict}[/bold]",
        )
    Console(width=100).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bars", description=__doc__)
    parser.add_argument(
        "groups", nargs="*", choices=[[], *GROUPS], help="which groups (default: all)"
    )
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    others = os.getloadavg()[0]
    if others > 0.25:
        print(f"load {others:.1f} before the first measurement: expect noise", file=sys.stderr)
    bars: list[Bar] = []
    for group in arguments.groups or GROUPS:
        for bar in GROUPS[group]():
            bars.append(bar)
            print(f"{bar.verdict:6} {bar.name}: {bar.figure}, target {bar.target}", flush=True)
    show(bars)
    return 0 if all(bar.met for bar in bars) else 1


if __name__ == "__main__":
    sys.exit(main())

"""`pyfuse demo`: a chat model and a sentence encoder, stock against accelerated."""

import argparse
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from typing import TextIO

import torch

from pyfuse.cli import machine, models, show
from pyfuse.cli.comparison import DTYPES, FUSED, STOCK, Comparison, NotAccelerated, Result
from pyfuse.models import zoo

DEFAULT_PROMPT = "Why is the sky blue? Answer in two sentences."


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
        return _fail("it needs transformers: pip install 'pyfuse[demo]'")
    try:
        for name in ("smollm2", "minilm"):
            if (reason := zoo.problem(name)) is not None:
                print(f"{name} is {reason}: fetching it once", file=sys.stderr)
            models.fetch(name)
    except zoo.FetchError as error:
        return _fail(str(error))
    _keep_offline()
    torch.set_num_threads(arguments.threads or machine.default_threads())
    out = sys.stderr if arguments.json else sys.stdout
    try:
        result = Comparison(arguments.prompt, arguments.dtype, arguments.quick, out).run()
    except NotAccelerated as error:
        return _fail(f"{error}\n`pyfuse doctor` says what this machine can run, and why")
    _print(result, out)
    if arguments.json:
        rows = [{**asdict(row), "gain": row.gain} for row in result.rows]
        print(json.dumps({**asdict(result), "rows": rows}, indent=1))
    return 0 if all(text["equal"] for text in result.greedy) else 1


def _keep_offline() -> None:
    """Keep transformers off the network and quiet. It reads the variable when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]


def _print(result: Result, out: TextIO) -> None:
    """The table, the texts, the errors and the receipts."""
    print(file=out)
    show.table(
        f"{result.cpu}, {result.threads} threads, interleaved, best of the rounds",
        ["model", "dtype", "work", STOCK, FUSED, "unit", "gain"],
        [
            [
                r.model,
                r.dtype,
                r.work,
                f"{r.stock:.1f}",
                f"{r.fused:.1f}",
                r.unit,
                f"{r.gain:.2f} x",
            ]
            for r in result.rows
        ],
        right=[STOCK, FUSED, "gain"],
        file=out,
    )
    if result.greedy:
        same = sum(text["equal"] for text in result.greedy)
        print(f"greedy text the same as stock: {same} of {len(result.greedy)} (fp32)", file=out)
    for label, found in result.errors.items():
        what = "logit" if label.startswith("smollm2") else "output"
        print(
            f"largest {what} error against stock, {label}: {found['error']:.2g} "
            f"(largest {what}: {found['largest']:.3g})",
            file=out,
        )
    for label, receipt in result.receipts.items():
        print(f"\n{label}: {receipt['text']}", file=out)


def _fail(message: str) -> int:
    print(f"pyfuse demo: {message}", file=sys.stderr)
    return 1

"""`pyfuse train`: train a model from scratch, or further."""

import argparse
import importlib
import importlib.util
import sys
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pyfuse.cli import machine, show

_NEEDED = ("tokenizers", "safetensors", "matplotlib", "filelock")


class Row(NamedTuple):
    """module: has run(), see `pyfuse.training.program`. options: the module of its `Options`, which alone is imported
    for the help. short, long: for the help. needed: packages beside `_NEEDED`."""

    module: str
    options: str
    short: str
    long: str
    needed: tuple[str, ...] = ()


PROGRAMS = {
    "lm": Row(
        "pyfuse.training.lm",
        "pyfuse.training.lm_options",
        "a language model: the next token of a text",
        "Train a causal language model, GPT-2 or Llama, from scratch or further.",
    ),
    "mlm": Row(
        "pyfuse.training.mlm",
        "pyfuse.training.mlm_options",
        "a masked language model: the hidden tokens of a text",
        "Train a BERT as masked language model, from scratch or further.",
    ),
    "classifier": Row(
        "pyfuse.training.classifier",
        "pyfuse.training.classifier_options",
        "a classifier of texts: their labels",
        "Fine-tune a pre-trained encoder (BERT, MiniLM) on labelled texts. FOLDER gets accuracy, precision, recall "
        "and F1 of what is held out as well (metrics.json, confusion.csv).",
        ("pandas",),
    ),
    "seq2seq": Row(
        "pyfuse.training.seq2seq",
        "pyfuse.training.seq2seq_options",
        "an encoder-decoder: dates as people write them into ISO 8601",
        "Train the encoder-decoder of the first paper on a translation that is made on the spot: dates in many forms "
        "into ISO 8601, of years that it has never seen.",
    ),
}
_OF_ALL = (
    "FOLDER gets checkpoints that Hugging Face's libraries read, log.csv (a row for each step and evaluation) and "
    "curves.png. A run that was ended, by whatever, goes on with --resume as if nothing had happened. Under torchrun "
    "the processes share each batch."
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` and what can be trained."""
    parser = commands.add_parser(
        "train",
        help="train a Transformer",
        description="Train the reference Transformer on pyfuse's operations.",
    )
    kinds = parser.add_subparsers(title="what to train", metavar="KIND", required=True)
    for name, row in PROGRAMS.items():
        one = kinds.add_parser(name, help=row.short, description=f"{row.long} {_OF_ALL}")
        one.add_argument(
            "--out", type=Path, required=True, metavar="FOLDER", help="what the run leaves"
        )
        one.add_argument(
            "--resume",
            action="store_true",
            help="go on with the run in FOLDER; its options need not be given again",
        )
        options = fields(importlib.import_module(row.options).Options)
        for field in options:
            _add_option(one, field)
        one.set_defaults(run=partial(run, row, {f.name for f in options}))


def _add_option(parser: argparse.ArgumentParser, field: "Field[Any]") -> None:
    """An option of a field; left out, it is not in the result, so that it can be told from one that is given."""
    from pyfuse.training.options import flag

    about = field.metadata
    text, default = about["text"].replace("%", "%%"), field.default
    if default is not None and default is not False:
        text += (
            f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"
        )
    more: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
    if default is False:
        parser.add_argument(flag(field.name), action="store_true", **more)
        return
    kind = str(field.type)
    types = {"int": int, "float": float, "Path": Path, "list[Path]": Path}
    more["type"] = types.get(kind.removesuffix(" | None"), str)
    if kind.startswith("list"):
        more["nargs"] = "+"
    if about["choices"]:
        more["choices"] = about["choices"]
    else:
        more["metavar"] = about["metavar"]
    parser.add_argument(flag(field.name), **more)


def run(row: Row, known: set[str], arguments: argparse.Namespace) -> int:
    """Train; 2 for options or text that do not do, 1 for what went wrong later."""
    needed = (*_NEEDED, *row.needed)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"it needs {' and '.join(missing)}: pip install 'pyfuse[train]'", 1)
    import torch

    from pyfuse.models import zoo
    from pyfuse.training.errors import TrainingError
    from pyfuse.training.program import Result

    given = {name: value for name, value in vars(arguments).items() if name in known}
    if "threads" not in given and not arguments.resume:
        torch.set_num_threads(machine.default_threads())
    try:
        if "from_" in given:
            given["from_"] = zoo.folder(given["from_"])
        result: Result | None = importlib.import_module(row.module).run(
            arguments.out, given, resume=arguments.resume
        )
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", 1)
    if result is not None:
        said = ", ".join(_said(n, v, result.uniform) for n, v in result.figures.items())
        print(
            f"held-out {said}\n"
            f"{result.steps} steps in {result.seconds:.0f} s, {result.speed:,.0f} tok/s\n"
            f"the model: {result.checkpoint}"
        )
        for table in result.tables():
            show.table(table.title, table.columns, table.rows, right=table.right)
    return 0


def _said(name: str, value: float, uniform: int) -> str:
    if name == "perplexity":
        return f"perplexity {value:.2f} (of knowing nothing: {uniform})"
    return f"{name.replace('_', ' ')} {value:.4f}"


def _fail(message: str, status: int) -> int:
    print(f"pyfuse train: {message}", file=sys.stderr)
    return status

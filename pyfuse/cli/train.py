"""`pyfuse train lm`: train a model from scratch, or further."""

import argparse
import importlib.util
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from pyfuse.cli import machine

_NEEDED = ("tokenizers", "safetensors", "matplotlib", "filelock")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train` and what can be trained."""
    from pyfuse.training.lm_options import Options

    parser = commands.add_parser(
        "train",
        help="train a Transformer: a language model",
        description="Train the reference Transformer on pyfuse's operations.",
    )
    kinds = parser.add_subparsers(title="what to train", metavar="KIND", required=True)
    lm = kinds.add_parser(
        "lm",
        help="a language model: the next token of a text",
        description="Train a causal language model, GPT-2 or Llama, from scratch or further. FOLDER gets "
        "checkpoints that Hugging Face's libraries read, log.csv (a row for each step and evaluation) and curves.png. "
        "A run that was ended, by whatever, goes on with --resume as if nothing had happened. Under torchrun the "
        "processes share each batch.",
    )
    lm.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="what the run leaves")
    lm.add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in FOLDER; its options need not be given again",
    )
    for field in fields(Options):
        _add_option(lm, field)
    lm.set_defaults(run=run_lm)


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


def run_lm(arguments: argparse.Namespace) -> int:
    """Train; 2 for options or text that do not do, 1 for what went wrong later."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"it needs {' and '.join(missing)}: pip install 'pyfuse[train]'", 1)
    import torch

    from pyfuse.training import lm
    from pyfuse.training.errors import TrainingError
    from pyfuse.training.lm_options import Options

    known = {f.name for f in fields(Options)}
    given = {name: value for name, value in vars(arguments).items() if name in known}
    if "threads" not in given and not arguments.resume:
        torch.set_num_threads(machine.default_threads())
    try:
        result = lm.run(arguments.out, given, resume=arguments.resume)
    except (ValueError, FileNotFoundError) as error:
        return _fail(str(error), 2)
    except TrainingError as error:
        return _fail(str(error), 1)
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}", 1)
    if result is not None:
        print(
            f"held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
            f"(of knowing nothing: {result.uniform})\n"
            f"{result.steps} steps in {result.seconds:.0f} s, {result.speed:,.0f} tok/s\n"
            f"the model: {result.checkpoint}"
        )
    return 0


def _fail(message: str, status: int) -> int:
    print(f"pyfuse train: {message}", file=sys.stderr)
    return status

"""The fields of `pyfuse.generation.Options` on the command line."""

import argparse
import re
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

from pyfuse.generation import values
from pyfuse.generation.options import Options

FIELDS = {f.name: f for f in fields(Options)}
# By the groups of the help: what is one value, and no token's id.
GROUPS = {
    "length": ("max_new_tokens", "min_new_tokens", "stop"),
    "sampling": ("temperature", "top_k", "top_p", "min_p", "typical_p", "seed"),
    "beam search": ("beams", "beam_groups", "diversity_penalty", "length_penalty", "early_stopping"),
    "repetition": (
        "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram",
    ),
    "results": ("n", "logprobs"),
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    "stop": {"nargs": "+", "metavar": "TEXT"},
    "seed": {"nargs": "+", "metavar": "N"},
    "early_stopping": {"nargs": "?", "const": True, "choices": ("never",)},
}


def flag(name: str) -> str:
    """The option on the command line: --top-p of top_p."""
    return "--" + name.replace("_", "-")


def add(parser: argparse.ArgumentParser) -> None:
    """An option of each; left out, it is not in the result, and Options has its default."""
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            field = FIELDS[name]
            text, default = field.metadata["text"].replace("%", "%%"), field.default
            if type(default) in (int, float):
                text += f" (default: {default:g})"
            group.add_argument(
                flag(name), default=argparse.SUPPRESS, help=text, **{**_number(field), **_SHAPES.get(name, {})}
            )  # fmt: skip


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """For Options: those that the command line has."""
    found = {name: value for name, value in vars(arguments).items() if name in FIELDS}
    if len(found.get("seed", ())) == 1:
        found["seed"] = found["seed"][0]
    return found


def in_flags(error: Exception, *more: str) -> str:
    """The message, with the names of options, of `more` too, as they are on the command line."""
    names = "|".join(sorted([*FIELDS, *more], key=len, reverse=True))
    text = re.sub(rf"\b({names})(?=: | is \d)", lambda found: flag(found[1]), str(error))
    return re.sub(r"\bprompts\[(\d+)\]", lambda found: f"prompt {int(found[1]) + 1}", text)


def _number(field: "Field[Any]") -> dict[str, Any]:
    """How argparse reads a number; nothing of a field of another type."""
    for kind, letter in ((int, "N"), (float, "X")):
        if str(field.type).startswith(kind.__name__):
            return {"type": _reader(field, kind), "metavar": letter}
    return {}


def _reader(field: "Field[Any]", kind: type[int] | type[float]) -> Callable[[str], float]:
    """Reads a number within the field's limits."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError as error:
            needs = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, needs {needs}") from error
        try:
            values.check_number(field.name, value, kind.__name__, field.metadata)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from error
        return value

    return read

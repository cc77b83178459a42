"""A text as the material of a program: its sequences, those held out, and the tokenizer of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyfuse.training import text, tokens
from pyfuse.training.errors import TrainingError
from pyfuse.training.lm_options import TextOptions
from pyfuse.training.program import Material
from pyfuse.training.windows import Windows, evenly
from pyfuse.training.world import World

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
IDENTIFIED = ("text", "tokenizer")


@dataclass(frozen=True)
class Corpus(Material):
    """held: windows of the part that is not learnt from."""

    data: Windows
    held: list[Tensor]
    tokenizer: tokens.Tokenizer


def corpus(
    options: TextOptions, stored: Mapping[str, Any] | None, world: World,
    make: Callable[[list[str]], tokens.Tokenizer], length: int,
) -> Corpus:  # fmt: skip
    """make: the tokenizer of these documents, called in the first process of a new run only, since a BPE of a large
    text takes a while. length: tokens of a window beyond its first one.

    ValueError, FileNotFoundError: no such text, or too little. TrainingError: not the text that the run began with.
    """
    found = text.read_text(options.text)
    if stored is not None and found.sha256 != stored["text"]:
        raise TrainingError(
            "--text: is not the text that the run began with; give the same one, or begin anew with another --out"
        )
    learnt, held = text.split(found.documents, options.held_out)
    if stored is not None:
        tokenizer = tokens.from_json(stored["tokenizer"])
    else:
        made = make(learnt).json if world.first else None
        tokenizer = tokens.from_json(world.from_first(made))
    windows, rest = (
        Windows(
            tokenizer.stream(part),
            length,
            seed=options.seed,
            count=options.batch * options.accumulate,
            what=what,
        )
        for part, what in ((learnt, "to learn from"), (held, "held out (--held-out)"))
    )
    return Corpus(
        data=windows,
        identity={"text": found.sha256, "tokenizer": tokenizer.json},
        files={TOKENIZER: tokenizer.json.encode()},
        held=evenly(rest, options.eval_windows),
        tokenizer=tokenizer,
    )

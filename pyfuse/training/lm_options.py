"""The options of `pyfuse train lm`, and those of all programs that learn from plain text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pyfuse.training.model_options import ModelOptions
from pyfuse.training.options import option
from pyfuse.training.tokens import BYTES


@dataclass(frozen=True)
class TextOptions(ModelOptions):
    """Those of a model of plain text, a part of which is held out."""

    text: list[Path] | None = option(
        None,
        "files and folders of text in UTF-8 (default: the sources of Python's standard library)",
        metavar="PATH",
        free=True,  # where it lies may change, what it says may not: see corpus.py
    )
    held_out: float = option(
        0.05, "share of the text, at its end, that is kept for the evaluation", metavar="X", least=0.0, below=1.0
    )  # fmt: skip
    eval_windows: int = option(
        64, "held-out sequences of an evaluation, evenly spread", metavar="N", least=1, free=True
    )


@dataclass(frozen=True)
class Options(TextOptions):
    """Those of a causal language model."""

    of_a_new_model: ClassVar[tuple[str, ...]] = (
        "kind", *ModelOptions.of_a_new_model, "tokenizer", "vocabulary",
    )  # fmt: skip

    tokenizer: str = option(
        "bpe", "a byte-level BPE of this text, or single bytes", choices=("bpe", "bytes")
    )
    vocabulary: int = option(4096, "tokens of the BPE", metavar="N", least=BYTES)
    kind: str = option("gpt2", "whose architecture", choices=("gpt2", "llama"))

    def check_together(self, given: Iterable[str]) -> None:
        super().check_together(given)
        if self.tokenizer == "bytes" and "vocabulary" in given:
            raise ValueError(f"--vocabulary: with --tokenizer bytes there are {BYTES} tokens")

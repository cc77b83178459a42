"""The options of `pyfuse train lm`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyfuse.training.options import RunOptions, flag, option
from pyfuse.training.tokens import BYTES

_OF_A_NEW_MODEL = ("kind", "layers", "width", "heads", "tokenizer", "vocabulary")


@dataclass(frozen=True)
class Options(RunOptions):
    """Those of a language model beside those of every run."""

    text: list[Path] | None = option(
        None,
        "files and folders of text in UTF-8 (default: the sources of Python's standard library)",
        metavar="PATH",
        free=True,  # where it lies may change, what it says may not: see _material
    )
    held_out: float = option(
        0.05, "share of the text, at its end, that is kept for the evaluation", metavar="X", least=0.0, below=1.0
    )  # fmt: skip
    tokenizer: str = option(
        "bpe", "a byte-level BPE of this text, or single bytes", choices=("bpe", "bytes")
    )
    vocabulary: int = option(4096, "tokens of the BPE", metavar="N", least=BYTES)
    kind: str = option("gpt2", "whose architecture", choices=("gpt2", "llama"))
    layers: int = option(4, "blocks", metavar="N", least=1)
    width: int = option(256, "of the vector of a token", metavar="N", least=1)
    heads: int = option(4, "of attention", metavar="N", least=1)
    context: int = option(256, "tokens of a sequence", metavar="N", least=1)
    from_: Path | None = option(
        None,
        "begin with this pre-trained model and its tokenizer: config.json, model.safetensors, tokenizer.json",
        metavar="FOLDER",
    )
    dropout: float | None = option(
        None, "of the embedding and of what is added to it (default: 0, or the model's own)", metavar="P",
        least=0.0, below=1.0,
    )  # fmt: skip
    attention_dropout: float | None = option(
        None, "of the weights of attention (default: as --dropout)", metavar="P", least=0.0, below=1.0
    )  # fmt: skip
    hidden_dropout: float | None = option(
        None, "after the activation (default: as --dropout)", metavar="P", least=0.0, below=1.0
    )  # fmt: skip
    eval_windows: int = option(
        64, "held-out sequences of an evaluation, evenly spread", metavar="N", least=1, free=True
    )

    def check_together(self, given: Iterable[str]) -> None:
        """ValueError: an option that another one makes useless. given: the names of those that somebody chose."""
        useless = [name for name in _OF_A_NEW_MODEL if name in given]
        if self.from_ is not None and useless:
            raise ValueError(f"{flag(useless[0])}: --from has a model and a tokenizer of its own")
        if self.tokenizer == "bytes" and "vocabulary" in given:
            raise ValueError(f"--vocabulary: with --tokenizer bytes there are {BYTES} tokens")

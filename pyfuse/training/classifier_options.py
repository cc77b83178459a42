"""The options of `pyfuse train classifier`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pyfuse.training.model_options import PretrainedOptions
from pyfuse.training.options import option


@dataclass(frozen=True)
class Options(PretrainedOptions):
    """Those of a classifier of texts. Steps and rates are those of fine-tuning: few and small."""

    data: list[Path] | None = option(
        None,
        "CSV files in UTF-8 with a column of texts and one of labels; there has to be one",
        metavar="PATH",
        free=True,  # where it lies may change, what it says may not: see classifier.py
    )
    text_column: str = option("text", "its name in the header", metavar="NAME")
    label_column: str = option("label", "its name in the header", metavar="NAME")
    test: list[Path] | None = option(
        None,
        "CSV files to examine the classifier by (default: a part of --data)",
        metavar="PATH",
        free=True,
    )
    held_out: float = option(
        0.2, "share of the texts of each label that is kept for the evaluation, without --test", metavar="X",
        least=0.001, below=1.0,
    )  # fmt: skip
    steps: int = option(400, "updates of the parameters in all", metavar="N", least=1, free=True)
    batch: int = option(32, "texts at a time, of all processes together", metavar="N", least=1)
    lr: float = option(1e-4, "largest learning rate", metavar="X", least=0.0)
    weight_decay: float = option(0.01, "AdamW's, of matrices only", metavar="X", least=0.0)
    context: int = option(128, "tokens of a text; what is longer is cut", metavar="N", least=1)
    eval_every: int = option(
        100, "steps between two evaluations; 0 for first and last", metavar="N", least=0, free=True
    )

    def check_together(self, given: Iterable[str]) -> None:
        if not self.data:
            raise ValueError(
                "--data: needed, a CSV file of texts and labels; "
                "`python -m pyfuse.training.reviews reviews.csv` makes one to try"
            )
        if self.from_ is None:
            raise ValueError(
                "--from: needed, an encoder to begin with: the folder of a BERT, or minilm "
                "(once `pyfuse models fetch minilm` has fetched it)"
            )
        if self.test and "held_out" in given:
            raise ValueError("--held-out: nothing of --data is held out with --test")

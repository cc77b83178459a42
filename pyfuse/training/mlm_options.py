"""The options of `pyfuse train mlm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyfuse.training.lm_options import TextOptions
from pyfuse.training.model_options import ModelOptions
from pyfuse.training.options import option
from pyfuse.training.tokens import MARKS


@dataclass(frozen=True)
class Options(TextOptions):
    """Those of a masked language model."""

    of_a_new_model: ClassVar[tuple[str, ...]] = (*ModelOptions.of_a_new_model, "vocabulary")

    steps: int = option(1000, "updates of the parameters in all", metavar="N", least=1, free=True)
    batch: int = option(32, "sequences at a time, of all processes together", metavar="N", least=1)
    warmup: int = option(
        100,
        "steps in which the learning rate rises; then a cosine to a tenth",
        metavar="N",
        least=0,
    )
    # [CLS], [SEP], and two tokens of which one may be masked.
    context: int = option(
        128, "tokens of a sequence, [CLS] and [SEP] included", metavar="N", least=4
    )
    vocabulary: int = option(
        4096, "tokens of the byte-level BPE of this text", metavar="N", least=256 + len(MARKS)
    )
    masked: float = option(
        0.15, "share of the tokens of a sequence that are to be found out", metavar="X", least=0.0, below=1.0
    )  # fmt: skip

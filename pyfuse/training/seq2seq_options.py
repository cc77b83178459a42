"""The options of `pyfuse train seq2seq`."""

from __future__ import annotations

from dataclasses import dataclass

from pyfuse.training.dates import LONGEST
from pyfuse.training.model_options import ModelOptions
from pyfuse.training.options import option


@dataclass(frozen=True)
class Options(ModelOptions):
    """Those of an encoder-decoder."""

    steps: int = option(1200, "updates of the parameters in all", metavar="N", least=1, free=True)
    batch: int = option(64, "examples at a time, of all processes together", metavar="N", least=1)
    lr: float = option(2e-3, "largest learning rate", metavar="X", least=0.0)
    warmup: int = option(
        100, "steps in which the learning rate rises; then a cosine to a tenth", metavar="N", least=0
    )  # fmt: skip
    save_every: int = option(
        200, "steps between two checkpoints; 0 for one at the end", metavar="N", least=0, free=True
    )
    eval_every: int = option(
        200, "steps between two evaluations; 0 for first and last", metavar="N", least=0, free=True
    )
    layers: int = option(2, "blocks of the encoder, and of the decoder", metavar="N", least=1)
    width: int = option(128, "of the vector of a token", metavar="N", least=1)
    context: int = option(
        LONGEST + 1, "tokens that a question or an answer may have", metavar="N", least=LONGEST + 1
    )
    label_smoothing: float = option(
        0.0, "share of a target that all tokens have evenly (the paper has 0.1)", metavar="X", least=0.0, below=1.0
    )  # fmt: skip
    eval_examples: int = option(
        256, "held-out examples of an evaluation", metavar="N", least=1, free=True
    )

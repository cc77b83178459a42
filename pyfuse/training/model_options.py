"""The model of a run: options of its sizes, or the pre-trained one that the run begins with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from pyfuse.training.options import RunOptions, flag, option

if TYPE_CHECKING:
    from pyfuse.models.transformer import Transformer

_DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout")


@dataclass(frozen=True)
class PretrainedOptions(RunOptions):
    """Those of a Transformer that goes on from another, beside those of every run."""

    context: int = option(256, "tokens of a sequence", metavar="N", least=1)
    from_: Path | None = option(
        None,
        "begin with this pre-trained model and its tokenizer: a folder with config.json, model.safetensors and "
        "tokenizer.json, or a name of `pyfuse models list`",
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


@dataclass(frozen=True)
class ModelOptions(PretrainedOptions):
    """Those of a Transformer that may be a new one."""

    # With --from they say nothing.
    of_a_new_model: ClassVar[tuple[str, ...]] = ("layers", "width", "heads")

    layers: int = option(4, "blocks", metavar="N", least=1)
    width: int = option(256, "of the vector of a token", metavar="N", least=1)
    heads: int = option(4, "of attention", metavar="N", least=1)

    def check_together(self, given: Iterable[str]) -> None:
        useless = [name for name in self.of_a_new_model if name in given]
        if self.from_ is not None and useless:
            raise ValueError(f"{flag(useless[0])}: --from has a model and a tokenizer of its own")


def sizes(options: ModelOptions, vocabulary: int) -> dict[str, Any]:
    """Fields of the `Config` of a new model."""
    dropout = options.dropout or 0.0
    return {
        "vocabulary": vocabulary,
        "width": options.width,
        "layers": options.layers,
        "heads": options.heads,
        "max_positions": options.context,
        **dict.fromkeys(_DROPOUTS, dropout),
        **_dropouts(options),
    }


def pretrained(
    options: PretrainedOptions, ops: Any, vocabulary: int, **changes: Any
) -> Transformer:
    """The model of --from, with float32 parameters; vocabulary: of the tokenizer; changes: see `from_pretrained`.

    ValueError: it has too few positions for --context, or fewer tokens than the tokenizer.
    """
    from pyfuse.models.checkpoint import from_pretrained  # not for the help of the command line

    assert options.from_ is not None
    rates = _dropouts(options)
    if options.dropout is not None:
        rates = dict.fromkeys(("attention_dropout", "hidden_dropout"), options.dropout) | rates
    model = from_pretrained(options.from_, dtype=torch.float32, ops=ops, **rates, **changes)
    if options.context > model.config.max_positions:
        raise ValueError(
            f"--context: {options.context}, but the model of --from has {model.config.max_positions} positions"
        )
    if vocabulary > model.config.vocabulary:
        raise ValueError(
            f"--from: the tokenizer has {vocabulary} tokens, the model {model.config.vocabulary}"
        )
    return model


def _dropouts(options: PretrainedOptions) -> dict[str, float]:
    return {n: getattr(options, n) for n in _DROPOUTS if getattr(options, n) is not None}

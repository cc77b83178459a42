"""BERT's masked language modelling (Devlin et al., arXiv:1810.04805): the program of `pyfuse train mlm`.

Its other task, whether one sentence follows another, is left out: Liu et al., arXiv:1907.11692, found it of no use.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyfuse.models.export import hf_config
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training import program, tokens
from pyfuse.training.corpus import IDENTIFIED, TOKENIZER_CONFIG, corpus
from pyfuse.training.loop import IGNORED, Batch, Figures
from pyfuse.training.masking import Masked, Masking, inner, marks
from pyfuse.training.mlm_options import Options
from pyfuse.training.model_options import pretrained, sizes
from pyfuse.training.program import Material, Program, Result, Stored, perplexity
from pyfuse.training.world import World

__all__ = ["MaskedLanguageModel", "Options", "Result", "loss", "new_config", "run"]


@dataclass(frozen=True)
class MaskedCorpus(Material):
    """examined: held-out sequences, the same tokens of them hidden in every evaluation, of every seed."""

    tokenizer: tokens.Tokenizer
    examined: Batch


class MaskedLanguageModel(Program[Options, MaskedCorpus]):
    """The hidden tokens of a text, by a BERT."""

    name = "mlm"
    options = Options
    identified = IDENTIFIED
    figures = ("loss", "perplexity", "accuracy")
    drawn = ("accuracy",)

    def material(self, options: Options, stored: Stored | None, world: World) -> MaskedCorpus:
        made = corpus(options, stored, world, partial(_tokenizer, options), options.context - 2)
        masking = Masking(marks(made.tokenizer), made.tokenizer.size, options.masked)
        described = _tokenizer_config(made.tokenizer, options)
        return MaskedCorpus(
            data=Masked(made.data, masking, options.seed),
            identity=made.identity,
            files={**made.files, TOKENIZER_CONFIG: described},
            tokenizer=made.tokenizer,
            examined=masking.batch([inner(w) for w in made.held], 0),
        )

    def model(self, options: Options, material: MaskedCorpus, ops: Any) -> Transformer:
        size = material.tokenizer.size
        if options.from_ is not None:
            return pretrained(options, ops, size, head="mlm")
        return Transformer(new_config(options, size), ops)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return loss(model, batch)

    def evaluation(
        self, model: Transformer, material: MaskedCorpus, options: Options, world: World
    ) -> Callable[[], Figures]:
        own = {n: t[world.rank :: world.size] for n, t in material.examined.items()}

        def evaluate() -> Figures:
            sums = torch.zeros(3, dtype=torch.float64)
            for i in range(0, len(own["ids"]), options.batch):
                part = {n: t[i : i + options.batch].to(world.device) for n, t in own.items()}
                sums += _sums(model, part).cpu()
            total, right, count = world.sums(*sums.tolist())
            mean = total / count
            return {"loss": mean, "perplexity": perplexity(mean), "accuracy": right / count}

        return evaluate

    def config(self, model: Transformer, material: MaskedCorpus) -> dict[str, Any]:
        return hf_config(model.config, pad=material.tokenizer.library.token_to_id(tokens.MARKS[0]))


run = partial(program.run, MaskedLanguageModel())


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the hidden tokens, on average; logits of no others are computed."""
    y: Tensor = model(batch["ids"], targets=batch["targets"])
    return y


def new_config(options: Options, vocabulary: int) -> Config:
    """A BERT of these sizes."""
    return Config(
        **sizes(options, vocabulary), hidden=4 * options.width, causal=False, norm_first=False, norm_eps=1e-12,
        activation="gelu", embedding_norm=True, segments=2, head="mlm",
    )  # fmt: skip


def _sums(model: Transformer, batch: Batch) -> Tensor:
    """[-log p of the hidden tokens, how many of them are the likeliest, how many there are], in float64."""
    hidden = batch["targets"] != IGNORED
    x, weight, bias = model.last_layer(model.hidden(batch["ids"])[hidden])
    logits, targets = model.ops.linear(x, weight, bias).float(), batch["targets"][hidden]
    lost = nn.functional.cross_entropy(logits, targets, reduction="sum")
    right = (logits.argmax(1) == targets).sum()
    return torch.stack((lost, right, hidden.sum())).double()


def _tokenizer(options: Options, documents: list[str]) -> tokens.Tokenizer:
    if options.from_ is not None:
        return tokens.from_folder(options.from_)
    return tokens.with_marks(tokens.train_bpe(documents, options.vocabulary, tokens.MARKS))


def _tokenizer_config(tokenizer: tokens.Tokenizer, options: Options) -> bytes:
    """What Hugging Face's libraries want to know beside tokenizer.json: which tokens mean what."""
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    known = {
        name: token
        for name, token in zip(names, tokens.MARKS, strict=True)
        if tokenizer.library.token_to_id(token) is not None
    }
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": options.context,
        **known,
    }
    return json.dumps(described, indent=1).encode() + b"\n"

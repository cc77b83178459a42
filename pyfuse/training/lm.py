"""Causal language modelling by maximum likelihood: the program of `pyfuse train lm`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from pyfuse.models.export import hf_config
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training import program, tokens
from pyfuse.training.corpus import IDENTIFIED, Corpus, corpus
from pyfuse.training.lm_options import Options
from pyfuse.training.loop import Batch, Figures
from pyfuse.training.model_options import pretrained, sizes
from pyfuse.training.program import Program, Result, Stored, perplexity
from pyfuse.training.windows import batch
from pyfuse.training.world import World

__all__ = ["LanguageModel", "Options", "Result", "loss", "new_config", "run"]


class LanguageModel(Program[Options, Corpus]):
    """The next token of a text, by a GPT-2 or a Llama."""

    name = "lm"
    options = Options
    identified = IDENTIFIED
    figures = ("loss", "perplexity")

    def material(self, options: Options, stored: Stored | None, world: World) -> Corpus:
        return corpus(options, stored, world, partial(_tokenizer, options), options.context)

    def model(self, options: Options, material: Corpus, ops: Any) -> Transformer:
        size = material.tokenizer.size
        if options.from_ is not None:
            return pretrained(options, ops, size)
        return Transformer(new_config(options, size), ops)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return loss(model, batch)

    def evaluation(
        self, model: Transformer, material: Corpus, options: Options, world: World
    ) -> Callable[[], Figures]:
        own = material.held[world.rank :: world.size]

        def evaluate() -> Figures:
            total = 0.0
            for i in range(0, len(own), options.batch):
                rows = batch(own[i : i + options.batch])
                part = {n: t.to(world.device) for n, t in rows.items()}
                total += loss(model, part).item() * len(part["ids"])
            mean = world.sums(total)[0] / len(material.held)
            return {"loss": mean, "perplexity": perplexity(mean)}

        return evaluate

    def config(self, model: Transformer, material: Corpus) -> dict[str, Any]:
        return hf_config(model.config, material.tokenizer.end)


run = partial(program.run, LanguageModel())


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the next token, on average."""
    y: Tensor = model(batch["ids"], targets=batch["targets"])
    return y


def new_config(options: Options, vocabulary: int) -> Config:
    """A GPT-2 or a Llama of these sizes."""
    common = sizes(options, vocabulary)
    if options.kind == "gpt2":
        return Config(**common, hidden=4 * options.width)
    # Two thirds of GPT-2's hidden size, for one matrix more: as many parameters.
    hidden = -(-8 * options.width // (3 * 32)) * 32
    return Config(
        **common, hidden=hidden, position="rope", norm="rms", activation="silu", gated=True,
        attention_bias=False, hidden_bias=False,
    )  # fmt: skip


def _tokenizer(options: Options, documents: list[str]) -> tokens.Tokenizer:
    if options.from_ is not None:
        return tokens.from_folder(options.from_)
    if options.tokenizer == "bytes":
        return tokens.single_bytes()
    return tokens.train_bpe(documents, options.vocabulary)

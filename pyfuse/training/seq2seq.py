"""Sequence to sequence: the program of `pyfuse train seq2seq`, by the encoder-decoder of Vaswani et al.,
arXiv:1706.03762."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pyfuse.models.export import hf_config
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training import dates, program, tokens
from pyfuse.training.corpus import TOKENIZER, TOKENIZER_CONFIG
from pyfuse.training.loop import IGNORED, Batch, Figures, Loss, mixed
from pyfuse.training.model_options import pretrained, sizes
from pyfuse.training.pairs import Pair, Pairs, batch, greedy
from pyfuse.training.program import Material, Program, Result, Stored
from pyfuse.training.seq2seq_options import Options
from pyfuse.training.world import World

__all__ = ["Options", "Result", "Seq2Seq", "loss", "new_config", "run"]


@dataclass(frozen=True)
class Examples(Material):
    """data: `Pairs`. held: examples that are never learnt from."""

    held: list[Pair]
    tokenizer: tokens.Tokenizer


class Seq2Seq(Program[Options, Examples]):
    """Dates as people write them into ISO 8601 (dates.py)."""

    name = "seq2seq"
    options = Options
    identified = ("tokenizer",)
    figures = ("loss", "token_accuracy", "exact_match")
    drawn = ("token_accuracy", "exact_match")

    def material(self, options: Options, stored: Stored | None, world: World) -> Examples:
        if stored is not None:
            tokenizer = tokens.from_json(stored["tokenizer"])
        elif options.from_ is not None:
            tokenizer = tokens.from_folder(options.from_)
        else:
            tokenizer = tokens.single_bytes()
        if tokenizer.end is None:
            raise ValueError(f"--from: its tokenizer has none of {' '.join(tokens.ENDS)}")
        learnt, held = dates.years(options.seed)
        generator = random.Random(mixed(options.seed, -1))
        return Examples(
            data=Pairs(
                partial(dates.example, of_years=learnt), tokenizer, seed=options.seed,
                count=options.batch * options.accumulate,
            ),
            identity={"tokenizer": tokenizer.json},
            files={TOKENIZER: tokenizer.json.encode(), TOKENIZER_CONFIG: _tokenizer_config(tokenizer)},
            held=[dates.example(generator, held) for _ in range(options.eval_examples)],
            tokenizer=tokenizer,
        )  # fmt: skip

    def model(self, options: Options, material: Examples, ops: Any) -> Transformer:
        size = material.tokenizer.size
        if options.from_ is None:
            return Transformer(new_config(options, size), ops)
        model = pretrained(options, ops, size)
        if model.encoder is None or model.config.head != "lm":
            raise ValueError("--from: needs an encoder-decoder with a head, as BART")
        return model

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return loss(model, batch)

    def objective(self, options: Options) -> Loss:
        return partial(loss, label_smoothing=options.label_smoothing)

    def evaluation(
        self, model: Transformer, material: Examples, options: Options, world: World
    ) -> Callable[[], Figures]:
        own = material.held[world.rank :: world.size]

        def evaluate() -> Figures:
            sums = [0.0] * 5
            for i in range(0, len(own), options.batch):
                part = batch(own[i : i + options.batch], material.tokenizer)
                part = {n: t.to(world.device) for n, t in part.items()}
                found = scores(model, part, end=material.tokenizer.end)
                sums = [a + b for a, b in zip(sums, found, strict=True)]
            total, right, targets, exact, rows = world.sums(*sums)
            return {
                "loss": total / targets,
                "token_accuracy": right / targets,
                "exact_match": exact / rows,
            }

        return evaluate

    def config(self, model: Transformer, material: Examples) -> dict[str, Any]:
        end = material.tokenizer.end
        return hf_config(model.config, end, begin=end, pad=end)


run = partial(program.run, Seq2Seq())


def _tokenizer_config(tokenizer: tokens.Tokenizer) -> bytes:
    """That tokenizer.json is all there is to it: Hugging Face's Marian would look for a model of SentencePiece."""
    assert tokenizer.end is not None
    end = tokenizer.library.id_to_token(tokenizer.end)
    names = {"eos_token": end, "pad_token": end}
    return json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}).encode() + b"\n"


def loss(model: Any, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """-log p of the next token of the answer, on average."""
    memory = model.encode(batch["ids"], batch["mask"])
    y: Tensor = model(
        batch["decoder_ids"], memory=memory, memory_mask=batch["mask"], targets=batch["targets"],
        label_smoothing=label_smoothing,
    )  # fmt: skip
    return y


def scores(model: Transformer, batch: Batch, end: int | None) -> tuple[float, ...]:
    """(Σ -log p of the targets, targets whose logit is the largest, targets, answers without a mistake, answers).

    The answers are the model's own (`greedy`); the targets are judged after the right tokens before them.
    """
    assert end is not None
    mask, targets = batch["mask"], batch["targets"]
    memory = model.encode(batch["ids"], mask)
    logits = model(batch["decoder_ids"], memory=memory, memory_mask=mask)
    total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    right = (logits.argmax(-1) == targets).sum()
    answers = greedy(model, memory, mask, end=end, longest=targets.shape[1])
    exact = (answers == targets.masked_fill(targets == IGNORED, end)).all(1).sum()
    counted = (targets != IGNORED).sum()
    return total.item(), right.item(), counted.item(), exact.item(), float(len(targets))


def new_config(options: Options, vocabulary: int) -> Config:
    """The paper's: norms after the sums, sinusoids, the table scaled by √width, ReLU between."""
    return Config(
        **sizes(options, vocabulary), hidden=4 * options.width, encoder_layers=options.layers, norm_first=False,
        position="sinusoidal", embedding_scale=options.width**0.5, activation="relu", head_bias=True,
    )  # fmt: skip

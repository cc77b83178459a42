"""Texts to labels, by a pre-trained encoder with a new head: the program of `pyfuse train classifier`.

    logits = W₂·dropout(tanh(W₁·x[CLS] + b₁)) + b₂        loss = -log softmax(logits)[label], on average

All of it is trained (Devlin et al., arXiv:1810.04805, section 4.1). A checkpoint is a BertForSequenceClassification.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from pyfuse.models.export import hf_config
from pyfuse.models.transformer import Transformer
from pyfuse.training import labelled, program, tokens
from pyfuse.training.classifier_options import Options
from pyfuse.training.corpus import TOKENIZER, TOKENIZER_CONFIG
from pyfuse.training.errors import TrainingError
from pyfuse.training.loop import Batch, Figures
from pyfuse.training.metrics import Metrics, confusion
from pyfuse.training.model_options import pretrained
from pyfuse.training.program import Material, Program, Stored
from pyfuse.training.state import write_file
from pyfuse.training.texts import Texts, padding
from pyfuse.training.world import World

METRICS, CONFUSION = "metrics.json", "confusion.csv"


@dataclass(frozen=True)
class Result(program.Result):
    """metrics: of what is held out, at the end."""

    metrics: Metrics

    def tables(self) -> list[program.Table]:
        return self.metrics.tables()


def run(
    folder: Path, given: Mapping[str, Any], *, resume: bool = False, speak: TextIO | None = None
) -> Result | None:
    """Train in a folder, which gets metrics.json and confusion.csv as well: see `program.run`."""
    classifier = Classifier()
    ended = program.run(classifier, folder, given, resume=resume, speak=speak)
    if ended is None:
        return None
    assert classifier.metrics is not None  # a run ends with an evaluation
    result = Result(**vars(ended), metrics=classifier.metrics)
    report = json.dumps(result.metrics.as_json(), indent=1, ensure_ascii=False)
    write_file(Path(folder) / METRICS, report.encode() + b"\n")
    write_file(Path(folder) / CONFUSION, result.metrics.as_csv().encode())
    return result


@dataclass(frozen=True)
class Labelled(Material):
    """labels: the names of the classes. held: the texts that are not learnt from."""

    labels: list[str]
    held: Texts
    tokenizer: tokens.Tokenizer


class Classifier(Program[Options, Labelled]):
    """metrics: of the last evaluation."""

    name = "classifier"
    options = Options
    identified = ("data", "tokenizer")
    figures = ("loss", "accuracy", "macro_f1")
    drawn = ("accuracy", "macro_f1")

    metrics: Metrics | None = None

    def material(self, options: Options, stored: Stored | None, world: World) -> Labelled:
        names, learnt, held, sha256 = _texts(options)
        if stored is not None and sha256 != stored["data"]:
            raise TrainingError(
                "--data, --test: are not the texts that the run began with; give the same ones, "
                "or begin anew with another --out"
            )
        assert options.from_ is not None
        tokenizer = (
            tokens.from_folder(options.from_)
            if stored is None
            else tokens.from_json(stored["tokenizer"])
        )
        count = options.batch * options.accumulate
        data, rest = (
            Texts(part, tokenizer, options.context, seed=options.seed, count=count)
            for part in (learnt, held)
        )
        return Labelled(
            data=data,
            identity={"data": sha256, "tokenizer": tokenizer.json},
            files={
                TOKENIZER: tokenizer.json.encode(),
                TOKENIZER_CONFIG: json.dumps({"model_max_length": options.context}).encode(),
            },
            labels=names,
            held=rest,
            tokenizer=tokenizer,
        )

    def model(self, options: Options, material: Labelled, ops: Any) -> Transformer:
        head = {"head": "classes", "labels": tuple(material.labels)}
        model = pretrained(options, ops, material.tokenizer.size, **head)
        if model.config.causal:
            raise ValueError(
                "--from: a decoder, whose first token sees no other; a classifier needs an encoder (BERT)"
            )
        return model

    def loss(self, model: Any, batch: Batch) -> Tensor:
        return loss(model, batch)

    def evaluation(
        self, model: Transformer, material: Labelled, options: Options, world: World
    ) -> Callable[[], Figures]:
        own = range(world.rank, len(material.held), world.size)

        def evaluate() -> Figures:
            batches = material.held.batches(own, options.batch)
            total, counts = examine(model, batches, len(material.labels), world.device)
            total, *cells = world.sums(total, *counts.flatten().tolist())
            self.metrics = Metrics(material.labels, torch.tensor(cells).long().view_as(counts))
            return figures(total, self.metrics)

        return evaluate

    def config(self, model: Transformer, material: Labelled) -> dict[str, Any]:
        return hf_config(model.config, pad=padding(material.tokenizer))

    def uniform(self, model: Transformer) -> int:
        return model.config.classes


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the label, on average."""
    y: Tensor = model(batch["ids"], batch["mask"], targets=batch["targets"])
    return y


def examine(
    model: nn.Module, batches: Iterable[Batch], classes: int, device: torch.device
) -> tuple[float, Tensor]:
    """The sum of -log p of the labels, and the confusion matrix [classes, classes]."""
    total, counts = 0.0, torch.zeros(classes, classes, dtype=torch.int64)
    for batch in batches:
        ids, mask, targets = (batch[n].to(device) for n in ("ids", "mask", "targets"))
        logits = model(ids, mask).float()
        total += nn.functional.cross_entropy(logits, targets, reduction="sum").item()
        counts += confusion(batch["targets"], logits.argmax(-1).cpu(), classes)
    return total, counts


def figures(total: float, metrics: Metrics) -> Figures:
    """Of an evaluation; total: the sum of the losses."""
    texts = int(metrics.support.sum())
    return {"loss": total / texts, "accuracy": metrics.accuracy, "macro_f1": metrics.macro("f1")}


def _texts(options: Options) -> tuple[list[str], labelled.Part, labelled.Part, str]:
    """(labels, to learn from, held out, SHA-256)"""
    columns = options.text_column, options.label_column
    assert options.data is not None
    table = labelled.read(options.data, *columns, "--data")
    names = labelled.classes(table.labels)
    if options.test is None:
        return names, *labelled.split(table, names, options.held_out, options.seed), table.sha256
    test = labelled.read(options.test, *columns, "--test")
    return names, *labelled.both(table, test, names), f"{table.sha256} {test.sha256}"

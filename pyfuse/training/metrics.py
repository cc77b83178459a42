"""How well a classifier does: from the confusion matrix, all else.

With n[i, j] texts of class i that were taken for class j, N in all (Sokolova and Lapalme, "A systematic analysis of
performance measures for classification tasks", Information Processing & Management 45(4), 2009):

    accuracy     = Σ n[i, i] / N              which is also the micro average of precision, of recall and of F1
    precision[c] = n[c, c] / Σᵢ n[i, c]       of what was taken for c, the share that is c
    recall[c]    = n[c, c] / Σⱼ n[c, j]       of what is c, the share that was taken for it
    F1[c]        = 2·n[c, c] / (Σᵢ n[i, c] + Σⱼ n[c, j])
    macro        = the mean over the classes; weighted: each class by its share Σⱼ n[c, j] / N

0 / 0 is 0: a class that is never predicted has precision 0, one without texts recall 0. So scikit-learn has it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyfuse.training.program import Table

SCORES = ("precision", "recall", "f1")


@dataclass(frozen=True)
class Metrics:
    """labels: the names of the C classes. confusion: n [C, C], int64."""

    labels: Sequence[str]
    confusion: Tensor

    @property
    def accuracy(self) -> float:
        return _ratio(self.confusion.diagonal().sum(), self.confusion.sum()).item()

    @property
    def support(self) -> Tensor:
        """Texts of each class [C]."""
        return self.confusion.sum(1)

    @property
    def precision(self) -> Tensor:
        """[C]"""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(0))

    @property
    def recall(self) -> Tensor:
        """[C]"""
        return _ratio(self.confusion.diagonal(), self.support)

    @property
    def f1(self) -> Tensor:
        """[C]"""
        return _ratio(2 * self.confusion.diagonal(), self.confusion.sum(0) + self.support)

    def macro(self, score: str) -> float:
        """The mean of "precision", "recall" or "f1" over the classes."""
        per_class: Tensor = getattr(self, score)
        return per_class.mean().item()

    def weighted(self, score: str) -> float:
        """The same, each class by its share of the texts."""
        per_class: Tensor = getattr(self, score)
        return _ratio((per_class * self.support).sum(), self.support.sum()).item()

    def rows(self) -> list[tuple[str, float, float, float, int]]:
        """(name, precision, recall, F1, texts) of each class, of the macro and of the weighted average."""
        texts = self.support.tolist()
        columns = [getattr(self, score).tolist() for score in SCORES]
        found = list(zip(self.labels, *columns, texts, strict=True))
        for name, mean in (("macro average", self.macro), ("weighted average", self.weighted)):
            found.append((name, *map(mean, SCORES), sum(texts)))
        return found

    def tables(self) -> list[Table]:
        """What `rows` and the confusion matrix say, to be shown."""
        scores = [
            (name, *(f"{x:.4f}" for x in numbers), str(texts))
            for name, *numbers, texts in self.rows()
        ]
        counts = [
            (label, *map(str, row))
            for label, row in zip(self.labels, self.confusion.tolist(), strict=True)
        ]
        heads = ("precision", "recall", "F1", "texts")
        taken = [f"as {label}" for label in self.labels]
        return [
            Table("Of the texts held out", ("label", *heads), scores, heads),
            Table("What was taken for what", ("label", *taken), counts, taken),
        ]

    def as_json(self) -> dict[str, Any]:
        texts = self.support.tolist()
        columns = {score: getattr(self, score).tolist() for score in SCORES}
        return {
            "texts": sum(texts),
            "accuracy": self.accuracy,
            **{f"macro_{score}": self.macro(score) for score in SCORES},
            **{f"weighted_{score}": self.weighted(score) for score in SCORES},
            "classes": {
                label: {**{score: columns[score][i] for score in SCORES}, "texts": texts[i]}
                for i, label in enumerate(self.labels)
            },
        }

    def as_csv(self) -> str:
        """The confusion matrix: a row for each class, a column for what its texts were taken for."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["label", *self.labels])
        for label, row in zip(self.labels, self.confusion.tolist(), strict=True):
            writer.writerow([label, *row])
        return text.getvalue()


def confusion(targets: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """n [C, C] of the indices [N] of what texts are, and of what they were taken for."""
    return (targets * classes + predicted).bincount(minlength=classes * classes).view(classes, -1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """In float64; 0 / 0 = 0."""
    return numerator.double() / denominator.double().clamp_min(torch.finfo(torch.double).tiny)

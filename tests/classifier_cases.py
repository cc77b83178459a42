"""What the tests of the classifier share: labelled texts that are easy to tell apart, and a tiny BERT."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

GOOD, BAD, OTHER = (
    ("good", "fine", "nice"),
    ("bad", "poor", "dull"),
    ("film", "plot", "cast", "it", "is"),
)
SMALL: dict[str, Any] = {
    "batch": 4, "steps": 6, "warmup": 2, "lr": 0.01, "context": 8, "save_every": 2, "eval_every": 3, "device": "cpu",
    "threads": 1,
}  # fmt: skip


def write_csv(
    file: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("text", "label")
) -> Path:
    with file.open("w", encoding="utf-8", newline="") as out:
        csv.writer(out).writerows([header, *rows])
    return file


def reviews(count: int = 40, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of 2 to 12 words, the first of which says what the label is."""
    chance, found = random.Random(seed), []
    for i in range(count):
        words = [chance.choice((BAD, GOOD)[i % 2]), *chance.choices(OTHER, k=chance.randint(1, 11))]
        found.append((" ".join(words), ("negative", "positive")[i % 2]))
    return found


def write_bert(folder: Path) -> Path:
    """A BERT of one layer, with its tokenizer."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHER]
    library = Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")  # type: ignore[call-arg]
    )
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.add_special_tokens(words[:5])
    library.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, initializer_range=0.2,
    )  # fmt: skip
    hf.BertModel(config).save_pretrained(folder)
    library.save(str(folder / "tokenizer.json"))
    return folder

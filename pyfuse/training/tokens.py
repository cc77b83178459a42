"""Text to tokens, by the `tokenizers` library: a byte-level BPE (Sennrich et al., arXiv:1508.07909) of the text itself,
single bytes, or the tokenizer of a pre-trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Library

END = "<|endoftext|>"  # between documents
BYTES = 257  # tokens that any text can be written in: all bytes, and END
SEP = "[SEP]"
MARKS = ("[PAD]", "[UNK]", "[CLS]", SEP, "[MASK]")  # BERT's
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", SEP)  # what pre-trained models call END


class Tokenizer:
    """end: the id of what stands between documents; None for a tokenizer without such a token."""

    def __init__(self, library: Library) -> None:
        self.library = library
        # What a pre-trained tokenizer does for single prompts is not wanted in a stream.
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True  # text that spells END is text
        ends = (library.token_to_id(name) for name in ENDS)
        self.end: int | None = next((i for i in ends if i is not None), None)

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.library.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def json(self) -> str:
        """tokenizer.json, as Hugging Face's libraries read it."""
        return self.library.to_str()

    def stream(self, documents: Sequence[str]) -> Tensor:
        """All documents in one: int32, each followed by `end`."""
        parts = []
        for encoded in self.library.encode_batch_fast(list(documents), add_special_tokens=False):
            if encoded.ids:  # not of spaces only, for a tokenizer that drops them
                ids = encoded.ids if self.end is None else [*encoded.ids, self.end]
                parts.append(torch.tensor(ids, dtype=torch.int32))
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)


def from_json(text: str) -> Tokenizer:
    from tokenizers import Tokenizer as Library

    return Tokenizer(Library.from_str(text))


def from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a pre-trained model: its folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"from: {folder} has no tokenizer.json")
    return from_json(file.read_text(encoding="utf-8"))


def single_bytes() -> Tokenizer:
    """A token for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = [END, *sorted(ByteLevel.alphabet())]
    return Tokenizer(_byte_level({letter: i for i, letter in enumerate(letters)}))


def train_bpe(documents: Sequence[str], size: int, special: Sequence[str] = (END,)) -> Tokenizer:
    """A byte-level BPE of so many tokens, the merges that shorten these documents most. special: its first tokens.

    ValueError: the documents are too short for so many.
    """
    least = 256 + len(special)
    if size < least:
        raise ValueError(
            f"vocabulary: got {size}, needs at least {least}: all bytes and {' '.join(special)}"
        )
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    library = _byte_level({})
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(documents, trainer)
    got = library.get_vocab_size()
    if got < size:
        raise ValueError(
            f"vocabulary: the text has only {got} tokens to merge, {size} were wanted; "
            f"give a longer text, or --vocabulary {got}"
        )
    return Tokenizer(library)


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    """As in BERT [CLS] comes before a text and [SEP] after it, for whoever reads its tokenizer.json; not in streams."""
    from tokenizers.processors import TemplateProcessing

    library = tokenizer.library
    ids = [(name, library.token_to_id(name)) for name in ("[CLS]", SEP)]
    library.post_processor = TemplateProcessing(
        single=f"[CLS] $A {SEP}", pair=f"[CLS] $A {SEP} $B:1 {SEP}:1", special_tokens=ids
    )
    return tokenizer


def _byte_level(vocabulary: dict[str, int]) -> Library:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    if vocabulary:
        library.add_special_tokens([AddedToken(END, special=True)])
    return library

"""Text and tokens: a model's tokenizer and chat template, text that grows token by token, and strings that end it.

tokenizer = Tokenizer.of("folder")                  # or file.gguf, or a model that `pyfuse models` has fetched
ids = tokenizer.chat([{"role": "user", "content": "Why is the sky blue?"}])
text = tokenizer.detokenizer()
for token in new_tokens:
    print(text.add(token), end="")                  # what no later token can change
print(text.end())
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pyfuse.models import zoo

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}

# Of these a tokenizer is made; without any, transformers makes an empty one of some architectures.
_FILES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "vocab.json",
    "vocab.txt", "tekken.json",
)  # fmt: skip
_MARK = "aloha"  # stands for an answer in a conversation that is only made to see what follows one
_END = "eos_token_id"
_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet


class Tokenizer:
    """A transformers tokenizer as generation needs it.

    library: transformers' tokenizer. settings: the model's configuration, for the tokens that generation begins and
    ends with. where: for messages.
    """

    def __init__(
        self, library: Any, settings: Mapping[str, Any] | None = None, where: str = "tokenizer"
    ) -> None:
        self.library, self.where = library, where
        self._settings = {} if settings is None else settings

    @classmethod
    def of(cls, source: str | Path) -> Tokenizer:
        """The tokenizer of a model: a folder, a GGUF file, or a model's name in `pyfuse.models.zoo`.

        FileNotFoundError: no such file or folder, or no tokenizer in it. ValueError: one that cannot be read.
        ModuleNotFoundError: transformers is not installed.
        """
        path = zoo.folder(source)
        if importlib.util.find_spec("transformers") is None:
            raise ModuleNotFoundError(
                f"{path}: text needs transformers: pip install 'pyfuse[hf]'", name="transformers"
            )
        if path.suffix == ".gguf":
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            return cls(_load(path.parent, gguf_file=path.name), where=str(path))
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        if not any((path / name).is_file() for name in _FILES):
            raise FileNotFoundError(
                f"{path}: no tokenizer (no {_FILES[0]}, nor another of its files)"
            )
        return cls(_load(path), _settings_of(path), str(path))

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model wants around a text, as a beginning."""
        ids: list[int] = self.library(text, verbose=False)["input_ids"]
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Without special tokens; U+FFFD for bytes that are no UTF-8."""
        text: str = self.library.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def detokenizer(self, after: Sequence[int] = ()) -> Detokenizer:
        """See `Detokenizer`."""
        return Detokenizer(self, after)

    @property
    def has_chat(self) -> bool:
        """Whether there is a chat template."""
        return bool(self.library.chat_template)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """A conversation by the model's template, up to where its next answer begins.

        ValueError: the model has no template, or the template does not take these messages (some know no system
        message, or want user and assistant in turns).
        """
        text = self._rendered(messages, add_generation_prompt=True)
        return self._plain(text)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Each of them ends a text: those of generation_config.json and config.json, the tokenizer's own, and what
        the chat template writes after an answer."""
        own = self.library.eos_token_id
        ends = [*_several(self._settings.get(_END)), *_several(own), *self._after_an_answer()]
        return tuple(dict.fromkeys(ends))

    @property
    def start_tokens(self) -> tuple[int, ...]:
        """What the decoder of an encoder-decoder begins with; () for other models."""
        return tuple(_several(self._settings.get("decoder_start_token_id")))

    @property
    def forced_tokens(self) -> dict[int, int]:
        """For `Options.forced_tokens`: what an encoder-decoder has to say first (0) or last (-1), as a language."""
        found = {0: "forced_bos_token_id", -1: "forced_eos_token_id"}
        named = {step: self._settings.get(name) for step, name in found.items()}
        return {step: token for step, token in named.items() if isinstance(token, int)}

    def _after_an_answer(self) -> list[int]:
        if not self.has_chat:
            return []
        example = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
        try:
            _, marked, after = self._rendered(example).rpartition(_MARK)
        except ValueError:  # a template for other conversations
            return []
        ids = self._plain(after.lstrip()) if marked else []
        return [i for i in ids[:1] if i in self.library.added_tokens_decoder]

    def _rendered(self, messages: Sequence[Message], **options: Any) -> str:
        if not self.has_chat:
            raise ValueError(f"{self.where}: the model has no chat template")
        from jinja2 import TemplateError  # torch brings it

        try:
            text: str = self.library.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, **options
            )
        except (TemplateError, TypeError) as error:  # TypeError: it adds what cannot be added
            raise ValueError(f"{self.where}: its chat template says: {error}") from error
        return text

    def _plain(self, text: str) -> list[int]:
        """A template's text has its special tokens already."""
        ids: list[int] = self.library(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @cached_property
    def bytes(self) -> frozenset[int]:
        """Tokens of a byte each, which sentencepiece's models write what they have no word for with."""
        names = [f"<0x{byte:02X}>" for byte in range(256)]
        ids = self.library.convert_tokens_to_ids(names)
        back = self.library.convert_ids_to_tokens([i or 0 for i in ids])
        return frozenset(i for i, name, own in zip(ids, names, back, strict=True) if own == name)


class Detokenizer:
    """Text that grows token by token: `add` gives what is certain, `end` the rest; together decode(all of them).

    Held back is what a token that follows may still change: the bytes of a character that is not whole, and of
    sentencepiece's byte tokens the whole run of them, since one that does not fit makes all of them unreadable.
    A word's leading space depends on what is before it, so the last tokens are decoded together with the new one.

    after: tokens before the first one, as a prompt, whose text is not given again: the text is then what decode(after
    + all) has more than decode(after).
    """

    _WINDOW = 12  # tokens that are decoded together, where a character does not need more

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(after)  # decoded together; what they begin with has been shown
        self._shown = len(tokenizer.decode(after).removesuffix(_UNFINISHED))  # characters
        self._in_bytes = False  # the last token that has a text is a byte

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often one word, or nothing."""
        self._tokens.append(token)
        if token in self._tokenizer.bytes:
            self._in_bytes = True
            return ""
        text = self._tokenizer.decode(self._tokens)
        if self._in_bytes and text == self._tokenizer.decode(self._tokens[:-1]):
            return ""  # a special token, which does not end the run
        self._in_bytes = False
        whole = not text.endswith(_UNFINISHED)
        piece = text[self._shown : len(text) - (not whole)]
        self._shown += len(piece)
        if whole and piece:
            self._cut()
        return piece

    def end(self) -> str:
        """What was held back."""
        text = self._tokenizer.decode(self._tokens)[self._shown :]
        self._shown += len(text)
        return text

    def copy(self) -> Detokenizer:
        """Another one with the same tokens, which goes on by itself."""
        twin = object.__new__(Detokenizer)
        twin.__dict__.update(self.__dict__, _tokens=self._tokens.copy())
        return twin

    def _cut(self) -> None:
        """Forget all tokens but the last, here, where a character has just ended.

        The last one has a text. A decoder that takes the space off its first word takes it off there, each time.
        """
        if len(self._tokens) > self._WINDOW:
            del self._tokens[:-1]
            self._shown = len(self._tokenizer.decode(self._tokens))


class StopStrings:
    """Text in pieces up to the first of some strings, which may lie across pieces.

    The first is the one that is complete first, of several that are complete at once the longest; so it does not
    depend on how the text is cut. Text that may be the beginning of one is held back.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """ValueError: an empty string, which would end any text."""
        if isinstance(strings, str):
            raise TypeError(f"stop: needs several strings, got one: {strings!r}")
        if "" in strings:
            raise ValueError("stop: got an empty string")
        self.strings = tuple(strings)
        self._held = ""
        self._hit: str | None = None

    def add(self, piece: str) -> tuple[str, str | None]:
        """(text to show, the string that was found); after one was found nothing is shown any more."""
        if self._hit is not None:
            return "", self._hit
        text = self._held + piece
        ends = [(text.find(s) + len(s), -len(s), s) for s in self.strings if s in text]
        if ends:
            end, _, self._hit = min(ends)
            self._held = ""
            return text[: end - len(self._hit)], self._hit
        certain = len(text) - max((_overlap(text, s) for s in self.strings), default=0)
        self._held = text[certain:]
        return text[:certain], None

    def end(self) -> str:
        """What was held back, and turned out to be no stop string."""
        text, self._held = self._held, ""
        return text

    def copy(self) -> StopStrings:
        """Another one that has seen the same text, and goes on by itself."""
        twin = object.__new__(StopStrings)
        twin.__dict__.update(self.__dict__)
        return twin


def _overlap(text: str, stop: str) -> int:
    """Characters of the longest end of `text` that `stop` begins with, but is more than."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def _load(folder: Path, **options: str) -> Any:
    """From these files alone, never from the network. ValueError: transformers cannot make a tokenizer of them."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:  # JSON that is none, or that of something else
        raise ValueError(f"{folder}: its tokenizer cannot be read: {error}") from error


def _settings_of(folder: Path) -> dict[str, Any]:
    """config.json, and over it generation_config.json; the end tokens of both."""
    settings: dict[str, Any] = {}
    ends: list[int] = []
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            try:
                read = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
            ends += _several(read.get(_END))
            settings |= {key: value for key, value in read.items() if value is not None}
    return {**settings, _END: ends}


def _several(ids: int | list[int] | None) -> list[int]:
    """Configurations have a number, several, or none."""
    return [] if ids is None else ids if isinstance(ids, list) else [ids]

"""Tokenizers, chat templates, text that grows token by token, and strings that end it."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from text_cases import KINDS, TEMPLATE, byte_level, sentencepiece, write_gguf

from pyfuse.generation import text as module
from pyfuse.generation.text import Detokenizer, StopStrings, Tokenizer
from pyfuse.models import zoo

QUESTION = [{"role": "user", "content": "Why?"}]


def pieces(tokenizer: Tokenizer, ids: Sequence[int], after: Sequence[int] = ()) -> list[str]:
    text = tokenizer.detokenizer(after)
    return [*(text.add(i) for i in ids), text.end()]


def smollm2() -> Tokenizer:
    if zoo.problem("smollm2") is not None:
        pytest.skip("smollm2 is not fetched: make models")
    return Tokenizer.of("smollm2")


@pytest.mark.parametrize("kind", [*KINDS, "smollm2"])
def test_text_in_pieces_is_the_text(kind: str) -> None:
    """Of any tokens: also of bytes that are no character, special tokens, and words that no text would have."""
    tokenizer = Tokenizer(KINDS[kind]()) if kind in KINDS else smollm2()
    draw = random.Random(0)
    for length in (0, 1, 2, 3, 17, 65):
        for _ in range(100):
            ids = [draw.randrange(len(tokenizer.library)) for _ in range(length)]
            whole, shown = tokenizer.decode(ids), ""
            for piece in pieces(tokenizer, ids):
                shown += piece
                assert whole.startswith(shown), ids
            assert shown == whole, ids


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "smollm2"])
def test_characters_of_several_bytes(kind: str) -> None:
    """Real text, some of its tokens lost."""
    tokenizer = Tokenizer(KINDS[kind]()) if kind in KINDS else smollm2()
    draw = random.Random(1)
    for lost in (0.0, 0.05, 0.3):
        for _ in range(150):
            text = "".join(draw.choice("a😀é漢 ß🏳️‍🌈") for _ in range(30))
            ids = in_bytes(text) if kind == "sentencepiece" else tokenizer.encode(text)
            ids = [i for i in ids if draw.random() >= lost]
            assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)
            if not lost and kind != "sentencepiece":
                assert tokenizer.decode(ids) == text


def in_bytes(text: str) -> list[int]:
    """Words of `sentencepiece`, and single bytes."""
    words = {" ": "▁", "a": "▁a", "é": "é"}
    library = sentencepiece()
    names = [[words[c]] if c in words else [f"<0x{b:02X}>" for b in c.encode()] for c in text]
    ids: list[int] = library.convert_tokens_to_ids([n for some in names for n in some])
    return ids


def test_a_character_is_shown_when_it_is_whole() -> None:
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a😀 te")
    assert len(ids) == 5 and pieces(tokenizer, ids) == ["a", "", "😀", " t", "e", ""]
    assert pieces(tokenizer, ids[:2]) == ["a", "", "\ufffd"]
    assert pieces(tokenizer, [ids[0], ids[1], ids[0]]) == ["a", "", "\ufffda", ""]
    # What cannot become a character is certain, though the last byte is not.
    assert pieces(tokenizer, [ids[1]] * 3) == ["", "\ufffd", "\ufffd", "\ufffd"]


def test_a_run_of_bytes_is_shown_when_it_has_ended() -> None:
    tokenizer = Tokenizer(sentencepiece())
    smile = in_bytes("😀")
    word, special = tokenizer.library.convert_tokens_to_ids(["▁sky", "<s>"])
    assert pieces(tokenizer, [*smile, word]) == ["", "", "", "", "😀 sky", ""]
    assert pieces(tokenizer, [*smile, special, smile[0]]) == [*[""] * 6, "\ufffd" * 5]
    assert pieces(tokenizer, [*smile[:2], special, *smile[2:]]) == [*[""] * 5, "😀"]


def test_the_space_before_the_first_word_depends_on_what_is_before_it() -> None:
    tokenizer = Tokenizer(sentencepiece())
    word, space, letter = tokenizer.library.convert_tokens_to_ids(["▁sky", "▁", "b"])
    assert pieces(tokenizer, [word, word]) == ["sky", " sky", ""]
    assert pieces(tokenizer, [space, word]) == ["", " sky", ""]
    assert pieces(tokenizer, [word, word], after=[letter]) == [" sky", " sky", ""]
    smile = byte_level()("a😀")["input_ids"]
    assert pieces(Tokenizer(byte_level()), smile[2:], after=smile[:2]) == ["😀", ""]
    long = [letter] * 40
    assert "".join(pieces(tokenizer, [word] * 40, after=long)) == " sky" * 40


def test_it_decodes_few_tokens_at_a_time() -> None:
    tokenizer = Tokenizer(byte_level())
    lengths = []
    plain = tokenizer.decode
    tokenizer.decode = lambda ids: lengths.append(len(ids)) or plain(ids)  # type: ignore
    text = tokenizer.detokenizer()
    for i in tokenizer.encode("a b 😀 " * 200):
        text.add(i)
    assert max(lengths) <= 16


def test_copies_go_on_by_themselves() -> None:
    tokenizer = Tokenizer(byte_level())
    first, second, _, tail, _ = tokenizer.encode("a😀 te")
    one = tokenizer.detokenizer()
    assert one.add(first) == "a" and one.add(second) == ""
    other = one.copy()
    assert isinstance(other, Detokenizer)
    assert other.add(tail) == "\ufffd t" and other.end() == ""
    assert one.add(first) == "\ufffda" and one.end() == "" and one.end() == ""


@pytest.mark.parametrize("cut", [1, 2, 3, 100])
@pytest.mark.parametrize(
    "strings, text, shown, hit",
    [
        (["\n\n"], "one\ntwo\n\nthree", "one\ntwo", "\n\n"),
        (["END"], "EEND", "E", "END"),
        (["END"], "ENENEN", "ENENEN", None),
        (["abcd", "bc"], "xabcd", "xa", "bc"),  # complete first, though it begins later
        (["abc", "c"], "abc", "", "abc"),  # complete at once: the longer one
        (["aab"], "aaab", "a", "aab"),
        (["😀"], "a😀b", "a", "😀"),
        ([], "anything", "anything", None),
        (["x"], "", "", None),
    ],
)
def test_stop_strings(strings: list[str], text: str, shown: str, hit: str | None, cut: int) -> None:
    stops, out, found = StopStrings(strings), "", None
    for start in range(0, len(text), cut):
        piece, found = stops.add(text[start : start + cut])
        out += piece
        assert shown.startswith(out)
        if found is not None:
            assert stops.add("more") == ("", found)
            break
    assert (out + stops.end(), found) == (shown, hit)


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["User:", "\n#"])
    assert stops.add("Hi.\nU") == ("Hi.\n", None)
    twin = stops.copy()
    assert twin.add("ser") == ("", None) and twin.add(": x") == ("", "User:")
    assert stops.add("SA\n") == ("USA", None) and stops.end() == "\n"


def test_stop_strings_need_to_be_some() -> None:
    with pytest.raises(ValueError, match="stop: got an empty string"):
        StopStrings(["a", ""])
    with pytest.raises(TypeError, match="stop: needs several strings, got one: 'abc'"):
        StopStrings("abc")


def test_chat_is_transformers_chat() -> None:
    library = byte_level()
    tokenizer = Tokenizer(library)
    ids = tokenizer.chat(QUESTION)
    text = "<|start|>user\nWhy?<|stop|>\n<|start|>assistant\n"
    assert library.decode(ids) == text
    theirs = library.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert ids == theirs and tokenizer.has_chat
    assert tokenizer.decode(ids) == "user\nWhy?\nassistant\n"


def test_end_tokens() -> None:
    end, stop = 0, 2
    assert Tokenizer(byte_level()).end_tokens == (end, stop)
    assert Tokenizer(byte_level(None)).end_tokens == (end,)
    assert Tokenizer(byte_level(), {"eos_token_id": [7, 2, 8]}).end_tokens == (7, stop, 8, end)
    assert Tokenizer(byte_level(), {"eos_token_id": 9}).end_tokens == (9, end, stop)
    spaced = "{% for m in messages %}{{ m['content'] }} <|stop|>{% endfor %}"
    assert Tokenizer(byte_level(spaced)).end_tokens == (end, stop)
    # Nothing special follows an answer; a template that shows none; one that does not take the example.
    for template in ("{{ messages[-1]['content'] }}, ok", "{{ 1 }}", "{{ raise_exception('no') }}"):
        assert Tokenizer(byte_level(template)).end_tokens == (end,)
    assert Tokenizer(sentencepiece()).end_tokens == ()


def test_tokens_that_an_encoder_decoder_begins_with() -> None:
    assert Tokenizer(byte_level()).start_tokens == () and not Tokenizer(byte_level()).forced_tokens
    settings = {"decoder_start_token_id": 5, "forced_bos_token_id": 0, "forced_eos_token_id": 2}
    tokenizer = Tokenizer(byte_level(), settings)
    assert tokenizer.start_tokens == (5,) and tokenizer.forced_tokens == {0: 0, -1: 2}


def test_no_chat_template() -> None:
    tokenizer = Tokenizer(byte_level(None), where="here")
    assert not tokenizer.has_chat
    with pytest.raises(ValueError, match="here: the model has no chat template"):
        tokenizer.chat(QUESTION)


@pytest.mark.parametrize(
    "template, message",
    [
        (TEMPLATE, "no tools here"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{% if", "end of template"),
        ("{{ messages[0]['x']['y'] }}", "has no attribute 'x'"),
    ],
)
def test_a_template_that_refuses(template: str, message: str) -> None:
    tokenizer = Tokenizer(byte_level(template), where="here")
    with pytest.raises(ValueError, match=f"here: its chat template says: .*{message}"):
        tokenizer.chat([{"role": "tool", "content": "x"}])


def test_a_folder(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    config = {"model_type": "llama", "eos_token_id": 4, "decoder_start_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": [5, 6], "decoder_start_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = Tokenizer.of(tmp_path)
    assert tokenizer.end_tokens == (4, 5, 6, 0, 2) and tokenizer.start_tokens == (7,)
    assert (
        tokenizer.decode(tokenizer.encode("Why is the sky blue? 😀")) == "Why is the sky blue? 😀"
    )
    assert Tokenizer.of(str(tmp_path)).chat(QUESTION) == Tokenizer(byte_level()).chat(QUESTION)


def test_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    tokenizer = Tokenizer.of(tmp_path / "tiny.gguf")
    ids = tokenizer.chat(QUESTION)
    assert tokenizer.library.decode(ids) == "<|start|>user\nWhy?<|stop|>\n<|start|>assistant\n"
    assert tokenizer.end_tokens == (0, 2)


def test_what_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder"):
        Tokenizer.of(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"some\.gguf: no such file"):
        Tokenizer.of(tmp_path / "some.gguf")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer \(no tokenizer\.json, nor"):
        Tokenizer.of(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"its tokenizer cannot be read"):
        Tokenizer.of(tmp_path)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match=r"its tokenizer cannot be read"):
        Tokenizer.of(tmp_path / "bad.gguf")
    byte_level().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        Tokenizer.of(tmp_path)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"transformers: pip install 'pyfuse\[hf\]'"):
        Tokenizer.of(tmp_path)


def test_a_model_that_is_not_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pyfuse models fetch smollm2"):
        Tokenizer.of("smollm2")


def test_the_real_tokenizer() -> None:
    tokenizer = smollm2()
    assert tokenizer.end_tokens == (2,)
    text = tokenizer.library.decode(tokenizer.chat(QUESTION))
    assert text.endswith("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n")


def test_other_vocabulary_sizes_than_the_model() -> None:
    """Models round their vocabulary up: what the tokenizer has no name for has no text."""
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("ab")
    assert pieces(tokenizer, [ids[0], 5000, ids[1]]) == ["a", "", "b", ""]

"""Text, tokens, windows and the schedule: who learns from what, in which order, and how fast."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from training_cases import write_text

from pyfuse.training import text, tokens
from pyfuse.training.schedule import learning_rate
from pyfuse.training.windows import Windows, batch, evenly


def test_the_schedule() -> None:
    rate = [learning_rate(step, steps=110, warmup=10, peak=2.0) for step in range(110)]
    assert rate[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rate[10] == 2.0 and rate[60] == pytest.approx(1.1)
    assert rate[-1] == pytest.approx(0.2, abs=1e-3) and rate[10:] == sorted(rate[10:], reverse=True)
    assert learning_rate(0, steps=5, warmup=0, peak=1.0) == 1.0
    assert learning_rate(110, steps=110, warmup=10, peak=2.0) == pytest.approx(0.2)
    assert learning_rate(3, steps=4, warmup=8, peak=1.0) == 0.5  # it ends while it still rises


def test_the_split_keeps_every_character_once() -> None:
    documents = ["a" * 30, "b" * 50, "c" * 19, "d"]
    learnt, held = text.split(documents, 0.25)
    assert learnt == ["a" * 30, "b" * 45] and held == ["b" * 5, "c" * 19, "d"]
    assert text.split(documents, 0.0) == (documents, [])


def test_the_standard_library_is_found() -> None:
    files = text.standard_library()
    names = {f.name for f in files}
    assert files == sorted(files) and {"argparse.py", "zipfile.py", "abc.py"} & names
    assert not any({"site-packages", "test"} & set(f.parts[-3:]) for f in files)


def test_files_are_read_in_their_order(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", 3)
    (folder / "sub").mkdir()
    (folder / "sub" / "last.txt").write_bytes(b"one\r\ntwo")
    (folder / ".hidden").write_bytes(b"\xff")
    found = text.read_text([folder])
    assert len(found.documents) == 4 and found.documents[-1] == "one\r\ntwo"
    assert found.documents[0].startswith("the 0th") and "€" in found.documents[0]
    again = text.read_text([folder / "0.txt", folder / "1.txt", folder / "2.txt", folder / "sub"])
    assert again.sha256 == found.sha256
    (folder / "1.txt").write_text("other")
    assert text.read_text([folder]).sha256 != found.sha256


def test_errors_of_text(tmp_path: Path) -> None:
    folder = write_text(tmp_path / "text", 2)
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        text.read_text([folder, tmp_path / "nowhere"])
    (folder / "1.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"1\.txt is not UTF-8 \(byte 3\)"):
        text.read_text([folder])
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"there is none in .*empty"):
        text.read_text([empty])


def test_bytes_and_bpe_are_without_loss(tmp_path: Path) -> None:
    documents = text.read_text([write_text(tmp_path / "text")]).documents
    for tokenizer in (tokens.single_bytes(), tokens.train_bpe(documents, 300)):
        stream = tokenizer.stream(documents)
        parts = "".join(documents).encode()
        assert tokenizer.end == 0 and (stream == 0).sum() == len(documents)
        assert tokenizer.library.decode(stream[stream != 0].tolist()) == "".join(documents)
        assert stream.max() < tokenizer.size
        again = tokens.from_json(tokenizer.json)
        assert torch.equal(again.stream(documents), stream) and again.size == tokenizer.size
        if tokenizer.size == tokens.BYTES:
            assert len(stream) == len(parts) + len(documents)
        else:
            assert tokenizer.size == 300 and len(stream) < 0.8 * len(parts)
    assert tokens.train_bpe(documents, 300).json == tokens.train_bpe(documents, 300).json


def test_errors_of_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has only 26\d tokens to merge, 4096 were wanted"):
        tokens.train_bpe(["aa bb aa bb"], 4096)
    with pytest.raises(ValueError, match="got 256, needs at least 257"):
        tokens.train_bpe(["text"], 256)
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        tokens.from_folder(tmp_path)


def test_each_epoch_is_a_permutation_of_its_own() -> None:
    windows = Windows(torch.arange(10 * 7 + 1 + 3), 7, seed=5, count=4)
    assert len(windows) == 10
    first, second = windows.order.epoch(0), windows.order.epoch(1)
    assert first.sort().values.tolist() == second.sort().values.tolist() == list(range(10))
    assert not torch.equal(first, second)
    assert not torch.equal(first, Windows(windows.tokens, 7, seed=6, count=4).order.epoch(0))
    seen = torch.cat([windows.rows(step)["targets"] for step in range(5)])  # two epochs
    assert seen.flatten().bincount(minlength=74)[1:71].tolist() == [2] * 70
    for step in range(5):
        rows = windows.rows(step)
        assert torch.equal(rows["ids"] + 1, rows["targets"]) and rows["ids"].shape == (4, 7)


def test_a_step_has_the_same_rows_in_any_order() -> None:
    def made() -> Windows:
        return Windows(torch.arange(500), 9, seed=1, count=6)

    one, steps = made(), list(range(40))
    expected = {step: one.rows(step)["ids"] for step in steps}
    random.Random(0).shuffle(steps)
    other = made()
    assert all(torch.equal(other.rows(step)["ids"], expected[step]) for step in steps)


def test_no_held_out_token_is_learnt(tmp_path: Path) -> None:
    """Text whose two parts have no byte in common."""
    file = tmp_path / "text.txt"
    file.write_text("a" * 900 + "b" * 100)
    parts = text.split(text.read_text([file]).documents, 0.1)
    tokenizer = tokens.single_bytes()
    learnt, held = (Windows(tokenizer.stream(p), 8, seed=0, count=3) for p in parts)
    a, b = (tokenizer.library.token_to_id(c) for c in "ab")
    seen = torch.cat([learnt.rows(step)["targets"] for step in range(100)]).unique().tolist()
    examined = batch(evenly(held, 1000))["targets"].unique().tolist()
    assert a in seen and b not in seen and b in examined and a not in examined


def test_evaluations_are_spread_over_the_text() -> None:
    windows = Windows(torch.arange(101), 10, seed=0, count=1)
    assert [w[0].item() for w in evenly(windows, 3)] == [0, 30, 60]
    assert len(evenly(windows, 99)) == 10
    with pytest.raises(
        ValueError, match="9 tokens held out, but one window of context 10 needs 11"
    ):
        Windows(torch.arange(9), 10, seed=0, count=1, what="held out")

"""Labelled texts: what a CSV file may be, how it is shared out, in which batches it comes, and what is counted."""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from classifier_cases import reviews, write_bert, write_csv
from sklearn import metrics as sklearn
from torch import Tensor

from pyfuse.training import labelled, tokens
from pyfuse.training import reviews as film_reviews
from pyfuse.training.labelled import Part, Table, classes, read, split
from pyfuse.training.metrics import SCORES, Metrics, confusion
from pyfuse.training.texts import Texts


def test_fields_are_read_as_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        '\ufefflabel,id,text\r\n01,1,NA\r\n1,2,"two, words\nand ""more"""\r\n\r\nnull,3, ä € \r\n'.encode()
    )
    table = read([file, file], "text", "label", "--data")
    assert table.texts == ["NA", 'two, words\nand "more"', "ä €"] * 2
    assert table.labels == ["01", "1", "null"] * 2
    assert table.sha256 != read([file], "text", "label", "--data").sha256
    assert read([file], "label", "id", "--data").labels == ["1", "2", "3"]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"text,label\n", "has a header, but no rows"),
        (b"text,label\n\xff,a\n", r"is not UTF-8 \(byte 11\)"),
        (b"review,label\na,b\n", "has no column 'text'; its columns are review, label"),
        (b"text,stars\na,b\n", "has no column 'label'; its columns are text, stars"),
        (b'text,label\na,b\n"  ",b\n,b\n', r"has 2 of 3 rows without a text \(row 3, 4\)"),
        (b"text,label\na,b\nb\n", r"has 1 of 2 rows without a label \(row 3\)"),
        (b"text,label\n" + b",b\n" * 9, r"has 9 of 9 rows without a text \(row 2, 3, 4, 5, 6, …\)"),
        (b"text,label\na,b\na, b,c\n", r"is no CSV file \(Expected 2 fields in line 3, saw 3\)"),
        (b"text,label\na, b,c\n", "has more fields in a row than columns"),
        (b'text,label\n"a,b\n', "is no CSV file"),
    ],
)
def test_files_that_do_not_do(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^--data: .*a\.csv {message}"):
        read([tmp_path / "a.csv"], "text", "label", "--data")
    with pytest.raises(FileNotFoundError, match=r"--test: there is no file .*b\.csv"):
        read([tmp_path / "b.csv"], "text", "label", "--test")


def test_labels_are_in_order() -> None:
    assert classes(["10", "9", "-1", "9"]) == ["-1", "9", "10"]
    assert classes(["b", "10", "9"]) == ["10", "9", "b"]
    with pytest.raises(ValueError, match="needs two labels, all texts have 'a'"):
        classes(["a", "a"])


def test_each_label_gives_its_share() -> None:
    labels = ["a"] * 50 + ["b"] * 10 + ["c"] * 2
    table = Table([str(i) for i in range(62)], labels, "")
    learnt, held = split(table, ["a", "b", "c"], 0.2, seed=3)
    assert Counter(held.targets) == {0: 10, 1: 2, 2: 1} and len(learnt.texts) == 49
    assert set(learnt.texts) | set(held.texts) == set(table.texts)
    for part in (learnt, held):
        assert [labels[int(text)] for text in part.texts] == ["abc"[i] for i in part.targets]
    assert split(table, ["a", "b", "c"], 0.2, seed=3) == (learnt, held)
    assert split(table, ["a", "b", "c"], 0.2, seed=4) != (learnt, held)
    assert Counter(split(table, ["a", "b", "c"], 0.99, seed=0)[0].targets) == {0: 1, 1: 1, 2: 1}
    with pytest.raises(ValueError, match="one text only has the label 'd'"):
        split(Table([*table.texts, "x"], [*labels, "d"], ""), ["a", "b", "c", "d"], 0.2, seed=0)


def test_a_test_set_of_its_own() -> None:
    table = Table(["x", "y"], ["a", "b"], "")
    test = Table(["z", "w", "v"], ["b", "c", "c"], "")
    with pytest.raises(ValueError, match=r"--test: the label 'c' \(row 3\) is in no row of --data"):
        labelled.both(table, test, ["a", "b"])
    learnt, held = labelled.both(table, Table(["z"], ["b"], ""), ["a", "b"])
    assert (learnt, held) == (Part(["x", "y"], [0, 1]), Part(["z"], [1]))


def test_batches_are_as_long_as_their_longest_text(tmp_path: Path) -> None:
    tokenizer = tokens.from_folder(write_bert(tmp_path))
    part = Part(["good film", "it is bad", "[SEP] " * 20, "dull"], [1, 0, 0, 0])
    texts = Texts(part, tokenizer, 6, seed=0, count=3)
    assert [len(ids) for ids in texts.ids] == [4, 5, 6, 3]
    assert all(ids[0] == 2 and ids[-1] == 3 for ids in texts.ids)  # [CLS] and [SEP], when cut too
    assert 3 not in texts.ids[2][1:-1]  # a text that spells [SEP] is text
    batch = texts.batch([0, 3])
    assert batch["ids"].tolist() == [[2, 5, 11, 3], [2, 10, 3, 0]]
    assert batch["mask"].tolist() == [[True] * 4, [True] * 3 + [False]]
    assert batch["targets"].tolist() == [1, 0]
    one = [texts.rows(step)["ids"] for step in range(4)]
    again = Texts(part, tokenizer, 6, seed=0, count=3)
    for step in (2, 0, 3, 1):
        assert torch.equal(again.rows(step)["ids"], one[step])
    lengths = [b["ids"].shape[1] for b in texts.batches(range(4), 2)]
    assert lengths == [4, 6]
    with pytest.raises(ValueError, match=r"--context: 2 tokens, .* marks take 2"):
        Texts(part, tokenizer, 2, seed=0, count=3)


def test_the_metrics_of_a_table_made_by_hand() -> None:
    """Of 6 a: 4 as a, 2 as b. Of 3 b: all as a. No c, but one b more as c. d is never seen."""
    names = ["a", "b", "c", "d"]
    counts = torch.tensor([[4, 2, 0, 0], [3, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    found = Metrics(names, counts)
    assert found.accuracy == 0.4
    assert found.precision.tolist() == pytest.approx([4 / 7, 0, 0, 0])
    assert found.recall.tolist() == pytest.approx([4 / 6, 0, 0, 0])
    assert found.f1.tolist() == pytest.approx([8 / 13, 0, 0, 0])
    assert found.macro("f1") == pytest.approx(2 / 13)
    assert found.weighted("f1") == pytest.approx(8 / 13 * 0.6)
    rows = list(csv.reader(io.StringIO(found.as_csv())))
    assert rows[0] == ["label", *names] and rows[2] == ["b", "3", "0", "1", "0"]
    assert found.as_json()["classes"]["b"] == {"precision": 0, "recall": 0, "f1": 0, "texts": 4}
    assert found.rows()[-1] == ("weighted average", *map(found.weighted, SCORES), 10)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.UndefinedMetricWarning")
@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("texts", [1, 5, 200])
def test_the_metrics_are_those_of_scikit_learn(classes: int, texts: int) -> None:
    generator = torch.Generator().manual_seed(classes * texts)
    truth, guess = torch.randint(classes, (2, texts), generator=generator)
    found = Metrics([str(i) for i in range(classes)], confusion(truth, guess, classes))
    labels: list[int] = list(range(classes))
    assert (found.confusion.numpy() == sklearn.confusion_matrix(truth, guess, labels=labels)).all()
    assert found.accuracy == pytest.approx(sklearn.accuracy_score(truth, guess))
    for average in (None, "macro", "weighted"):
        theirs = sklearn.precision_recall_fscore_support(
            truth, guess, labels=labels, average=average, zero_division=0
        )
        for score, value in zip(SCORES, theirs, strict=False):
            assert _of(found, score, average) == pytest.approx(value), (score, average)


def _of(found: Metrics, score: str, average: str | None) -> Any:
    if average is None:
        per_class: Tensor = getattr(found, score)
        return per_class.tolist()
    return found.macro(score) if average == "macro" else found.weighted(score)


def test_ratings_become_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = film_reviews._csv('1\t2.3\tA "good" film, ä\r\n2\t-0.1\tDull\r\n3\t0\tNeither\r\n')
    assert list(csv.reader(io.StringIO(text))) == [
        ["text", "label"], ['A "good" film, ä', "positive"], ["Dull", "negative"],
    ]  # fmt: skip
    file = write_csv(tmp_path / "a.csv", reviews(4))
    before = file.read_bytes()
    assert film_reviews.main([str(file)]) == 1 and "is there already" in capsys.readouterr().err
    assert film_reviews.fetch(file) == file and file.read_bytes() == before


@pytest.mark.filterwarnings("ignore:Setuptools is replacing distutils")
def test_what_pip_cannot_get_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("INDEX_URL", tmp_path.as_uri()), ("NO_INDEX", "1"), ("CONFIG_FILE", "/dev/null")):  # fmt: skip
        monkeypatch.setenv(f"PIP_{name}", value)
    assert film_reviews.main([str(tmp_path / "a.csv")]) == 1
    assert "pip could not download vaderSentiment==3.3.2" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()

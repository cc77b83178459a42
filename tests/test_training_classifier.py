"""`pyfuse train classifier`: it learns, as plain torch does, goes on bit by bit, and refuses what does not do."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from classifier_cases import SMALL, reviews, write_bert, write_csv
from training_cases import as_arguments, contents, rows, run

from pyfuse import cli
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.training import classifier, state
from pyfuse.training.curves import read_log
from pyfuse.training.errors import TrainingError

NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Options of a small run; its files are there for all."""
    folder = tmp_path_factory.mktemp("classifier")
    write_bert(folder / "bert")
    yield SMALL | {"data": [write_csv(folder / "a.csv", reviews())], "from_": folder / "bert"}


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here; one test has it."""
    if request.node.name != "test_what_a_run_leaves":
        monkeypatch.setattr("pyfuse.training.curves.draw", lambda *_: None)


def train(folder: Path, given: dict[str, Any], **more: Any) -> classifier.Result:
    result = classifier.run(folder, given, speak=io.StringIO(), **more)
    assert result is not None
    return result


def test_it_learns_as_plain_torch_does(given: dict[str, Any], tmp_path: Path) -> None:
    given = given | {"steps": 60, "batch": 16, "save_every": 0, **NO_DROPOUT}
    result = train(tmp_path / "ours", given)
    stock = train(tmp_path / "stock", given | {"stock": True})
    ours, theirs = ([float(r["loss"]) for r in rows(tmp_path / n)] for n in ("ours", "stock"))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert (result.metrics.confusion == stock.metrics.confusion).all()
    assert result.metrics.accuracy == 1.0 == result.figures["macro_f1"] and result.uniform == 2
    assert ours[0] == pytest.approx(0.693, abs=0.05) and result.loss == ours[-1] < 0.2


def test_dropout_is_on_by_default(given: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path / "with", given)
    train(tmp_path / "without", given | NO_DROPOUT)
    assert rows(tmp_path / "with")[0] == rows(tmp_path / "without")[0]  # the evaluation has none
    assert rows(tmp_path / "with")[1]["loss"] != rows(tmp_path / "without")[1]["loss"]


def test_what_a_run_leaves(given: dict[str, Any], tmp_path: Path) -> None:
    result = train(tmp_path / "run", given)
    kept = ("config.json", "model.safetensors", "optimizer.safetensors", "state.json")
    assert sorted(contents(tmp_path / "run")) == sorted(
        [
            *(
                f"checkpoint-00000006/{n}"
                for n in (*kept, "tokenizer.json", "tokenizer_config.json")
            ),
            *("confusion.csv", "curves.png", "log.csv", "metrics.json", "run.json"),
        ]
    )
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found == result.metrics.as_json() and found["texts"] == 8
    table = list(csv.reader((tmp_path / "run" / "confusion.csv").open()))
    assert table[0] == ["label", "negative", "positive"]
    assert [[int(x) for x in row[1:]] for row in table[1:]] == result.metrics.confusion.tolist()
    log = read_log(tmp_path / "run" / "log.csv")
    assert {"loss", "accuracy", "macro_f1", "lr", "gradient_norm", "tokens_per_second"} <= set(log[0])  # fmt: skip
    assert float(log[-1]["macro_f1"]) == found["macro_f1"] == result.figures["macro_f1"]
    # Real tokens are counted, not padding: texts of 4 to 8 tokens, 4 at a time.
    assert (
        4 * 4 < int(log[1]["tokens"]) < 4 * 8 and (tmp_path / "run" / "curves.png").stat().st_size
    )


def test_hugging_face_reads_a_checkpoint(given: dict[str, Any], tmp_path: Path) -> None:
    folder = train(tmp_path / "run", given).checkpoint
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    texts = ["good film", "it is a very bad film " * 9]
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert batch["input_ids"].shape == (2, given["context"])  # cut where the run cut
    with torch.no_grad():
        ours = from_pretrained(folder)(batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(model(**batch).logits, ours, rtol=1e-4, atol=1e-5)
    assert model.config.id2label == {0: "negative", 1: "positive"}
    assert model.config.label2id == {"negative": 0, "positive": 1}
    said = hf.pipeline("text-classification", str(folder), device="cpu")(texts, truncation=True)
    assert [s["label"] for s in said] == [model.config.id2label[int(i)] for i in ours.argmax(-1)]


def test_numbers_as_labels_and_a_test_set(given: dict[str, Any], tmp_path: Path) -> None:
    stars = [(text, str(9 + i % 3)) for i, (text, _) in enumerate(reviews())]
    columns = ("review", "stars")
    given = given | {
        "data": [write_csv(tmp_path / f"{n}.csv", stars[n::2], columns) for n in range(2)],
        "test": [write_csv(tmp_path / "test.csv", stars[:7], columns)],
        "text_column": "review",
        "label_column": "stars",
    }
    result = train(tmp_path / "run", given)
    assert result.metrics.labels == ["9", "10", "11"]
    assert result.metrics.support.tolist() == [3, 2, 2]
    config = json.loads((result.checkpoint / "config.json").read_text())
    assert config["id2label"] == {"0": "9", "1": "10", "2": "11"}


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_run_that_was_ended_goes_on_bit_by_bit(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    train(tmp_path / "whole", given)
    real, calls = classifier.loss, []

    def ended(model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) > step:
            raise KeyboardInterrupt
        return real(model, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(classifier, "loss", ended)
        train(tmp_path / "ended", given)
    left = [p.name for p in state.checkpoints(tmp_path / "ended")]
    assert left == ([f"checkpoint-0000000{step // 2 * 2}"] if step > 1 else [])
    train(tmp_path / "ended", {}, resume=True)
    assert rows(tmp_path / "ended") == rows(tmp_path / "whole")
    whole, ended_one = (contents(tmp_path / n) for n in ("whole", "ended"))
    for name in ("model.safetensors", "optimizer.safetensors"):
        file = f"checkpoint-00000006/{name}"
        assert whole[file] == ended_one[file]
    for name in ("metrics.json", "confusion.csv"):
        assert whole[name] == ended_one[name]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_as_one(given: dict[str, Any], parallel: str, tmp_path: Path) -> None:
    given = given | NO_DROPOUT | {"accumulate": 2, "parallel": parallel}
    train(tmp_path / "one", given)
    done = run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pyfuse",
            "train", "classifier", "--out", str(tmp_path / "two"), *as_arguments(given),
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("What was taken for what") == 1  # the first process alone speaks
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        for name in ("loss", "gradient_norm", "accuracy", "macro_f1"):
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-4), name
    assert contents(tmp_path / "two").keys() - contents(tmp_path / "one").keys() == {"curves.png"}


def test_what_went_on_with_other_texts_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    mine = given | {"data": [write_csv(tmp_path / "a.csv", reviews())]}
    train(tmp_path / "run", mine)
    before = contents(tmp_path / "run")
    write_csv(tmp_path / "a.csv", reviews(seed=1))
    with pytest.raises(TrainingError, match="are not the texts that the run began with"):
        train(tmp_path / "run", {"steps": 8}, resume=True)
    moved = given["data"]  # the same texts, elsewhere
    with pytest.raises(TrainingError, match=r"--held-out: 0\.5, but the run has 0\.2"):
        train(tmp_path / "run", {"data": moved, "held_out": 0.5}, resume=True)
    assert contents(tmp_path / "run") == before
    assert train(tmp_path / "run", {"data": moved, "steps": 8}, resume=True).steps == 8


def test_a_damaged_checkpoint_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    folder = train(tmp_path / "run", given).checkpoint
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    before = contents(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"model\.safetensors: 100 of \d+ bytes; the chec"):
        train(tmp_path / "run", {"steps": 8}, resume=True)
    assert contents(tmp_path / "run") == before


def test_a_full_disk_leaves_the_old_metrics(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path / "run", given)
    before, real = contents(tmp_path / "run")["metrics.json"], os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == classifier.METRICS:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(TrainingError, match=r"run: cannot write \(No space left on device\)"):
            train(tmp_path / "run", {"steps": 9}, resume=True)
    assert contents(tmp_path / "run")["metrics.json"] == before
    result = train(tmp_path / "run", {}, resume=True)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert result.steps == 9 and found == result.metrics.as_json()


def test_the_command(given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    out = ["train", "classifier", "--out", str(tmp_path / "run")]
    assert cli.main([*out, *as_arguments(given)]) == 0
    said = capsys.readouterr().out
    assert "accuracy" in said and "macro average" in said and "as positive" in said
    assert "checkpoint-00000006" in said
    assert cli.main([*out, "--resume", "--steps", "7"]) == 0
    assert "7 steps in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "--data: needed, a CSV file of texts and labels"),
        ("--data {csv}", "--from: needed, an encoder to begin with"),
        ("--data nowhere.csv --from {bert}", "--data: there is no file nowhere.csv"),
        ("--data {csv} --from {bert} --test {csv} --held-out 0.1", "--held-out: nothing of --data"),
        ("--data {csv} --from {bert} --held-out 1", "--held-out: got 1, needs at least 0.001"),
        (
            "--data {csv} --from {bert} --text-column words",
            "has no column 'words'; its columns are",
        ),
        ("--data {csv} --from {bert} --label-column text", "one text only has the label"),
        ("--data {csv} --from {bert} --test {other}", "--test: the label 'neutral' (row 2) is in"),
        ("--data {other} --from {bert}", "a classifier needs two labels, all texts have 'neutral'"),
        ("--data {csv} --from {gpt2}", "a classifier needs an encoder (BERT)"),
        (
            "--data {csv} --from {bert} --context 17",
            "--context: 17, but the model of --from has 16",
        ),
        ("--data {csv} --from nowhere", "has no tokenizer.json"),
    ],
)
def test_wrong_usage(
    arguments: str, message: str, given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    other = write_csv(tmp_path / "other.csv", [("it is", "neutral"), ("film", "neutral")])
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 64}
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer = (given["from_"] / "tokenizer.json").read_bytes()
    (tmp_path / "gpt2" / "tokenizer.json").write_bytes(tokenizer)
    names = {"csv": given["data"][0], "bert": given["from_"], "other": other}
    chosen = arguments.format(**names, gpt2=tmp_path / "gpt2").split()
    small = as_arguments({n: v for n, v in SMALL.items() if n != "context"} | {"context": 8})
    status = cli.main(["train", "classifier", "--out", str(tmp_path / "run"), *small, *chosen])
    said = capsys.readouterr()
    assert status == 2 and message in said.err, said
    assert not (tmp_path / "run").exists()


def test_a_model_by_its_name(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path))
    chosen = as_arguments({"data": given["data"], "from_": "minilm"})
    assert cli.main(["train", "classifier", "--out", str(tmp_path / "run"), *chosen]) == 2
    assert "fetch it with: pyfuse models fetch minilm" in capsys.readouterr().err


def test_parts_of_a_batch_add_up_and_bf16_is_near(given: dict[str, Any], tmp_path: Path) -> None:
    given = given | NO_DROPOUT | {"save_every": 0, "eval_every": 0}
    train(tmp_path / "one", given | {"batch": 8})
    train(tmp_path / "parts", given | {"accumulate": 2})
    train(tmp_path / "bf16", given | {"batch": 8, "dtype": "bf16"})
    one, parts, bf16 = (
        [float(r["loss"]) for r in rows(tmp_path / n)] for n in ("one", "parts", "bf16")
    )
    assert one == pytest.approx(parts, rel=1e-4)
    assert one == pytest.approx(bf16, rel=0.05) and one != bf16

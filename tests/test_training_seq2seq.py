"""`pyfuse.training.seq2seq`: dates into ISO 8601, held-out years, greedy answers, and a run of it."""

from __future__ import annotations

import io
import random
import re
import sys
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from training_cases import as_arguments, contents, rows, run

from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.transformer import Transformer
from pyfuse.training import dates, seq2seq, state
from pyfuse.training.loop import IGNORED
from pyfuse.training.pairs import Pairs, batch, greedy
from pyfuse.training.tokens import single_bytes
from pyfuse.training.world import World

SMALL: dict[str, Any] = {
    "layers": 1, "width": 16, "heads": 2, "batch": 4, "steps": 6, "warmup": 2, "save_every": 2, "eval_every": 3,
    "eval_examples": 10, "device": "cpu", "threads": 1, "lr": 0.01,
}  # fmt: skip
DROPOUT: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.3}
ISO = r"\d{4}-\d\d(-\d\d(/\d{4}-\d\d-\d\d)?)?"


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here."""
    if request.node.name != "test_what_a_run_leaves":
        monkeypatch.setattr("pyfuse.training.curves.draw", lambda *_: None)


def train(folder: Path, resume: bool = False, **given: Any) -> seq2seq.Result:
    options = given if resume else SMALL | given
    result = seq2seq.run(folder, options, resume=resume, speak=io.StringIO())
    assert result is not None
    return result


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [float(row["loss"]) for row in rows(folder) if row["kind"] == kind]


# ---- the task ------------------------------------------------------------------------------------


def test_no_question_of_an_evaluation_can_have_been_learnt_from() -> None:
    """Every question has its year in it as digits, and the years are in one part only."""
    for seed in (0, 1):
        learnt, held = dates.years(seed)
        assert not set(learnt) & set(held) and len(held) == dates.HELD_OUT_YEARS
        assert sorted(learnt + held) == list(range(dates.FIRST_YEAR, dates.LAST_YEAR + 1))
        for part in (learnt, held):
            generator, found = random.Random(5), set()
            for _ in range(2000):
                question, answer = dates.example(generator, part)
                (year,) = re.findall(r"\d{4}", question)
                assert int(year) in part and set(re.findall(r"\d{4}", answer)) == {year}
                found.add(question)
            assert len(found) > 1000
    assert dates.years(0) != dates.years(1)


def test_forms_of_a_date() -> None:
    day, end = date(1987, 3, 22), date(1987, 4, 3)
    assert dates.day_forms(day) == [
        "22 March 1987", "March 22, 1987", "22 Mar. 1987", "Mar. 22, 1987", "Sunday, 22 March 1987",
        "22nd of March 1987", "March 22nd, 1987", "the twenty-second of March, 1987", "1987, March 22",
        "22.3.1987", "3/22/1987",
    ]  # fmt: skip
    assert dates.month_forms(day)[:3] == ["March 1987", "Mar. 1987", "3/1987"]
    assert "from 22 March to 3 April 1987" in dates.interval_forms(day, end)
    assert "March 22-30, 1987" in dates.interval_forms(day, date(1987, 3, 30))
    ordinals = [re.sub("of.*", "", dates.day_forms(date(1, 1, d))[5]) for d in range(1, 32)]
    assert [o for o in ordinals if "th" not in o] == [
        "1st ", "2nd ", "3rd ", "21st ", "22nd ", "23rd ", "31st ",
    ]  # fmt: skip
    in_words = [dates.day_forms(date(1, 1, d))[7] for d in (1, 20, 21, 30, 31)]
    assert [w.split()[1] for w in in_words] == [
        "first", "twentieth", "twenty-first", "thirtieth", "thirty-first",
    ]  # fmt: skip


def test_every_form_is_short_and_means_one_thing() -> None:
    """Of a leap year and another one: no two answers have the same question, so that all can be known."""
    meaning: dict[str, str] = {}
    for year in (2023, 2024):
        for n in range(366):
            day = date(year, 1, 1) + timedelta(n)
            said = [(q, f"{day}") for q in dates.day_forms(day)]
            said += [(q, f"{day:%Y-%m}") for q in dates.month_forms(day)]
            for later in (1, 8, 20, 59):
                end = min(day + timedelta(later), date(day.year, 12, 31))
                if end > day:
                    said += [(q, f"{day}/{end}") for q in dates.interval_forms(day, end)]
            for question, answer in said:
                assert meaning.setdefault(question, answer) == answer
                assert question.isascii() and re.fullmatch(ISO, answer)
                assert max(len(question), len(answer)) <= dates.LONGEST


def test_batches_are_padded_and_follow_from_the_step() -> None:
    tokenizer = single_bytes()
    end = tokenizer.end
    assert end is not None
    made = batch([("ab", "x"), ("abcd", "xyz")], tokenizer)
    assert {n: t.shape for n, t in made.items()} == {
        "ids": (2, 4), "mask": (2, 4), "decoder_ids": (2, 4), "targets": (2, 4),
    }  # fmt: skip
    assert made["mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    x = tokenizer.library.token_to_id("x")
    assert made["targets"][0].tolist() == [x, end, IGNORED, IGNORED]
    assert made["decoder_ids"][0, :2].tolist() == [end, x] and made["decoder_ids"][1, 0] == end
    assert torch.equal(made["targets"][1, :-1], made["decoder_ids"][1, 1:])

    def make(generator: random.Random) -> tuple[str, str]:
        return dates.example(generator, dates.years(0)[0])

    a, b = (Pairs(make, tokenizer, seed=0, count=8) for _ in range(2))
    a.rows(0)
    assert all(torch.equal(t, b.rows(3)[n]) for n, t in a.rows(3).items())
    assert not torch.equal(a.rows(4)["ids"][0], a.rows(3)["ids"][0])
    assert not a.rows(3)["mask"].all() and (a.rows(3)["targets"] == IGNORED).any()


# ---- the model -----------------------------------------------------------------------------------


def made() -> Transformer:
    torch.manual_seed(2)
    model = Transformer(seq2seq.new_config(seq2seq.Options(layers=1, width=16, heads=2), 257))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


@torch.no_grad()
def test_greedy_answers_are_the_largest_logits() -> None:
    model, ids = made(), torch.randint(1, 257, (5, 9))
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    memory = model.encode(ids, mask)
    said = greedy(model, memory, mask, end=0, longest=7)
    assert said.shape == (5, 7)
    given = F.pad(said, (1, 0))[:, :-1]
    wanted = model(given, memory=memory, memory_mask=mask).argmax(-1)
    ended = (said == 0).cumsum(1).bool()
    assert torch.equal(said, wanted.masked_fill(ended, 0))
    model.bias[0] = 1e4  # type: ignore[index]
    assert greedy(model, memory, mask, end=0, longest=7).tolist() == [[0] * 7] * 5


@torch.no_grad()
def test_an_answer_with_one_mistake_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = made(), single_bytes()
    pairs = [("March 3, 1987", "1987-03-03"), ("March 1987", "1987-03")]
    part = batch(pairs, tokenizer)
    right = part["targets"].masked_fill(part["targets"] == IGNORED, 0)
    for wrong, exact in ((None, 2.0), ((0, 9), 1.0), ((1, 7), 1.0), ((1, 8), 1.0)):
        said = right.clone()
        if wrong is not None:
            said[wrong] = 7
        monkeypatch.setattr(seq2seq, "greedy", lambda *_, said=said, **__: said)
        total, _, targets, found, count = seq2seq.scores(model, part, end=0)
        assert (found, count, targets) == (exact, 2.0, 19.0)
        assert total / targets == pytest.approx(seq2seq.loss(model, part).item(), rel=1e-5)


def test_smoothing_changes_what_is_minimised() -> None:
    model, part = made(), batch([("March 3, 1987", "1987-03-03")], single_bytes())
    options = seq2seq.Options(label_smoothing=0.1)
    smooth = seq2seq.Seq2Seq().objective(options)(model, part)
    memory = model.encode(part["ids"], part["mask"])
    logits = model(part["decoder_ids"], memory=memory, memory_mask=part["mask"])
    wanted = F.cross_entropy(logits.flatten(0, 1), part["targets"].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(smooth, wanted, rtol=1e-5, atol=1e-6)
    assert smooth.item() != pytest.approx(seq2seq.loss(model, part).item(), rel=1e-4)


# ---- a run ---------------------------------------------------------------------------------------


def test_the_losses_fall_and_are_those_of_plain_torch(tmp_path: Path) -> None:
    more: dict[str, Any] = {
        "steps": 32, "layers": 2, "width": 32, "batch": 16, "save_every": 0, "eval_every": 0, "lr": 0.003,
    }  # fmt: skip
    result = train(tmp_path / "ours", **more)
    stock = train(tmp_path / "stock", stock=True, **more)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "stock"), rel=1e-5)
    assert result.loss == pytest.approx(stock.loss, rel=1e-5)
    held = losses(tmp_path / "ours", "eval")
    assert held[-1] == result.loss < 0.7 * held[0] and result.uniform == 257
    assert result.figures["token_accuracy"] == stock.figures["token_accuracy"] > 0.1


def test_what_a_run_leaves(tmp_path: Path) -> None:
    result = train(tmp_path / "run")
    assert {p.partition("/")[2] or p for p in contents(tmp_path / "run")} == {
        "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "curves.png",
        "tokenizer_config.json", "log.csv", "run.json",
    }  # fmt: skip
    table = rows(tmp_path / "run")
    evaluations = [row for row in table if row["kind"] == "eval"]
    assert [row["step"] for row in evaluations] == ["0", "3", "6"]
    for row in evaluations:
        assert 0.0 <= float(row["exact_match"]) <= float(row["token_accuracy"]) <= 1.0
    assert set(result.figures) == {"loss", "token_accuracy", "exact_match"}
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_hugging_face_gives_the_same_answers(tmp_path: Path) -> None:
    """A checkpoint is a Marian with a tokenizer: its generate() says what `greedy` does."""
    folder = train(tmp_path / "run", steps=20).checkpoint
    model: Any = hf.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    tokenizer = single_bytes()
    assert type(model).__name__ == "MarianMTModel"
    part = batch([("March 3, 1987", "1987-03-03"), ("3/1987", "1987-03")], tokenizer)
    ours = from_pretrained(folder, position="sinusoidal")
    with torch.no_grad():
        memory = ours.encode(part["ids"], part["mask"])
        said = greedy(ours, memory, part["mask"], end=0, longest=12)
        theirs = model.generate(
            part["ids"], attention_mask=part["mask"], num_beams=1, do_sample=False, max_new_tokens=12,
            renormalize_logits=False,
        )  # fmt: skip
    assert torch.equal(theirs[:, 1:], said[:, : theirs.shape[1] - 1])
    read = hf.AutoTokenizer.from_pretrained(folder)
    assert read("March 3, 1987")["input_ids"] == part["ids"][0].tolist()


def test_a_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    train(tmp_path / "whole", steps=8, **DROPOUT, label_smoothing=0.1)
    train(tmp_path / "parts", steps=8, **DROPOUT, label_smoothing=0.1)
    last = state.checkpoints(tmp_path / "parts")[-1]
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    train(tmp_path / "parts", resume=True)  # from the beginning: there is no other checkpoint
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    train(tmp_path / "short", steps=4, **DROPOUT, label_smoothing=0.1, warmup=100, eval_every=0)
    train(tmp_path / "long", steps=8, **DROPOUT, label_smoothing=0.1, warmup=100, eval_every=0)
    train(tmp_path / "short", resume=True, steps=8)
    ours, theirs = losses(tmp_path / "short"), losses(tmp_path / "long")
    assert ours == theirs
    ends = [
        (state.checkpoints(tmp_path / run)[-1] / name).read_bytes()
        for name in ("model.safetensors", "optimizer.safetensors")
        for run in ("short", "long")
    ]
    assert ends[0] == ends[1] and ends[2] == ends[3]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_share_the_batches(parallel: str, tmp_path: Path) -> None:
    """Their losses are those of one; parts of a batch differ in targets and padding."""
    options = SMALL | {"steps": 4, "eval_every": 2, "parallel": parallel}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
    ]
    train_it = ["-m", "pyfuse", "train", "seq2seq", "--out", str(tmp_path / "two")]
    found = run([*torchrun, *train_it, *as_arguments(options)])
    assert found.returncode == 0, found.stderr
    assert "exact match" in found.stdout
    train(tmp_path / "one", steps=4, eval_every=2)
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for name in ("loss", "gradient_norm", "token_accuracy", "exact_match"):
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-5)


def test_from_a_pretrained_model(tmp_path: Path) -> None:
    first = train(tmp_path / "first", steps=10).checkpoint
    own = {n: v for n, v in SMALL.items() if n not in ("layers", "width", "heads")}
    second = seq2seq.run(
        tmp_path / "second", own | {"from_": first, "steps": 2}, speak=io.StringIO()
    )
    assert second is not None
    before, after = losses(tmp_path / "first", "eval"), losses(tmp_path / "second", "eval")
    assert after[0] == pytest.approx(before[-1], rel=1e-5)
    with pytest.raises(ValueError, match="--layers: --from has a model"):
        seq2seq.run(tmp_path / "third", SMALL | {"from_": first})
    with pytest.raises(ValueError, match="--context: got 10, needs at least 65"):
        seq2seq.run(tmp_path / "third", SMALL | {"context": 10})


def test_evaluations_do_not_depend_on_who_does_them() -> None:
    """Each process its share, in batches of any size."""
    program, model = seq2seq.Seq2Seq(), made()
    found = []
    for size in (3, 10):
        options = seq2seq.Options(batch=size, eval_examples=10)
        world = World(torch.device("cpu"))
        material = program.material(options, None, world)
        with torch.no_grad():
            found.append(program.evaluation(model, material, options, world)())
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-5)

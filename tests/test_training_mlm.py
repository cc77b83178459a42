"""`pyfuse.training.mlm`: which tokens are hidden, that they are found out, and what is left of it."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from training_cases import losses, rows, small_mlm, write_text

from pyfuse.models import transformer
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.training import mlm, tokens
from pyfuse.training.loop import IGNORED
from pyfuse.training.masking import Marks, Masked, Masking, inner, marks
from pyfuse.training.windows import Windows, evenly

MARKS = Marks(cls=2, sep=3, mask=4)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here; one test has it."""
    if request.node.name != "test_what_a_run_leaves":
        monkeypatch.setattr("pyfuse.training.curves.draw", lambda *_: None)


def train(folder: Path, text: Path, **more: Any) -> mlm.Result:
    result = mlm.run(folder, small_mlm(text, **more), speak=io.StringIO())
    assert result is not None
    return result


# ---- which tokens --------------------------------------------------------------------------------


def test_shares_of_hidden_tokens_are_berts() -> None:
    torch.manual_seed(0)
    windows = list(torch.randint(5, 10_005, (400, 126), dtype=torch.int32))
    batch = Masking(MARKS, 10_005, 0.15).batch(windows, 0, 0)
    ids, targets = batch["ids"], batch["targets"]
    assert ids.shape == targets.shape == (400, 128) and ids.dtype == targets.dtype == torch.int64
    chosen = targets != IGNORED
    assert set(chosen.sum(1).tolist()) == {round(0.15 * 126)}
    before = torch.stack(windows).long()
    assert torch.equal(targets[:, 1:-1][chosen[:, 1:-1]], before[chosen[:, 1:-1]])
    assert torch.equal(ids[:, 1:-1][~chosen[:, 1:-1]], before[~chosen[:, 1:-1]])
    count = chosen.sum().item()
    hidden = (ids[chosen] == MARKS.mask).sum().item() / count
    kept = (ids[chosen] == targets[chosen]).sum().item() / count
    assert hidden == pytest.approx(0.8, abs=0.02) and kept == pytest.approx(0.1, abs=0.02)
    replaced = ids[chosen & (ids != targets) & (ids != MARKS.mask)]
    assert replaced.min() < 200 and replaced.max() > 9_800 and len(replaced.unique()) > 600
    places = chosen.sum(0)[1:-1].double()  # each as likely as any other: 60 ± 7
    assert places.min() > 35 and places.max() < 90


def test_marks_are_never_hidden_and_something_always_is() -> None:
    windows = [torch.tensor(w) for w in ([7, 3], [3, 9], [8, 8])]
    for seed in range(50):
        batch = Masking(MARKS, 10, 0.15).batch(windows, seed)
        assert batch["ids"][:, 0].eq(2).all() and batch["ids"][:, -1].eq(3).all()
        assert batch["targets"].ne(IGNORED).sum(1).tolist() == [1, 1, 1]
        assert batch["targets"][0, 1] == 7 and batch["targets"][1, 2] == 9


def test_what_is_hidden_follows_from_seed_and_step() -> None:
    windows = Windows(torch.arange(5, 1000), 14, seed=0, count=4)
    masking = Masking(MARKS, 1000, 0.3)
    data, again = (Masked(windows, masking, seed=1) for _ in range(2))
    first = data.rows(0)
    assert first["ids"].shape == (4, 16)
    for step in (3, 1, 0):
        for name, t in data.rows(step).items():
            assert torch.equal(t, again.rows(step)[name])
    same = data.rows(step)["targets"]
    for other in (Masked(windows, masking, seed=2).rows(0), data.rows(1)):
        assert not torch.equal(same != IGNORED, other["targets"] != IGNORED)


def test_the_tokenizer_has_berts_marks_and_any_text(text: Path) -> None:
    documents = [f.read_text(encoding="utf-8") for f in sorted(text.iterdir())]
    tokenizer = tokens.with_marks(tokens.train_bpe(documents, 280, tokens.MARKS))
    assert [tokenizer.library.token_to_id(name) for name in tokens.MARKS] == [0, 1, 2, 3, 4]
    assert marks(tokenizer) == MARKS and tokenizer.end == 3 and tokenizer.size == 280
    stream = tokenizer.stream(["a [MASK] b", "ß漢"])
    assert (stream == 3).sum() == 2 and stream[-1] == 3 and not (stream == 4).any()
    assert 1 not in stream and 2 not in stream
    encoded = tokenizer.library.encode("the file").ids
    assert encoded[0] == 2 and encoded[-1] == 3
    with pytest.raises(ValueError, match="vocabulary: got 260, needs at least 261"):
        tokens.train_bpe(documents, 260, tokens.MARKS)
    with pytest.raises(ValueError, match=r"--from: its tokenizer has no \[CLS\] or <s>"):
        marks(tokens.single_bytes())


# ---- the run -------------------------------------------------------------------------------------


def test_the_losses_fall_and_are_those_of_plain_torch(text: Path, tmp_path: Path) -> None:
    more = {"steps": 30, "layers": 2, "save_every": 0}
    result = train(tmp_path / "ours", text, **more)
    stock = train(tmp_path / "stock", text, stock=True, **more)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "stock"), rel=1e-5)
    held = losses(tmp_path / "ours", "eval")
    assert held[0] == pytest.approx(math.log(280), abs=0.1) and result.uniform == 280
    assert held[-1] == result.loss == pytest.approx(stock.loss, rel=1e-5)
    assert result.loss < 0.8 * held[0] and result.figures["perplexity"] == math.exp(result.loss)


def test_what_a_run_leaves(text: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "run", text, dropout=0.1)
    assert sorted(p.name for p in result.checkpoint.iterdir()) == [
        "config.json", "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = rows(tmp_path / "run")
    assert list(table[0])[:6] == ["step", "kind", "tokens", "loss", "perplexity", "accuracy"]
    assert table[1]["tokens"] == "64" and table[1]["accuracy"] == ""


def test_the_figures_are_of_the_hidden_tokens(text: Path, tmp_path: Path) -> None:
    """Of the checkpoint, by Hugging Face's model: all logits, then those that count."""
    given = mlm.Options(**small_mlm(text))
    result = train(tmp_path / "run", text, steps=20, seed=0)
    theirs = hf.AutoModelForMaskedLM.from_pretrained(result.checkpoint).eval()
    tokenizer = tokens.from_folder(result.checkpoint)
    documents = [f.read_text(encoding="utf-8") for f in sorted(text.iterdir())]
    held = "".join(documents)[-round(len("".join(documents)) * given.held_out) :]
    windows = Windows(tokenizer.stream([held]), given.context - 2, seed=0, count=1)
    batch = Masking(MARKS, 280, 0.15).batch([inner(w) for w in evenly(windows, 5)], 0)
    with torch.no_grad():
        logits = theirs(batch["ids"]).logits
        ours = from_pretrained(result.checkpoint)(batch["ids"])
    torch.testing.assert_close(logits, ours, rtol=1e-4, atol=1e-5)
    hidden = batch["targets"] != IGNORED
    loss = torch.nn.functional.cross_entropy(logits[hidden], batch["targets"][hidden]).item()
    right = (logits.argmax(-1)[hidden] == batch["targets"][hidden]).double().mean().item()
    assert result.loss == pytest.approx(loss, rel=1e-5) and result.figures["accuracy"] == right


def test_hugging_face_fills_a_mask(text: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", text).checkpoint
    fill = hf.pipeline("fill-mask", model=str(folder))
    assert fill.tokenizer.mask_token == "[MASK]" and fill.tokenizer.model_max_length == 16
    assert len(fill("the [MASK] says")) == 5


def test_only_hidden_tokens_reach_the_vocabulary(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], transformer.pyfuse_ops.linear_cross_entropy

    def loss(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(x.shape)
        return real(x, *arguments, **options)

    monkeypatch.setattr(transformer.pyfuse_ops, "linear_cross_entropy", loss)
    train(tmp_path / "run", text, steps=2)
    assert seen == [(8, 16)] * 2  # two of 14 tokens in each of four sequences


def test_evaluations_hide_the_same_tokens_whatever_the_seed(text: Path, tmp_path: Path) -> None:
    first = train(tmp_path / "first", text, steps=2).checkpoint
    evaluated = []
    for seed in (0, 5):
        given = small_mlm(text, from_=first, steps=1, seed=seed)
        for name in ("vocabulary", "layers", "width", "heads"):
            del given[name]
        mlm.run(tmp_path / str(seed), given, speak=io.StringIO())
        evaluated.append(losses(tmp_path / str(seed), "eval")[0])
    assert evaluated[0] == evaluated[1] == losses(tmp_path / "first", "eval")[-1]


def test_from_a_bert_without_a_head(text: Path, tmp_path: Path) -> None:
    """Its head begins anew; its words are its own tokenizer's."""
    first = train(tmp_path / "first", text, steps=2).checkpoint
    bert = hf.AutoModelForMaskedLM.from_pretrained(first).bert
    bert.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_bytes((first / "tokenizer.json").read_bytes())
    given = small_mlm(text, from_=tmp_path / "bert")
    with pytest.raises(ValueError, match="--layers: --from has a model and a tokenizer"):
        mlm.run(tmp_path / "run", given)
    for name in ("vocabulary", "layers", "width", "heads"):
        del given[name]
    with pytest.raises(ValueError, match="--context: 17, but the model of --from has 16 positions"):
        mlm.run(tmp_path / "run", given | {"context": 17})
    assert not (tmp_path / "run").exists()
    mlm.run(tmp_path / "run", given, speak=io.StringIO())
    assert losses(tmp_path / "run", "eval")[-1] < losses(tmp_path / "run", "eval")[0]

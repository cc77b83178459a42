"""`pyfuse.training.lm`: it learns, as plain torch does, and leaves what it says."""

from __future__ import annotations

import io
import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from training_cases import SMALL, contents, losses, rows, small, write_text

from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.export import hf_config, hf_tensors
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training import lm
from pyfuse.training.curves import columns, read_log
from pyfuse.training.errors import TrainingError
from pyfuse.training.loop import Plan, adamw
from pyfuse.training.products import Products

LOSSES = ("loss", "perplexity", "gradient_norm")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text")


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here; one test has it."""
    if request.node.name != "test_what_a_run_leaves":
        monkeypatch.setattr("pyfuse.training.curves.draw", lambda *_: None)


def train(folder: Path, text: Path, **more: Any) -> lm.Result:
    result = lm.run(folder, small(text, **more), speak=io.StringIO())
    assert result is not None
    return result


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_losses_fall_and_are_those_of_plain_torch(
    kind: str, text: Path, tmp_path: Path
) -> None:
    more = {"kind": kind, "steps": 30, "layers": 2, "save_every": 0}
    result = train(tmp_path / "ours", text, **more)
    stock = train(tmp_path / "stock", text, stock=True, **more)
    assert losses(tmp_path / "ours") == pytest.approx(losses(tmp_path / "stock"), rel=1e-5)
    assert result.loss == pytest.approx(stock.loss, rel=1e-5)
    held = losses(tmp_path / "ours", "eval")
    assert held[0] == pytest.approx(math.log(257), abs=0.1)
    assert held[-1] == result.loss < 0.75 * held[0] and result.uniform == 257
    assert result.perplexity == math.exp(result.loss) and result.speed > 0


def test_what_a_run_leaves(text: Path, tmp_path: Path) -> None:
    result = train(tmp_path / "run", text)
    assert sorted(contents(tmp_path / "run")) == [
        *(f"checkpoint-00000006/{n}" for n in ("config.json", "model.safetensors", "optimizer.safetensors")),
        *(f"checkpoint-00000006/{n}" for n in ("state.json", "tokenizer.json")),
        "curves.png", "log.csv", "run.json",
    ]  # fmt: skip
    table = read_log(tmp_path / "run" / "log.csv")
    assert tuple(table[0]) == columns(lm.LanguageModel.figures)
    found = [(int(row["step"]), row["kind"]) for row in table]
    steps = [(i, "train") for i in range(1, 7)]
    assert found == [(0, "eval"), *steps[:3], (3, "eval"), *steps[3:], (6, "eval")]
    assert [int(row["tokens"]) for row in table if row["kind"] == "train"] == [
        64 * i for i in range(1, 7)
    ]
    for row in table:
        wanted = {"loss", "seconds"} | (
            {"perplexity"}
            if row["kind"] == "eval"
            else {"lr", "gradient_norm", "tokens_per_second"}
        )
        assert all(math.isfinite(float(row[name])) for name in wanted)
    picture = (tmp_path / "run" / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and _pixels_differ(picture)
    assert result.checkpoint == tmp_path / "run" / "checkpoint-00000006"


def _pixels_differ(png: bytes) -> bool:
    """Whether the image data unpacks, and is not of one colour."""
    data, at = b"", 8
    while at < len(png):
        size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    return len(set(zlib.decompress(data))) > 20


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hugging_face_reads_a_checkpoint(kind: str, text: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", text, kind=kind, steps=3, dropout=0.1).checkpoint
    model = hf.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(257, (2, 16))
    with torch.no_grad():
        ours = from_pretrained(folder)(ids)
        torch.testing.assert_close(model(ids).logits, ours, rtol=1e-4, atol=1e-5)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("ä file")["input_ids"]) == "ä file"
    assert model.config.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied": False, "activation": "relu"},
        {"position": "rope", "norm": "rms", "gated": True, "activation": "silu", "kv_heads": 2, "tied": False},
        {"position": "rope", "norm": "rms", "gated": True, "activation": "silu", "window": 5, "head_dim": 8,
         "attention_bias": False, "hidden_bias": False},
    ],
    ids=["gpt2", "gpt2-untied", "llama", "mistral"],
)  # fmt: skip
def test_weights_go_out_and_come_back(fields: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"vocabulary": 31, "width": 24, "layers": 2, "heads": 4, "hidden": 40}
    model = Transformer(Config(**sizes, **fields))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    config = hf_config(model.config, 0)
    theirs = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config))
    theirs.load_state_dict(hf_tensors(model, config["model_type"]), strict=False)
    theirs.tie_weights()
    back = from_pretrained(theirs).state_dict()
    for name, t in model.state_dict().items():
        assert torch.equal(back[name], t), name


def test_what_has_no_form_to_be_saved_in_is_refused() -> None:
    sizes = {"vocabulary": 31, "width": 24, "layers": 2, "heads": 4, "hidden": 40}
    for fields in ({"causal": False}, {"norm_first": False}, {"position": "sinusoidal"}):
        with pytest.raises(ValueError, match="config: "):
            hf_config(Config(**sizes, **fields), None)


def test_parts_of_a_batch_add_up(text: Path, tmp_path: Path) -> None:
    train(tmp_path / "one", text, weight_decay=0.0)
    train(tmp_path / "parts", text, weight_decay=0.0, batch=2, accumulate=2)
    one, parts = rows(tmp_path / "one"), rows(tmp_path / "parts")
    for a, b in zip(one, parts, strict=True):
        for name in LOSSES:
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=1e-5)


def test_options_have_their_effect(text: Path, tmp_path: Path) -> None:
    train(tmp_path / "plain", text)
    plain = losses(tmp_path / "plain")
    for i, more in enumerate(
        (
            {"seed": 1}, {"dtype": "bf16"}, {"dropout": 0.2}, {"attention_dropout": 0.2}, {"hidden_dropout": 0.2},
            {"lr": 0.02}, {"warmup": 3}, {"clip": 0.1}, {"weight_decay": 0.9}, {"steps": 5},
        )
    ):  # fmt: skip
        train(tmp_path / str(i), text, **more)
        assert losses(tmp_path / str(i)) != plain[: more.get("steps", 6)], more
    for i, more in enumerate(({"recompute": True}, {"deterministic": True}, {"clip": 1e9})):
        train(tmp_path / f"same-{i}", text, **({"clip": 0.0} if "clip" in more else {}))
        train(tmp_path / f"{i}-same", text, **more)
        assert losses(tmp_path / f"same-{i}") == losses(tmp_path / f"{i}-same"), more


def test_weight_decay_is_of_matrices_only() -> None:
    model = Transformer(lm.new_config(lm.Options(layers=1, width=16, heads=2, context=8), 300))
    decayed, others = adamw(model, Plan(1, weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and others["weight_decay"] == 0.0
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in others["params"]} == {
        1
    }
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_from_a_pretrained_model(text: Path, tmp_path: Path) -> None:
    """The run goes on with the weights, the tokenizer and the dropout of the folder."""
    first = train(tmp_path / "first", text, steps=20, dropout=0.1).checkpoint
    own = {"tokenizer", "layers", "width", "heads"}
    given = {n: v for n, v in small(text).items() if n not in own} | {"from_": first, "steps": 2}
    second = lm.run(tmp_path / "second", given, speak=io.StringIO())
    assert second is not None
    before, after = losses(tmp_path / "first", "eval"), losses(tmp_path / "second", "eval")
    assert after[0] == pytest.approx(before[-1], rel=1e-5)
    config = json.loads((second.checkpoint / "config.json").read_text())
    assert config["resid_pdrop"] == config["attn_pdrop"] == 0.1 and config["n_embd"] == 16
    for name, value in (("width", 16), ("vocabulary", 300)):
        with pytest.raises(ValueError, match=f"--{name}: --from has a model and a tokenizer"):
            lm.run(tmp_path / "third", given | {name: value})
    with pytest.raises(ValueError, match="--context: 17, but the model of --from has 16 positions"):
        lm.run(tmp_path / "third", given | {"context": 17})
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        lm.run(tmp_path / "third", given | {"from_": tmp_path})
    assert not (tmp_path / "third").exists()


def test_a_loss_that_is_no_number_ends_the_run(text: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"step \d: the loss is .*a smaller --lr"):
        train(tmp_path / "run", text, lr=1e30, warmup=0, clip=0.0)
    assert not list((tmp_path / "run").glob("checkpoint-*6"))


def test_products_that_are_known_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyfuse.backends import cpu_matmul

    def measured(calls: Any, seconds: float) -> dict[str, float]:
        return {way: float(way != "onednn") for way in calls}

    monkeypatch.setattr(cpu_matmul, "take_turns", measured)
    shape = (256, 192, 176)
    before = cpu_matmul._calibrate
    products = Products()
    with products.kept():
        chosen = cpu_matmul.choose("forward", *shape).way
    assert cpu_matmul._calibrate is before and chosen == cpu_matmul.ways()[-1]
    (saved,) = json.loads(json.dumps(products.saved()))
    for way in cpu_matmul.ways():  # whatever is saved is taken, the slower one as well
        with Products([[*saved[:-1], way]]).kept():
            assert cpu_matmul.choose("forward", *shape).way == way
    with Products([[*saved[:-1], "magic"]]).kept():  # of another build of torch
        assert cpu_matmul.choose("forward", *shape).way == chosen


def test_the_optimizers_state_is_saved_by_name(text: Path, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", text).checkpoint
    saved = load_file(folder / "optimizer.safetensors")
    config = json.loads((folder / "state.json").read_text())["config"]
    names = [name for name, _ in Transformer(Config(**config)).named_parameters()]
    assert saved.keys() == {f"{n}.{p}" for n in names for p in ("step", "exp_avg", "exp_avg_sq")}
    assert {saved[f"{n}.step"].item() for n in names} == {float(SMALL["steps"])}

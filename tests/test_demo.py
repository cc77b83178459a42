"""`pyfuse demo` on tiny random models, and the measuring it is made of. No test judges a time."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pyfuse
from pyfuse import cli
from pyfuse.cli import comparison, demo, measure, models
from pyfuse.models import zoo

transformers = pytest.importorskip("transformers")

TEMPLATE = "{% for m in messages %}<s>{{ m['content'] }}\n{% endfor %}"
WORK = 4 * ["fp32"] + 4 * ["bf16"]


def tokenizer_of(words: str) -> "transformers.PreTrainedTokenizerFast":
    """One token for each letter of `words`, special tokens first."""
    tokenizers = pytest.importorskip("tokenizers")
    names = ["<s>", "</s>", "<pad>", "<unk>", *sorted(set(words))]
    vocabulary = {name: number for number, name in enumerate(names)}
    plain = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with `smollm2` and `minilm`: one-layer models of the two architectures."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizer_of("".join(comparison.PROMPTS) + demo.DEFAULT_PROMPT + "\n")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 2,
    }
    llama = transformers.LlamaConfig(
        **sizes, num_key_value_heads=1, bos_token_id=0, eos_token_id=1, initializer_range=0.3
    )
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "smollm2")
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "minilm")
    for name in ("smollm2", "minilm"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def small_demo(tiny, monkeypatch):
    """The demo with tiny models and tiny lengths; threads are put back after it."""
    monkeypatch.setattr(zoo, "path", lambda name, cache=None: tiny / name)
    monkeypatch.setattr(zoo, "problem", lambda name, cache=None: None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    effort = comparison.Effort(2, 8, 6, (5, 20), (4,), 3, (2, 7), rounds=1)
    monkeypatch.setattr(comparison, "QUICK", effort)
    monkeypatch.setattr(comparison, "FULL", replace(effort, rounds=2))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class FakeReceipt:
    def __str__(self) -> str:
        return "a receipt"

    def as_dict(self) -> dict[str, object]:
        return {}


def test_the_whole_demo(small_demo, capsys):
    assert cli.main(["demo", "--quick", "--threads", "1", "--prompt", "Why?"]) == 0
    said = capsys.readouterr().out
    assert "> Why?" in said
    assert "greedy text the same as stock: 2 of 2 (fp32)" in said
    assert said.count("largest logit error against stock") == 2
    for label in ("smollm2 fp32", "minilm fp32", "smollm2 bf16", "minilm bf16"):
        assert f"\n{label}: " in said  # its receipt


def test_json_is_all_of_stdout(small_demo, capsys):
    assert cli.main(["demo", "--quick", "--json", "--threads", "1"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [row["dtype"] for row in report["rows"]] == WORK
    assert [row["work"] for row in report["rows"]] == 2 * [
        "prefill 5",
        "prefill 20",
        "decode at 4",
        "encode 2 x 7",
    ]
    for row in report["rows"]:
        assert row["gain"] == pytest.approx(row["fused"] / row["stock"]) and row["stock"] > 0
    assert report["threads"] == 1 and report["quick"] is True
    assert [text["equal"] for text in report["greedy"]] == [True, True]
    assert report["errors"]["smollm2 fp32"]["error"] < 1e-4
    assert report["answer"] in printed.err


def test_one_dtype(small_demo, capsys):
    assert cli.main(["demo", "--json", "--threads", "1", "--dtype", "bf16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["dtype"] for row in report["rows"]} == {"bf16"} and report["greedy"] == []


def test_a_wrong_text_is_the_exit_status(small_demo, monkeypatch, capsys):
    def harm(model: torch.nn.Module) -> FakeReceipt:
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(-1.5)
        return FakeReceipt()

    monkeypatch.setattr(pyfuse, "accelerate", harm)
    assert cli.main(["demo", "--quick", "--threads", "1", "--dtype", "fp32"]) == 1
    said = capsys.readouterr().out
    assert "DIFFERENT from token" in said and "same as stock: 0 of 2" in said


def test_a_refusal_is_told(small_demo, monkeypatch, capsys):
    def refuse(model: torch.nn.Module) -> FakeReceipt:
        raise ValueError("nothing here can be accelerated")

    monkeypatch.setattr(pyfuse, "accelerate", refuse)
    assert cli.main(["demo", "--quick", "--threads", "1"]) == 1
    said = capsys.readouterr().err
    assert "smollm2 fp32 was not accelerated: nothing here can" in said and "doctor" in said


def test_models_are_fetched_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path))
    asked = []

    def refuse(name: str) -> Path:
        asked.append(name)
        raise zoo.FetchError("no network here")

    monkeypatch.setattr(models, "fetch", refuse)
    assert cli.main(["demo"]) == 1
    said = capsys.readouterr().err
    assert asked == ["smollm2"] and "smollm2 is not fetched: fetching it once" in said
    assert "pyfuse demo: no network here" in said


def test_without_transformers(monkeypatch, capsys):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo"]) == 1
    assert "pip install 'pyfuse[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "got '0', needs a number of threads"),
        (["--threads", "two"], "got 'two', needs a number of threads"),
        (["--dtype", "fp32,fp8"], "got 'fp8', needs some of fp32,bf16"),
        (["--dtype", ""], "got '', needs some of fp32,bf16"),
    ],
)
def test_bad_options(words, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(["demo", *words])
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_the_texts_are_compared_at_the_first_difference():
    assert comparison.first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert comparison.first_difference([1, 2], [1, 2, 3]) == 2


def test_interleave_takes_turns_and_keeps_the_best():
    order: list[str] = []
    times = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 6.0, 4.0])}

    def run(label: str):
        def one() -> float:
            order.append(label)
            return next(times[label])

        return one

    assert measure.interleave({"a": run("a"), "b": run("b")}, 3) == {"a": 1.0, "b": 4.0}
    assert "".join(order) == "abbaab"


def test_interleave_stops_at_its_budget():
    now = iter([0.0, 4.0, 6.0])  # start, before the 3rd round, before the 4th
    calls: list[int] = []
    run = {"a": lambda: float(calls.append(1) or len(calls))}
    assert measure.interleave(run, 9, budget=5.0, clock=lambda: next(now)) == {"a": 1.0}
    assert len(calls) == 3


def test_interleave_refuses_nothing_to_do():
    with pytest.raises(ValueError, match="rounds: got 0, needs at least 1"):
        measure.interleave({"a": lambda: 1.0}, 0)
    with pytest.raises(ValueError, match="runs: got none"):
        measure.interleave({}, 1)
    with pytest.raises(ValueError, match="models: got none"):
        measure.prefill_ms({}, 3, rounds=1)


def lengths_seen(model: torch.nn.Module, monkeypatch) -> list[tuple[int, int]]:
    """A list that gets (new tokens, tokens in the cache before) of every forward of the model."""
    seen: list[tuple[int, int]] = []
    forward = model.forward

    def watched(*args, **kwargs):
        cache = kwargs.get("past_key_values")
        seen.append((kwargs["input_ids"].shape[1], 0 if cache is None else cache.get_seq_length()))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    return seen


def test_what_is_measured(tiny, monkeypatch):
    """decode: single tokens from the same context in every round; prefill: the prompt at once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / "smollm2").eval()
    seen = lengths_seen(model, monkeypatch)
    best = measure.decode_ms({"only": model}, 10, steps=3, rounds=2)
    assert list(best) == ["only"] and best["only"] > 0
    assert seen == [(10, 0), (1, 10), (1, 11), (1, 12), (1, 10), (1, 11), (1, 12)]
    seen.clear()
    assert measure.prefill_ms({"only": model}, 12, rounds=2)["only"] > 0
    assert seen == [(12, 0), (12, 0)]


def test_mean_pool_leaves_padding_out():
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    assert torch.equal(
        measure.mean_pool(states, torch.tensor([[1, 1, 0]])), torch.tensor([[2.0, 3.0]])
    )

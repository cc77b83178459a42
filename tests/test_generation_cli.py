"""`pyfuse generate`: its help, its errors, and what it prints."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from text_cases import (
    ENDS,
    MESSAGE,
    TEMPLATE,
    Terminal,
    of_hf,
    transformers,
    write_bart,
    write_gguf,
    write_llama,
)

from pyfuse import cli
from pyfuse.cli import answers, generate, knobs, show
from pyfuse.generation import request
from pyfuse.generation.runner import Runner
from pyfuse.generation.text import Tokenizer
from pyfuse.models import zoo


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a chat template."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "chat")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One without a chat template."""
    return write_llama(tmp_path_factory.mktemp("tiny") / "plain", template=None)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def results(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    """Of --json."""
    assert cli.main(["generate", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_help_says_something_of_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["generate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for names in knobs.GROUPS.values():
        for name in names:
            field = knobs.FIELDS[name]
            assert f"{knobs.flag(name)} " in said
            assert " ".join(field.metadata["text"].split()[:4]) in said, name
            if type(field.default) in (int, float):
                assert f"(default: {field.default:g})" in said, name
    for line in generate._EXAMPLES.splitlines():
        assert " ".join(line.split()) in said
    for option in ("--prompt", "--prompt-file", "--system", "--raw", "--stream", "--json"):
        assert f"{option} " in said


def test_the_examples_are_right_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(generate, "run", lambda arguments: seen.append(arguments) or 0)
    commands = [line for line in generate._EXAMPLES.splitlines() if "pyfuse generate" in line]
    for line in commands:
        assert cli.main(shlex.split(line.partition("pyfuse ")[2])) == 0
    assert len(seen) == len(commands) == 6
    assert seen[2].n == 3 and seen[2].seed == [7] and seen[2].prompt == ["A haiku.", "A limerick."]


def test_a_prompt_is_answered(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (expected,) = of_hf(tiny, MESSAGE.format("Why?"))
    assert cli.main(["generate", str(tiny), "--prompt", "Why?", "--max-new-tokens", "24"]) == 0
    said = capsys.readouterr()
    assert said.out == Tokenizer.of(tiny).decode(expected) + "\n" and len(expected) > 3
    assert "first token after " in said.err and " tok/s, " in said.err
    assert f"{len(expected)} tokens in " in said.err


def test_a_prompt_is_continued(tiny: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (expected,) = of_hf(tiny, "Why?")
    for folder, raw in ((tiny, ["--raw"]), (tiny, ["--no-chat-template"]), (plain, [])):
        arguments = [str(folder), "--prompt", "Why?", *raw, "--max-new-tokens", "24", "--json"]
        assert cli.main(["generate", *arguments]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["tokens"] == expected
        assert ("has no chat template: it continues the text" in said.err) == (not raw)


def test_the_system_message(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (expected,) = of_hf(tiny, "<|start|>system\nBe brief.<|stop|>\n" + MESSAGE.format("Why?"))
    arguments = (tiny, "--prompt", "Why?", "--system", "Be brief.", "--max-new-tokens", 24)
    assert results(capsys, *arguments)[0]["tokens"] == expected


def test_json_has_all_of_a_result(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ("Why?", "What is 😀?", "x")
    drawn = (
        "--temperature",
        0.8,
        "--top-k",
        40,
        "--top-p",
        0.95,
        "--min-p",
        0.01,
        "--n",
        3,
        "--seed",
        5,
    )
    more = ("--max-new-tokens", 12, "--min-new-tokens", 2, "--logprobs", 2)  # fmt: skip
    found = results(capsys, tiny, "--prompt", *prompts, *drawn, *more)
    assert [(r["prompt"], r["index"]) for r in found] == [(p, i) for p in prompts for i in range(3)]
    tokenizer = Tokenizer.of(tiny)
    for r in found:
        assert r["finish_reason"] == ("length" if len(r["tokens"]) == 12 else "stop_token")
        assert r["text"] == tokenizer.decode(r["tokens"]) and len(r["tokens"]) >= 2
        assert r["prompt_tokens"] == len(tokenizer._plain(MESSAGE.format(r["prompt"])))
        assert 0 < r["timings"]["first_token"] < r["timings"]["total"]
        assert r["tokens_per_second"] > 0
        assert [one["token"] for one in r["logprobs"]] == r["tokens"]
        assert all(len(one["top"]) == 2 and one["logprob"] < 0 for one in r["logprobs"])
    assert len({tuple(r["tokens"]) for r in found[:3]}) == 3
    # The same text from the same seed, whatever is beside it.
    alone = results(capsys, tiny, "--prompt", prompts[1], *drawn, *more)
    assert [r["tokens"] for r in alone] == [r["tokens"] for r in found[3:6]]
    seeds = (4, 5, 6)
    other = results(capsys, tiny, "--prompt", *prompts, *drawn[:-1], *seeds, *more)
    same = [a["tokens"] == b["tokens"] for a, b in zip(found, other, strict=True)]
    assert same == [False] * 3 + [True] * 3 + [False] * 3


def test_beams(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.8}
    expected = of_hf(tiny, MESSAGE.format("Why?"), **options)
    searched = ("--beams", 4, "--n", 3, "--length-penalty", 0.8, "--max-new-tokens", 24)
    found = results(capsys, tiny, "--prompt", "Why?", *searched)
    assert [r["tokens"] for r in found] == expected
    scores = [r["score"] for r in found]
    assert scores == sorted(scores, reverse=True)
    assert all(r["timings"]["first_token"] is None and r["tokens_per_second"] > 0 for r in found)
    text = shown(capsys, tiny, "--prompt", "Why?", *searched, "--early-stopping", "never")
    assert text.count("# text ") == 3 and ", score -" in text


def test_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The prompt goes to the encoder; the decoder begins with what the configuration says, and is told what to say."""
    folder = write_bart(tmp_path / "bart")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    ids = torch.tensor([Tokenizer.of(folder).encode("Why is the sky blue?")])
    for beams in (1, 3):
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, num_beams=beams, do_sample=False
        )[0].tolist()  # fmt: skip
        more = ("--max-new-tokens", 12, *(["--beams", beams] * (beams > 1)))
        (found,) = results(capsys, folder, "--prompt", "Why is the sky blue?", *more)
        assert [2, *found["tokens"]] == made[: len(found["tokens"]) + 1] and len(
            found["tokens"]
        ) > 3
        assert found["tokens"][0] == 70


def test_weights_that_cannot_be_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_bart(tmp_path)
    assert cli.main(["generate", str(folder), "--prompt", "x", "--weights", "int8"]) == 1
    said = "\npyfuse generate: --weights: the compiled step cannot run this model: "
    assert said in capsys.readouterr().err


def test_several_results_are_told_apart(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (tiny, "--prompt", "a", "b", "--max-new-tokens", 3)
    text = shown(capsys, *arguments)
    assert text.startswith("# prompt 1 (length)\n") and "\n# prompt 2 (length)\n" in text
    text = shown(capsys, *arguments, "--temperature", 1, "--n", 2)
    assert "# prompt 2, text 1 (length)\n" in text


def test_the_stream_is_the_text(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ("--temperature", 1.2, "--seed", 3, 4, "--max-new-tokens", 40)
    arguments = (tiny, "--prompt", "Why?", "Who? 😀", *drawn)
    texts = [r["text"] for r in results(capsys, *arguments)]
    assert shown(capsys, *arguments, "--stream") == "".join(
        f"# prompt {i}\n{text}\n" for i, text in enumerate(texts, 1)
    )


def test_stop_strings(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (tiny, "--prompt", "Why?", "--temperature", 1, "--max-new-tokens", 40)
    (whole,) = results(capsys, *arguments)
    stop = whole["text"][7:9]
    (cut,) = results(capsys, *arguments, "--stop", "nothing of this", stop)
    assert cut["text"] == whole["text"][: whole["text"].index(stop)]
    assert cut["finish_reason"] == "stop_string"
    text = shown(capsys, *arguments, "--stop", stop, "--stream")
    assert text == cut["text"] + "\n"


def test_prompts_from_elsewhere(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--max-new-tokens", 8)
    (expected,) = results(capsys, tiny, "--prompt", "one\ntwo", *more)
    file = tmp_path / "prompt.txt"
    file.write_text("one\ntwo\n\n")
    for arguments, stdin in (
        (("--prompt-file", file), "other"),
        (("--prompt-file", "-"), "one\ntwo\n"),
        ((), "one\ntwo\r\n"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        (found,) = results(capsys, tiny, *arguments, *more)
        assert (found["prompt"], found["tokens"]) == ("one\ntwo", expected["tokens"])


def test_a_gguf_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    (found,) = results(capsys, file, "--prompt", "Why?", "--max-new-tokens", 8)
    ids = torch.tensor([Tokenizer.of(file)._plain(MESSAGE.format("Why?"))])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    )
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=ENDS
    )  # fmt: skip
    assert made[0, ids.shape[1] :].tolist()[: len(found["tokens"])] == found["tokens"]
    assert len(found["tokens"]) > 2


def test_dtype_and_threads(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (tiny, "--prompt", "Why?", "--max-new-tokens", 8, "--logprobs", 0)
    (full,) = results(capsys, *arguments)
    (half,) = results(capsys, *arguments, "--dtype", "bf16", "--threads", 1)
    assert torch.get_num_threads() == 1
    first, second = (r["logprobs"][0]["logprob"] for r in (full, half))
    assert first != second and first == pytest.approx(second, rel=0.05)


@pytest.mark.parametrize("name", answers.STORED)
def test_what_is_kept_in_int8(
    name: str, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[dict[str, Any]] = []

    class Seen(Runner):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(request, "Runner", Seen)
    arguments = (tiny, "--prompt", "Why?", "--max-new-tokens", 8, "--logprobs", 0)
    (full,) = results(capsys, *arguments)
    (small,) = results(capsys, *arguments, f"--{name}", "int8")
    assert name not in made[0] and made[1][name] == "int8"
    first, second = ([one["logprob"] for one in r["logprobs"][:2]] for r in (full, small))
    assert first != second and first == pytest.approx(second, rel=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--temperature hot", "argument --temperature: got 'hot', needs a number"),
        ("--temperature -1", "argument --temperature: got -1.0, needs at least 0"),
        ("--temperature nan", "argument --temperature: got nan, needs at least 0"),
        ("--top-p 1.5", "argument --top-p: got 1.5, needs"),
        ("--top-k 0", "argument --top-k: got 0, needs at least 1"),
        ("--n 0", "argument --n: got 0, needs at least 1"),
        ("--beams 1.5", "argument --beams: got '1.5', needs a whole number"),
        ("--max-new-tokens 0", "argument --max-new-tokens: got 0, needs at least 1"),
        ("--threads 0", "argument --threads: got '0', needs a number of threads"),
        ("--dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("--early-stopping soon", "argument --early-stopping: invalid choice: 'soon'"),
        ("--prompt-file x", "argument --prompt-file: not allowed with argument --prompt"),
        ("--prompt", "argument --prompt: expected at least one argument"),
        ("--warmth 3", "unrecognized arguments: --warmth"),
    ],
)
def test_wrong_usage(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", "nowhere", "--prompt", "x", *arguments.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--raw --system x", "--system: a message of the chat template, which --raw leaves out"),
        ("--stream --json", "--stream: shows a text, but --json prints results"),
        ("--stream --n 2 --temperature 1", "--stream: shows one text as it grows, but --n"),
        ("--stream --beams 2", "--stream: beam search (--beams) has no text before its end"),
        ("--logprobs 3", "--logprobs: told by --json alone"),
    ],
)
def test_what_makes_no_sense(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "nowhere", "--prompt", "x", *arguments.split()]) == 2
    assert capsys.readouterr().err.startswith(f"pyfuse generate: {message}")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--top-p 0.9", "--top-p: got 0.9, but without a temperature"),
        ("--beams 4 --temperature 0.7", "--temperature: got 0.7, but --beams is 4"),
        ("--n 3", "--n: got 3, but greedy"),
        ("--beams 2 --n 3", "--n: got 3, but --beams is 2"),
        ("--length-penalty 2", "--length-penalty: got 2.0, but --beams is 1"),
        ("--min-new-tokens 200", "--min-new-tokens: got 200, but --max-new-tokens is 128"),
    ],
)
def test_options_that_contradict_each_other(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before anything is loaded."""
    assert cli.main(["generate", "nowhere", "--prompt", "x", *arguments.split()]) == 1
    assert capsys.readouterr().err.startswith(f"pyfuse generate: {message}")


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 1) -> str:
    assert cli.main(["generate", *map(str, arguments)]) == status
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("pyfuse generate: ")
    return said.err.removeprefix("pyfuse generate: ")


def test_no_such_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path))
    prompt = ("--prompt", "x")
    nowhere = refusal(capsys, tmp_path / "nowhere", *prompt)
    assert "nowhere: no such folder or GGUF file, nor one of the models smollm2, minilm" in nowhere
    assert "pyfuse models fetch smollm2" in refusal(capsys, "smollm2", *prompt)
    assert "no tokenizer" in refusal(capsys, tmp_path, *prompt)


def test_models_that_do_not_do(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(tmp_path)
    prompt = ("--prompt", "x")
    assert "config.json" in refusal(capsys, tmp_path, *prompt)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(vocab_size=len(tokenizer), intermediate_size=32, **sizes)
    transformers.BertForMaskedLM(bert).save_pretrained(tmp_path)
    assert "no language model" in refusal(capsys, tmp_path, *prompt)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    assert "its weights cannot be read" in refusal(capsys, tmp_path, *prompt)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "its tokenizer cannot be read" in refusal(capsys, tmp_path, *prompt)


def test_prompts_that_do_not_do(
    tiny: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert "--prompt: the prompt is empty" in refusal(capsys, tiny, "--prompt", "", status=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "standard input: the prompt is empty" in refusal(capsys, tiny, status=2)
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in refusal(capsys, tiny, status=2)
    missing = refusal(capsys, tiny, "--prompt-file", tmp_path / "missing")
    assert missing.startswith("--prompt-file: ") and "No such file" in missing
    (tmp_path / "latin").write_bytes(b"caf\xe9 au lait")
    assert "latin: no text in UTF-8" in refusal(capsys, tiny, "--prompt-file", tmp_path / "latin")
    long = refusal(capsys, tiny, "--raw", "--prompt", "x", "y" * 200)
    assert long.startswith("prompt 2: 200 tokens") and "context" in long
    system = refusal(capsys, plain, "--prompt", "x", "--system", "y")
    assert system.startswith("--system: a message of the chat template, but ")
    strict = write_llama(tmp_path / "strict", TEMPLATE.replace("'tool'", "'system'"))
    assert "no tools here" in refusal(capsys, strict, "--prompt", "x", "--system", "y")
    seeds = refusal(capsys, tiny, "--prompt", "x", "--temperature", 1, "--seed", 1, 2)
    assert seeds.startswith("--seed: got (1, 2), needs one")


def test_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(generate.importlib.util, "find_spec", lambda name: None)
    said = refusal(capsys, "model.gguf", "--prompt", "x")
    assert "needs transformers and safetensors and gguf and accelerate" in said
    assert "pip install 'pyfuse[hf]'" in said


def test_times_are_told_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dim and in one line on a terminal; as they are elsewhere, and without rich."""
    line = "[first] token " * 20
    for rich, out, shown in (
        (True, Terminal(), None),
        (False, Terminal(), line),
        (True, io.StringIO(), line),
    ):
        monkeypatch.setattr(show, "HAVE_RICH", rich and show.HAVE_RICH)
        monkeypatch.setattr(sys, "stderr", out)
        answers.note(line)
        assert out.getvalue() == f"{shown}\n" if shown else line in out.getvalue()


def test_a_terminal_that_knows_few_characters(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    arguments = ["--prompt", "Why?", "--max-new-tokens", "40", "--temperature", "1", "--stream"]
    assert cli.main(["generate", str(tiny), *arguments]) == 0
    sys.stdout.flush()
    assert out.getvalue().decode("ascii").endswith("\n") and b"?" in out.getvalue()


def test_a_reader_that_goes_away(tiny: Path) -> None:
    command = f"{sys.executable} -m pyfuse generate {tiny} --prompt x --max-new-tokens 60 --stream"
    done = subprocess.run(
        ["bash", "-c", f"{command} --temperature 1 | head -c 1; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr and "Broken" not in done.stderr


def test_the_real_model(capsys: pytest.CaptureFixture[str]) -> None:
    if zoo.problem("smollm2") is not None:
        pytest.skip("smollm2 is not fetched: make models")
    question = ("smollm2", "--prompt", "What is the capital of France?", "--max-new-tokens", 12)
    (found,) = results(capsys, *question)
    assert found["text"] == "The capital of France is Paris."
    assert found["finish_reason"] == "stop_token"

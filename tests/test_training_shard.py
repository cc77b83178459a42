"""Two processes that share out the model (FSDP2) learn what one does, and whoever goes on may hold it otherwise."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from training_cases import (
    TORCHRUN,
    Job,
    contents,
    in_processes,
    rows,
    run,
    small,
    small_mlm,
    write_text,
)

from pyfuse.training import lm, mlm, state

FIGURES = ("loss", "gradient_norm", "perplexity", "accuracy")
# All norms are above 1, so that the gradients are clipped where `clip` does not say otherwise.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("lm", {"accumulate": 2}),
    "llama": ("lm", {"kind": "llama", "recompute": True, "clip": 0.1}),
    "stock": ("lm", {"stock": True, "dtype": "bf16", "clip": 0.0}),
    "mlm": ("mlm", {}),
    "mlm-replicated": ("mlm", {"parallel": "ddp"}),
}
PROGRAMS = {"lm": (lm.run, small), "mlm": (mlm.run, small_mlm)}
FSDP = {"parallel": "fsdp"}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all else here."""
    monkeypatch.setattr("pyfuse.training.curves.draw", lambda *_: None)


def options(name: str, text: Path, **more: Any) -> dict[str, Any]:
    program, own = RUNS[name]
    return PROGRAMS[program][1](text, **{"layers": 2, "steps": 4} | more | own)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs in two processes: of each of RUNS; `whole`, and `ended` that was ended and went on; `alone` that
    one process began; `replicated`, which is not sharded."""
    folder = tmp_path_factory.mktemp("sharded")
    text = write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyfuse.training.curves.draw", lambda *_: None)
        lm.run(folder / "alone", options("gpt2", text), speak=io.StringIO())
    dropout = options("gpt2", text, dropout=0.1, **FSDP)
    in_processes(
        2,
        [
            *(Job(p, folder / n, options(n, text, **FSDP)) for n, (p, _) in RUNS.items()),
            Job("lm", folder / "whole", dropout),
            Job("lm", folder / "ended", dropout, ends=3),
            Job("lm", folder / "ended", {}, resume=True),
            Job("lm", folder / "alone", {"steps": 6, **FSDP}, resume=True),
            Job("lm", folder / "replicated", options("gpt2", text)),
        ],
    )
    return folder


def same(one: list[dict[str, str]], other: list[dict[str, str]], within: float = 1e-5) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert [a[n] for n in ("step", "kind", "tokens")] == [
            b[n] for n in ("step", "kind", "tokens")
        ]
        for name in set(FIGURES) & a.keys():
            assert float(a[name] or 0) == pytest.approx(float(b[name] or 0), rel=within), name


@pytest.mark.parametrize("name", RUNS)
def test_a_sharded_model_learns_what_a_whole_one_does(
    name: str, sharded: Path, tmp_path: Path
) -> None:
    alone, _ = PROGRAMS[RUNS[name][0]]
    alone(tmp_path / "one", options(name, sharded / "text"), speak=io.StringIO())
    table = rows(tmp_path / "one")
    # bfloat16 has 8 bits, and rounds otherwise in batches of another size.
    same(table, rows(sharded / name), 1e-2 if name == "stock" else 1e-5)
    assert contents(tmp_path / "one").keys() == contents(sharded / name).keys()
    norms = [float(row["gradient_norm"]) for row in table if row["kind"] == "train"]
    assert min(norms) > 1.0


def test_a_sharded_run_goes_on_bitwise(sharded: Path) -> None:
    assert rows(sharded / "ended") == rows(sharded / "whole")
    one, other = (state.checkpoints(sharded / name)[-1] for name in ("ended", "whole"))
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes()


def test_another_number_of_processes_goes_on(sharded: Path, tmp_path: Path) -> None:
    """From one to two that share, and from two that share to one."""
    given = options("gpt2", sharded / "text")
    lm.run(tmp_path / "one", given, speak=io.StringIO())
    for folder in (tmp_path / "one", sharded / "gpt2"):
        lm.run(folder, {"steps": 6, "parallel": "ddp"}, resume=True, speak=io.StringIO())
        same(rows(folder), rows(sharded / "alone"))


def test_a_full_disk_ends_all_processes(sharded: Path) -> None:
    """The first one says so; the other, which waits for it, is ended by torchrun."""
    folder = sharded / "mlm"
    kept = contents(next(folder.glob("checkpoint-*")))
    arguments = [
        *TORCHRUN, "2", "-m", "pyfuse", "train", "mlm", "--out", str(folder), "--resume", "--steps", "6",
    ]  # fmt: skip
    done = run(["sh", "-c", 'ulimit -f 20; exec "$@"', "sh", *arguments])
    assert done.returncode == 1
    assert f"pyfuse train: {folder}: cannot write (File too large)" in done.stderr
    assert [contents(left) for left in folder.glob("*checkpoint-*")] == [kept]


def test_each_process_holds_its_part(sharded: Path) -> None:
    whole, *_ = held = [
        json.loads((sharded / f"{name}-{rank}.json").read_text())
        for name in ("replicated", "whole")
        for rank in (0, 1)
    ]
    assert held[0] == held[1] and whole["optimizer"] == 2 * whole["parameters"]
    for part in held[2:]:
        assert part.pop("model") == 0  # between evaluations and checkpoints there is no whole one
        for name, numbers in part.items():
            assert 0.45 * whole[name] < numbers < 0.55 * whole[name], name

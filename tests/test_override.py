"""override_torch: code that says torch runs on pyfuse, and torch is itself again afterwards."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pyfuse
from pyfuse.nn.override import _ORIGINALS, _REPLACED


def is_torchs_own() -> bool:
    return all(
        getattr(owner, name) is original
        for (owner, name, _), original in zip(_REPLACED, _ORIGINALS, strict=True)
    )


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    assert is_torchs_own()
    yield
    assert is_torchs_own()


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_torchs_modules_run_on_pyfuse(training: bool) -> None:
    model, x = encoder().train(training), torch.randn(2, 5, 16)
    with torch.set_grad_enabled(training):
        stock = model(x)
        with pyfuse.override_torch() as calls:
            y = model(x)
    torch.testing.assert_close(y, stock, rtol=1e-5, atol=2e-6)
    assert calls.run == {"linear": 4, "layer_norm": 4, "MultiheadAttention": 2}
    assert not calls.left


def test_functions_run_on_pyfuse() -> None:
    x = torch.randn(2, 3, 5, 8)
    w, large = torch.randn(8), torch.randn(100, 100)

    def all_of_them() -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(x, x, x, is_causal=True),
            F.layer_norm(x, (8,), w, w),
            F.rms_norm(x, (8,), w),
            F.linear(x, w[None], w[:1]),
            (F.dropout(large, 0.25) != 0.0).double().mean().ge(0.5).to(x.dtype),
        ]

    stock = all_of_them()
    with pyfuse.override_torch() as calls:
        found = all_of_them()
    assert calls.run.total() == 5 and not calls.left
    for a, b in zip(found, stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_torch() -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    model(x).square().sum().backward()
    stock = [p.grad for p in model.parameters()]
    model.zero_grad()
    with pyfuse.override_torch():
        y = model(x)
    y.square().sum().backward()  # the scope may end before
    for p, grad in zip(model.parameters(), stock, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


def test_what_is_left_to_torch_is_said_once() -> None:
    m, x = nn.MultiheadAttention(16, 2), torch.randn(5, 2, 16)
    with pyfuse.override_torch() as calls:
        m(x, x, x)
        m(x, x, x, need_weights=False)
    assert calls.left == {
        ("MultiheadAttention", "need_weights: attention weights are asked for"): 1
    }
    assert calls.run["MultiheadAttention"] == 1
    text = str(calls)
    assert "1 left to torch" in text and "need_weights" in text


def test_every_backend_of_pyfuse_runs_inside() -> None:
    """eager is made of torch's functions itself."""
    x, ids = torch.randn(2, 3, 5, 8), torch.zeros(2, 3, dtype=torch.int64)
    with pyfuse.override_torch():
        for name in ("eager", "cpu"):
            if pyfuse.dispatch.backend_status()[name] is None:
                with pyfuse.use_backend(name):
                    F.layer_norm(x, (8,))
                    F.rms_norm(x, (8,))
                    F.scaled_dot_product_attention(x, x, x)
                    pyfuse.embed(ids, torch.randn(4, 8), norm_weight=torch.ones(8))


def test_in_another_it_raises_and_the_outer_one_goes_on() -> None:
    with pyfuse.override_torch() as calls:
        with (
            pytest.raises(RuntimeError, match=r"is active since .*test_override.py:\d+"),
            pyfuse.override_torch(),
        ):
            pass
        with pytest.raises(RuntimeError, match="is active since"):
            pyfuse.override_torch.install()
        F.layer_norm(torch.ones(2, 4), (4,))
    assert calls.run == {"layer_norm": 1}


def test_an_exception_restores_torch() -> None:
    with pytest.raises(ZeroDivisionError), pyfuse.override_torch():
        _ = 1 / 0
    assert is_torchs_own()


def test_install_and_uninstall() -> None:
    calls = pyfuse.override_torch.install()
    try:
        F.layer_norm(torch.ones(2, 4), (4,))
    finally:
        assert pyfuse.override_torch.uninstall() is calls
    assert calls.run == {"layer_norm": 1}
    with pytest.raises(RuntimeError, match="without install"):
        pyfuse.override_torch.uninstall()


def test_what_others_replaced_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.warns(RuntimeWarning, match="layer_norm was replaced by others"),
        pyfuse.override_torch(),
    ):
        F.layer_norm = lambda *_: None  # type: ignore[assignment]
    assert is_torchs_own()


def test_other_threads_see_it() -> None:
    x = torch.ones(2, 4)
    with pyfuse.override_torch() as calls:
        thread = threading.Thread(target=lambda: F.layer_norm(x, (4,)))
        thread.start()
        thread.join()
    assert calls.run == {"layer_norm": 1}


def test_a_compiled_model_is_one_graph() -> None:
    model, x = encoder(), torch.randn(2, 5, 16)
    stock = model(x)
    with pyfuse.override_torch():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), stock, rtol=1e-5, atol=2e-6)


SCRIPT = """
import sys
import torch
from torch import nn
from torch.nn.functional import layer_norm
import beside

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
y = layer(torch.randn(2, 5, 16))
y.sum().backward()
layer.self_attn(y, y, y)
assert layer_norm.__module__ == beside.EXPECTED, layer_norm.__module__
print(__name__, sys.argv)
if "fail" in sys.argv:
    raise SystemExit(3)
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT))
    (folder / "beside.py").write_text("EXPECTED = 'pyfuse.nn.functional'\n")
    command = [sys.executable, "-m", "pyfuse", "run", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [("script.py",), ("-m", "script")], ids=["file", "module"])
def test_a_script_runs_as_it_is(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run(tmp_path, *words, "--epochs", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("__main__") and done.stdout.endswith("'--epochs', '3']\n")
    assert "calls run by pyfuse, 1 left to torch" in done.stderr
    assert "MultiheadAttention, left to torch: need_weights" in done.stderr


def test_a_scripts_exit_status_is_the_commands(tmp_path: Path) -> None:
    done = run(tmp_path, "script.py", "fail")
    assert done.returncode == 3 and "calls run by pyfuse" in done.stderr


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    done = run(tmp_path, "nothing.py")
    assert done.returncode == 2 and "nothing.py: no such file" in done.stderr
    done = run(tmp_path, "-m", "nothing")
    assert done.returncode != 0 and "No module named nothing" in done.stderr

"""pyfuse.compat.flash_attn.install(), and models written for the library that run after it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numerics
import pytest
import torch
from flash_attn_cases import angles, reference, turned, upstream
from torch import Tensor
from torch.nn import functional as F

from pyfuse.compat import flash_attn as ours


def entries() -> dict[str, Any]:
    return {name: m for name, m in sys.modules.items() if name.split(".")[0] == "flash_attn"}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn itself is installed here")
    assert not entries()
    yield
    assert not entries(), "a test left flash_attn behind"


def test_imports_as_programs_write_them() -> None:
    before = dict(sys.modules)
    with ours.install() as installation:
        import flash_attn
        import flash_attn.layers.rotary as by_name
        from flash_attn import flash_attn_func, flash_attn_with_kvcache
        from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input  # noqa: F401
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.layers.rotary import apply_rotary_emb, apply_rotary_emb_func  # noqa: F401
        from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn, rms_norm_fn  # noqa: F401
        from flash_attn.ops.triton.rotary import apply_rotary  # noqa: F401

        assert installation.active and flash_attn is ours and flash_attn.__version__ == "2.8.3"
        assert flash_attn_func is ours.flash_attn_func
        assert flash_attn_with_kvcache is flash_attn.flash_attn_with_kvcache
        assert flash_attn_varlen_func is ours.flash_attn_varlen_func
        assert by_name is importlib.import_module("pyfuse.compat.flash_attn.layers.rotary")
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.ops.triton.layer_norm"):
            assert importlib.util.find_spec(name) is sys.modules[name].__spec__ is not None
        with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.losses"):
            importlib.import_module("flash_attn.losses.cross_entropy")
    assert not installation.active
    assert sys.modules == before | {name: m for name, m in sys.modules.items() if "compat" in name}
    assert importlib.util.find_spec("flash_attn") is None


def test_every_module_has_both_names() -> None:
    """One module each, so that there are no second copies of a class."""
    with ours.install():
        names = {
            name.removeprefix("pyfuse.compat.") for name in sys.modules if "compat.flash" in name
        }
        assert names == set(entries()) and "flash_attn.ops.triton.rotary" in names
        for name in names:
            assert sys.modules[name] is sys.modules[f"pyfuse.compat.{name}"]


def test_metadata_is_not_answered() -> None:
    """What asks whether the CUDA library is installed is told that it is not."""
    with ours.install():
        with pytest.raises(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version("flash_attn")
        utils = pytest.importorskip("transformers.utils")
        assert not utils.is_flash_attn_2_available()


def test_install_again_and_in_which_order_they_go() -> None:
    first = ours.install()
    second = ours.install()
    with pytest.raises(RuntimeError, match=r"later install\(\) is still in place"):
        first.uninstall()
    second.uninstall()
    assert sys.modules["flash_attn"] is ours and first.active
    second.uninstall()
    assert sys.modules["flash_attn"] is ours, "uninstalled twice"
    first.uninstall()
    first.uninstall()
    with ours.install(), ours.install(force=True):
        assert sys.modules["flash_attn"] is ours


def test_an_error_inside_takes_it_back() -> None:
    with pytest.raises(KeyError), ours.install():
        raise KeyError("x")


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Something that stands for the real library on sys.path."""
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.8.3+real'\n")
    (package / "losses.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in entries():
        del sys.modules[name]


def test_the_library_is_not_hidden_unasked(library: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"the library itself can be imported, from .*__init__\.py"
    ):
        ours.install()
    real = importlib.import_module("flash_attn")
    with pytest.raises(RuntimeError, match=r"has been imported already, from .*__init__\.py"):
        ours.install()
    assert sys.modules["flash_attn"] is real


@pytest.mark.parametrize("imported", [False, True])
def test_force_hides_the_library_until_it_is_taken_back(library: Path, imported: bool) -> None:
    real = importlib.import_module("flash_attn.losses") if imported else None
    before = entries()
    with ours.install(force=True):
        assert importlib.import_module("flash_attn") is ours
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.losses")
    assert entries() == before
    assert importlib.import_module("flash_attn").__version__ == "2.8.3+real"
    assert real is None or importlib.import_module("flash_attn.losses") is real


@pytest.fixture
def models() -> Iterator[ModuleType]:
    with ours.install():
        yield importlib.import_module("flash_attn_models")
    del sys.modules["flash_attn_models"]


def compare(model: torch.nn.Module, formula: Any, x: Tensor, *rest: Any) -> None:
    """Output and every parameter's gradient of a float32 model, by the accuracy rule."""

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        model.to(dtype)
        point = x.to(dtype).requires_grad_()
        out = function(point, *rest)
        points = [point, *model.parameters()]
        return [out.detach(), *torch.autograd.grad((out * upstream(out)).sum(), points)]

    actual = run(model, torch.float32)
    exact, eager = run(formula, torch.float64), run(formula, torch.float32)
    names = ["output", "x", *(name for name, _ in model.named_parameters())]
    for i, name in enumerate(names):
        kind = "gradient" if i else "output"
        numerics.check(actual[i], exact[i], eager[i], name, kind)  # type: ignore[arg-type]


def rotated(x: Tensor, rotary_dim: int, base: float, start: int = 0) -> Tensor:
    """x [B, S, H, D]; the angles as float32 has them, since the models' tables are float32."""
    pair = torch.arange(0, rotary_dim, 2, dtype=torch.float32)
    angle = torch.outer(
        torch.arange(start, start + x.shape[1]).float(), 1 / base ** (pair / rotary_dim)
    )
    tables = (angle.cos(), angle.sin())
    return turned(x.transpose(1, 2), *tables, False).transpose(1, 2)


def test_an_unpadded_encoder(models: ModuleType) -> None:
    model = models.Encoder()
    lengths = [13, 0, 5, 20]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]

    def layer(layer: Any, x: Tensor) -> Tensor:
        norm = layer.attn_norm
        y = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias)
        q, k, v = layer.Wqkv(y).unflatten(-1, (3, layer.heads, -1)).unbind(2)
        q, k = (rotated(t, t.shape[-1], 160000.0) for t in (q, k))
        window = (layer.window, layer.window)
        x = x + layer.Wo(reference(q, k, v, window_size=window)[0].flatten(2))
        y = F.layer_norm(x, x.shape[-1:], layer.mlp_norm.weight, layer.mlp_norm.bias)
        hidden, gate = layer.Wi(y).chunk(2, -1)
        return x + layer.Wd(F.gelu(hidden) * gate)

    def formula(x: Tensor, mask: Tensor) -> Tensor:
        rows = []
        for row, n in zip(x, lengths, strict=True):
            y = row[None, :n]
            for one in model.layers:
                y = layer(one, y)
            rows.append(F.pad(y[0], (0, 0, 0, 20 - n)))
        return torch.stack(rows)

    compare(model, formula, torch.randn(4, 20, 48), mask)


def test_a_parallel_decoder_block_and_its_cache(models: ModuleType) -> None:
    model = models.ParallelBlock()

    def formula(x: Tensor) -> Tensor:
        y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight
        q = model.Wq(y).unflatten(-1, (4, 16))
        k, v = model.Wkv(y).unflatten(-1, (2, 2, 16)).unbind(2)
        o = reference(rotated(q, 8, 1e4), rotated(k, 8, 1e4), v, causal=True)[0]
        return model.join(x, y, o)

    x = torch.randn(3, 17, 64)
    compare(model, formula, x)
    model.float()
    with torch.no_grad():
        exact = formula(x)
        cache = torch.full((3, 32, 2, 2, 16), torch.nan)
        outs, start = [], 0
        for n in (9, 1, 3, 1, 1, 1, 1):  # the prompt, then one or a few tokens at a time
            lengths = torch.full((3,), start, dtype=torch.int32)
            outs.append(model.step(x[:, start : start + n], cache, lengths))
            start += n
    torch.testing.assert_close(torch.cat(outs, 1), exact, rtol=1e-5, atol=2e-6)
    assert cache[:, :17].isfinite().all() and cache[:, 17:].isnan().all()


def test_the_formula_s_angles() -> None:
    """`rotated` and the tables of the other tests agree."""
    x = torch.randn(1, 9, 2, 16, dtype=torch.float64)
    cos, sin = angles(9, 16, torch.float64)
    torch.testing.assert_close(
        rotated(x, 16, 1e4),
        turned(x.transpose(1, 2), cos, sin, False).transpose(1, 2),
        rtol=1e-5,
        atol=1e-5,
    )

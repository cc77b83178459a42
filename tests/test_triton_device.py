"""The seam of the Triton backend: who may run, what is refused and why, tuning, word of what is compiled."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextvars import Context, ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated import standing_in
from launches import attention_launches
from ptxemu import triton_compile

import pyfuse
from pyfuse import dispatch
from pyfuse.backends import triton_compiling, triton_device, triton_tune

triton = pytest.importorskip("triton", reason="Triton is not installed")


def tensor(d: int = 64, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(1, 2, 8, d).to(dtype)


def reason(q: torch.Tensor, **options: Any) -> str:
    with standing_in(80), pytest.raises(NotImplementedError) as refusal:
        pyfuse.attention(q, q, q, backend="triton", **options)
    return str(refusal.value)


def test_why_not() -> None:
    assert "q is torch.float64; the kernels have float32, bfloat16 and float16" in reason(
        tensor(dtype=torch.float64)
    )
    assert "D is 257, the kernel has 1 to 256" in reason(tensor(257))
    assert "D is 0, the kernel has 1 to 256" in reason(tensor(0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_the_next_one_runs() -> None:
    x = tensor()
    with pytest.raises(NotImplementedError, match="triton: torch sees no GPU"):
        pyfuse.attention(x, x, x, backend="triton")
    assert dispatch.backend_status()["triton"] == "torch sees no GPU"
    assert pyfuse.attention(x, x, x).shape == x.shape


def test_cpu_tensors_are_not_taken_where_a_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_device, "_stand_in", None)
    text = triton_device.why_not("q", tensor())
    assert text == "q is on cpu, Triton's kernels run on a GPU"


def test_every_thread_has_an_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks for one where a kernel loads by descriptors, and keeps it in a context of the thread."""
    from triton.runtime import _allocation

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(triton_device, "_prepared", ContextVar("_prepared", default=False))
    gpu = object.__new__(triton_device.Gpu)
    gpu.index = 0
    found: list[Any] = []

    def kernel(*args: Any, **options: Any) -> None:
        found.append(_allocation._allocator.get())

    def launch() -> None:
        gpu.launch({(1,): kernel}, (1,), (), {})

    contexts = [Context() for _ in range(2)]
    for context in contexts:
        context.run(launch)
    contexts[0].run(triton.set_allocator, len)  # a user's own stays
    contexts[0].run(launch)
    assert found == [triton_device._scratch, triton_device._scratch, len]


def test_explain_names_it() -> None:
    x = tensor()
    with standing_in(80):
        explained = pyfuse.explain("attention", x, x, x, backend="triton")
    assert explained.chosen == "triton"


@pytest.mark.parametrize("seeds", [([1, 1], [3, 5]), ([16, 2**31], [7, 2**32 - 1])])
def test_no_seed_is_compiled_in(seeds: tuple[list[int], list[int]]) -> None:
    """Triton makes another kernel for an integer of 1, and for one that is a multiple of 16, unless told not to."""
    kinds = []
    for seed in seeds:
        launches = attention_launches(
            80, 64, torch.bfloat16, 128, dropout_p=0.25, dropout_seed=torch.tensor(seed)
        )
        kinds.append(
            {
                name: triton_compile.bind(one.kernel, one.args, 80, one.options).specialization
                for name, one in launches.items()
            }
        )
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("lengths", [((1, 1), (7, 9)), ((16, 32), (17, 31))])
def test_no_length_is_compiled_in(lengths: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """A growing cache, or a batch of another length, must not compile again."""
    kinds = []
    for m, n in lengths:
        q, k = torch.empty(1, m, 2, 64).transpose(1, 2), torch.empty(1, n, 2, 64).transpose(1, 2)
        launched = []
        with standing_in(80) as gpu:
            gpu.launch = lambda *call, kept=launched: kept.append(call)  # type: ignore[method-assign]
            pyfuse.attention(q, k, k, causal=True, window=5, backend="triton")
        ((kernel, _, args, options),) = launched
        kinds.append(triton_compile.bind(kernel, args, 80, options).specialization)
    assert kinds[0] == kinds[1]


# Tuning -------------------------------------------------------------------------------------------


class Timer:
    """A device whose times are given; None: does not fit."""

    name = "a GPU"

    def __init__(self, times: dict[str, float | None]) -> None:
        self.times, self.asked = times, 0

    def time(self, launch: Callable[[Any], None], tiles: Any) -> float | None:
        self.asked += 1
        return self.times[tiles]


KERNEL = SimpleNamespace(__name__="kernel", cache_key="0123456789abcdef0123")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path))
    triton_tune._known.cache_clear()
    return tmp_path / "autotune.json"


def choose(device: Timer, kind: tuple[Any, ...] = (1,)) -> str:
    return triton_tune.choose(device, KERNEL, kind, list(device.times), lambda tiles: None)


def test_the_fastest_that_fits_is_taken_and_kept(cache: Path) -> None:
    device = Timer({"shipped": 2.0, "fast": 1.0, "too large": None})
    assert choose(device) == "fast" and device.asked == 3
    assert choose(device) == "fast" and device.asked == 3
    assert list(json.loads(cache.read_text()).values()) == ["'fast'"]
    triton_tune._known.cache_clear()  # another process
    assert choose(device) == "fast" and device.asked == 3
    assert choose(device, kind=(2,)) == "fast" and device.asked == 6


def test_none_that_fits(cache: Path) -> None:
    with pytest.raises(RuntimeError, match="none of 'shipped' fits a GPU"):
        choose(Timer({"shipped": None}))


def test_an_unreadable_file_is_told_of_and_begun_anew(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.write_text("{half")
    assert choose(Timer({"shipped": 1.0})) == "shipped"
    assert "measuring again" in caplog.text
    assert json.loads(cache.read_text())


def test_a_call_is_tuned(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the emulator's counts; the result is that of any tiles."""
    from pyfuse.kernels import configs

    tiles = [configs.Tiles(128, 64, 4, 2), configs.Tiles(16, 16, 4, 1)]
    monkeypatch.setattr(configs, "candidates", lambda *_: tiles)
    monkeypatch.setattr(triton_tune, "enabled", True)
    q = tensor()
    with standing_in(80), caplog.at_level(logging.INFO, "pyfuse.triton"):
        o = pyfuse.attention(q, q, q, backend="triton")
    assert "flash_fwd_kernel" in caplog.text
    (found,) = json.loads(cache.read_text()).values()
    assert found == repr(tiles[1]), "8 queries take fewest instructions in the smallest tile"
    torch.testing.assert_close(o, pyfuse.attention(q, q, q, backend="eager"), rtol=0, atol=2e-2)


# What is compiled -----------------------------------------------------------------------------------


def compilation(module: str) -> dict[str, Any]:
    return {"fn": SimpleNamespace(module=module, name="flash_fwd_kernel"), "key": ""}


def test_compilations_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    announcer = triton_compiling.Announcer()
    with caplog.at_level(logging.INFO, "pyfuse.triton"):
        for module in ("pyfuse.kernels.flash_fwd", "somebody.else"):
            announcer.before(**compilation(module))
            announcer.after(**compilation(module))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("compiling flash_fwd_kernel") and second.startswith("compiled ")


def test_on_a_terminal_a_status_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    announcer = triton_compiling.Announcer()
    announcer.before(**compilation("pyfuse.kernels.flash_fwd"))
    announcer.after(**compilation("pyfuse.kernels.flash_fwd"))
    assert "compiling flash_fwd_kernel" in capsys.readouterr().err


def test_who_listened_before_still_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    heard = []
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = lambda **call: heard.append(call["key"]) or True
        triton_compiling.announce()
        answer = knobs.runtime.jit_cache_hook(**compilation("somebody.else"))
    assert answer is True and heard == [""]

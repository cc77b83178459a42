"""Choosing a backend: the first without an objection, a named one never falls back, explain() tells all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import pyfuse
from pyfuse import dispatch
from pyfuse.backends import BACKENDS

Q = torch.randn(1, 2, 5, 8)
EMPTY = Q[..., :0]  # a head size of 0, which no kernel takes


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_every_listed_backend_keeps_the_contract() -> None:
    for name in BACKENDS:
        module = dispatch.load(name)
        reason = module.why_unavailable()
        assert reason is None or (isinstance(reason, str) and reason)
        for op, impl in module.OPS.items():
            assert callable(impl.fn) and callable(impl.why_not), f"{name}: {op}"
    assert set(dispatch.load("eager").OPS) >= set(dispatch.load("cpu").OPS), (
        "eager has every operation"
    )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="backend: got 'gpu', needs one of cpu, cuda, triton, eager"
    ):
        pyfuse.attention(Q, Q, Q, backend="gpu")
    with pytest.raises(ValueError, match="use_backend: got 'gpu'"), pyfuse.use_backend("gpu"):
        pass


def test_a_named_backend_does_not_fall_back() -> None:
    with pytest.raises(NotImplementedError, match="cpu: "):
        pyfuse.attention(EMPTY, EMPTY, EMPTY, backend="cpu")
    with pyfuse.use_backend("cpu"), pytest.raises(NotImplementedError, match="cpu: "):
        pyfuse.attention(EMPTY, EMPTY, EMPTY)
    assert pyfuse.attention(EMPTY, EMPTY, EMPTY).shape == EMPTY.shape


def test_use_backend_is_scoped_and_overruled_by_the_argument() -> None:
    with pyfuse.use_backend("eager"):
        assert pyfuse.explain("attention", Q, Q, Q).chosen == "eager"
        if dispatch.backend_status()["cpu"] is None:
            assert pyfuse.explain("attention", Q, Q, Q, backend="cpu").chosen == "cpu"
        with pytest.raises(RuntimeError, match="inner"), pyfuse.use_backend("cpu"):
            raise RuntimeError("inner")
        assert pyfuse.explain("attention", Q, Q, Q).chosen == "eager"


def test_explain_names_each_backend_passed_over() -> None:
    answer = pyfuse.explain(pyfuse.attention, EMPTY, EMPTY, EMPTY)
    assert answer.chosen == "eager"
    assert [c.backend for c in answer.candidates] == ["cpu", "cuda", "triton", "eager"]
    assert answer.candidates[0].reason and answer.candidates[-1].reason is None
    assert str(answer).splitlines()[0] == "attention: eager" and "cpu: " in str(answer)


def test_explain_checks_like_the_call_and_computes_nothing() -> None:
    with pytest.raises(ValueError, match="k: "):
        pyfuse.explain("attention", Q, torch.randn(1, 2, 5, 7), Q)
    x = torch.randn(2, 4, 3, 8)
    before = x.clone()
    c = torch.ones(3, 4)
    pyfuse.explain("rope", x, 2 * c, c, layout="half", inplace=True)
    assert torch.equal(x, before)
    with pytest.raises(TypeError, match="not an operation"):
        pyfuse.explain(torch.relu, x)


def test_environment_chooses_the_backend() -> None:
    code = "import torch, pyfuse; q = torch.ones(1, 1, 2, 8); print(pyfuse.explain('attention', q, q, q).chosen)"
    assert python(code, PYFUSE_BACKEND="eager").stdout.strip() == "eager"
    refused = python(code, PYFUSE_BACKEND="vulkan")
    assert refused.returncode != 0
    assert (
        "ValueError: PYFUSE_BACKEND: got 'vulkan', needs one of cpu, cuda, triton, eager"
        in refused.stderr
    )


@pytest.mark.skipif(dispatch.backend_status()["cpu"] is not None, reason="pyfuse._C is not built")
def test_environment_chooses_the_instruction_set() -> None:
    code = (
        "import torch, pyfuse; from pyfuse.backends import cpu; q = torch.ones(1, 1, 2, 8);"
        "pyfuse.attention(q, q, q); print(cpu.isa())"
    )
    from pyfuse.backends import cpu

    for isa in cpu.available_isas():
        assert python(code, PYFUSE_ISA=isa).stdout.strip() == isa
    refused = python(code, PYFUSE_ISA="avx9")
    assert "ValueError: PYFUSE_ISA: got 'avx9', needs one of" in refused.stderr


@pytest.mark.skipif(dispatch.backend_status()["cpu"] is not None, reason="pyfuse._C is not built")
def test_kernels_refuse_null_pointers() -> None:
    """A FakeTensor's data pointer is 0: that must raise, not crash."""
    from pyfuse.backends.cpu_module import module

    sizes = (1, 1, 1, 1, 1, 8, 8)  # B, Hq, Hk, M, N, D, Dv
    with pytest.raises(ValueError, match="q: null data pointer"):
        module().attention((sizes, 0, 0))
    with pytest.raises(ValueError, match="q: null data pointer"):
        module().attention_decode((sizes, 0, 0))
    with pytest.raises(ValueError, match="x: null data pointer"):
        module().linear(0, 8, 1, 8, 0, 1, 8, 1, 8, 8, 0, 0, 0, 0, 0, 0, 1)


def test_lazily_negated_tensors_are_read_with_their_sign() -> None:
    lazy = torch._neg_view(Q)  # as in x.conj().imag, but with a unit stride
    mask = torch._neg_view(torch.randn(5, 5))
    assert lazy.is_neg() and mask.is_neg()
    exact = pyfuse.attention(lazy.clone(), Q, Q)
    torch.testing.assert_close(pyfuse.attention(lazy, Q, Q), exact)
    assert torch.equal(
        pyfuse.attention(Q, Q, Q, mask=mask), pyfuse.attention(Q, Q, Q, mask=mask.clone())
    )
    with torch.no_grad():
        torch.testing.assert_close(pyfuse.layer_norm(lazy), pyfuse.layer_norm(lazy.clone()))


def test_import_is_light() -> None:
    """accelerate() alone needs transformers: importing pyfuse must not."""
    code = "import sys, pyfuse; print([m for m in ('transformers', 'rich', 'triton.language') if m in sys.modules])"
    loaded = (
        python("import torch, sys; print('triton.language' in sys.modules)").stdout.strip()
        == "True"
    )
    assert python(code).stdout.strip() == ("['triton.language']" if loaded else "[]")

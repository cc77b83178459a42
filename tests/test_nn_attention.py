"""MultiheadAttention: what torch documents, said once, holds for torch's module and for ours."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nn_cases import KINDS, MASKS, attention_formula, check_module, masks, randomize
from numerics import check
from torch import Tensor, nn

import pyfuse
from pyfuse.nn import _fallbacks

kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def made(kind: str, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return randomize(KINDS[kind].MultiheadAttention(*sizes, **options)).to(dtype)


def inputs(
    batch_first: bool, width: int, dtype: torch.dtype, b: int, m: int, n: int | None = None
) -> list[Tensor]:
    """A query; beside it key and value where n is given."""
    lengths = [m] if n is None else [m, n, n]
    shapes = [(b, length, width) if batch_first else (length, b, width) for length in lengths]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@kinds
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention(kind: str, batch_first: bool, mask: str) -> None:
    m = made(kind, 24, 3, batch_first=batch_first)
    given = masks(mask, 3, 2, 7, 7, torch.float32)
    check_module(
        m,
        lambda m, x: m(x[0], x[0], x[0], need_weights=False, **given)[0],
        lambda m, x: attention_formula(m, x[0], x[0], x[0], **given)[0],  # type: ignore[arg-type]
        inputs(batch_first, 24, torch.float32, 2, 7),
        mask,
    )


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "both bool"])
def test_cross_attention_in_every_dtype(kind: str, dtype: str, mask: str) -> None:
    m = made(kind, 32, 2, batch_first=True, dtype=DTYPES[dtype])
    given = masks(mask, 2, 3, 5, 9, DTYPES[dtype])
    check_module(
        m,
        lambda m, x: m(*x, need_weights=False, **given)[0],
        lambda m, x: attention_formula(m, *x, **given)[0],  # type: ignore[arg-type]
        inputs(True, 32, DTYPES[dtype], 3, 5, 9),
        f"{dtype}, {mask}",
    )


OPTIONS: dict[str, dict[str, Any]] = {
    "no bias": {"bias": False},
    "other widths": {"kdim": 10, "vdim": 6},
    "other widths, no bias": {"kdim": 10, "vdim": 6, "bias": False},
    "bias_k": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both appended": {"add_bias_kv": True, "add_zero_attn": True},
}


@kinds
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options_of_the_constructor(kind: str, batch_first: bool, options: str) -> None:
    m = made(kind, 20, 4, batch_first=batch_first, **OPTIONS[options])
    query, key, value = inputs(batch_first, 20, torch.float32, 2, 3, 5)
    key, value = key[..., : m.kdim], value[..., : m.vdim]
    given = masks("both bool", 4, 2, 3, 5, torch.float32)
    check_module(
        m,
        lambda m, x: m(*x, need_weights=False, **given)[0],
        lambda m, x: attention_formula(m, *x, **given)[0],  # type: ignore[arg-type]
        [query, key, value],
        options,
    )


@kinds
def test_a_key_that_is_also_the_value(kind: str) -> None:
    m = made(kind, 16, 2, batch_first=True)
    check_module(
        m,
        lambda m, x: m(x[0], x[1], x[1], need_weights=False)[0],
        lambda m, x: attention_formula(m, x[0], x[1], x[1])[0],  # type: ignore[arg-type]
        inputs(True, 16, torch.float32, 2, 3, 5)[:2],
        "key is value",
    )


@kinds
@pytest.mark.parametrize("mask", ["none", "bool", "bool 3d", "padding"])
def test_unbatched_input(kind: str, mask: str) -> None:
    m = made(kind, 16, 2, batch_first=True)
    given = masks(mask, 2, 1, 5, 5, torch.float32)
    if "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"][0]
    check_module(
        m,
        lambda m, x: m(x[0], x[0], x[0], need_weights=False, **given)[0],
        lambda m, x: attention_formula(m, x[0], x[0], x[0], **given)[0],  # type: ignore[arg-type]
        [torch.randn(5, 16)],
        mask,
    )


@kinds
@pytest.mark.parametrize("average", [False, True], ids=["per head", "averaged"])
@pytest.mark.parametrize("batched", [False, True], ids=["unbatched", "batched"])
def test_weights(kind: str, average: bool, batched: bool) -> None:
    m = made(kind, 16, 2, batch_first=True).eval()
    given = masks("bool", 2, 3, 5, 7, torch.float32)
    x = inputs(True, 16, torch.float32, 3, 5, 7)
    x = x if batched else [t[0] for t in x]
    y, w = m(*x, average_attn_weights=average, **given)  # need_weights is torch's default
    exact_y, exact_w = attention_formula(m, *x, **given)
    exact_w = exact_w.mean(-3) if average else exact_w
    assert w.shape == exact_w.shape
    torch.testing.assert_close(y, exact_y, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(w, exact_w, rtol=1e-5, atol=1e-6)
    assert m(*x, need_weights=False, **given)[1] is None


@kinds
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("m, n", [(6, 6), (4, 7), (7, 4)])
def test_the_hint_of_a_causal_mask(kind: str, padded: bool, m: int, n: int) -> None:
    """is_causal with the mask itself: the same as the mask alone. The hint is the top-left one."""
    attention = made(kind, 16, 2, batch_first=True)
    mask = torch.ones(m, n, dtype=torch.bool).triu(1)
    padding = masks("padding", 2, 2, m, n, torch.float32)["key_padding_mask"] if padded else None
    check_module(
        attention,
        lambda a, x: a(
            *x, need_weights=False, attn_mask=mask, is_causal=True, key_padding_mask=padding
        )[0],
        lambda a, x: attention_formula(a, *x, attn_mask=mask, key_padding_mask=padding)[0],  # type: ignore[arg-type]
        inputs(True, 16, torch.float32, 2, m, n),
        "causal",
    )


@kinds
@pytest.mark.parametrize("batch_first", [False, True], ids=["sequence first", "batch first"])
def test_an_empty_batch(kind: str, batch_first: bool) -> None:
    m = made(kind, 16, 2, batch_first=batch_first)
    (x,) = inputs(batch_first, 16, torch.float32, 0, 5)
    x.requires_grad_()
    y = m(x, x, x, need_weights=False)[0]
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@kinds
def test_a_query_without_a_key_sees_nothing(kind: str) -> None:
    """In training and in inference it gets the bias of the output projection, and no NaN goes anywhere."""
    m = made(kind, 16, 2, batch_first=True)
    hidden = torch.zeros(5, 5, dtype=torch.bool)
    hidden[2] = True
    check_module(
        m,
        lambda m, x: m(x[0], x[0], x[0], need_weights=False, attn_mask=hidden)[0],
        lambda m, x: attention_formula(m, x[0], x[0], x[0], attn_mask=hidden)[0],  # type: ignore[arg-type]
        inputs(True, 16, torch.float32, 2, 5),
        "hidden row",
    )


@kinds
def test_dropout_is_of_the_weights(kind: str) -> None:
    """Expectation and spread over the columns of an identity of values: p/(1-p) of the weights' square."""
    p, n = 0.3, 64
    m = KINDS[kind].MultiheadAttention(n, 1, dropout=p, bias=False, batch_first=True)
    with torch.no_grad():  # weights of 1/n, values and output as they are
        m.in_proj_weight.zero_()
        m.in_proj_weight[2 * n :] = torch.eye(n)
        m.out_proj.weight.copy_(torch.eye(n))
    x = torch.eye(n).expand(40, n, n).contiguous()
    y = m(x, x, x, need_weights=False)[0] * n
    kept = 1 / (1 - p)
    assert torch.isclose(y, torch.tensor(kept)).logical_or(y == 0).all()
    share, count = (y == 0).double().mean().item(), y.numel()
    assert abs(share - p) < 5 * (p * (1 - p) / count) ** 0.5
    assert (m.eval()(x, x, x, need_weights=False)[0] * n - 1).abs().max() < 1e-5


@kinds
def test_autocast(kind: str) -> None:
    m = made(kind, 32, 2, batch_first=True)
    (x,) = inputs(True, 32, torch.float32, 2, 9)
    mask = masks("float", 2, 2, 9, 9, torch.float32)["attn_mask"]
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x, x, x, need_weights=False)[0]
        masked = m(x, x, x, need_weights=False, attn_mask=mask)[0]
    assert y.dtype == masked.dtype == torch.bfloat16
    for found, given in ((y, None), (masked, mask)):
        exact = attention_formula(m.double(), *[x.double()] * 3, attn_mask=given)[0]
        with torch.autocast("cpu", torch.bfloat16):
            eager = attention_formula(m.float(), x, x, x, attn_mask=given)[0]
        check(found, exact, eager.to(torch.bfloat16), "autocast", random=True)
    y.sum().backward()
    assert m.in_proj_weight.grad.dtype == torch.float32


WRONG: dict[str, dict[str, Any]] = {
    "width": {"query": torch.zeros(2, 3, 12)},
    "batch": {"query": torch.zeros(1, 3, 16), "attn_mask": torch.zeros(3, 3, 3)},
    "dims": {"query": torch.zeros(1, 2, 3, 16)},
    "integer mask": {"attn_mask": torch.zeros(3, 3, dtype=torch.int64)},
    "mask's size": {"attn_mask": torch.zeros(3, 4, dtype=torch.bool)},
    "padding's size": {"key_padding_mask": torch.zeros(2, 4, dtype=torch.bool)},
    "hint without a mask": {"is_causal": True},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_those_of_torch(wrong: str) -> None:
    raised = []
    for kind in KINDS:
        m = made(kind, 16, 2, batch_first=True)
        x = torch.zeros(2, 3, 16)
        given = {"query": x, "key": x, "value": x, "need_weights": False, **WRONG[wrong]}
        with pytest.raises((AssertionError, RuntimeError)) as error:
            m(**given)
        raised.append((error.type, str(error.value)))
    assert raised[0] == raised[1]


def test_mismatched_types_of_masks_warn_as_in_torch() -> None:
    m = made("pyfuse", 16, 2, batch_first=True)
    given = masks("both bool", 2, 2, 5, 5, torch.float32)
    given["attn_mask"] = torch.randn(5, 5)
    (x,) = inputs(True, 16, torch.float32, 2, 5)
    with pytest.warns(UserWarning, match="mismatched"):
        y = m(x, x, x, need_weights=False, **given)[0]
    torch.testing.assert_close(y, attention_formula(m, x, x, x, **given)[0], rtol=1e-5, atol=1e-6)


def test_it_is_torchs_module() -> None:
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(24, 3, kdim=8, add_bias_kv=True)
    torch.manual_seed(1)
    ours = pyfuse.nn.MultiheadAttention(24, 3, kdim=8, add_bias_kv=True)
    assert isinstance(ours, nn.MultiheadAttention) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("options", [{}, {"need_weights": True}, {"average_attn_weights": False}])
def test_the_fast_form_runs_where_it_should(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """need_weights is torch's to answer, and nothing else is."""
    calls = _fallbacks.Calls()
    monkeypatch.setattr(_fallbacks, "counting", calls)
    m = made("pyfuse", 16, 2, batch_first=True)
    (x,) = inputs(True, 16, torch.float32, 2, 5)
    m(x, x, x, **{"need_weights": False, **options})
    left = {name: reason.partition(":")[0] for name, reason in calls.left}
    wanted = {"MultiheadAttention": "need_weights"} if options.get("need_weights") else {}
    assert left == wanted and calls.run.get("MultiheadAttention", 0) == (not wanted)


def test_nothing_of_the_size_of_the_scores_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are broadcast, and neither forward nor backward keeps a matrix of M x N for each head."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(result):
                if isinstance(t, Tensor):
                    self.size = max(self.size, t.untyped_storage().nbytes() // t.element_size())
            return result

    m = made("pyfuse", 16, 8, batch_first=True)
    x = torch.randn(2, 128, 16, requires_grad=True)
    padding = torch.zeros(2, 128, dtype=torch.bool)
    padding[0, 100:] = True
    for padded in (None, padding):
        with Largest() as largest:
            m(x, x, x, need_weights=False, key_padding_mask=padded)[0].sum().backward()
        assert largest.size <= 2 * 128 * 48, f"{largest.size} elements"


def test_compiled_in_one_graph() -> None:
    m = made("pyfuse", 16, 2, batch_first=True)
    given = masks("both bool", 2, 2, 5, 5, torch.float32)
    (x,) = inputs(True, 16, torch.float32, 2, 5)
    compiled = torch.compile(
        lambda x: m(x, x, x, need_weights=False, **given)[0], fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(x), m(x, x, x, need_weights=False, **given)[0])


def test_a_copy_and_a_second_derivative() -> None:
    m = copy.deepcopy(made("pyfuse", 8, 2, batch_first=True, dtype=torch.float64))
    x = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return m(x, x, x, need_weights=False)[0]

    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(call, (x,))

"""The Transformer modules: what torch documents, said once, holds for torch's modules and for ours."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_cases import (
    KINDS,
    check_module,
    decoder_layer_formula,
    encoder_layer_formula,
    masks,
    norm,
    randomize,
)
from numerics import check
from torch import Tensor, nn

import pyfuse
from pyfuse.nn import _fallbacks, _suits
from pyfuse.nn._blocks import feed_forward, norm_of_sum

kinds = pytest.mark.parametrize("kind", KINDS)
norm_first = pytest.mark.parametrize("norm_first", [False, True], ids=["norm after", "norm first"])
batch_first = pytest.mark.parametrize(
    "batch_first", [False, True], ids=["sequence first", "batch first"]
)
WIDTH, HEADS = 16, 2


def encoder_layer(kind: str, dropout: float = 0.0, **options: Any) -> Any:
    return randomize(
        KINDS[kind].TransformerEncoderLayer(WIDTH, HEADS, 40, dropout=dropout, **options)
    )


def decoder_layer(kind: str, dropout: float = 0.0, **options: Any) -> Any:
    return randomize(
        KINDS[kind].TransformerDecoderLayer(WIDTH, HEADS, 40, dropout=dropout, **options)
    )


def sequence(batch_first: bool, length: int, batch: int = 2) -> Tensor:
    return torch.randn((batch, length, WIDTH) if batch_first else (length, batch, WIDTH))


def formula_of(layers: Any, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
    for layer in layers:
        x = encoder_layer_formula(layer, x, mask, padding)
    return x


@kinds
@norm_first
@batch_first
@pytest.mark.parametrize("mask", ["none", "bool", "float 3d", "padding", "both bool"])
def test_encoder_layer(kind: str, norm_first: bool, batch_first: bool, mask: str) -> None:
    layer = encoder_layer(kind, norm_first=norm_first, batch_first=batch_first)
    given = masks(mask, HEADS, 2, 7, 7, torch.float32)
    mask_, padding = given.get("attn_mask"), given.get("key_padding_mask")
    check_module(
        layer,
        lambda m, x: m(x[0], mask_, padding),
        lambda m, x: encoder_layer_formula(m, x[0], mask_, padding),  # type: ignore[arg-type]
        [sequence(batch_first, 7)],
        mask,
    )


@kinds
@norm_first
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_encoder_layer_in_inference(
    kind: str, norm_first: bool, activation: str, bias: bool
) -> None:
    """Where torch's fast path runs, and where it does not (silu, no bias)."""
    function: Any = nn.functional.silu if activation == "silu" else activation
    options = {"norm_first": norm_first, "activation": function, "bias": bias, "batch_first": True}
    layer = encoder_layer(kind, dropout=0.5, **options).eval()
    check_module(
        layer,
        lambda m, x: m(x[0]),
        lambda m, x: encoder_layer_formula(m, x[0], None, None),  # type: ignore[arg-type]
        [sequence(True, 9)],
        activation,
        gradients=False,
    )


@kinds
@norm_first
@batch_first
@pytest.mark.parametrize(
    "mask, memory_mask", [("none", "none"), ("bool", "padding"), ("padding", "bool")]
)
def test_decoder_layer(
    kind: str, norm_first: bool, batch_first: bool, mask: str, memory_mask: str
) -> None:
    layer = decoder_layer(kind, norm_first=norm_first, batch_first=batch_first)
    own, other = (
        masks(mask, HEADS, 2, 5, 5, torch.float32),
        masks(memory_mask, HEADS, 2, 5, 8, torch.float32),
    )
    given = (
        own.get("attn_mask"), own.get("key_padding_mask"), other.get("attn_mask"), other.get("key_padding_mask")
    )  # fmt: skip
    check_module(
        layer,
        lambda m, x: m(*x, given[0], given[2], given[1], given[3]),
        lambda m, x: decoder_layer_formula(m, *x, *given),  # type: ignore[arg-type]
        [sequence(batch_first, 5), sequence(batch_first, 8)],
        f"{mask}, {memory_mask}",
    )


@kinds
@batch_first
@pytest.mark.parametrize("final", [False, True], ids=["no norm", "norm"])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "causal and padding"])
def test_encoder(kind: str, batch_first: bool, final: bool, mask: str) -> None:
    last = randomize(KINDS[kind].LayerNorm(WIDTH)) if final else None
    layer = encoder_layer(kind, batch_first=batch_first)
    encoder = KINDS[kind].TransformerEncoder(layer, 2, last, enable_nested_tensor=False)
    padding = None
    if "padding" in mask:
        padding = torch.zeros(2, 7, dtype=torch.bool)
        padding[1, 4:] = True
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1) if "causal" in mask else None

    def formula(m: Any, x: list[Tensor]) -> Tensor:
        y = formula_of(m.layers, x[0], causal, padding)
        return y if m.norm is None else norm(m.norm, y)

    check_module(
        encoder, lambda m, x: m(x[0], causal, padding), formula, [sequence(batch_first, 7)], mask
    )


@kinds
@pytest.mark.parametrize("final", [False, True], ids=["no norm", "norm"])
def test_what_padding_gives_in_inference(kind: str, final: bool) -> None:
    """With nested tensors, torch's default, it is 0 before the last norm; otherwise it is computed like the rest."""
    layer = encoder_layer(kind, batch_first=True)
    last = randomize(KINDS[kind].LayerNorm(WIDTH)) if final else None
    encoder = KINDS[kind].TransformerEncoder(layer, 2, last).eval()
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:], padding[2, 1:] = True, True
    x = sequence(True, 7, 3)
    exact = formula_of(encoder.layers, x, None, padding).masked_fill(padding[..., None], 0.0)
    exact = exact if encoder.norm is None else norm(encoder.norm, exact)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x, None, padding), exact, rtol=1e-5, atol=2e-6)
        added = padding.to(x.dtype).masked_fill(padding, -math.inf)
        torch.testing.assert_close(encoder(x, None, added), exact, rtol=1e-5, atol=2e-6)
        left = padding.flip(1)  # not left-aligned: no nested tensors
        plain = formula_of(encoder.layers, x, None, left)
        plain = plain if encoder.norm is None else norm(encoder.norm, plain)
        torch.testing.assert_close(encoder(x, None, left), plain, rtol=1e-5, atol=2e-6)


@kinds
@norm_first
def test_transformer(kind: str, norm_first: bool) -> None:
    options: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
    model = KINDS[kind].Transformer(WIDTH, HEADS, 2, 2, 40, **options)
    model = randomize(model)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[0, 5:] = True

    def run(m: Any, x: list[Tensor]) -> Tensor:
        y: Tensor = m(
            *x, tgt_mask=causal.to(x[0].dtype), src_key_padding_mask=padding, memory_key_padding_mask=padding
        )  # fmt: skip
        return y

    def formula(m: Any, x: list[Tensor]) -> Tensor:
        memory = norm(m.encoder.norm, formula_of(m.encoder.layers, x[0], None, padding))
        y = x[1]
        for layer in m.decoder.layers:
            y = decoder_layer_formula(layer, y, memory, causal, None, None, padding)
        return norm(m.decoder.norm, y)

    check_module(model, run, formula, [sequence(True, 7), sequence(True, 5)], "transformer")


@kinds
@norm_first
def test_dropout_trains_and_rests(kind: str, norm_first: bool) -> None:
    """In training two calls differ, of the same seed they agree, and their mean is near the value without it."""
    layer = encoder_layer(kind, dropout=0.2, batch_first=True, norm_first=norm_first)
    x = sequence(True, 6, 1).expand(400, -1, -1).contiguous()
    torch.manual_seed(3)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    rest = layer.eval()(x)
    assert torch.equal(rest, layer(x))


def test_dropout_of_a_sum_is_of_its_update() -> None:
    p, update = 0.3, torch.ones(300, WIDTH)
    x = torch.randn(300, WIDTH)
    y, z = norm_of_sum(update, x, nn.Dropout(p), nn.LayerNorm(WIDTH))
    dropped = torch.isclose(z, x)
    assert torch.isclose(z - x, torch.tensor(1 / (1 - p)), atol=1e-5).logical_or(dropped).all()
    share = dropped.double().mean().item()
    assert abs(share - p) < 5 * (p * (1 - p) / z.numel()) ** 0.5
    torch.testing.assert_close(y, nn.functional.layer_norm(z, (WIDTH,)), rtol=1e-5, atol=2e-6)
    _, z = norm_of_sum(update, x, nn.Dropout(p).eval(), nn.LayerNorm(WIDTH))
    assert torch.equal(z, x + update)


def test_dropout_of_one_is_torchs() -> None:
    layer = encoder_layer("pyfuse", dropout=1.0, batch_first=True)
    x = sequence(True, 4)
    y = norm(layer.norm2, norm(layer.norm1, x))
    torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)


def models(kind: str) -> list[nn.Module]:
    parts = KINDS[kind]
    layer = parts.TransformerEncoderLayer(WIDTH, HEADS, 40, norm_first=True)
    return [
        parts.TransformerEncoderLayer(WIDTH, HEADS, 40),
        parts.TransformerDecoderLayer(WIDTH, HEADS, 40, bias=False),
        parts.TransformerEncoder(layer, 2, parts.LayerNorm(WIDTH), enable_nested_tensor=False),
        parts.TransformerDecoder(parts.TransformerDecoderLayer(WIDTH, HEADS, 40), 2),
        parts.Transformer(WIDTH, HEADS, 1, 1, 40, batch_first=True),
    ]


def test_they_are_torchs_modules(tmp_path: Path) -> None:
    """The same seed gives the same parameters; a checkpoint without pickles of one loads in the other."""
    from safetensors.torch import load_model, save_model

    torch.manual_seed(1)
    theirs = models("torch")
    torch.manual_seed(1)
    ours = models("pyfuse")
    torch.manual_seed(2)
    others = zip(models("torch"), models("pyfuse"), strict=True)
    for i, (a, b, (a2, b2)) in enumerate(zip(theirs, ours, others, strict=True)):
        assert isinstance(b, type(a)) and repr(a) == repr(b)
        assert list(a.state_dict()) == list(b.state_dict())
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
        save_model(a, str(tmp_path / f"theirs{i}"))
        save_model(b, str(tmp_path / f"ours{i}"))
        load_model(b2, str(tmp_path / f"theirs{i}"))
        load_model(a2, str(tmp_path / f"ours{i}"))
        assert all(map(torch.equal, a2.state_dict().values(), b2.state_dict().values()))


def test_every_part_is_ours() -> None:
    for model in models("pyfuse"):
        for part in model.modules():
            assert getattr(pyfuse.nn, type(part).__name__, type(part)) is type(part), type(part)


def test_a_custom_part_stays_as_it_is() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS), 1)
    model = pyfuse.nn.Transformer(WIDTH, HEADS, custom_encoder=encoder)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder) is pyfuse.nn.TransformerDecoder


@pytest.mark.parametrize("block", ["_sa_block", "_ff_block"])
def test_a_subclass_keeps_its_blocks(block: str) -> None:
    """What a subclass of the layer replaces is called."""

    def replaced(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * x

    own = type("Own", (pyfuse.nn.TransformerEncoderLayer,), {block: replaced})
    stock = type("Stock", (nn.TransformerEncoderLayer,), {block: replaced})
    a, b = own(WIDTH, HEADS, 40, dropout=0.0), stock(WIDTH, HEADS, 40, dropout=0.0)
    b.load_state_dict(a.state_dict())
    x = sequence(False, 5)
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("part", ["norm1", "dropout", "dropout2", "linear1", "self_attn"])
def test_hooks_run(part: str) -> None:
    layer = encoder_layer("pyfuse", batch_first=True)
    seen: list[str] = []
    layer.get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
    layer(sequence(True, 3))
    assert seen == [part]


def test_the_fused_sums_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _fallbacks.Calls()
    monkeypatch.setattr(_fallbacks, "counting", calls)
    monkeypatch.setattr(_suits, "LEAST_DROPOUT", 0)
    encoder = pyfuse.nn.TransformerEncoder(
        encoder_layer("pyfuse", dropout=0.1, batch_first=True), 2
    )
    encoder(sequence(True, 5)).sum().backward()
    expected = {"linear": 4, "MultiheadAttention": 2, "layer_norm": 4, "dropout": 2}
    assert calls.run == expected and not calls.left
    encoder.layers[0].norm1 = nn.LayerNorm(WIDTH)  # torch's own is as good
    encoder.layers[1].norm1 = nn.Identity()
    encoder(sequence(True, 5))
    assert calls.run["layer_norm"] == 4 + 3


ACTIVATED: list[tuple[Any, str | None]] = [
    ("relu", "relu"),
    ("gelu", "gelu"),
    (torch.relu, "relu"),
    (nn.functional.silu, "silu"),
    (nn.ReLU(), "relu"),
    (nn.GELU("tanh"), "gelu_tanh"),
    (nn.SiLU(), "silu"),
    (nn.LeakyReLU(), None),
    (lambda x: x.relu(), None),
]


@pytest.mark.parametrize("activation, name", ACTIVATED, ids=lambda x: str(x)[:20])
def test_dropout_takes_the_activation_along(
    activation: Any, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values as where a hook keeps them apart, with the seed of the one drawn in the other."""
    layer = encoder_layer("pyfuse", dropout=0.4, batch_first=True, activation=activation)
    x, taken = torch.randn(3, 5, WIDTH), []

    def dropout(x: Tensor, p: float, *, activation: str | None = None) -> Tensor:
        taken.append(activation)
        torch.manual_seed(7)
        return pyfuse.dropout(x, p, activation=activation)

    monkeypatch.setattr("pyfuse.ops.dropout", dropout)
    monkeypatch.setattr(_suits, "LEAST_DROPOUT", 0)
    fused = feed_forward(layer, x)
    handle = layer.dropout.register_forward_hook(lambda *_: None)
    apart = feed_forward(layer, x)
    torch.testing.assert_close(fused, apart, rtol=1e-5, atol=1e-6)
    assert taken == ([None, None] if name is None else [name, None])
    handle.remove()
    taken.clear()
    feed_forward(layer.eval(), x)
    assert not taken


@norm_first
def test_autocast_keeps_torchs_dtypes(norm_first: bool) -> None:
    found = []
    for kind in KINDS:
        torch.manual_seed(5)
        layer = encoder_layer(kind, batch_first=True, norm_first=norm_first)
        x = sequence(True, 6)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        found.append(y.detach())
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    exact = encoder_layer_formula(layer.double(), x.double(), None, None)
    theirs, ours = found
    check(ours, exact, theirs, "autocast")


def test_a_compiled_encoder_is_one_graph() -> None:
    encoder = pyfuse.nn.TransformerEncoder(encoder_layer("pyfuse", batch_first=True), 2)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x = sequence(True, 5).requires_grad_()
    torch.testing.assert_close(compiled(x), encoder(x))
    compiled(x).sum().backward()
    mine, x.grad = x.grad, None
    encoder(x).sum().backward()
    torch.testing.assert_close(mine, x.grad)


@pytest.mark.parametrize("empty", [(0, 5), (2, 0)], ids=["no sequence", "no token"])
def test_nothing_in_nothing_out(empty: tuple[int, int]) -> None:
    layer = encoder_layer("pyfuse", batch_first=True)
    x = torch.randn(*empty, WIDTH)
    assert layer(x).shape == x.shape


def test_names_that_only_torch_has() -> None:
    assert pyfuse.nn.GELU is nn.GELU and pyfuse.nn.functional.softmax is nn.functional.softmax
    assert {"MultiheadAttention", "GELU"} <= set(dir(pyfuse.nn))
    with pytest.raises(AttributeError, match="has 'Atention'"):
        pyfuse.nn.Atention  # noqa: B018

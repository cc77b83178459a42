"""On a GPU, as users call it: CUDA tensors, streams, graphs, threads, compiled code, models in training.

Every option of every kernel is tested with CPU tensors elsewhere, on emulated GPUs or (`--gpu-device=cuda`) a real one;
here is what these tests cannot see: that calls with CUDA tensors reach the kernels, beside whatever else the GPU does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numerics
import pytest
import torch
import torch.nn.functional as F
from model_cases import minis
from torch import Tensor

import pyfuse
import pyfuse.ops
from pyfuse import dispatch
from pyfuse.models import stock
from pyfuse.models.transformer import Transformer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
GPU_BACKENDS = [name for name in ("cuda", "triton") if dispatch.backend_status()[name] is None]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Operation = Callable[..., Any]
Tensors = Mapping[str, Tensor]


def randn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def heads(dtype: torch.dtype, length: int, d: int, n: int | None = None) -> dict[str, Tensor]:
    """q of 8 heads, k and v of 2, in memory as projections leave them."""
    rows = {"q": (length, 8), "k": (n or length, 2), "v": (n or length, 2)}
    return {name: randn(2, m, h, d, dtype=dtype).transpose(1, 2) for name, (m, h) in rows.items()}


def operations(dtype: torch.dtype) -> dict[str, tuple[Operation, dict[str, Tensor]]]:
    """Calls and their differentiable tensors."""
    made: dict[str, tuple[Operation, dict[str, Tensor]]] = {}
    for d, length in ((64, 1000), (96, 333), (128, 1024), (256, 130)):
        for causal in (False, True):
            call = partial(pyfuse.attention, causal=causal)
            made[f"attention D{d}{' causal' if causal else ''}"] = call, heads(dtype, length, d)
    made["attention softcap"] = partial(pyfuse.attention, softcap=20.0), heads(dtype, 257, 64)
    made["attention window"] = (
        partial(pyfuse.attention, causal=True, window=(100, 0)),
        heads(dtype, 777, 128),
    )
    mask = torch.rand(2, 1, 300, 300, device="cuda") < 0.7
    made["attention mask"] = partial(pyfuse.attention, mask=mask), heads(dtype, 300, 64)
    rows, wide = randn(777, 1000, dtype=dtype), randn(33, 8192, dtype=dtype)
    w, b = randn(1000, dtype=dtype), randn(1000, dtype=dtype)
    made["rms_norm"] = pyfuse.rms_norm, {"x": rows, "weight": w}
    made["layer_norm"] = pyfuse.layer_norm, {"x": rows, "weight": w, "bias": b}
    made["layer_norm wide"] = (
        pyfuse.layer_norm,
        {"x": wide, "weight": randn(8192, dtype=dtype), "bias": randn(8192, dtype=dtype)},
    )
    angles = torch.rand(333, 32, device="cuda")

    def rope(x: Tensor, **options: Any) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return pyfuse.rope(
            x, *(t.to(dtype) for t in (angles.cos(), angles.sin())), layout="half", **options
        )

    made["rope"] = rope, {"x": heads(dtype, 333, 64)["q"]}
    ids = torch.randint(0, 500, (3, 70), device="cuda")
    made["embed"] = (
        lambda table, **options: pyfuse.embed(ids, table, **options),
        {"table": randn(500, 256, dtype=dtype)},
    )
    target = torch.randint(0, 1000, (300,), device="cuda")
    made["loss"] = (
        lambda x, weight, **options: pyfuse.ops.linear_cross_entropy(x, weight, target, **options),
        {"x": randn(300, 128, dtype=dtype), "weight": randn(1000, 128, dtype=dtype) / 8},
    )
    return made


def results(
    call: Operation, tensors: Tensors, upstream: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """The output, and the gradient of every tensor."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = call(**leaves, **options)
    weights = torch.ones_like(y) if upstream is None else upstream.to(y.dtype)
    gradients = torch.autograd.grad(y, list(leaves.values()), weights)
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def on(backend: str, call: Operation, tensors: Tensors, upstream: Tensor | None = None) -> Any:
    try:
        return results(call, tensors, upstream, backend=backend)
    except NotImplementedError as refusal:
        pytest.skip(str(refusal).splitlines()[-1].strip())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", operations(torch.float32) if torch.cuda.is_available() else [""])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_values_and_gradients(backend: str, name: str, dtype: torch.dtype) -> None:
    call, tensors = operations(dtype)[name]
    upstream = torch.randn_like(call(**tensors, backend="eager"))
    exact = results(call, {n: t.double() for n, t in tensors.items()}, upstream, backend="eager")
    eager = results(call, tensors, upstream, backend="eager")
    actual = on(backend, call, tensors, upstream)
    for part, value in actual.items():
        kind: numerics.Kind = "output" if part == "output" else "gradient"
        numerics.check(value, exact[part], eager[part], f"{name} {part}", kind)


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_side_streams_and_threads(backend: str) -> None:
    """Each thread launches on a stream of its own, after work that it waits for; nobody waits for the device."""
    call, tensors = operations(torch.bfloat16)["attention D128 causal"]
    expected = on(backend, call, tensors)
    outcome: dict[int, dict[str, Tensor]] = {}

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            busy = torch.randn(4096, 4096, device="cuda")
            for _ in range(20):
                busy = busy @ busy / 64
            nothing = 0 * busy[0, 0].nan_to_num()
            delayed = {n: t + nothing.to(t.dtype) for n, t in tensors.items()}
            outcome[index] = results(call, delayed, None, backend=backend)
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcome) == 4
    for found in outcome.values():
        for part, value in expected.items():
            numerics.assert_bitwise_equal(found[part], value, part)


@pytest.mark.parametrize(
    "name", ["attention D64 causal", "attention D128", "rms_norm", "rope", "embed"]
)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_captured_graph(backend: str, name: str) -> None:
    call, tensors = operations(torch.bfloat16)[name]
    inputs = {n: t.clone() for n, t in tensors.items()}
    on(backend, call, inputs)  # loads and compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(call, inputs, None, backend=backend)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(call, inputs, None, backend=backend)
    for t in inputs.values():
        t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    for part, value in results(call, inputs, None, backend=backend).items():
        numerics.assert_bitwise_equal(captured[part], value, part)


def test_compiled_without_graph_breaks() -> None:
    call, tensors = operations(torch.bfloat16)["attention D64 causal"]
    compiled = torch.compile(lambda **given: call(**given) * 2, fullgraph=True)
    actual = results(compiled, tensors, None)
    wide = {n: t.double() for n, t in tensors.items()}
    exact, eager = (
        results(lambda **given: call(**given, backend="eager") * 2, inputs, None)
        for inputs in (wide, tensors)
    )
    for part, value in actual.items():
        numerics.check(value, exact[part], eager[part], part, "gradient")


def test_what_is_chosen_runs_on_the_gpu() -> None:
    for name, (call, tensors) in operations(torch.bfloat16).items():
        if isinstance(call, partial):
            chosen = pyfuse.explain(call.func, **tensors, **call.keywords).chosen
            assert chosen in GPU_BACKENDS, name


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_the_cpus(p: float) -> None:
    """The same seed drops the same elements on either device."""
    x = torch.ones(64, 4096)
    torch.manual_seed(3)
    here = pyfuse.dropout(x, p)
    torch.manual_seed(3)
    there = pyfuse.dropout(x.cuda(), p)
    assert abs((here == 0).double().mean() - p) < 0.01
    assert abs((there == 0).double().mean().cpu() - p) < 0.01


@pytest.mark.parametrize(
    "name", list(minis(vocabulary=97, width=64, layers=2, heads=4, hidden=128))
)
def test_training_is_torchs(name: str) -> None:
    config = minis(vocabulary=97, width=64, layers=2, heads=4, hidden=128)[name]
    ids = torch.randint(3, 97, (4, 48), device="cuda")
    runs = []
    for ops in (pyfuse.ops, stock):
        torch.manual_seed(0)
        model = Transformer(config, ops).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        losses = []
        for _ in range(8):
            optimizer.zero_grad()
            extra = {"memory": model.encode(ids)} if config.encoder_layers else {}
            loss = model(ids, targets=ids, **extra)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    ours, theirs = runs
    assert ours[-1] < ours[0]
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_module_moved_to_the_gpu() -> None:
    torch.manual_seed(0)
    ours = pyfuse.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True).cuda()
    theirs = torch.nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True).cuda()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 65, 128, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    with pyfuse.override_torch():
        q = torch.randn(2, 4, 100, 64, device="cuda")
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, q, q),
            pyfuse.scaled_dot_product_attention(q, q, q),
        )

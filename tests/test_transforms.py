"""Every operation under everything that torch does to a function: autograd, functorch, compilers, export, fakes."""

from __future__ import annotations

import subprocess
import sys
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder, only_backends
from test_eager_attention import close
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transform_cases import CASES, FEW, Case, by_formula, gradients, leaves, loss_of, total

import pyfuse

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in FEW], ids=FEW)


# --- functorch and forward-mode AD


@every_case
def test_vmap(case: Case, one_seed: None) -> None:
    function, point = case.split()
    stacked = [torch.stack((x, x.flip(-1))) for x in point]
    expected = [function(*(x[i] for x in stacked), backend="eager") for i in (0, 1)]
    if isinstance(expected[0], Tensor):
        close(torch.vmap(function)(*stacked), torch.stack(expected))
    else:
        close(torch.vmap(function)(*stacked), tuple(map(torch.stack, zip(*expected, strict=True))))


@every_case
def test_func_grad(case: Case, one_seed: None) -> None:
    loss, point = loss_of(case)
    everything = tuple(range(len(point)))
    _, expected = by_formula(case)
    close(torch.func.grad(loss, everything)(*point), expected)
    stacked = [torch.stack((x, x)) for x in point]
    both = torch.vmap(torch.func.grad(loss, everything))(*stacked)
    close(both, tuple(torch.stack((g, g)) for g in expected))


@every_case
def test_forward_derivatives(case: Case, one_seed: None) -> None:
    """Along t, the loss changes by <gradient, t>: torch.func.jvp, and dual numbers."""
    loss, point = loss_of(case)
    tangents = [torch.randn_like(x) for x in point]
    _, expected = by_formula(case)
    change = torch.stack([(g * t).sum() for g, t in zip(expected, tangents, strict=True)]).sum()
    close(torch.func.jvp(loss, tuple(point), tuple(tangents))[1], change)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(point, tangents, strict=True)]
        close(forward_ad.unpack_dual(loss(*duals)).tangent, change)


@every_case
def test_jacobian_and_hessian(case: Case, one_seed: None) -> None:
    """By functorch; and by autograd over kernels, one row at a time and vectorised."""
    function, point = case.split(3)
    first, *rest = point

    def one_result(x: Tensor) -> Tensor:
        result = function(x, *rest)
        return result if isinstance(result, Tensor) else result[0]

    def loss(x: Tensor) -> Tensor:
        return total(function(x, *rest))

    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    with only_backends(recorder=Recorder()):
        rows = jacobian(one_result, first)
        close(jacobian(one_result, first, vectorize=True), rows)
        close(torch.func.jacrev(one_result)(first), rows)
        close(torch.func.hessian(loss)(first), hessian(loss, first))


# --- compilers and graphs


def names_in(graph: GraphModule) -> list[str]:
    return [str(node.target).removesuffix(".default") for node in graph.graph.nodes]


@every_case
def test_compiles_as_one_operator(case: Case, one_seed: None) -> None:
    """With and without a gradient, the graph has the operator and not the formula's pieces."""
    function, point = case.split()
    expected, _ = by_formula(case)
    for inputs in (point, leaves(point)):
        graphs: list[GraphModule] = []

        def keep(graph: GraphModule, _: Any, graphs: list[GraphModule] = graphs) -> Any:
            graphs.append(graph)
            return graph.forward

        torch._dynamo.reset()
        close(torch.compile(function, fullgraph=True, backend=keep)(*inputs), expected)
        calls = [node for node in graphs[0].graph.nodes if node.op.startswith("call")]
        names = [str(node.target) for node in calls if node.users and node.target is not getitem]
        assert names == [f"pyfuse.{case.op}"]


@every_case
def test_compiles_backward(case: Case, one_seed: None, backends: Recorder | None) -> None:
    graphs: list[list[str]] = []

    def keep(graph: GraphModule, _: Any) -> Any:
        graphs.append(names_in(graph))
        return graph

    torch._dynamo.reset()
    function, point = case.split()
    compiled = torch.compile(
        function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    result, expected = by_formula(case)
    close(gradients(compiled, point), expected)
    assert f"pyfuse.{case.op}" in graphs[0] and f"pyfuse.{case.op}_backward" in graphs[1]
    if backends is not None:
        assert backends.calls == [f"{case.op} forward", f"{case.op} backward"]
        compiled(*point)
    close(compiled(*point), result)


@few_cases
def test_backward_runs_forward_again_where_nothing_restores(case: Case, one_seed: None) -> None:
    torch._dynamo.reset()
    function, point = case.split()
    _, expected = by_formula(case)
    recorder = Recorder(restores=False)
    with only_backends(recorder=recorder):
        close(gradients(torch.compile(function, backend="aot_eager"), point), expected)
    assert recorder.calls == [f"{case.op} {step}" for step in ("forward", "forward", "backward")]


@few_cases
def test_inductor_with_dynamic_shapes(case: Case, one_seed: None) -> None:
    """One graph for all sizes, forward and backward."""
    torch._dynamo.reset()
    names = sorted(case.needs())

    def call(arguments: dict[str, Any], point: list[Tensor]) -> Any:
        return getattr(pyfuse, case.op)(**(arguments | dict(zip(names, point, strict=True))))

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for n in (5, 7, 9):
        torch.manual_seed(n)
        arguments = case.make(n)
        point = leaves([arguments[name] for name in names])
        expected = call(arguments | {"backend": "eager"}, point)
        result = compiled(arguments, point)
        close(result, expected)
        found = torch.autograd.grad(total(result), point)
        close(found, torch.autograd.grad(total(expected), point))
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3, "compiled again for another size"


@few_cases
def test_compiles_around_functorch(case: Case, one_seed: None) -> None:
    torch._dynamo.reset()
    loss, point = loss_of(case)
    _, expected = by_formula(case)
    grad = torch.compile(
        lambda *p: torch.func.grad(loss, tuple(range(len(p))))(*p),
        fullgraph=True,
        backend="aot_eager",
    )
    close(grad(*point), expected)
    stacked = [torch.stack((x, x.flip(-1))) for x in point]
    mapped = torch.compile(lambda *p: torch.vmap(loss)(*p), fullgraph=True, backend="aot_eager")
    close(mapped(*stacked), torch.vmap(loss)(*stacked))


@every_case
def test_exports(case: Case) -> None:
    function, point = case.split()

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = torch.nn.Parameter(point[-1])

        def forward(self, *most: Tensor) -> Any:
            return function(*most, self.last)

    for strict in (False, True):
        program = torch.export.export(Module(), tuple(point[:-1]), strict=strict)
        assert f"pyfuse.{case.op}" in names_in(program.graph_module)
        torch.manual_seed(5)
        expected = function(*point)
        torch.manual_seed(5)
        close(program.module()(*point[:-1]), expected)


def test_an_exported_program_loads_elsewhere(tmp_path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pyfuse.rms_norm(x)

    torch.export.save(torch.export.export(Module(), (torch.ones(2, 4),)), tmp_path / "norm.pt2")
    code = "import sys, torch, pyfuse; print(torch.export.load(sys.argv[1]).module()(torch.ones(2, 4)).sum().item())"
    run = [sys.executable, "-c", code, str(tmp_path / "norm.pt2")]
    assert float(subprocess.run(run, capture_output=True, text=True).stdout) == pytest.approx(8.0)


@every_case
def test_fake_tensors(case: Case) -> None:
    """Shapes and dtypes are those of the real call, forward and backward."""
    function, point = case.split()
    inputs = leaves(point)
    real = function(*inputs)
    found = torch.autograd.grad(total(real), inputs)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in inputs]
        fake = function(*fakes)
        fake_found = torch.autograd.grad(total(fake), fakes)
    if isinstance(real, Tensor):
        real, fake = (real,), (fake,)
    for r, f in zip((*real, *found), (*fake, *fake_found), strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)


@every_case
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(case: Case, mode: str, one_seed: None) -> None:
    function, point = case.split()

    def step(*point: Tensor) -> Any:
        return gradients(function, list(point))

    graph = make_fx(step, tracing_mode=mode, _allow_non_fake_inputs=True)(*point)
    names = names_in(graph)
    assert f"pyfuse.{case.op}" in names and f"pyfuse.{case.op}_backward" in names
    close(graph(*point), step(*point))


def test_wrappers_of_tensors_take_the_formula() -> None:
    """DTensor, TwoTensor, ...: they know torch's own operators only."""
    x, weight = torch.randn(2, 8), torch.randn(8)
    for wanted in (False, True):
        both = TwoTensor(x, 2 * x).requires_grad_(wanted)
        y = pyfuse.rms_norm(both, TwoTensor(weight, weight))
        assert isinstance(y, TwoTensor) and y.requires_grad == wanted
        torch.testing.assert_close(y.a, pyfuse.rms_norm(x, weight))
        torch.testing.assert_close(y.b, pyfuse.rms_norm(2 * x, weight))


class Seen(TorchDispatchMode):
    """Keeps the arguments of every call of `operator`."""

    def __init__(self, operator: Any) -> None:
        super().__init__()
        self.operator, self.calls = operator, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.operator:
            self.calls.append((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@few_cases
def test_operators_pass_opcheck(case: Case, one_seed: None) -> None:
    """torch's own tests of an operator: schema, fake, autograd, dynamic shapes."""
    function, point = case.split()
    for name in (case.op, f"{case.op}_backward"):
        operator = getattr(torch.ops.pyfuse, name).default
        with Seen(operator) as seen:
            gradients(function, point)
        (args, kwargs) = seen.calls[0]
        wants = name == case.op
        args = tree_map_only(
            Tensor, lambda x, w=wants: x.detach().requires_grad_(w and x.is_floating_point()), args
        )
        torch.library.opcheck(operator, args, kwargs)

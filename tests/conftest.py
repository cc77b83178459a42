"""What all tests share: NaN in fresh memory, every backend and ISA, a count of skips."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from importlib import import_module, util
from typing import Any, NamedTuple
from zlib import crc32

import pytest
import setuptools  # noqa: F401  inductor needs it, and it refuses once the standard library's distutils has been imported
import torch
from recorder import Recorder, only_backends

from pyfuse import dispatch
from pyfuse.backends import BACKENDS


class Target(NamedTuple):
    """A backend to test: the CPU kernels in an ISA; the CUDA and the Triton kernels on a GPU of a compute capability;
    the latter also in Triton's interpreter."""

    backend: str
    isa: str | None = None
    arch: int | None = None

    def __str__(self) -> str:
        kind = self.isa or (self.arch and f"sm_{self.arch}")
        return f"{self.backend}-{kind}" if kind else self.backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--emulated",
        choices=("sample", "all", "only"),
        default="sample",
        help="tests of backends on emulated GPUs, and those that compile for several: a sample beside everything else "
        "(default), all of them, or all of them and nothing else (make test-gpu)",
    )
    parser.addoption(
        "--sample",
        type=int,
        default=12,
        metavar="N",
        help="a sample is one of so many tests, as each of them compiles several kernels (default 12)",
    )
    parser.addoption(
        "--gpu-device",
        choices=("emulator", "cuda"),
        default="emulator",
        help="what runs the GPU kernels: the PTX emulator, one architecture after the other (default), or torch's GPU",
    )


# On the emulator one test in so many runs for each of these; its marker `emulated` may say otherwise.
EMULATED = {80: 1, 90: 1, 89: 16, 120: 16}
_RUNNING = [name for name, reason in dispatch.backend_status().items() if reason is None]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "emulated(sm_80=1, ...): of its tests on an emulated GPU of that kind one in so many runs, 0 for none",
    )
    config.addinivalue_line("markers", "ahead_of_time: compiles for several GPUs, and runs nothing")
    config.addinivalue_line("markers", "backends(*names): of the `target` fixture these alone")


def _targets(config: pytest.Config) -> list[Target]:
    """Every backend but eager: the CPU kernels once for each ISA, the Triton kernels for each GPU."""
    targets = []
    if "cpu" in _RUNNING:
        from pyfuse.backends import cpu

        targets += [Target("cpu", isa) for isa in cpu.available_isas()]
    if os.environ.get("TRITON_INTERPRET") == "1":
        return [*targets, Target("triton", "interpreter")] if _has("triton") else targets
    archs = list(EMULATED)
    if config.getoption("--gpu-device") == "cuda":
        from ptxemu.device import compute_capability

        archs = [compute_capability()]
    return targets + [
        Target(name, arch=a) for name in ("cuda", "triton") if _has(name) for a in archs
    ]


def _has(backend: str) -> bool:
    """Whether the backend's kernels are installed, be there a GPU or not."""
    if backend == "cuda":
        from pyfuse.backends import cuda_device

        return cuda_device._cuda is not None
    return util.find_spec("triton") is not None


@pytest.fixture(params=_RUNNING)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that can run here, eager among them."""
    name: str = request.param
    return name


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend but eager (and each ISA and GPU), selected for the time of the test."""
    chosen: Target = request.param
    if chosen.isa == "interpreter":
        yield chosen  # the backend itself takes CPU tensors then
        return
    if chosen.arch is not None:
        from emulated import standing_in

        with standing_in(chosen.arch, request.config.getoption("--gpu-device"), chosen.backend):
            yield chosen
        return
    from pyfuse.backends import cpu

    before = cpu.isa()
    cpu.select_isa(chosen.isa)
    try:
        yield chosen
    finally:
        cpu.select_isa(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """None in a dtype that its backend has no kernels for. Of tests on an emulated GPU, and of those that compile for
    several, one in so many, chosen by its name."""
    kept, left_out = [], []
    emulated = config.getoption("--gpu-device") == "emulator"
    wanted = config.getoption("--emulated") if emulated else "all"
    for item in items:
        if _has_no_kernel(item):
            left_out.append(item)
            continue
        target = _target_of(item)
        if target is not None and target.backend == "triton" and target.arch is not None:
            item.add_marker("triton")
        share = _share_of(item) if emulated else None
        if share is None:
            (left_out if wanted == "only" else kept).append(item)
            continue
        share *= config.getoption("--sample") if wanted == "sample" else 1
        lucky = share > 0 and crc32(item.nodeid.encode()) % share == 0
        (kept if lucky else left_out).append(item)
    items[:] = kept
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _share_of(item: pytest.Item) -> int | None:
    """Of all tests like this one, one in so many runs; None for one that always runs."""
    if item.get_closest_marker("ahead_of_time"):
        return 1
    arch = _arch_of(item)
    if arch is None:
        return None
    shares = dict(EMULATED)
    for marker in reversed(list(item.iter_markers("emulated"))):
        shares.update({int(k.removeprefix("sm_")): n for k, n in marker.kwargs.items()})
    return shares[arch]


def _has_no_kernel(item: pytest.Item) -> bool:
    """GPUs' kernels have no float64, and Triton's interpreter computes bfloat16 wrongly."""
    target = _target_of(item)
    if target is None or target.backend == "cpu":
        return False
    params = item.callspec.params  # type: ignore[attr-defined]
    missing: tuple[Any, ...] = (torch.float64, "f64")
    if target.isa == "interpreter":
        missing += (torch.bfloat16, "bf16")
    return any(getattr(x, "dtype", x) in missing for x in params.values())


def _target_of(item: pytest.Item) -> Target | None:
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return None
    target = item.callspec.params.get("target")
    return target if isinstance(target, Target) else None


def _arch_of(item: pytest.Item) -> int | None:
    """The emulated GPU that a test runs on; None for all other tests."""
    target = _target_of(item)
    return None if target is None else target.arch


def at_threads(*counts: int) -> Iterator[int]:
    """Set torch's number of threads to each of the counts in turn, then back."""
    before = torch.get_num_threads()
    try:
        for count in counts:
            torch.set_num_threads(count)
            yield count
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like give NaN (integers: their maximum): what stays unwritten shows."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`target`: see there. `gpu`: the emulator in each architecture that `@pytest.mark.archs` names, or the real device
    in its own."""
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    names = [
        name.strip()
        for names in own
        for name in (names.split(",") if isinstance(names, str) else names)
    ]
    if "target" in metafunc.fixturenames and "target" not in names:
        none = pytest.param(None, marks=pytest.mark.skip("no backend but eager can run here"))
        only = metafunc.definition.get_closest_marker("backends")
        targets = [t for t in _targets(metafunc.config) if not only or t.backend in only.args]
        metafunc.parametrize("target", targets or [none], ids=str, indirect=True)
    if "gpu" not in metafunc.fixturenames:
        return
    from ptxemu import gpu  # here, since it builds the emulator

    marker = metafunc.definition.get_closest_marker("archs")
    archs = marker.args if marker else gpu.ARCHS
    metafunc.parametrize("gpu", gpu.targets(archs), ids=str)


@pytest.fixture
def one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call of one operation has the same dropout."""
    seed = torch.tensor([3, 14])
    for name in ("attention", "dropout", "embed", "norm"):
        monkeypatch.setattr(import_module(f"pyfuse.ops.{name}"), "draw_seed", lambda: seed)


@pytest.fixture(params=["installed", "kernels", "formula"])
def backends(request: pytest.FixtureRequest) -> Iterator[Recorder | None]:
    """The backends as they are; one that has all gradient kernels; none but eager."""
    if request.param == "installed":
        yield None
        return
    recorder = Recorder() if request.param == "kernels" else None
    with only_backends(**({"recorder": recorder} if recorder else {})):
        yield recorder


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = [f"pyfuse targets: {', '.join(map(str, _targets(config))) or 'none'} (besides eager)"]
    for name in BACKENDS:
        reason = dispatch.backend_status()[name]
        if reason is not None and name not in ("cuda", "triton"):
            lines.append(f"pyfuse backend {name} is not tested: {reason}")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Skips by reason: one that grows unseen would be a test that no longer runs."""
    reasons = Counter(
        report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        for report in terminalreporter.getreports("skipped")
    )
    if reasons:
        terminalreporter.section(f"{sum(reasons.values())} skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{count:6d}  {reason.removeprefix('Skipped: ')}")

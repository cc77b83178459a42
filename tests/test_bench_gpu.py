"""The benchmark for GPUs, run whole at small sizes on an emulated one: that it will start where there is a real one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from emulated import standing_in

from benchmarks import bench_gpu
from pyfuse.backends import cuda_device

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.triton


@pytest.mark.parametrize("quick, backend", [(False, "triton"), (True, "triton"), (False, "cuda")])
def test_every_line_is_printed(
    quick: bool, backend: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if backend == "cuda" and cuda_device._cuda is None:
        pytest.skip(cuda_device.NOT_BUILT)

    def once(run: Callable[[], object], return_mode: str) -> float:
        run()
        return 0.5

    monkeypatch.setattr("triton.testing.do_bench", once)
    monkeypatch.setattr("sys.argv", ["bench_gpu", "--backend", backend, *["--quick"][:quick]])
    shapes = [bench_gpu.Shape(1, (2, 1), 33, 16, causal) for causal in (False, True)]
    for name, value in {
        "DEVICE": "cpu", "SHAPES": shapes, "QUICK": shapes[:1], "DECODING": [(2, (2, 1), 64, 16)],
        "ROWS": [(5, 64)], "ROTATED": [(2, (2, 1), 5, 16)], "EMBEDDED": [(7, 9, 64)],
        "LOSSES": [(70, 65, 64)],
    }.items():  # fmt: skip
        monkeypatch.setattr(bench_gpu, name, value)
    # FlexAttention is compiled on a GPU, which takes no emulator; here it only has to be called rightly.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with standing_in(80, backend=backend):
        assert bench_gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert not [line for line in lines if "cannot" in line and "backward on CPU" not in line]
    started = [line.split("  ")[0] for line in lines if " pyfuse " in line]
    kinds = ["attention ", "attention and gradient"]
    kinds += [] if quick else ["decode", "rms_norm", "layer_norm", "add and", "rope", "embed"]
    kinds += [] if quick or backend == "cuda" else ["loss"]
    assert all(any(line.startswith(kind) for line in started) for kind in kinds)

"""Compile CUDA C++ with nvcc, keeping the results on disk, and run it: in the emulator, or on a GPU.

report = launch(SAMPLES / "layer_norm.cu", "layer_norm_fp32", rows, 128, params, gpu=Emulator(80))
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

from .arguments import Argument
from .build import CACHE
from .gpu import Gpu, nvcc_arch
from .report import Report

SAMPLES = Path(__file__).parent / "samples"
# What samples take of the library's kernels.
LIBRARY = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ("-O3", "-std=c++17", "-lineinfo", f"-I{LIBRARY}")


class NvccNotFound(RuntimeError):
    """There is no nvcc on this machine."""


class CompileError(RuntimeError):
    """nvcc refused a source; the message is nvcc's own."""


def find_nvcc() -> Path | None:
    """nvcc from PATH, else from CUDA_HOME or CUDA_PATH, else from /usr/local/cuda."""
    found = shutil.which("nvcc")
    if found is not None:
        return Path(found)
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    return next((path for path in candidates if path.is_file()), None)


@cache
def _nvcc() -> tuple[Path, str]:
    """nvcc and what it says of its version."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise NvccNotFound(
            "nvcc is neither in PATH, CUDA_HOME/bin nor /usr/local/cuda/bin: install the CUDA "
            "toolkit (12.8 or later for sm_120), or set CUDA_HOME"
        )
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    return nvcc, version.stdout


def _with_includes(source: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """A source and the files it includes by a path in quotes, directly or not, each once."""
    seen = set() if seen is None else seen
    source = source.resolve()
    if source in seen or not source.is_file():
        return
    seen.add(source)
    yield source
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', source.read_text(), re.MULTILINE):
        near = source.parent / name
        yield from _with_includes(near if near.is_file() else LIBRARY / name, seen)


def _compile(
    source: Path, kind: str, arch: str, options: Sequence[str], virtual: str | None = None
) -> Path:
    """The file that nvcc makes of a source; `kind` is ptx or cubin, `virtual` the architecture of the PTX between."""
    nvcc, version = _nvcc()
    target = [f"-arch=compute_{virtual}", f"-code=sm_{arch}"] if virtual else [f"-arch=sm_{arch}"]
    command = [str(nvcc), f"-{kind}", *target, *FLAGS, *options, str(source.resolve())]
    key = hashlib.sha256("\0".join([version, *command[1:]]).encode())
    for path in _with_includes(source):
        key.update(b"\0" + path.read_bytes())
    output = CACHE / f"{source.stem}-sm{arch}-{key.hexdigest()[:20]}.{kind}"
    if output.exists():
        return output
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder, output.name)
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        if done.returncode != 0:
            raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        made.replace(output)  # at once, for tests that run side by side
    return output


def _options(defines: Mapping[str, str] | None, flags: Sequence[str]) -> list[str]:
    return [f"-D{name}={value}" for name, value in sorted((defines or {}).items())] + list(flags)


def compile_ptx(
    source: Path, arch: str, defines: Mapping[str, str] | None = None, flags: Sequence[str] = ()
) -> str:
    """The PTX of a source for an arch such as "80" or "90a"."""
    return _compile(source, "ptx", arch, _options(defines, flags)).read_text()


def compile_cubin(
    source: Path,
    arch: str,
    defines: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    virtual: str | None = None,
) -> Path:
    """A cubin of a source, for cuobjdump and nvdisasm; by way of PTX for `virtual`, which is `arch` if not given."""
    return _compile(source, "cubin", arch, _options(defines, flags), virtual)


def launch(
    source: Path,
    entry: str,
    grid: int | Sequence[int],
    block: int | Sequence[int],
    *args: Argument,
    gpu: Gpu,
    shared: int = 0,
    seed: int = 0,
    cluster: int | Sequence[int] = 1,
    defines: Mapping[str, str] | None = None,
    flags: Sequence[str] = (),
    check: bool = True,
) -> Report:
    """Compile for `gpu`, run one kernel there and give its report, if `check` after its check()."""
    arch = nvcc_arch(gpu.arch)
    ptx = compile_ptx(source, arch, defines, flags)
    module = gpu.module(ptx, lambda: compile_cubin(source, arch, defines, flags).read_bytes())
    report = module.launch(entry, grid, block, args, shared=shared, seed=seed, cluster=cluster)
    return report.check() if check else report

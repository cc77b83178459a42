"""What this machine can do at best, measured: the yardstick of the kernels' figures.

    python -m benchmarks.peaks [--threads N]

benchmarks/peaks.cpp is compiled on first use with the C++ compiler at hand and kept in build/. Machines drift,
so a peak is worth something only beside a kernel timed in the same process: `reader` gives a run for
`measure.interleave`. Tensors that fit the cache are read from there: hold a kernel to `reader` of its own.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pyfuse.cli import machine

SOURCE = Path(__file__).with_suffix(".cpp")
BUILD = Path(__file__).resolve().parent.parent / "build"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-Wno-psabi", "-fopenmp", "-fPIC", "-shared")
BITS = {"avx512": 512, "avx2": 256, "baseline": 128}  # baseline: SSE2, or NEON
ROUNDS = 25


def read_bandwidth(threads: int) -> float:
    """Bytes per second that the threads together read from main memory: the best of some passes."""
    size = max(8 * _last_level_cache(), 256 << 20)
    buffer = torch.ones(size // 4)  # written once: fresh zeros are all one page, in cache
    run = reader(threads, buffer)
    return size / min(run() for _ in range(ROUNDS))


def reader(threads: int, *tensors: Tensor) -> Callable[[], float]:
    """A run for `measure.interleave`: reads the tensors' memory once and returns its seconds."""
    for i, t in enumerate(tensors):
        if t.device.type != "cpu" or not t.is_contiguous():
            raise ValueError(f"tensors[{i}]: needs contiguous memory of the CPU")
    pieces = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    sizes = (ctypes.c_int64 * len(tensors))(*(t.nbytes for t in tensors))
    seconds = _library().read_seconds

    def run() -> float:
        assert len(tensors) == len(sizes)  # and are alive as long as this run
        return float(seconds(pieces, sizes, len(sizes), threads))

    return run


def fma_peak(threads: int, isa: str = "avx512") -> float:
    """Operations per second (a multiply-add is two) in float32; isa: avx512, avx2 or baseline."""
    if isa not in BITS:
        raise ValueError(f"isa: got {isa!r}, needs one of {', '.join(BITS)}")
    library = _library()
    if not library.has_vectors(BITS[isa]):
        raise NotImplementedError(f"isa: this CPU has no {isa}")
    return max(float(library.fma_rate(BITS[isa], threads)) for _ in range(ROUNDS))


def bf16_dot_peak(threads: int) -> float:
    """Operations per second of AVX-512's dot products of bf16 pairs (vdpbf16ps: 64 each)."""
    library = _library()
    if not library.has_bf16_dot():
        raise NotImplementedError("this CPU has no avx512_bf16")
    return max(float(library.bf16_dot_rate(threads)) for _ in range(ROUNDS))


def _last_level_cache() -> int:
    """Bytes of the largest cache; 0 where the system does not tell."""
    names = [n for n in os.sysconf_names if n.startswith("SC_LEVEL") and n.endswith("CACHE_SIZE")]
    return max((os.sysconf(name) for name in names), default=0)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_built()))
    library.read_seconds.restype = ctypes.c_double
    library.fma_rate.restype = ctypes.c_double
    library.bf16_dot_rate.restype = ctypes.c_double
    return library


def _built() -> Path:
    """The library, compiled unless this source was before, by this compiler and for this machine."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise RuntimeError("benchmarks.peaks needs a C++ compiler: found none of c++, g++, clang++")
    key = repr((SOURCE.read_text(), compiler, FLAGS, os.uname().machine)).encode()
    library = BUILD / f"peaks-{hashlib.sha256(key).hexdigest()[:16]}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}")  # moved at the end: others may be building it
        subprocess.run([*compiler.split(), *FLAGS, str(SOURCE), "-o", str(part)], check=True)
        part.replace(library)
    return library


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peaks")
    parser.add_argument("--threads", type=int, default=machine.default_threads())
    threads = parser.parse_args().threads
    print(f"{machine.cpu_model()}, {threads} threads")
    print(f"read from memory    {read_bandwidth(threads) / 1e9:8.1f} GB/s")
    for isa, bits in BITS.items():
        if _library().has_vectors(bits):
            print(f"fma, {isa:15}{fma_peak(threads, isa) / 1e9:8.1f} GF/s")
    if _library().has_bf16_dot():
        print(f"bf16 dot, avx512    {bf16_dot_peak(threads) / 1e9:8.1f} GF/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

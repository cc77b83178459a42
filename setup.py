"""Builds pyfuse._C, and where nvcc is found pyfuse._cuda, with CMake. Everything else about the package is in
pyproject.toml.

The build folder is kept (build/cmake-<tag>), so that a second install compiles only what changed.
PYFUSE_CUDA=on|off|auto says whether to build pyfuse._cuda (auto: where nvcc is found), and TORCH_CUDA_ARCH_LIST, as
torch's own extensions read it, for which GPUs ("8.0 9.0a"; default: all that cmake/cuda.cmake names).
Without a C++ compiler the package installs as pure Python: the eager backend then runs every operation.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
NO_COMPILER = (
    "pyfuse: no C++17 compiler was found, so pyfuse._C is not built and every operation runs on the "
    "eager backend; install g++ or clang++ and run pip install again for the fast CPU kernels."
)


def find_compiler() -> "str | None":
    named = os.environ.get("CXX")
    if named:
        return shutil.which(named.split()[0])
    return next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)


def nvcc_archs(listed: str) -> "list[str]":
    """torch's list of compute capabilities as nvcc names them: "8.0;9.0a+PTX" is 80, 90a. 9.0 is 90a as well: the same
    GPUs, with their wgmma."""
    names = listed.replace(";", " ").split()
    for name in names:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name):
            raise ValueError(f"TORCH_CUDA_ARCH_LIST: {name!r}, needs numbers such as 8.0 or 9.0a")
    archs = [name.removesuffix("+PTX").replace(".", "") for name in names]
    return ["90a" if arch == "90" else arch for arch in archs]


def has_target(folder: Path, name: str) -> bool:
    listed = subprocess.run(
        ["cmake", "--build", str(folder), "--target", "help"], capture_output=True, text=True
    )
    return any(line.split(":")[0] == name for line in listed.stdout.splitlines())


class CMakeBuild(build_ext):
    """Runs CMake once for all extensions that it lists; an absent compiler is no error, a failed build is."""

    def run(self) -> None:
        if find_compiler() is None:
            print(NO_COMPILER, file=sys.stderr)
            self.extensions = []
            return
        super().run()

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # Build isolation puts these two somewhere else each time; the rest of the cache stays valid.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]  # fmt: skip
        cuda = os.environ.get("PYFUSE_CUDA", "auto")
        if cuda not in ("auto", "on", "off"):
            raise ValueError(f"PYFUSE_CUDA: got {cuda!r}, needs auto, on or off")
        configure.append(f"-DPYFUSE_CUDA={cuda}")
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if archs:
            configure.append(f"-DPYFUSE_CUDA_ARCHITECTURES={';'.join(nvcc_archs(archs))}")
        subprocess.run(configure, check=True)
        name = ext.name.rpartition(".")[2]
        if name == "_cuda" and not has_target(folder, name):
            print("pyfuse: nvcc was not found, so pyfuse._cuda is not built", file=sys.stderr)
            return
        subprocess.run(["cmake", "--build", str(folder), "--target", name], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


setup(
    ext_modules=[
        Extension("pyfuse._C", sources=[]),
        Extension("pyfuse._cuda", sources=[], optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)

"""Builds pyfuse._C with CMake. Everything else about the package is in pyproject.toml.

The build folder is kept (build/cmake-<tag>), so that a second install compiles only what changed.
Without a C++ compiler the package installs as pure Python: the eager backend then runs every operation.
"""

import os
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
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(folder), "--target", "_C"], check=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / target.name, target)


setup(
    ext_modules=[Extension("pyfuse._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)

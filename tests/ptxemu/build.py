"""Builds the emulator with CMake, once and again when its sources change; used by `import ptxemu`."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).resolve().parent
ROOT = SOURCES.parents[1]
# The file name says for which Python it is, the folder also for which platform.
FOLDER = ROOT / "build" / f"ptxemu-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


# Compiled kernels.
CACHE = Path(os.environ.get("PTXEMU_CACHE", ROOT / "build" / "ptxemu-cache"))


class BuildError(RuntimeError):
    """The emulator could not be built; the message holds what CMake or the compiler said."""


def load_extension() -> ModuleType:
    """Build what is out of date and import `_ptxemu` from the build folder."""
    path = build()
    spec = importlib.util.spec_from_file_location("_ptxemu", path)
    if spec is None or spec.loader is None:
        raise BuildError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build() -> Path:
    """The built module's path. Processes that want it at the same time wait for each other."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    target = FOLDER / f"_ptxemu{sysconfig.get_config_var('EXT_SUFFIX')}"
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_current(target):
            return target
        started = time.time()
        compile_into(FOLDER)
        os.utime(target, (started, started))  # a source that was saved meanwhile is newer
    return target


def compile_into(folder: Path) -> None:
    """Configure and build in a folder, with all cores."""
    import pybind11

    # Next to the interpreter, where pip puts them, or on PATH.
    near = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=near) or shutil.which("cmake")
    ninja = shutil.which("ninja", path=near) or shutil.which("ninja")
    if cmake is None:
        raise BuildError("the emulator needs cmake: pip install cmake ninja pybind11")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    _run([cmake, "-S", str(SOURCES), "-B", str(folder), *generator,
          "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}",
          f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"])  # fmt: skip
    _run([cmake, "--build", str(folder), "--parallel"])


def _is_current(target: Path) -> bool:
    if not target.exists():
        return False
    built = target.stat().st_mtime
    return all(
        source.stat().st_mtime <= built
        for pattern in ("src/**/*.cpp", "src/**/*.h", "CMakeLists.txt")
        for source in SOURCES.glob(pattern)
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")

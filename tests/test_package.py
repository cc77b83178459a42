"""The package as pip sees it: an sdist that can be built, and an install on a machine without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").is_file(), reason="not run from a source tree"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without anything built, so that a build here leaves the real one alone."""
    copy = tmp_path_factory.mktemp("source") / "pyfuse"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def backend(hook: str, source: Path, target: Path, **variables: str) -> tuple[Path, str]:
    """Call a hook of the build backend as pip does; (what it made, what it printed)."""
    code = f"import setuptools.build_meta as b; print(b.{hook}({str(target)!r}))"
    done = run(sys.executable, "-c", code, cwd=source, **variables)
    return target / done.stdout.split()[-1], done.stdout + done.stderr


def test_the_sdist_holds_what_a_build_needs(source: Path, tmp_path: Path) -> None:
    sdist, _ = backend("build_sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*") if p.is_file()}
    needed |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob("pyfuse/**/*.py")}
    needed |= {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "pyfuse/py.typed"}
    assert needed <= names, f"missing: {sorted(needed - names)}"
    assert not [name for name in names if name.endswith(".so")]


def test_without_a_compiler_the_eager_backend_installs(source: Path, tmp_path: Path) -> None:
    wheel, output = backend("build_wheel", source, tmp_path, CXX="no-such-compiler")
    assert output.count("no C++17 compiler was found") == 1
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.endswith(".so")]
        sources = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("pyfuse/**/*.py")}
        assert sources | {"pyfuse/py.typed"} <= set(names)
        archive.extractall(tmp_path / "site")
    # An editable install of this very tree would lend its compiled module.
    alone = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in repr(f)];"
    )
    code = alone + (
        "import torch, pyfuse; q = torch.ones(1, 2, 3, 8);"
        "print(pyfuse.__file__); print(pyfuse.attention(q, q, q).sum().item());"
        "print(pyfuse.explain('attention', q, q, q))"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    where, total, *explanation = done.stdout.splitlines()
    assert where.startswith(str(tmp_path)) and float(total) == 48.0
    assert explanation[0] == "attention: eager"
    assert "pyfuse._C is not built" in explanation[1] and "install g++ or clang++" in explanation[1]
    code = alone + "from pyfuse.cli import main; main(['doctor'])"
    doctor = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "pyfuse._C is not built" in " ".join(doctor.stdout.split())


def test_a_compiler_that_fails_is_an_error(source: Path, tmp_path: Path) -> None:
    """A broken build must not pass for an absent compiler."""
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    variables = {**os.environ, "CXX": shutil.which("false") or "/bin/false"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=variables, capture_output=True, text=True
    )
    assert done.returncode != 0 and "CMake" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("PYFUSE_CUDA", "perhaps", "PYFUSE_CUDA: got 'perhaps', needs auto, on or off"),
        ("TORCH_CUDA_ARCH_LIST", "8.0 Hopper", "TORCH_CUDA_ARCH_LIST: 'Hopper', needs numbers"),
    ],
)
def test_settings_of_the_cuda_build_are_checked(
    source: Path, tmp_path: Path, variable: str, value: str, message: str
) -> None:
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env={**os.environ, variable: value}, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stdout + done.stderr

"""`pyfuse doctor`: in subprocesses with and without optional packages, and on made-up machines."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import pyfuse
from pyfuse import cli, dispatch
from pyfuse.cli import doctor, machine

OPTIONAL = (*doctor.OPTIONAL_PACKAGES, "typer", "packaging", "numpy", "huggingface_hub", "psutil")

# Hides packages as if they were not installed: find_spec() gives None and import raises.
HIDING = """
import sys
from importlib.machinery import PathFinder

class Hiding:
    find_distributions = PathFinder.find_distributions
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
from pyfuse.cli import main
sys.exit(main(sys.argv[1:]))
"""


def run_doctor(*words: str, hidden: tuple[str, ...] = (), **variables: str):
    """`pyfuse doctor` in a new process without those packages and with no other PYFUSE_* set."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYFUSE_")}
    program = HIDING.replace("{hidden!r}", repr(set(hidden)))
    return subprocess.run(
        [sys.executable, "-c", program, "doctor", *words],
        env={**environment, **variables},
        cwd=tempfile.gettempdir(),  # not the source folder, which would hide what is installed
        capture_output=True,
        text=True,
        timeout=120,
    )


def findings(section: str) -> dict[str, doctor.Finding]:
    return {f.name: f for f in doctor.examine() if f.section == section}


def test_every_part_is_there():
    done = run_doctor("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    expected = ["versions", "machine", "backends", "threads", "settings", "packages", "models"]
    assert list(report["sections"]) == [*expected, "openmp"]
    assert report["sections"]["versions"]["torch"] == torch.__version__
    assert report["sections"]["backends"]["eager"] == "can run"
    assert set(report["sections"]["backends"]) >= set(dispatch.BACKENDS)
    assert report["ok"] == (not report["warnings"])


def test_nothing_optional_installed():
    done = run_doctor(hidden=OPTIONAL)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "pyfuse doctor" and lines[1].split() == ["part", "what", "state"]
    for name in doctor.OPTIONAL_PACKAGES:
        assert re.search(rf"{name} +not installed \(for: ", done.stdout), name
    assert not re.search("[━│┃]", done.stdout)  # rich's lines


def test_module_and_command_are_the_same():
    done = subprocess.run(
        [sys.executable, "-m", "pyfuse", "doctor", "--help"],
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "--strict" in done.stdout


def test_strict_is_the_exit_status():
    typo = {"PYFUSE_BACKENDS": "eager"}
    relaxed, strict = run_doctor(**typo), run_doctor("--strict", **typo)
    assert (relaxed.returncode, strict.returncode) == (0, 1)
    said = "warning: settings: PYFUSE_BACKENDS: pyfuse reads no such variable"
    assert said in relaxed.stdout and said in strict.stdout
    assert "did you mean PYFUSE_BACKEND?" in strict.stdout


def test_strict_passes_without_warnings(monkeypatch, capsys):
    calm = [doctor.Finding("machine", "CPU", "abacus")]
    monkeypatch.setattr(doctor, "examine", lambda: calm)
    assert cli.main(["doctor", "--strict"]) == 0
    said = capsys.readouterr().out
    assert "abacus" in said and said.endswith("no warnings\n")


def test_unknown_instruction_set():
    if dispatch.backend_status()["cpu"] is not None:
        pytest.skip("needs pyfuse._C, which is not built")
    done = run_doctor("--json", "--strict", PYFUSE_ISA="mmx")
    assert done.returncode == 1, done.stderr
    (warning,) = [w for w in json.loads(done.stdout)["warnings"] if w["section"] == "backends"]
    assert "PYFUSE_ISA: got 'mmx', needs one of" in warning["warning"]


def test_instruction_sets(monkeypatch):
    if dispatch.backend_status()["cpu"] is not None:
        pytest.skip("needs pyfuse._C, which is not built")
    cpu = dispatch.load("cpu")
    chosen, _, rest = findings("backends")["instruction set"].value.partition(" of ")
    assert chosen == cpu.isa() and rest.split(", ") == cpu.available_isas()


def test_kernels_not_built(monkeypatch):
    status = {"cpu": "pyfuse._C is not built: install g++", "eager": None}
    monkeypatch.setattr(dispatch, "backend_status", lambda: status)
    cpu = findings("backends")["cpu"]
    assert cpu.value == "no: pyfuse._C is not built: install g++"
    assert cpu.warning is not None and cpu.warning.startswith("pyfuse._C is not built: install")


MAPS = """\
7f10-7f20 r--p 00000000 fe:00 1 /site/torch/lib/libgomp.so.1
7f20-7f30 r-xp 00001000 fe:00 1 /site/torch/lib/libgomp.so.1
7f30-7f40 r--p 00000000 fe:00 2 /usr/lib/libcgomp.so
7f40-7f50 rw-p 00000000 00:00 0
7f50-7f60 r--p 00000000 fe:00 3 /site/a folder.libs/libgomp-a34b3233.so.1.0.0
7f60-7f70 r--p 00000000 fe:00 4 /opt/libiomp5.so
7f70-7f80 r--p 00000000 fe:00 5 /opt/libompd.so
7f80-7f90 r--p 00000000 fe:00 6 /opt/libomp.so.5
"""


def test_openmp_libraries_are_found_in_a_map():
    assert machine.openmp_libraries(MAPS) == [
        "/site/torch/lib/libgomp.so.1",
        "/site/a folder.libs/libgomp-a34b3233.so.1.0.0",
        "/opt/libiomp5.so",
        "/opt/libomp.so.5",
    ]


@pytest.mark.parametrize(
    ("libraries", "value", "warned"),
    [
        (None, "not looked at (no /proc/self/maps on this system)", False),
        ([], "none loaded", False),
        (["/a/libgomp.so.1"], "/a/libgomp.so.1", False),
        (["/a/libgomp.so.1", "/b/libomp.so"], "/a/libgomp.so.1, /b/libomp.so", True),
    ],
)
def test_two_openmp_runtimes_are_a_warning(monkeypatch, libraries, value, warned):
    monkeypatch.setattr(machine, "openmp_libraries", lambda: libraries)
    found = findings("openmp")["runtimes"]
    assert found.value == value
    assert (found.warning is not None and "LD_PRELOAD" in found.warning) == warned


def test_a_fresh_process_has_one_openmp_runtime():
    report = json.loads(run_doctor("--json").stdout)
    runtimes = report["sections"]["openmp"]["runtimes"]
    if runtimes.startswith("not looked at"):
        pytest.skip(runtimes)
    assert len(runtimes.split(", ")) == 1


def test_more_threads_than_cpus(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(machine, "usable_cpus", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "physical_cores", lambda: 2)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    found = findings("threads")["torch uses"]
    assert found.warning is not None and found.warning.endswith("set OMP_NUM_THREADS=2")
    monkeypatch.setattr(machine, "cpu_quota", lambda: 1.5)
    found = findings("threads")["torch uses"]
    assert found.warning is not None and "share 1.5 CPUs" in found.warning
    assert found.warning.endswith("set OMP_NUM_THREADS=1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert findings("threads")["torch uses"].warning is None


def test_cores_of_this_machine():
    assert 1 <= machine.physical_cores() <= len(machine.usable_cpus()) <= (os.cpu_count() or 1)
    assert machine.cpu_model()


def test_default_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "physical_cores", lambda: 8)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    assert machine.default_threads() == 8
    monkeypatch.setattr(machine, "cpu_quota", lambda: 2.5)
    assert machine.default_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert machine.default_threads() == 3


def test_unsupported_version(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "requires",
        lambda name: ['transformers<2,>=1; extra == "hf"', "torch>=2"],
    )
    found = findings("packages")["transformers"]
    assert found.warning is not None and "pyfuse supports transformers <2,>=1" in found.warning


def test_supported_version(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: ["Transformers>=1"])
    found = findings("packages")["transformers"]
    assert found.warning is None and found.value.endswith("(supported: >=1)")


def test_cache_and_models(monkeypatch, tmp_path):
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path / "new"))
    found = findings("models")
    assert found["cache folder"].value == str(tmp_path / "new")
    assert found["cache folder"].warning is None  # not there yet, but it can be made
    assert found["smollm2"].value == "not fetched (pyfuse models fetch smollm2)"
    assert found["smollm2"].warning is None
    (tmp_path / "new" / "models" / "minilm").mkdir(parents=True)
    damaged = findings("models")["minilm"].warning
    assert damaged is not None and damaged.startswith("damaged")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYFUSE_CACHE", str(tmp_path / "file" / "cache"))
    unwritable = findings("models")["cache folder"].warning
    assert unwritable is not None and "set PYFUSE_CACHE" in unwritable


def test_every_variable_that_the_source_reads_is_known():
    package = Path(pyfuse.__file__).parent
    sources = [*package.rglob("*.py"), *(package.parent / "csrc").rglob("*.cpp")]
    reads = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](PYFUSE_\w+)""")
    read = {name for file in sources for name in reads.findall(file.read_text("utf-8"))}
    assert read <= set(doctor.KNOWN_VARIABLES) and "PYFUSE_CACHE" in read

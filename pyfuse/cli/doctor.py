"""`pyfuse doctor`: what this machine and this installation can do, and what is wrong with it."""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from pyfuse import dispatch
from pyfuse.cli import machine, show
from pyfuse.models import zoo

KNOWN_VARIABLES = {
    "PYFUSE_AUTOTUNE": "1: measure the block sizes of Triton kernels",
    "PYFUSE_BACKEND": "the only backend that may run",
    "PYFUSE_CACHE": "the cache folder",
    "PYFUSE_ISA": "the instruction set that the cpu backend uses",
}

OPTIONAL_PACKAGES = {
    "transformers": "pyfuse.accelerate(), pyfuse demo",
    "safetensors": "loading checkpoints",
    "tokenizers": "loading tokenizers",
    "gguf": "pyfuse models fetch smollm2",
    "accelerate": "pyfuse models fetch smollm2",
    "pip": "pyfuse models fetch",
    "pandas": "pyfuse train classifier",
    "rich": "tables and progress bars instead of plain text",
    "triton": "Triton kernels for GPUs",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `warning` says what is wrong and what to do."""

    section: str
    name: str
    value: str
    warning: str | None = None


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor`."""
    parser = commands.add_parser(
        "doctor",
        help="say what this machine can run, and what is wrong",
        description="Show the CPU, its instruction sets, threads, OpenMP runtimes, backends (and "
        "why one cannot run), optional packages, models and settings, with a warning and a fix "
        "for what is wrong.",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if there is a warning")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 with --strict when it holds a warning."""
    findings = examine()
    warnings = [f for f in findings if f.warning is not None]
    if arguments.json:
        sections: dict[str, dict[str, str]] = {}
        for f in findings:
            sections.setdefault(f.section, {})[f.name] = f.value
        said = [{"section": f.section, "name": f.name, "warning": f.warning} for f in warnings]
        print(json.dumps({"ok": not warnings, "warnings": said, "sections": sections}, indent=1))
    else:
        rows = [[f.section, f.name, ("! " if f.warning else "") + f.value] for f in findings]
        for here, above in zip(reversed(rows[1:]), reversed(rows[:-1]), strict=True):
            if here[0] == above[0]:
                here[0] = ""
        show.table("pyfuse doctor", ["part", "what", "state"], rows)
        for f in warnings:
            print(f"warning: {f.section}: {f.name}: {f.warning}")
        print(f"{len(warnings) or 'no'} warning{'s' * (len(warnings) != 1)}")
    return 1 if warnings and arguments.strict else 0


def examine() -> list[Finding]:
    """Look at everything. OpenMP comes last: the looking itself loads what pyfuse uses."""
    return [
        *_installation(),
        *_backends(),
        *_threads(),
        *_settings(),
        *_packages(),
        *_models(),
        *_openmp(),
    ]


def _installation() -> Iterator[Finding]:
    try:
        version = importlib.metadata.version("pyfuse")
    except importlib.metadata.PackageNotFoundError:
        version = "not installed, run from its source folder"
    yield Finding("versions", "pyfuse", f"{version} ({Path(__file__).parents[1]})")
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "torch", torch.__version__)
    yield Finding("machine", "system", f"{platform.system()} {platform.machine()}")
    yield Finding("machine", "CPU", machine.cpu_model())
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"
    yield Finding("machine", "GPU", gpu)


def _backends() -> Iterator[Finding]:
    status = dispatch.backend_status()
    for name, reason in status.items():
        warning = None
        if name == "cpu" and reason is not None:
            warning = f"{reason}. Until then plain torch runs every operation, at its own speed"
        yield Finding("backends", name, "can run" if reason is None else f"no: {reason}", warning)
    if status.get("cpu", "absent") is None:
        cpu = dispatch.load("cpu")
        try:
            chosen = f"{cpu.isa()} of {', '.join(cpu.available_isas())}"
        except ValueError as error:  # PYFUSE_ISA names one that does not exist or cannot run here
            yield Finding("backends", "instruction set", "none chosen", str(error))
        else:
            yield Finding("backends", "instruction set", chosen)


def _threads() -> Iterator[Finding]:
    cpus, cores, threads = machine.usable_cpus(), machine.physical_cores(), torch.get_num_threads()
    quota = machine.cpu_quota()
    granted = f"{cores} physical ({len(cpus)} logical) of {os.cpu_count()} logical in the machine"
    yield Finding("threads", "cores", granted)
    if quota is not None:
        yield Finding("threads", "container limit", f"{quota:g} CPUs")
    limit = len(cpus) if quota is None else min(len(cpus), quota)
    warning = None
    if threads > limit:
        warning = (
            f"{threads} threads share {limit:g} CPUs and wait for each other; "
            f"set OMP_NUM_THREADS={max(1, int(min(cores, limit)))}"
        )
    yield Finding("threads", "torch uses", str(threads), warning)
    yield Finding("threads", "OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "not set"))


def _settings() -> Iterator[Finding]:
    found = {k: v for k, v in sorted(os.environ.items()) if k.startswith("PYFUSE_")}
    for name, value in found.items():
        warning = None
        if name not in KNOWN_VARIABLES:
            close = get_close_matches(name, KNOWN_VARIABLES, n=1)
            meant = f"did you mean {close[0]}?" if close else f"known: {', '.join(KNOWN_VARIABLES)}"
            warning = f"pyfuse reads no such variable; {meant}"
        yield Finding("settings", name, value, warning)
    if not found:
        yield Finding("settings", "PYFUSE_*", f"none set (known: {', '.join(KNOWN_VARIABLES)})")


def _packages() -> Iterator[Finding]:
    wanted = _declared_ranges()
    for name, use in OPTIONAL_PACKAGES.items():
        if importlib.util.find_spec(name) is None:
            yield Finding("packages", name, f"not installed (for: {use})")
            continue
        version = importlib.metadata.version(name)
        value, warning = version, None
        specifier = wanted.get(name)
        if specifier:
            from packaging.specifiers import SpecifierSet

            if SpecifierSet(specifier).contains(version, prereleases=True):
                value = f"{version} (supported: {specifier})"
            else:
                warning = f"pyfuse supports {name} {specifier}: pip install '{name}{specifier}'"
        yield Finding("packages", name, value, warning)


def _declared_ranges() -> dict[str, str]:
    """Package -> version range, from pyfuse's own metadata; empty where that cannot be read."""
    if importlib.util.find_spec("packaging") is None:
        return {}
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("pyfuse") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [Requirement(line) for line in lines]
    return {re.sub(r"[-_.]+", "-", r.name).lower(): str(r.specifier) for r in parsed}


def _models() -> Iterator[Finding]:
    folder = zoo.cache_folder()
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    warning = None
    if not (there.is_dir() and os.access(there, os.W_OK)):
        warning = f"{there} cannot be written; set PYFUSE_CACHE to a folder that can"
    yield Finding("models", "cache folder", str(folder), warning)
    for name in zoo.MODELS:
        reason = zoo.problem(name)
        state = "ready" if reason is None else f"{reason} (pyfuse models fetch {name})"
        broken = reason is not None and reason != "not fetched"
        yield Finding("models", name, state, state if broken else None)


def _openmp() -> Iterator[Finding]:
    libraries = machine.openmp_libraries()
    if libraries is None:
        yield Finding("openmp", "runtimes", "not looked at (no /proc/self/maps on this system)")
        return
    warning = None
    if len(libraries) > 1:
        warning = (
            f"{len(libraries)} OpenMP runtimes are loaded, each with threads of its own that "
            "compete for the cores. Import torch before other packages; where that does not help, "
            f"uninstall the package that brings the one that is not torch's "
            f"({os.path.dirname(torch.__file__)}), or start Python with LD_PRELOAD set to torch's"
        )
    yield Finding("openmp", "runtimes", ", ".join(libraries) or "none loaded", warning)

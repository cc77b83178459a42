"""What this machine is: CPU, cores that may be used, OpenMP runtimes in this process."""

import os
import platform
import re
from pathlib import Path

import torch

_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)(-[0-9a-f]+)?\.(so|dylib)[^/]*$")


def cpu_model() -> str:
    """The CPU's name, or the architecture where the system tells no name."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cpus() -> set[int]:
    """The logical CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def physical_cores() -> int:
    """How many physical cores those logical CPUs are; where unknown, torch's own default."""
    cores = set()
    for cpu in usable_cpus():
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        if not (topology / "core_id").is_file():
            return torch.get_num_threads()
        names = ("physical_package_id", "core_id")
        cores.add(tuple((topology / name).read_text() for name in names))
    return len(cores)


def cpu_quota() -> float | None:
    """The CPUs' worth of time that a container grants (cgroup v2); None without a limit."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.is_file():
        return None
    quota, period = limit.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def default_threads() -> int:
    """Threads for a measurement: OMP_NUM_THREADS where set, else the physical cores granted."""
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads()
    quota = cpu_quota()
    cores = physical_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def openmp_libraries(maps: str | None = None) -> list[str] | None:
    """The files of the OpenMP runtimes loaded in this process, in the order of their addresses.

    maps: the text of /proc/self/maps; None reads it, and gives None where there is no such file.
    """
    if maps is None:
        file = Path("/proc/self/maps")
        if not file.is_file():
            return None
        maps = file.read_text("utf-8", "replace")
    found: dict[str, None] = {}
    for line in maps.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and _OPENMP.search(fields[5]):
            found[os.path.realpath(fields[5])] = None
    return list(found)

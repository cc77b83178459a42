"""Whether there is memory for what is to be allocated: an error instead of a program that the system ends."""

from __future__ import annotations

from pathlib import Path

import torch


def available_bytes(device: torch.device) -> int | None:
    """Memory that can be allocated there; None where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    file = Path("/proc/meminfo")
    if device.type != "cpu" or not file.is_file():
        return None
    for line in file.read_text("ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return None


def check_memory(wanted: int, device: torch.device, what: str, remedy: str) -> None:
    """MemoryError, if so many bytes are not there: what needs them, and what would help."""
    available = available_bytes(device)
    if available is not None and wanted > available:
        raise MemoryError(
            f"{what} {wanted} bytes, but {available} are available on {device}: {remedy}"
        )

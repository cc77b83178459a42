"""Block sizes chosen by measuring: with PYFUSE_AUTOTUNE=1, once for each kind of call on each GPU.

Without it every launch takes what kernels/configs.py ships. With it the first call of a kind runs each candidate a few
times and keeps the fastest in ``autotune.json``, in pyfuse's cache folder (``PYFUSE_CACHE``, else ~/.cache/pyfuse):
by GPU, version of Triton and source of the kernel, so that a new one of any of these is measured again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from pyfuse.folders import cache_folder

_log = logging.getLogger("pyfuse.triton")

Tiles = TypeVar("Tiles")

enabled = os.environ.get("PYFUSE_AUTOTUNE", "") not in ("", "0")


def choose(
    device: Any,
    kernel: Any,
    kind: tuple[Any, ...],
    candidates: Iterable[Tiles],
    launch: Callable[[Tiles], None],
) -> Tiles:
    """The fastest of the candidates for this kind of call; the first is what is shipped.

    kind: all that the choice may depend on. launch: starts the kernel with these tiles; results may be overwritten. A
    candidate that the GPU has no room for (registers, shared memory) drops out.
    """
    path = cache_folder() / "autotune.json"
    known = _known(path)
    options = list(candidates)
    key = " | ".join((device.name, _triton(), kernel.__name__, kernel.cache_key[:16], repr(kind)))
    names = [repr(tiles) for tiles in options]
    if known.get(key) not in names:
        times = {name: device.time(launch, t) for name, t in zip(names, options, strict=True)}
        fitting = {name: t for name, t in times.items() if t is not None}
        if not fitting:
            raise RuntimeError(f"{kernel.__name__}: none of {', '.join(names)} fits {device.name}")
        known[key] = min(fitting, key=lambda name: fitting[name])
        _log.info("%s %s: %s of %s", kernel.__name__, kind, known[key], fitting)
        _store(path, known)
    return options[names.index(known[key])]


@cache
def _triton() -> str:
    return f"triton {metadata.version('triton')}"


@cache
def _known(path: Path) -> dict[str, str]:
    """What has been measured; a file that cannot be read is told of and begun anew."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("%s: %s; measuring again", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _store(path: Path, known: dict[str, str]) -> None:
    """Through a file of its own, so that two processes never read half a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(known, indent=1, sort_keys=True))
    draft.replace(path)

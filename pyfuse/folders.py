"""Where pyfuse keeps files of its own: models, and what has been measured."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder that pyfuse may keep files in; it need not exist."""
    if chosen := os.environ.get("PYFUSE_CACHE"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache").absolute() / "pyfuse"

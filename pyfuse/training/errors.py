"""What can go wrong with a run, in words for whoever started it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["TrainingError", "disk_errors"]


class TrainingError(RuntimeError):
    """The run cannot begin or go on; the message says why and what to do."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """A disk that is full, or a limit on files, as a TrainingError. Files are replaced only when the new ones are
    whole, so what was there stays."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise TrainingError(
            f"{folder}: cannot write ({error.strerror}); what was saved before is untouched: "
            "free some space and go on with --resume"
        ) from error

"""Says that a kernel is being compiled, which takes a second or more at its first call: never a silent pause.

On a terminal with rich installed (the extra ``demo``) a spinner on stderr names the kernel while it lasts; anywhere
else the logger ``pyfuse.triton`` has a line at INFO when it starts and one when it ends.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

_OURS = "pyfuse.kernels."
_log = logging.getLogger("pyfuse.triton")


class Announcer:
    """What Triton calls before and after it compiles a kernel, for any kernel of the process."""

    def __init__(self) -> None:
        self._status: Any = None
        self._started = 0.0

    def before(self, **call: Any) -> None:
        fn = call["fn"]
        if not fn.module.startswith(_OURS):
            return
        self._started = time.perf_counter()
        text = f"compiling {fn.name} (once for these options; Triton keeps it on disk)"
        if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console

            self._status = Console(stderr=True).status(f"pyfuse: {text}")
            self._status.start()
        else:
            _log.info(text)

    def after(self, **call: Any) -> None:
        fn = call["fn"]
        if not fn.module.startswith(_OURS):
            return
        if self._status is not None:
            self._status.stop()
            self._status = None
        else:
            _log.info("compiled %s in %.1f s", fn.name, time.perf_counter() - self._started)


@cache
def announce() -> None:
    """Once for each process: let Triton tell of its compilations, beside whoever listens already."""
    from triton import knobs

    announcer = Announcer()
    runtime = knobs.runtime
    runtime.jit_cache_hook = _both(runtime.jit_cache_hook, announcer.before)
    runtime.jit_post_compile_hook = _both(runtime.jit_post_compile_hook, announcer.after)


def _both(first: Callable[..., Any] | None, second: Callable[..., None]) -> Callable[..., Any]:
    """Call both; what the first returns counts (for Triton, whether it has the kernel already)."""

    def call(**arguments: Any) -> Any:
        second(**arguments)
        return None if first is None else first(**arguments)

    return call

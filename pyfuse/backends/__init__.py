"""The backends, first choice first. A backend is a module with

- ``OPS: dict[str, Impl]``: for each operation that it offers, the function (with the operation's own
  signature) and ``why_not`` (same arguments; the reason why it cannot take them, or None);
- ``why_unavailable() -> str | None``: the reason why it cannot run on this machine at all.

A new backend is one module and one line here. Backends never import one another.
"""

from __future__ import annotations

BACKENDS: dict[str, str] = {
    "cpu": "pyfuse.backends.cpu",  # C++ with SIMD: the embedded default
    "cuda": "pyfuse.backends.cuda",  # written by hand for NVIDIA's GPUs
    "triton": "pyfuse.backends.triton_gpu",  # the same semantics on any GPU that Triton knows
    "eager": "pyfuse.backends.eager",  # plain torch on any device: the oracle, and what no kernel covers
}

"""The formulas in plain torch: the meaning of every operation, and the oracle of every test.

Any device, any dtype, differentiable any number of times; never in a hurry.
"""

from __future__ import annotations

from typing import Any

from pyfuse.backends import (
    eager_attention,
    eager_decode,
    eager_dropout,
    eager_norm,
    eager_position,
)
from pyfuse.dispatch import Impl


def why_unavailable() -> str | None:
    return None


def _takes_everything(*_: Any, **__: Any) -> str | None:
    return None


_FORMULAS = (
    eager_attention.attention,
    eager_attention.varlen_attention,
    eager_decode.decode_attention,
    eager_dropout.dropout,
    eager_norm.layer_norm,
    eager_norm.rms_norm,
    eager_position.rope,
    eager_position.rope_pair,
    eager_position.embed,
)
OPS: dict[str, Impl] = {fn.__name__: Impl(fn, _takes_everything) for fn in _FORMULAS}

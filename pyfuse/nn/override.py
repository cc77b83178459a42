"""torch's functions and modules replaced by pyfuse's while a scope lasts, for code that stays as it is."""

from __future__ import annotations

import sys
import warnings
from types import TracebackType
from typing import Any

import torch

from pyfuse.nn import _fallbacks, functional
from pyfuse.nn._fallbacks import Calls
from pyfuse.nn.attention import MultiheadAttention
from pyfuse.nn.decoder import TransformerDecoderLayer
from pyfuse.nn.encoder import TransformerEncoder, TransformerEncoderLayer

# (owner, attribute, what stands there meanwhile). The modules' forwards are replaced too: in inference torch's go other
# ways than these functions.
_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (torch.nn.functional, "linear", functional.linear),
    (torch.nn.functional, "scaled_dot_product_attention", functional.scaled_dot_product_attention),
    (torch.nn.functional, "dropout", functional.dropout),
    (torch.nn.functional, "layer_norm", functional.layer_norm),
    (torch.nn.functional, "rms_norm", functional.rms_norm),
    (torch.nn.functional, "multi_head_attention_forward", functional.multi_head_attention_forward),
    (torch.nn.MultiheadAttention, "forward", MultiheadAttention.forward),
    (torch.nn.TransformerEncoderLayer, "forward", TransformerEncoderLayer.forward),
    (torch.nn.TransformerDecoderLayer, "forward", TransformerDecoderLayer.forward),
    (torch.nn.TransformerEncoder, "forward", TransformerEncoder.forward),
)
_ORIGINALS = tuple(getattr(owner, name) for owner, name, _ in _REPLACED)


class override_torch:
    """``with pyfuse.override_torch() as calls:`` torch's attention, norms, linear layers and dropout run on pyfuse.

    These are torch.nn.functional's scaled_dot_product_attention, layer_norm, rms_norm, linear, dropout
    and multi_head_attention_forward, and what torch.nn.MultiheadAttention and the Transformer modules do. A call that
    pyfuse does not cover runs on torch's own function, exactly as without; ``print(calls)`` shows both, with the
    reasons.

    It holds for the whole process, in every thread, until the scope ends, also by an exception. What was imported by
    name before (``from torch.nn.functional import layer_norm``) stays as it was.
    ``calls = pyfuse.override_torch.install()`` has no scope: ``pyfuse.override_torch.uninstall()`` ends it.
    RuntimeError: one in another, or uninstall() without install().
    """

    _active: override_torch | None = None

    def __init__(self) -> None:
        self.calls = Calls()
        self._where = ""

    def __enter__(self) -> Calls:
        self._begin(sys._getframe(1).f_code.co_filename, sys._getframe(1).f_lineno)
        return self.calls

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    @classmethod
    def install(cls) -> Calls:
        """Replace torch's functions and modules until uninstall()."""
        override = cls()
        override._begin(sys._getframe(1).f_code.co_filename, sys._getframe(1).f_lineno)
        return override.calls

    @classmethod
    def uninstall(cls) -> Calls:
        """Give torch its own back; the calls since install()."""
        override = override_torch._active
        if override is None:
            raise RuntimeError("override_torch: uninstall() without install()")
        override._end()
        return override.calls

    def _begin(self, file: str, line: int) -> None:
        active = override_torch._active
        if active is not None:
            raise RuntimeError(
                f"override_torch: is active since {active._where}; one in another would not know what to restore"
            )
        self._where = f"{file}:{line}"
        override_torch._active = self
        _fallbacks.counting = self.calls
        for owner, name, ours in _REPLACED:
            setattr(owner, name, ours)

    def _end(self) -> None:
        if override_torch._active is not self:
            raise RuntimeError("override_torch: this one is not active")
        override_torch._active = None
        _fallbacks.counting = None
        for (owner, name, ours), original in zip(_REPLACED, _ORIGINALS, strict=True):
            if getattr(owner, name) is not ours:
                warnings.warn(
                    f"override_torch: {owner.__name__}.{name} was replaced by others meanwhile;"
                    " torch's own is there again",
                    RuntimeWarning,
                    stacklevel=3,
                )
            setattr(owner, name, original)

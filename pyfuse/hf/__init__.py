"""Hugging Face transformers: :func:`accelerate` a live model; the :class:`Receipt`; :func:`undo`.

Importing this package registers the attention and mask functions "pyfuse" and "pyfuse-eager", so
that ``from_pretrained(..., attn_implementation="pyfuse")`` works as well. The second name differs
in what runs where pyfuse does not: the model's own eager attention rather than torch's sdpa.
"""

from __future__ import annotations

try:
    import transformers
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ImportError(
        "pyfuse.accelerate needs Hugging Face transformers: pip install 'pyfuse[hf]'",
        name="transformers",
    ) from error

OLDEST, NEXT_MAJOR = (
    (5, 23),
    (6,),
)  # what the tests have run on; the attention interface changes between majors
_version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if not OLDEST <= _version < NEXT_MAJOR:
    raise ImportError(
        f"transformers: got version {transformers.__version__}, pyfuse needs >= 5.23 and < 6: "
        "pip install 'pyfuse[hf]'",
        name="transformers",
    )

from pyfuse.hf.entry import accelerate, undo  # noqa: E402
from pyfuse.hf.receipt import AccuracyError, Receipt  # noqa: E402

__all__ = ["AccuracyError", "Receipt", "accelerate", "undo"]

"""The names of flash-attn 2 (2.8.3), computed by pyfuse's operations on any device.

Import from here, or make programs that are written for the library run unchanged:

    import pyfuse.compat.flash_attn
    pyfuse.compat.flash_attn.install()
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import pad_input, unpad_input

What is here: the seven attention functions, ``bert_padding``, ``layers.rotary``, ``ops.triton.rotary`` and
``ops.triton.layer_norm``. Other modules of the library (losses, models, modules, the older ``ops``) are not, and
importing them says so. Signatures, layouts, alignments, defaults and returned values are the library's; errors are
ValueError and TypeError that name the argument, where it has assertions and RuntimeError.

More than the library does:
- any device; float32 and float64 beside bfloat16 and float16; any head size, and v's own; any page size; any rotary
  size; empty batches; int64 beside int32 lengths; dropout together with softcap;
- ``deterministic`` changes nothing: every result has the same bits from run to run;
- softmax_lse is differentiable (the library ignores its gradient); alibi_slopes may have a gradient as well.

Different from the library:
- the numbers of dropout are pyfuse's, another mask for the same seed;
- return_attn_probs=True with dropout_p > 0 raises NotImplementedError: the probabilities are never in memory. Without
  dropout the third value is an empty tensor, as in the library;
- with causal and ALiBi together softmax_lse holds the documented bias -slope · |i + N - M - j|, from which the
  library's kernel leaves out what is the same for a whole row of scores;
- flash_attn_varlen_func with block_table refuses dropout and gradients of the pages, which the library's kernel drops
  without a word;
- alibi_slopes [B, Hq] cost a call for each sequence (packed sequences are padded to max_seqlen for it).
"""

from __future__ import annotations

from pyfuse.compat.flash_attn._install import Installation, install
from pyfuse.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = "2.8.3"  # of the interface that is mirrored

__all__ = [
    "Installation",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]

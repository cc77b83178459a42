"""The operations. Each file is one operation's specification: maths, shapes, dtypes, errors; then a call."""

from pyfuse.ops import _library  # noqa: F401  an exported program that is loaded finds its operators
from pyfuse.ops.attention import attention, varlen_attention
from pyfuse.ops.decode import decode_attention
from pyfuse.ops.dropout import dropout
from pyfuse.ops.embed import embed
from pyfuse.ops.linear import linear
from pyfuse.ops.linear_cross_entropy import linear_cross_entropy
from pyfuse.ops.norm import layer_norm, rms_norm
from pyfuse.ops.position import alibi_slopes, rope_frequencies, sinusoidal_encoding
from pyfuse.ops.rope import rope, rope_pair
from pyfuse.ops.sdpa import scaled_dot_product_attention

__all__ = [
    "alibi_slopes",
    "attention",
    "decode_attention",
    "dropout",
    "embed",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_pair",
    "scaled_dot_product_attention",
    "sinusoidal_encoding",
    "varlen_attention",
]

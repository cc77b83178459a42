"""Names, order and defaults of pyfuse.compat.flash_attn are those of flash-attn 2.8.3.

The table was read from its source distribution: flash_attn/flash_attn_interface.py, bert_padding.py, layers/rotary.py,
ops/triton/rotary.py and ops/triton/layer_norm.py.
"""

from __future__ import annotations

import importlib
import inspect

import pytest

SCORES = "dropout_p=0.0 softmax_scale=None causal=False window_size=(-1,-1) softcap=0.0 alibi_slopes=None"
ATTENTION = f"{SCORES} deterministic=False return_attn_probs=False"
LENGTHS = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
NORM = (
    "x weight bias residual=None x1=None weight1=None bias1=None eps=1e-06 dropout_p=0.0 rowscale=None prenorm=False "
    "residual_in_fp32=False zero_centered_weight=False"
)
BUFFERS = "return_dropout_mask=False out_dtype=None out=None residual_out=None"
ROTARY = "interleaved=False inplace=False seqlen_offsets=0 cu_seqlens=None max_seqlen=None"

TABLE: dict[str, dict[str, str]] = {
    "flash_attn_interface": {
        "flash_attn_func": f"q k v {ATTENTION}",
        "flash_attn_kvpacked_func": f"q kv {ATTENTION}",
        "flash_attn_qkvpacked_func": f"qkv {ATTENTION}",
        "flash_attn_varlen_func": f"q k v {LENGTHS} {ATTENTION} block_table=None",
        "flash_attn_varlen_kvpacked_func": f"q kv {LENGTHS} {ATTENTION}",
        "flash_attn_varlen_qkvpacked_func": f"qkv cu_seqlens max_seqlen {ATTENTION}",
        "flash_attn_with_kvcache": "q k_cache v_cache k=None v=None rotary_cos=None rotary_sin=None "
        "cache_seqlens=None cache_batch_idx=None cache_leftpad=None block_table=None softmax_scale=None causal=False "
        "window_size=(-1,-1) softcap=0.0 rotary_interleaved=True alibi_slopes=None num_splits=0 "
        "return_softmax_lse=False",
    },
    "bert_padding": {
        "unpad_input": "hidden_states attention_mask unused_mask=None",
        "unpad_input_for_concatenated_sequences": "hidden_states attention_mask_in_length",
        "pad_input": "hidden_states indices batch seqlen",
        "index_first_axis": "input indices",
        "index_put_first_axis": "values indices first_axis_dim",
        "index_first_axis_residual": "input indices",
    },
    "layers.rotary": {
        "rotate_half": "x interleaved=False",
        "apply_rotary_emb_torch": "x cos sin interleaved=False",
        "apply_rotary_emb": f"x cos sin {ROTARY}",
        "apply_rotary_emb_func": f"x cos sin {ROTARY}",
        "apply_rotary_emb_qkv_": "qkv cos sin cos_k=None sin_k=None interleaved=False seqlen_offsets=0 "
        "num_heads_q=None",
        "apply_rotary_emb_kv_": "kv cos sin interleaved=False seqlen_offsets=0",
        "RotaryEmbedding": "dim base=10000.0 interleaved=False scale_base=None device=None",
        "RotaryEmbedding.forward": "self qkv kv=None seqlen_offset=0 max_seqlen=None num_heads_q=None",
        "RotaryEmbedding._update_cos_sin_cache": "self seqlen device=None dtype=None",
    },
    "ops.triton.rotary": {
        "apply_rotary": "x cos sin seqlen_offsets=0 cu_seqlens=None max_seqlen=None interleaved=False inplace=False "
        "conjugate=False",
    },
    "ops.triton.layer_norm": {
        "layer_norm_fn": f"{NORM} is_rms_norm=False {BUFFERS}",
        "rms_norm_fn": f"{NORM} {BUFFERS}",
        "layer_norm_linear_fn": "x norm_weight norm_bias linear_weight linear_bias residual=None eps=1e-06 "
        "prenorm=False residual_in_fp32=False is_rms_norm=False",
        "RMSNorm": "hidden_size eps=1e-05 dropout_p=0.0 zero_centered_weight=False device=None dtype=None",
        "RMSNorm.forward": "self x residual=None prenorm=False residual_in_fp32=False",
    },
}
ENTRIES = [(module, name) for module, functions in TABLE.items() for name in functions]


def written(parameter: inspect.Parameter) -> str:
    assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    if parameter.default is parameter.empty:
        return parameter.name
    return f"{parameter.name}={parameter.default!r}".replace(" ", "")


@pytest.mark.parametrize(("module", "name"), ENTRIES, ids=lambda entry: str(entry))
def test_signature(module: str, name: str) -> None:
    found = importlib.import_module(f"pyfuse.compat.flash_attn.{module}")
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters.values()
    assert " ".join(map(written, parameters)) == TABLE[module][name]


def test_no_public_function_is_missing_from_the_table() -> None:
    for module, functions in TABLE.items():
        found = importlib.import_module(f"pyfuse.compat.flash_attn.{module}")
        own = {
            name
            for name, value in vars(found).items()
            if inspect.isfunction(value) and value.__module__ == found.__name__ and name[0] != "_"
        }
        assert own <= set(functions), module

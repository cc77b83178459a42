"""Tokenizers of each kind, and tiny random models with one, for the tests of text and of `pyfuse generate`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
from tokenizers import Tokenizer as Library  # noqa: E402
from tokenizers import decoders, models, pre_tokenizers  # noqa: E402

from pyfuse.generation.text import Tokenizer  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ m['role'] }}\n{{ m['content'] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MESSAGE = "<|start|>user\n{}<|stop|>\n<|start|>assistant\n"  # what it makes of a question
ENDS = [0, 2]
SPECIAL = ("<|end|>", "<|start|>", "<|stop|>")


def wrapped(library: Library, **more: Any) -> Any:
    """transformers' tokenizer around it."""
    return transformers.PreTrainedTokenizerFast(tokenizer_object=library, **more)


def _bpe(names: list[str], merges: list[tuple[str, str]] | None = None, **more: Any) -> Library:
    return Library(models.BPE({n: i for i, n in enumerate(names)}, merges or [], **more))


def byte_level(template: str | None = TEMPLATE) -> Any:
    """A token for each byte, one for " t", and two that are parts of an emoji of four bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    smile = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("😀")[0][0]
    pairs = [("Ġ", "t"), (smile[0], smile[1]), (smile[2], smile[3])]
    library = _bpe([*SPECIAL, *letters, *("".join(p) for p in pairs)], pairs)
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    named = {"eos_token": SPECIAL[0], "additional_special_tokens": list(SPECIAL[1:])}
    return wrapped(library, chat_template=template, **named)


def sentencepiece() -> Any:
    """As Llama's: words with the space before them, and bytes for what is in no word."""
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    names = ["<unk>", "<s>", *bytes_, "▁", "▁▁", "▁a", "b", "▁sky", "\ufffd", "é", "c▁"]
    library = _bpe(names, byte_fallback=True, unk_token="<unk>")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return wrapped(library, bos_token="<s>")


def metaspace() -> Any:
    """As T5's: words with the space before them."""
    library = _bpe(["<unk>", "<s>", "▁", "▁▁", "▁a", "b", "▁sky", "é"], unk_token="<unk>")
    library.decoder = decoders.Metaspace()
    return wrapped(library, bos_token="<s>")


def wordpiece() -> Any:
    """As BERT's: parts of words."""
    names = ["[UNK]", "[CLS]", "a", "##b", "sky", ".", "'", "##s", "do", "not", "n't", "##\ufffd"]
    library = Library(models.WordPiece({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    library.decoder = decoders.WordPiece()
    return wrapped(library, cls_token="[CLS]")


def word_ends() -> Any:
    """As the first GPT's: what ends a word says so."""
    names = ["<unk>", "<s>", "a", "b</w>", "sky</w>", "sk", ".</w>"]
    library = _bpe(names, end_of_word_suffix="</w>", unk_token="<unk>")
    library.decoder = decoders.BPEDecoder()
    return wrapped(library, bos_token="<s>")


KINDS = {
    made.__name__: made for made in (byte_level, sentencepiece, metaspace, wordpiece, word_ends)
}


def write_llama(folder: Path, template: str | None = TEMPLATE, positions: int = 128) -> Path:
    """A Llama of two layers with random weights, and the tokenizer of `byte_level`."""
    tokenizer = byte_level(template)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_bart(folder: Path) -> Path:
    """An encoder-decoder with random weights, that has to begin with token 70, and the tokenizer of `byte_level`."""
    tokenizer = byte_level(None)
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, init_std=0.3,
        bos_token_id=1, eos_token_id=0, pad_token_id=3, decoder_start_token_id=2, forced_eos_token_id=0,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config)
    model.generation_config.forced_bos_token_id = 70
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_gguf(file: Path, template: str | None = TEMPLATE) -> None:
    """A Llama of one layer with random Q8_0 and F32 weights, and the tokenizer of `byte_level`."""
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    library = byte_level().backend_tokenizer
    width, heads, inner, size = 64, 2, 96, library.get_vocab_size()
    writer = gguf.GGUFWriter(str(file), "llama")
    for name, value in (
        ("block_count", 1), ("context_length", 128), ("embedding_length", width), ("feed_forward_length", inner),
        ("head_count", heads), ("head_count_kv", 1), ("layer_norm_rms_eps", 1e-5), ("rope_freq_base", 10000.0),
        ("rope_dimension_count", width // heads), ("vocab_size", size), ("tokenizer_model", "gpt2"),
        ("tokenizer_pre", "gpt-2"), ("token_list", [library.id_to_token(i) for i in range(size)]),
        ("token_types", [3] * len(SPECIAL) + [1] * (size - len(SPECIAL))), ("bos_token_id", 0), ("eos_token_id", 0),
        ("unk_token_id", 0),
    ):  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    writer.add_token_merges(["Ġ t"])
    if template is not None:
        writer.add_chat_template(template)
    half, random = width // heads, np.random.default_rng(0)
    for name, shape in {
        "token_embd": (size, width), "output_norm": (width,), "blk.0.attn_norm": (width,), "blk.0.ffn_norm": (width,),
        "blk.0.attn_q": (width, width), "blk.0.attn_k": (half, width), "blk.0.attn_v": (half, width),
        "blk.0.attn_output": (width, width), "blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }.items():  # fmt: skip
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_hf(folder: Path, text: str, **options: Any) -> list[list[int]]:
    """New tokens by Hugging Face's generate, without the end token; text: as the tokenizer gets it."""
    tokenizer = Tokenizer.of(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([tokenizer._plain(text)])
    options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": ENDS} | options
    made = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    new = made[:, ids.shape[1] :].tolist()
    return [row[: min((row.index(i) for i in ENDS if i in row), default=None)] for row in new]


class Terminal(io.StringIO):
    """Standard input or output that says it is one."""

    def isatty(self) -> bool:
        return True

"""Turn one GGUF file into a Hugging Face folder: `python -m pyfuse.models.convert FOLDER FILE OUT`.

A program of its own, so that the memory it takes is given back when it ends, and so that killing it
harms nobody but itself. `pyfuse.models.zoo` runs it and reads the percentages that transformers
prints on stderr.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch


def convert(folder: Path, file: str, out: Path) -> None:
    """Dequantize folder/file to float32 and save model, tokenizer and chat template in `out`.

    Raises RuntimeError when what was saved does not load back bit for bit.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it once, when it is imported
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # The loader leaves the marks of a quantized model, and save_pretrained refuses those.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for name, weight in model.state_dict().items():
        if name not in saved or not torch.equal(weight, saved[name]):
            raise RuntimeError(f"{out}: weight {name} does not read back as it was written")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))

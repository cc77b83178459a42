"""The weights of real models for `pyfuse.models.transformer`: GPT-2, Llama and Mistral, BERT, BART, Marian, T5.

model = from_pretrained("folder")                    # config.json beside model.safetensors
model = from_pretrained("file.gguf")                 # dequantized by transformers
model = from_pretrained(hf_model)                    # a Hugging Face model in memory
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyfuse import ops as pyfuse_ops
from pyfuse.models.families import Family, config_fields, family_of, of_head
from pyfuse.models.transformer import Config, Transformer


def from_pretrained(
    source: str | Path | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    ops: Any = pyfuse_ops,
    **changes: Any,
) -> Transformer:
    """A `Transformer` with the weights of `source`, in inference mode.

    source: a folder with config.json and safetensors (one file or several with an index), a GGUF file, or a Hugging
      Face model. dtype: of the weights, by default as they are there. ops: see `Transformer`.
    changes: of the `Config`, as dropout=0.1, position="sinusoidal" where the positions that are learned there are
      sinusoids, or of its head: head="classes", labels=("ham", "spam"); head="mlm".
      What the new head needs and the source lacks keeps its initial values, drawn by torch's generator, as does a
      classifier of other labels, or of another number of them (classes=5), than the source has.

    ValueError: a type of model, or an option of one, that the Transformer lacks; a weight that is missing or has no
    place; weights in nothing but a pickle. FileNotFoundError: no such folder, or no weights in it.
    """
    theirs, tensors, where = _read(source)
    try:
        fields = config_fields(theirs)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    own = Config(**fields)
    kept = changes.get("head", own.head), changes.get("classes", own.classes)
    if kept != ("classes", own.classes) or "labels" in changes:
        fields |= {"classes": 0, "labels": ()}
    config = Config(**fields | changes)
    model = Transformer(config, ops)
    renamed = own.labels and config.labels and own.labels != config.labels
    anew: tuple[str, ...] = ("classifier",) if renamed or own.classes != config.classes else ()
    weights = _Weights(family_of(theirs), tensors)
    missing = [
        name for name, to in model.state_dict().items()
        if not name.startswith(anew) and not weights.copy_to(name, to)
    ]  # fmt: skip
    new_head = config.head != own.head
    lost = [n for n in missing if not (new_head and of_head(n))]
    if lost:
        raise ValueError(f"{where}: no weights for {', '.join(lost[:5])}{' …' * (len(lost) > 5)}")
    if config.position == "sinusoidal":
        weights.read_sinusoids()
    placeless = weights.unread(
        without=lambda ours: ours.startswith(anew) or (new_head and of_head(ours))
    )
    if placeless:
        raise ValueError(
            f"{where}: weights without a place: {', '.join(placeless[:5])}{' …' * (len(placeless) > 5)}"
        )
    return model.to(
        dtype or next(t.dtype for t in tensors.values() if t.is_floating_point())
    ).eval()


class _Weights:
    """Their tensors under our names."""

    def __init__(self, family: Family, tensors: Mapping[str, Tensor]) -> None:
        self.family, self.tensors = family, tensors
        self.read: set[str] = set()

    def copy_to(self, name: str, to: Tensor) -> bool:
        """Whether there is such a weight; copied then."""
        layer, _, kind = name.rpartition(".")
        if not layer:  # a parameter of the model itself: its name says all
            layer, kind = name, ""
        parts = [self._find(t, kind) for t in self.family.names(layer)]
        if not parts or None in parts:
            return False
        found = [p for p in parts if p is not None]
        if (
            self.family.transposed
            and kind == "weight"
            and ".embedding." not in name
            and to.dim() == 2
        ):
            found = [t.t() for t in found]
        if layer.endswith("embedding.position"):
            found = [t[self.family.first_position :] for t in found]
        whole = torch.cat([t.reshape(-1) if to.dim() == 1 else t for t in found])
        if whole.shape != to.shape:
            raise ValueError(f"{name}: shape {tuple(whole.shape)}, needs {tuple(to.shape)}")
        to.copy_(whole)
        return True

    def read_sinusoids(self) -> None:
        """Tables of positions that say what the model computes. ValueError: they say something else."""
        for side in ("encoder", "decoder"):
            for name in self.family.names(f"{side}.embedding.position"):
                table = self._find(name, "weight")
                if table is None:
                    continue
                table = table[self.family.first_position :].float()
                sinusoids = pyfuse_ops.sinusoidal_encoding(*table.shape, device=table.device)
                if not torch.allclose(table, sinusoids, atol=1e-2):  # bfloat16 is as coarse
                    raise ValueError(f"position: {name} of the source holds no sinusoids like ours")

    def _find(self, layer: str, kind: str) -> Tensor | None:
        name = f"{layer}.{kind}" if kind else layer
        for candidate in (self.family.prefix + name, name):
            if candidate in self.tensors:
                self.read.add(candidate)
                return self.tensors[candidate]
        return None

    def unread(self, without: Callable[[str], bool]) -> list[str]:
        """without: which of our layers outside the blocks may be left out."""
        prefix, skipped = self.family.prefix, self.family.unread
        skipped += tuple(
            n for ours, names in self.family.outer.items() if without(ours) for n in names
        )
        return [
            name
            for name in self.tensors
            if name not in self.read
            and not name.removeprefix(prefix).startswith(skipped)
            and not name.endswith((".attn.bias", ".attn.masked_bias", "inv_freq", "position_ids"))
        ]


# ---- reading -------------------------------------------------------------------------------------


def _read(source: str | Path | nn.Module) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """(configuration, weights, a name for errors)"""
    if isinstance(source, nn.Module):
        config = dict(source.config.to_dict()) | {"architectures": [type(source).__name__]}  # type: ignore[union-attr, operator]
        return config, dict(source.state_dict()), type(source).__name__
    path = Path(source)
    if path.suffix == ".gguf":
        return _read(_dequantized(path))
    if not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path}: no folder of a model (it has no config.json), nor a GGUF file"
        )
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config, _read_safetensors(path), str(path)


def _dequantized(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    return model


def _read_safetensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = [p.name for p in folder.glob("model.safetensors")]
    if files:
        return {name: t for file in files for name, t in load_file(folder / file).items()}
    pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
        p.name for p in folder.glob("*.pt")
    )
    if pickles:
        raise ValueError(
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run any code when it is read; save them as"
            " safetensors: model.save_pretrained(folder, safe_serialization=True)"
        )
    raise FileNotFoundError(f"{folder}: no model.safetensors")

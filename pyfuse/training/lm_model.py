"""The model of `pyfuse train lm`: a new one, or one to go on with; its loss, and what it makes of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyfuse.models.checkpoint import from_pretrained
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training.lm_options import Options
from pyfuse.training.loop import Batch, Figures
from pyfuse.training.windows import batch
from pyfuse.training.world import World


def new_config(options: Options, vocabulary: int) -> Config:
    """A GPT-2 or a Llama of these sizes."""
    dropout = options.dropout or 0.0
    rates = {"dropout": dropout, "attention_dropout": dropout, "hidden_dropout": dropout}
    sizes: dict[str, Any] = {
        "vocabulary": vocabulary,
        "width": options.width,
        "layers": options.layers,
        "heads": options.heads,
        "max_positions": options.context,
        **rates | _dropouts(options),
    }
    if options.kind == "gpt2":
        return Config(**sizes, hidden=4 * options.width)
    # Two thirds of GPT-2's hidden size, for one matrix more: as many parameters.
    hidden = -(-8 * options.width // (3 * 32)) * 32
    return Config(
        **sizes, hidden=hidden, position="rope", norm="rms", activation="silu", gated=True,
        attention_bias=False, hidden_bias=False,
    )  # fmt: skip


def _dropouts(options: Options) -> dict[str, float]:
    names = ("dropout", "attention_dropout", "hidden_dropout")
    return {n: getattr(options, n) for n in names if getattr(options, n) is not None}


def pretrained(options: Options, ops: Any) -> Transformer:
    """The model of --from, with float32 parameters."""
    assert options.from_ is not None
    changes = _dropouts(options)
    if options.dropout is not None:
        changes = dict.fromkeys(("attention_dropout", "hidden_dropout"), options.dropout) | changes
    model = from_pretrained(options.from_, dtype=torch.float32, ops=ops, **changes)
    if options.context > model.config.max_positions:
        raise ValueError(
            f"--context: {options.context}, but the model of --from has {model.config.max_positions} positions"
        )
    return model


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the next token, on average."""
    y: Tensor = model(batch["ids"], targets=batch["targets"])
    return y


def evaluation(
    model: Transformer, windows: list[Tensor], size: int, world: World
) -> Callable[[], Figures]:
    """loss and perplexity of these windows, `size` at a time, each process its share of them."""
    own = windows[world.rank :: world.size]

    def evaluate() -> Figures:
        total = 0.0
        for i in range(0, len(own), size):
            part = {n: t.to(world.device) for n, t in batch(own[i : i + size]).items()}
            total += loss(model, part).item() * len(part["ids"])
        mean = world.sums(total)[0] / len(windows)
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0))}

    return evaluate

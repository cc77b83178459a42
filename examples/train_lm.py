"""A small GPT-2 that learns Python from the standard library's sources, step by step.

    python examples/train_lm.py              # about a quarter of an hour on two cores
    python examples/train_lm.py --stock      # the same weights and batches on plain torch

`pyfuse train lm` is the same with checkpoints, options and pictures.
"""

import argparse
import math

import torch
from torch import Tensor, nn

from pyfuse import ops
from pyfuse.models import stock
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training.loop import Batch, Figures, Plan, Trainer
from pyfuse.training.progress import progress
from pyfuse.training.text import read_text, split
from pyfuse.training.tokens import train_bpe
from pyfuse.training.windows import Windows, batch, evenly
from pyfuse.training.world import World

CONTEXT, BATCH = 256, 16

parser = argparse.ArgumentParser(description="Train a small GPT-2 on Python's standard library.")
parser.add_argument("--steps", type=int, default=300, help="updates of the parameters")
parser.add_argument("--stock", action="store_true", help="plain torch instead of pyfuse")
arguments = parser.parse_args()

# Text, and what is never learnt from.
learnt, held = split(read_text(None).documents, held_out=0.05)
tokenizer = train_bpe(learnt, 4096)
data = Windows(tokenizer.stream(learnt), CONTEXT, seed=0, count=BATCH)
examined = batch(evenly(Windows(tokenizer.stream(held), CONTEXT, seed=0, count=BATCH), 32))

# The model.
torch.manual_seed(0)
config = Config(
    vocabulary=4096, width=256, layers=4, heads=4, hidden=1024, max_positions=CONTEXT, dropout=0.0
)
model = Transformer(config, ops=stock if arguments.stock else ops)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the next token, on average."""
    y: Tensor = model(batch["ids"], targets=batch["targets"])
    return y


def evaluate() -> Figures:
    mean = loss(model, examined).item()
    return {"loss": mean, "perplexity": math.exp(mean)}


plan = Plan(steps=arguments.steps, warmup=50, eval_every=50)
with progress(plan.steps, 0) as shown:
    trainer = Trainer(
        model, loss, data, evaluate, plan, World(torch.device("cpu")), listeners=(shown,)
    )
    figures = trainer.run()
speed = trainer.tokens / trainer.seconds
print(f"perplexity {figures['perplexity']:.1f} of at most {config.vocabulary}, {speed:,.0f} tok/s")

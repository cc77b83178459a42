"""A small BERT that learns to find hidden tokens of Python's standard library, step by step.

    python examples/train_mlm.py
    python examples/train_mlm.py --stock     # the same weights and batches on plain torch

`pyfuse train mlm` is the same with checkpoints, options and pictures.
"""

import argparse
import math

import torch
from torch import Tensor, nn

from pyfuse import ops
from pyfuse.models import stock
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training.loop import Batch, Figures, Plan, Trainer
from pyfuse.training.masking import Masked, Masking, inner, marks
from pyfuse.training.progress import progress
from pyfuse.training.text import read_text, split
from pyfuse.training.tokens import MARKS, train_bpe
from pyfuse.training.windows import Windows, evenly
from pyfuse.training.world import World

CONTEXT, BATCH, VOCABULARY = 128, 32, 4096

parser = argparse.ArgumentParser(description="Train a small BERT on Python's standard library.")
parser.add_argument("--steps", type=int, default=500, help="updates of the parameters")
parser.add_argument("--stock", action="store_true", help="plain torch instead of pyfuse")
arguments = parser.parse_args()

# Text, and what is never learnt from; [CLS] and [SEP] go around each window.
learnt, held = split(read_text(None).documents, held_out=0.05)
tokenizer = train_bpe(learnt, VOCABULARY, special=MARKS)
windows, unseen = (
    Windows(tokenizer.stream(part), CONTEXT - 2, seed=0, count=BATCH) for part in (learnt, held)
)
# 15 % of the tokens are to be found out; which ones is drawn in each step, but not for what is held out.
masking = Masking(marks(tokenizer), VOCABULARY, share=0.15)
data = Masked(windows, masking, seed=0)
examined = masking.batch([inner(w) for w in evenly(unseen, 64)], 0)

# The model.
torch.manual_seed(0)
config = Config(
    vocabulary=VOCABULARY, width=256, layers=4, heads=4, hidden=1024, max_positions=CONTEXT, causal=False,
    norm_first=False, activation="gelu", embedding_norm=True, head="mlm",
)  # fmt: skip
model = Transformer(config, ops=stock if arguments.stock else ops)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the hidden tokens, on average; logits of no others are computed."""
    y: Tensor = model(batch["ids"], targets=batch["targets"])
    return y


def evaluate() -> Figures:
    mean = loss(model, examined).item()
    return {"loss": mean, "perplexity": math.exp(mean)}


plan = Plan(steps=arguments.steps, warmup=100, eval_every=50)
with progress(plan.steps, 0) as shown:
    trainer = Trainer(
        model, loss, data, evaluate, plan, World(torch.device("cpu")), listeners=(shown,)
    )
    figures = trainer.run()
speed = trainer.tokens / trainer.seconds
print(f"perplexity {figures['perplexity']:.1f} of at most {config.vocabulary}, {speed:,.0f} tok/s")

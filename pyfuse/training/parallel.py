"""How the processes of a run hold its model: each all of it, or each a part.

    ddp    parameters, gradients and optimizer's state in each process; gradients are averaged
           (torch's DistributedDataParallel: Li et al., arXiv:2006.15704)
    fsdp   a part of each of them in each process; a block's parameters come together while it computes (sharded.py)

Both compute the same. What a checkpoint has is whole in either, so that a run may go on with the other, or with another
number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pyfuse.training.world import World

Loss = Callable[[Any, dict[str, Tensor]], Tensor]


class Objective(nn.Module):
    """loss(model, batch) as a module: whatever the loss calls of the model is within DDP, or within FSDP."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self.model, batch)


class Replicated:
    """Each process, or the only one, has the whole model, which is moved to its device.

    model: for evaluations and checkpoints. learner: whose parameters are learnt; here the same. objective: gives the
    loss; its gradients are averaged over the processes.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World) -> None:
        self.model = self.learner = model.to(world.device)
        self.objective: nn.Module = Objective(model, loss)
        if world.size > 1:
            self.objective = DistributedDataParallel(self.objective)

    def without_exchange(self) -> AbstractContextManager[None]:
        """Within: gradients are added up in each process, for the next ones that are averaged."""
        if isinstance(self.objective, DistributedDataParallel):
            return self.objective.no_sync()
        return nullcontext()

    def whole(self) -> AbstractContextManager[None]:
        """Within: model is whole. All processes enter together."""
        return nullcontext()

    def gathered(self, t: Tensor) -> Tensor:
        """The whole of a parameter, a gradient or a state. All processes ask together."""
        return t

    def share(self, whole: Tensor, p: Tensor) -> Tensor:
        """What this process holds of a tensor that belongs to its parameter p."""
        return whole.to(p.device, copy=True)


def parallel(kind: str, model: nn.Module, loss: Loss, world: World) -> Replicated:
    """kind: "ddp" or "fsdp". One process alone holds everything."""
    if kind == "fsdp" and world.size > 1:
        from pyfuse.training.sharded import Sharded  # fully_shard takes seconds to import

        return Sharded(model, loss, world)
    return Replicated(model, loss, world)

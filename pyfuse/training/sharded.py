"""A model shared out over the processes of a run, by torch's fully_shard ("FSDP2").

Zhao et al., arXiv:2304.11277; the idea: Rajbhandari et al., arXiv:1910.02054.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from pyfuse.training.parallel import Loss, Objective, Replicated
from pyfuse.training.world import World


class Sharded(Replicated):
    """Each process has a part of each parameter of the learner, a copy of the model.

    The model itself is empty but within `whole`, so that evaluations and checkpoints are as without sharding: no
    process has to make as many calls as the others.
    """

    def __init__(self, model: nn.Module, loss: Loss, world: World) -> None:
        self.model, self.learner = model, copy.deepcopy(model)
        self._empty()
        model.to(world.device)
        mesh = init_device_mesh(world.device.type, (world.size,))
        # A block of a list at a time; what is left, tables and heads among it, together with the loss that uses it.
        lists = [m for m in self.learner.modules() if isinstance(m, nn.ModuleList)]
        for block in (b for blocks in lists for b in blocks):
            fully_shard(block, mesh=mesh)
        self.objective = Objective(self.learner, loss)
        fully_shard(self.objective, mesh=mesh)
        # It says so of each block, since these return views of larger tensors; nothing here writes into them.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        if dist.get_backend() == "gloo":  # it has sums only, and refuses averages
            for part in self.objective.modules():
                if isinstance(part, FSDPModule):
                    part.set_force_sum_reduction_for_comms(True)

    def without_exchange(self) -> AbstractContextManager[None]:
        """Gradients are exchanged in any case: whole ones would take the memory that sharding is to save."""
        return nullcontext()

    @contextmanager
    def whole(self) -> Iterator[None]:
        with torch.no_grad():
            for name, p in self.learner.named_parameters():
                self.model.get_parameter(name).data = self.gathered(p)
        try:
            yield
        finally:
            self._empty()

    def gathered(self, t: Tensor) -> Tensor:
        return t.full_tensor() if isinstance(t, DTensor) else t

    def share(self, whole: Tensor, p: Tensor) -> Tensor:
        if not isinstance(p, DTensor) or whole.dim() != p.dim():  # the optimizer's count of steps
            return super().share(whole, p)
        # Each process has the whole tensor already.
        return distribute_tensor(
            whole.to(p.device), p.device_mesh, p.placements, src_data_rank=None
        )

    def _empty(self) -> None:
        for p in self.model.parameters():
            p.data = p.data.new_empty(0)

"""Processes that share a training run over torch.distributed, or the one that runs alone."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


class Processes:
    """Processes of a run. rank, world: of this one, and how many; shared: True if torch.distributed is initialised."""

    def __init__(self) -> None:
        self.shared = dist.is_available() and dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if self.shared else (0, 1)

    def sum(self, t: Tensor) -> None:
        """Sum over all processes, in place."""
        if self.shared:
            dist.all_reduce(t, dist.ReduceOp.SUM)

    def maximum(self, t: Tensor) -> None:
        """Maximum over all processes, in place."""
        if self.shared:
            dist.all_reduce(t, dist.ReduceOp.MAX)

    def gather(self, x: Tensor, batch_index: Tensor, count: int) -> Tensor:
        """Gather the tokens of all processes in the batch's order: [layers, count, width]."""
        if not self.shared:
            return x
        batch = x.new_zeros(x.shape[0], count, x.shape[2])
        batch[:, batch_index] = x
        self.sum(batch)
        return batch

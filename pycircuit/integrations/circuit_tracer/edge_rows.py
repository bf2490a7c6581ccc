"""Edge rows as circuit-tracer's graph holds them: one dense matrix of the nodes that were chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pycircuit import ops
from pycircuit.model.replacement import LocalReplacement
from pycircuit.progress import Progress
from pycircuit.trace.collect import RowCollector
from pycircuit.trace.columns import Columns
from pycircuit.trace.memory_plan import TILE_TARGETS, MemoryBoundError, MemoryPlan, free_bytes, readable, tile_bytes
from pycircuit.trace.row_store import PackedRows, RowStore, StoreSize
from pycircuit.trace.targets import Target

_AT_ONCE = 256  # rows


@dataclass(frozen=True, eq=False)
class Adjacency:
    """active: [n, 3] layer, position, feature, ascending; values: [n]; selected: [k] rows of `active`, ascending;
    matrix: [nodes, nodes] row = target, column = source; order selected features, errors (layer-major), tokens,
    targets."""

    active: Tensor
    values: Tensor
    selected: Tensor
    matrix: Tensor


class _Whole(RowStore):
    """Rows as the sweep writes them, none packed: kept until they are ranked, or put where they belong at once.

    into: [nodes, nodes] for the latter.
    """

    def __init__(self, found: _Rows, rows: int, into: Tensor | None) -> None:
        super().__init__(found.sweep.columns, found.value, StoreSize(rows, dense=into is None, keep=None))
        self.found, self.into = found, into

    def pack(self, filled: Tensor, layer: Sequence[int], position: Sequence[int]) -> PackedRows:
        if self.into is not None:
            nodes = self.found.nodes_at(self.count, self.count + len(filled))
            self.into[nodes, : filled.shape[1]] = filled.to(self.into)
        none = np.empty(0, np.float32)
        return PackedRows(np.zeros(len(filled), np.int64), none.astype(np.int32), none)

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        """Weights may be negative here; influence is linear in them."""
        assert self.block is not None  # ranked rows are kept
        total = ops.influence(self.block, node, weight.clamp_min(0), order)
        return total - ops.influence(self.block, node, -weight.clamp_max(0), order) if (weight < 0).any() else total


class _Rows(RowCollector):
    """Rows of a trace, dense."""

    def __init__(
        self, local: LocalReplacement, targets: Sequence[Target], rows: int, into: Tensor | None, show: Progress
    ) -> None:
        self.into = into
        plan = MemoryPlan(memory=0, stored=True, dense=into is None, keep=None, tile_bytes=_tile_bytes(local))
        super().__init__(local, targets, plan, show, rows)

    def _new_store(self) -> RowStore:
        return _Whole(self, self.total, self.into)

    def nodes_at(self, begin: int, end: int) -> Tensor:
        """The nodes of rows begin .. end, of which some may be under way, where every feature has one: on the CPU."""
        outputs = torch.tensor(self.order) + self.sweep.columns.count
        return torch.cat([outputs, *(nodes.cpu() for nodes in self._nodes)])[begin:end]


def adjacency(
    local: LocalReplacement, targets: Sequence[Target], most: int | None, round_size: int, show: Progress
) -> Adjacency:
    """most: how many features get rows and columns, by influence, round_size at a time; None or 0: all."""
    columns, outputs = Columns.of(local), len(targets)
    total = columns.features
    wanted = min(most or total, total)
    nodes = columns.count - total + wanted + outputs
    _fits(local, nodes, 0 if wanted == total else (wanted + outputs) * columns.count)
    matrix = torch.zeros(nodes, nodes)
    found = _Rows(local, targets, wanted + outputs, matrix if wanted == total else None, show)
    found.add_targets()
    every = torch.arange(total, device=found.layer.device)
    while (left := wanted - found.expanded) > 0:
        found.add_features(every if wanted == total else found.most_influential(min(left, round_size)))
    chosen = found.nodes().cpu()
    selected = chosen.sort().values
    if wanted < total:
        _place(found, chosen, selected, matrix)
    active = torch.stack([found.layer, found.position, found.index], 1)
    return Adjacency(active, found.value, selected, matrix)


def _place(found: _Rows, chosen: Tensor, selected: Tensor, matrix: Tensor) -> None:
    """Ranked rows into the matrix, without the columns of features that were not chosen."""
    block, columns, outputs = found.store.block, found.sweep.columns, len(found.targets)
    assert block is not None
    rows = torch.empty(len(matrix), dtype=torch.int64)
    rows[torch.searchsorted(selected, chosen)] = torch.arange(len(chosen)) + outputs
    rows[torch.tensor(found.order) + len(matrix) - outputs] = torch.arange(outputs)
    kept = torch.cat([selected, torch.arange(columns.features, columns.count)]).to(block.device)
    filled = torch.cat([torch.arange(len(selected)), torch.arange(len(matrix) - outputs, len(matrix))])
    for some in filled.split(_AT_ONCE):
        taken = rows[some].to(block.device)
        matrix[some, : len(kept)] = block[taken[:, None], kept].to(matrix)


def _tile_bytes(local: LocalReplacement) -> int:
    frozen, size = local.model, local.model.embeddings.element_size()
    wide = max(one.w_o.shape[1] + one.w_v.shape[0] + one.heads for one in frozen.layers)
    one = size * frozen.positions * (frozen.width + wide)  # of a target of full length
    return max(one, min(max(tile_bytes(frozen.device), TILE_TARGETS * one), free_bytes(frozen.device) // 8))


def _fits(local: LocalReplacement, nodes: int, ranked: int) -> None:
    """Whether their matrix, and the rows that are ranked, can be there at all."""
    needed = [(torch.device("cpu"), nodes**2 * torch.zeros(0).element_size())]
    needed.append((local.model.device, ranked * local.model.dtype.itemsize))
    for device in {device for device, _ in needed}:
        size, free = sum(n for d, n in needed if d == device), free_bytes(device)
        if size > free:
            raise MemoryBoundError(
                f"attribute: memory must be at least {readable(size)} on {device} for circuit-tracer's matrix of "
                f"{nodes} x {nodes} nodes, got {readable(free)}; lower max_feature_nodes, or use pc.attribute, whose "
                "graph keeps rows only"
            )

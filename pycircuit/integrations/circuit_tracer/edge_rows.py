"""Edge rows in the form of circuit-tracer's graph: one dense matrix of the chosen nodes."""

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

_ROWS_AT_ONCE = 256  # rows


@dataclass(frozen=True, eq=False)
class Adjacency:
    """Active features and the edges of the selected ones.

    active: [n, 3] layer, position, feature, ascending; values: [n]; selected: [k] rows of `active`, ascending;
    matrix: [nodes, nodes] row = target, column = source; order selected features, errors (layer-major), tokens,
    targets.
    """

    active: Tensor
    values: Tensor
    selected: Tensor
    matrix: Tensor


class _DenseStore(RowStore):
    """Store of unpacked rows, which are ranked later, or written at once into a matrix: [nodes, nodes]."""

    def __init__(self, collector: _Rows, rows: int, into: Tensor | None) -> None:
        super().__init__(collector.sweep.columns, collector.value, StoreSize(rows, dense=into is None, keep=None))
        self.collector, self.into = collector, into

    def pack(self, filled: Tensor, layer: Sequence[int], position: Sequence[int]) -> PackedRows:
        if self.into is not None:
            nodes = self.collector.nodes_at(self.count, self.count + len(filled))
            self.into[nodes, : filled.shape[1]] = filled.to(self.into)
        none = np.empty(0, np.float32)
        return PackedRows(np.zeros(len(filled), np.int64), none.astype(np.int32), none)

    def influence(self, order: Tensor, node: Tensor, weight: Tensor) -> Tensor:
        """Influence of the ranked rows for weights of any sign, in which influence is linear."""
        assert self.block is not None  # ranked rows are stored
        total = ops.influence(self.block, node, weight.clamp_min(0), order)
        return total - ops.influence(self.block, node, -weight.clamp_max(0), order) if (weight < 0).any() else total


class _Rows(RowCollector):
    """Rows of a trace, dense."""

    def __init__(
        self, local: LocalReplacement, targets: Sequence[Target], rows: int, into: Tensor | None, progress: Progress
    ) -> None:
        self.into = into
        plan = MemoryPlan(memory=0, stored=True, dense=into is None, keep=None, tile_bytes=_tile_size(local))
        super().__init__(local, targets, plan, progress, rows)

    def _new_store(self) -> RowStore:
        return _DenseStore(self, self.total, self.into)

    def nodes_at(self, begin: int, end: int) -> Tensor:
        """Nodes of rows begin to end, on the CPU, if every feature has a row; some rows may not be written yet."""
        outputs = torch.tensor(self.order) + self.sweep.columns.count
        return torch.cat([outputs, *(nodes.cpu() for nodes in self._nodes)])[begin:end]


def adjacency(
    local: LocalReplacement,
    targets: Sequence[Target],
    max_feature_nodes: int | None,
    round_size: int,
    progress: Progress,
) -> Adjacency:
    """Trace the adjacency matrix.

    max_feature_nodes: number of features with rows and columns, by influence, round_size at a time; None or 0: all.
    """
    columns, outputs = Columns.of(local), len(targets)
    total = columns.features
    chosen_features = min(max_feature_nodes or total, total)
    nodes = columns.count - total + chosen_features + outputs
    _require_memory(local, nodes, 0 if chosen_features == total else (chosen_features + outputs) * columns.count)
    matrix = torch.zeros(nodes, nodes)
    collector = _Rows(local, targets, chosen_features + outputs, matrix if chosen_features == total else None, progress)
    collector.add_targets()
    every = torch.arange(total, device=collector.layer.device)
    while (missing := chosen_features - collector.expanded) > 0:
        collector.add_features(
            every if chosen_features == total else collector.most_influential(min(missing, round_size))
        )
    chosen = collector.nodes().cpu()
    selected = chosen.sort().values
    if chosen_features < total:
        _fill_ranked_rows(collector, chosen, selected, matrix)
    active = torch.stack([collector.layer, collector.position, collector.index], 1)
    return Adjacency(active, collector.value, selected, matrix)


def _fill_ranked_rows(collector: _Rows, chosen: Tensor, selected: Tensor, matrix: Tensor) -> None:
    """Copy ranked rows into the matrix, without the columns of features that were not chosen."""
    block, columns, outputs = collector.store.block, collector.sweep.columns, len(collector.targets)
    assert block is not None
    rows = torch.empty(len(matrix), dtype=torch.int64)
    rows[torch.searchsorted(selected, chosen)] = torch.arange(len(chosen)) + outputs
    rows[torch.tensor(collector.order) + len(matrix) - outputs] = torch.arange(outputs)
    chosen_columns = torch.cat([selected, torch.arange(columns.features, columns.count)]).to(block.device)
    filled = torch.cat([torch.arange(len(selected)), torch.arange(len(matrix) - outputs, len(matrix))])
    for block_rows in filled.split(_ROWS_AT_ONCE):
        source_rows = rows[block_rows].to(block.device)
        matrix[block_rows, : len(chosen_columns)] = block[source_rows[:, None], chosen_columns].to(matrix)


def _tile_size(local: LocalReplacement) -> int:
    frozen, size = local.model, local.model.embeddings.element_size()
    attention_width = max(layer.w_o.shape[1] + layer.w_v.shape[0] + layer.heads for layer in frozen.layers)
    target_bytes = size * frozen.positions * (frozen.width + attention_width)  # of a target of full length
    wanted_bytes = max(tile_bytes(frozen.device), TILE_TARGETS * target_bytes)
    return max(target_bytes, min(wanted_bytes, free_bytes(frozen.device) // 8))


def _require_memory(local: LocalReplacement, nodes: int, ranked: int) -> None:
    """Raise unless circuit-tracer's matrix and the ranked rows fit into memory."""
    needs = [(torch.device("cpu"), nodes**2 * torch.zeros(0).element_size())]
    needs.append((local.model.device, ranked * local.model.dtype.itemsize))
    for device in {device for device, _ in needs}:
        size, free = sum(n for d, n in needs if d == device), free_bytes(device)
        if size > free:
            raise MemoryBoundError(
                f"attribute: memory must be at least {readable(size)} on {device} for circuit-tracer's matrix of "
                f"{nodes} x {nodes} nodes, got {readable(free)}; lower max_feature_nodes, or use pc.attribute, whose "
                "graph keeps rows only"
            )

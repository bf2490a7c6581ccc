"""Stability of pruning: the nodes and edges that stay whatever the thresholds and the weights of the targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks
from pycircuit.progress import Progress, Report

from .influence import target_weights
from .prune import Pruned, prune, thresholds

if TYPE_CHECKING:
    from .graph import Graph

OP = "Graph.stability"


@dataclass(frozen=True, eq=False)
class Stability:
    """Shares of prunings that keep each node and edge of a graph.

    graph: the graph before; nodes: [nodes] float64; edges: [entries] float64, of graph.rows; prunings: their number;
    threshold: the share that core nodes and edges have at least. Tokens and targets are always in.
    """

    graph: Graph
    nodes: Tensor
    edges: Tensor
    prunings: int
    threshold: float

    @property
    def core(self) -> Pruned:
        """Nodes and edges that nearly all prunings keep."""
        return self._pruned(self.nodes >= self.threshold, self.edges >= self.threshold)

    @property
    def contingent(self) -> Pruned:
        """Nodes and edges that some prunings keep and others do not; its edges may end in core nodes."""
        return self._pruned(
            (self.nodes > 0) & (self.nodes < self.threshold), (self.edges > 0) & (self.edges < self.threshold)
        )

    def _pruned(self, nodes: Tensor, edges: Tensor) -> Pruned:
        return Pruned(self.graph, nodes, edges, self.graph.influence())

    def __repr__(self) -> str:
        inner = self.nodes[: self.graph.first_token]
        counts = []
        for name, share in (("nodes", inner), ("edges", self.edges)):
            core = int((share >= self.threshold).sum())
            counts.append(f"{name}={core} core and {int((share > 0).sum()) - core} contingent of {len(share)}")
        return f"Stability(prunings={self.prunings}, {', '.join(counts)})"


def stability(
    graph: Graph,
    node_thresholds: Sequence[float],
    edge_thresholds: Sequence[float],
    samples: int,
    seed: int,
    core: float,
    progress: bool | Report,
) -> Stability:
    """Prune a graph at every pair of thresholds under every sample of the targets' weights."""
    pairs = [thresholds(OP, node, edge) for node in node_thresholds for edge in edge_thresholds]
    if not pairs:
        raise ValueError(f"{OP}: node_thresholds and edge_thresholds must have at least one entry each, got none")
    samples = checks.whole_number(OP, "samples", samples, 1)
    core = checks.number(OP, "core", core)
    if not 0 < core <= 1:
        raise ValueError(f"{OP}: core must be above 0 and at most 1, got {core}")
    weights = _samples(graph, samples, checks.whole_number(OP, "seed", seed, 0))
    node_count, edge_count = np.zeros(graph.nodes, np.int64), np.zeros(graph.rows.entries, np.int32)
    total, bar = samples * len(pairs), Progress(progress)
    for i, (sample, pair) in enumerate((sample, pair) for sample in weights for pair in pairs):
        bar.step("pruning", i, total, "prunings")
        pruned = prune(graph, *pair, sample)
        node_count += pruned.node_mask.numpy()
        edge_count += pruned.edge_mask.numpy()
    bar.step("pruning", total, total, "prunings")
    bar.close()
    return Stability(graph, torch.from_numpy(node_count / total), torch.from_numpy(edge_count / total), total, core)


def _samples(graph: Graph, samples: int, seed: int) -> list[np.ndarray]:
    """Weights of the targets, zero elsewhere: [nodes] each, all with the same sum; the first are the graph's own."""
    own, generator = target_weights(graph), np.random.default_rng(seed)
    result = [own]
    for _ in range(samples - 1):
        drawn = own * generator.exponential(size=len(own))
        result.append(drawn * (own.sum() / drawn.sum()) if drawn.sum() > 0 else own)
    return result

"""Pruning: the few nodes and edges that carry most of the influence on the targets.

Influence counts the stored entries of a row only, as if what was dropped were not there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pycircuit.ops import checks

from . import influence
from .threshold import cumulative, cutoff

if TYPE_CHECKING:
    from .graph import Graph


@dataclass(frozen=True, eq=False)
class Pruned:
    """What pruning kept. node_mask: [nodes]; edge_mask: [entries] of graph.rows; influence: [nodes] float64, before.

    Tokens and targets are always kept.
    """

    whole: Graph
    node_mask: Tensor
    edge_mask: Tensor
    influence: Tensor

    @cached_property
    def graph(self) -> Graph:
        """The graph of the kept nodes and edges alone."""
        return subgraph(self.whole, self.node_mask, self.edge_mask)

    def cumulative(self) -> Tensor:
        """For each kept node, in order, the share of all influence in nodes at least as influential as it."""
        wanted = self.node_mask.nonzero()[:, 0].numpy()
        return torch.from_numpy(cumulative(self.influence.numpy(), wanted))

    def __repr__(self) -> str:
        return (
            f"Pruned(nodes={int(self.node_mask.sum())} of {len(self.node_mask)}, "
            f"edges={int(self.edge_mask.sum())} of {len(self.edge_mask)})"
        )


def prune(graph: Graph, node_threshold: float, edge_threshold: float) -> Pruned:
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 <= value <= 1:
            raise ValueError(f"prune: {name} must be from 0 to 1, got {value}")
    found = influence.of_nodes(graph)
    nodes = found >= cutoff(found, node_threshold)
    nodes[graph.first_token :] = True
    edges = _influential_edges(graph, nodes, edge_threshold)
    _drop_dead_ends(graph, nodes, edges)
    return Pruned(graph, torch.from_numpy(nodes), torch.from_numpy(edges), torch.from_numpy(found))


def _edges_between(graph: Graph, nodes: np.ndarray) -> np.ndarray:
    """[entries]: both ends are in `nodes`."""
    return nodes[graph.rows.column.numpy()] & np.repeat(nodes[graph.row_node.numpy()], graph.rows.lengths())


def _influential_edges(graph: Graph, nodes: np.ndarray, threshold: float) -> np.ndarray:
    """An edge's influence is its share of its row times the influence of the row's node, among kept nodes only."""
    share = influence.shares(graph.rows, _edges_between(graph, nodes))
    entering = influence.spread(graph, share) + influence.target_weights(graph)
    share *= np.repeat(entering[graph.row_node.numpy()], graph.rows.lengths())
    return share >= cutoff(share, threshold)


def _drop_dead_ends(graph: Graph, nodes: np.ndarray, edges: np.ndarray) -> None:
    """Take out, in place, features and errors that feed nothing and features that nothing feeds, until none is left."""
    node, column = graph.row_node.numpy(), graph.rows.column.numpy()
    while True:
        feeds, fed = np.zeros(graph.nodes, bool), np.zeros(graph.nodes, bool)
        feeds[column[edges]] = True
        fed[node] = graph.rows.sums(edges) > 0
        dead = nodes.copy()
        dead[graph.first_token :] = False
        dead[: graph.first_error] &= ~(feeds & fed)[: graph.first_error]
        dead[graph.first_error : graph.first_token] &= ~feeds[graph.first_error : graph.first_token]
        if not dead.any():
            return
        nodes &= ~dead
        edges &= _edges_between(graph, nodes)


def _mask(name: str, given: Any, count: int) -> np.ndarray:
    t = checks.tensor("subgraph", name, given)
    checks.of_type("subgraph", name, t, (torch.bool,))
    checks.shaped("subgraph", name, t, (count,), "one for each")
    return t.cpu().numpy()


def subgraph(graph: Graph, node_mask: Any, edge_mask: Any = None) -> Graph:
    nodes = _mask("node_mask", node_mask, graph.nodes)
    edges = _edges_between(graph, nodes)
    if edge_mask is not None:
        edges &= _mask("edge_mask", edge_mask, graph.rows.entries)
    weight, node = graph.rows.weight.numpy(), graph.row_node.numpy()
    rows, row = nodes[node], torch.from_numpy(nodes[node])
    assert graph.dropped is not None and graph.dropped_mass is not None  # filled when the graph was made
    left = np.where(edges, 0, weight).astype(np.float64)
    # Errors and tokens keep their places, so a node's new number is the count of places before it.
    places = nodes.copy()
    places[graph.first_error : graph.first_target] = True
    number = torch.from_numpy(np.cumsum(places) - 1)
    kept = graph.rows.select(rows, edges)
    return replace(
        graph,
        features=graph.features[torch.from_numpy(nodes[: graph.first_error])],
        values=graph.values[torch.from_numpy(nodes[: graph.first_error])],
        rows=type(kept)(kept.row_ptr, number[kept.column.long()], kept.weight),
        row_node=number[graph.row_node[row]],
        bias=graph.bias[row],
        preactivation=graph.preactivation[row],
        dropped=(graph.dropped + torch.from_numpy(graph.rows.sums(left)))[row],
        dropped_mass=(graph.dropped_mass + torch.from_numpy(graph.rows.sums(np.abs(left))))[row],
        targets=_targets_of(graph, nodes[graph.first_target :]),
    )


def _targets_of(graph: Graph, kept: np.ndarray) -> Any:
    which, t = torch.from_numpy(kept), graph.targets
    labels = [label for label, keep in zip(t.labels, kept, strict=True) if keep]
    return type(t)(labels, t.ids[which], t.weights[which], t.positions[which])

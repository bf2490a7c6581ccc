"""Pruning: the few nodes and edges that carry most of the influence on the targets.

Influence counts the stored entries of a row only, as if there were no dropped ones.
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
from .csr import Rows
from .faithfulness import KEY as FAITHFULNESS
from .show.notebook import pruned_html
from .threshold import cumulative, cutoff

if TYPE_CHECKING:
    from .graph import Graph


@dataclass(frozen=True, eq=False)
class Pruned:
    """Result of pruning: masks of the remaining nodes and edges.

    original: the graph before; node_mask: [nodes], always with all tokens and targets; edge_mask: [entries] of
    original.rows; influence: [nodes] float64, of the original.
    """

    original: Graph
    node_mask: Tensor
    edge_mask: Tensor
    influence: Tensor

    @cached_property
    def graph(self) -> Graph:
        """Graph of the remaining nodes and edges alone."""
        return subgraph(self.original, self.node_mask, self.edge_mask)

    def cumulative(self) -> Tensor:
        """Share of all influence in nodes at least as influential as each remaining node, in order."""
        nodes = self.node_mask.nonzero()[:, 0].numpy()
        return torch.from_numpy(cumulative(self.influence.numpy(), nodes))

    def _repr_html_(self) -> str:
        return pruned_html(self)

    def __repr__(self) -> str:
        return (
            f"Pruned(nodes={int(self.node_mask.sum())} of {len(self.node_mask)}, "
            f"edges={int(self.edge_mask.sum())} of {len(self.edge_mask)})"
        )


def thresholds(op: str, node: Any, edge: Any) -> tuple[float, float]:
    """Both thresholds as floats, once they are known to be from 0 to 1."""
    node, edge = checks.number(op, "node_threshold", node), checks.number(op, "edge_threshold", edge)
    for name, value in (("node_threshold", node), ("edge_threshold", edge)):
        if not 0 <= value <= 1:
            raise ValueError(f"{op}: {name} must be from 0 to 1, got {value}")
    return node, edge


def prune(graph: Graph, node_threshold: float, edge_threshold: float, weights: np.ndarray | None = None) -> Pruned:
    """Prune a graph to the nodes and edges that carry these shares of the influence. weights: as in propagate."""
    node_threshold, edge_threshold = thresholds("prune", node_threshold, edge_threshold)
    node_influence = influence.propagate(graph, graph.rows, influence.scales(graph.rows), weights)
    nodes = node_influence >= cutoff(node_influence, node_threshold)
    nodes[graph.first_token :] = True
    edges = _between(graph.rows, graph.row_node, nodes)
    inner = graph.rows if edges.all() else graph.rows.select(edges)
    # An edge's influence is its share of its row times the influence of the row's node, among remaining nodes only.
    score = influence.EdgeInfluence(graph, inner, weights)
    strong = score.at_least(cutoff(score, edge_threshold))
    _drop_dead_ends(graph, nodes, inner if strong.all() else inner.select(strong))
    strong &= _between(inner, graph.row_node, nodes)
    edges[edges] = strong
    return Pruned(graph, torch.from_numpy(nodes), torch.from_numpy(edges), torch.from_numpy(node_influence))


def _between(rows: Rows, row_node: Tensor, nodes: np.ndarray) -> np.ndarray:
    """Mask of the entries whose source and target are both in `nodes`: [entries]."""
    out = np.zeros(rows.entries, bool)
    column = rows.column.numpy()
    for block in rows.blocks(np.flatnonzero(nodes[row_node.numpy()])):
        for entries in block.slices:
            nodes.take(column[entries], out=out[entries], mode="clip")
    return out


def _drop_dead_ends(graph: Graph, nodes: np.ndarray, rows: Rows) -> None:
    """Remove, in place, features and errors on no path through `rows` from an error or token to a target."""
    node, column, groups = graph.row_node.numpy(), rows.column.numpy(), influence.layer_groups(graph)
    fed = nodes.copy()
    fed[: graph.first_error] = False
    for group in reversed(groups):
        for block in rows.blocks(group):
            fed[node[block.rows]] |= block.reduce(np.logical_or, fed.take(block.gather(column)))
    live = np.zeros(graph.nodes, bool)
    live[graph.first_target :] = True
    for group in groups:
        for block in rows.blocks(group[live[node[group]]]):
            live[block.gather(column)] = True
    nodes[: graph.first_token] &= (fed & live)[: graph.first_token]


def _mask(name: str, mask: Any, count: int) -> np.ndarray:
    t = checks.tensor("subgraph", name, mask)
    checks.of_type("subgraph", name, t, (torch.bool,))
    checks.shaped("subgraph", name, t, (count,), "one for each")
    return t.cpu().numpy()


def subgraph(graph: Graph, node_mask: Any, edge_mask: Any = None) -> Graph:
    """Graph of the nodes and edges in the masks; removed edges are added to `dropped`."""
    nodes = _mask("node_mask", node_mask, graph.nodes)
    edges = _between(graph.rows, graph.row_node, nodes)
    if edge_mask is not None:
        edges &= _mask("edge_mask", edge_mask, graph.rows.entries)
    rows = nodes[graph.row_node.numpy()]
    row, features = torch.from_numpy(rows), torch.from_numpy(nodes[: graph.first_error])
    # set when the graph was made
    assert graph.dropped is not None and graph.dropped_mass is not None and graph.product_norm is not None
    dropped, mass = _left_out(graph.rows, rows, edges)
    # Errors and tokens keep their columns, so a node's new index is the count of numbered nodes before it.
    numbered = nodes.copy()
    numbered[graph.first_error : graph.first_target] = True
    number = np.cumsum(numbered) - 1
    selected = graph.rows.select(edges, rows)
    column = torch.from_numpy(number.astype(np.int32).take(selected.column.numpy()))
    return replace(
        graph,
        features=graph.features[features],
        values=graph.values[features],
        rows=Rows.trusted(selected.row_ptr, column, selected.weight),
        row_node=torch.from_numpy(number)[graph.row_node[row]],
        bias=graph.bias[row],
        preactivation=graph.preactivation[row],
        product_norm=graph.product_norm[row],
        dropped=graph.dropped[row] + torch.from_numpy(dropped[rows]),
        dropped_mass=graph.dropped_mass[row] + torch.from_numpy(mass[rows]),
        targets=_targets_of(graph, nodes[graph.first_target :]),
        provenance={key: value for key, value in graph.provenance.items() if key != FAITHFULNESS},
    )


def _left_out(rows: Rows, row_mask: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the entries that are not in `edges`, and of their absolute values: [rows] float64 each."""
    dropped, mass = np.zeros(rows.count), np.zeros(rows.count)
    weight = rows.weight.numpy()
    for block in rows.blocks(np.flatnonzero(row_mask)):
        omitted = block.gather(weight).astype(np.float64)
        omitted *= ~block.gather(edges)
        dropped[block.rows] = block.reduce(np.add, omitted)
        mass[block.rows] = block.reduce(np.add, np.abs(omitted, out=omitted))
    return dropped, mass


def _targets_of(graph: Graph, mask: np.ndarray) -> Any:
    selected, t = torch.from_numpy(mask), graph.targets
    labels = [label for label, chosen in zip(t.labels, mask, strict=True) if chosen]
    return type(t)(labels, t.ids[selected], t.weights[selected], t.positions[selected])

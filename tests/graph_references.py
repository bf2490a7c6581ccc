"""Slow reference implementations of influence and pruning, and changes of graphs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pycircuit.graph import Graph, Rows

SEEDS = range(12)


def weights_of(graph: Graph) -> Tensor:
    out = torch.zeros(graph.nodes, dtype=torch.float64)
    out[graph.first_target :] = graph.targets.weights
    return out


def normalised(matrix: Tensor) -> Tensor:
    size = matrix.abs().double()
    return size / size.sum(1, keepdim=True).clamp_min(1e-300)


def influence_by_inverse(matrix: Tensor, weights: Tensor) -> Tensor:
    """Every path at once: weights @ ((I - A)^-1 - I)."""
    eye = torch.eye(len(matrix), dtype=torch.float64)
    return weights @ (torch.linalg.inv(eye - normalised(matrix)) - eye)


def keep_share(scores: Tensor, share: float) -> Tensor:
    """By a full sort: the largest scores whose sum reaches the share, and those equal to the last."""
    if not scores.sum() > 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    ordered = scores.flatten().sort(descending=True).values
    if share == 1:
        return scores > 0
    reached = ordered.cumsum(0) >= share * ordered.sum() * (1 - 1e-12)
    return scores >= ordered[int(reached.nonzero()[0])] * (1 - 1e-12)


def prune_slowly(graph: Graph, node_share: float, edge_share: float) -> tuple[Tensor, Tensor]:
    """(nodes, edges as [nodes, nodes]), one step after another on the dense matrix."""
    matrix, weights = graph.dense().double(), weights_of(graph)
    nodes = keep_share(influence_by_inverse(matrix, weights), node_share)
    nodes[graph.first_token :] = True
    inside = matrix * nodes[:, None] * nodes
    edges = keep_share(normalised(inside) * (influence_by_inverse(inside, weights) + weights)[:, None], edge_share)
    inner, errors = torch.arange(graph.nodes) < graph.first_token, torch.arange(graph.nodes) >= graph.first_error
    while (dead := nodes & inner & ~((edges.any(1) | errors) & edges.any(0))).any():
        nodes &= ~dead
        edges[dead], edges[:, dead] = False, False
    return nodes, edges


def edges_of(graph: Graph, mask: Tensor) -> Tensor:
    out = torch.zeros(graph.nodes, graph.nodes, dtype=torch.bool)
    row = graph.row_node[torch.from_numpy(graph.rows.row_of_entry()).long()]
    out[row[mask], graph.rows.column[mask].long()] = True
    return out


def shuffled(graph: Graph) -> Graph:
    """Shuffle the features of a graph."""
    order = torch.randperm(len(graph.features), generator=torch.Generator().manual_seed(0))
    number = torch.cat([order.argsort(), torch.arange(len(order), graph.nodes)])
    dense_rows = graph.dense()[graph.row_node]
    dense_rows[:, number[: graph.first_target]] = dense_rows[:, : graph.first_target].clone()
    rows, _, _ = Rows.from_dense(dense_rows)
    return replace(
        graph, features=graph.features[order], values=graph.values[order], rows=rows, row_node=number[graph.row_node]
    )


def with_rows(graph: Graph, **changes: Tensor) -> Graph:
    parts = {"row_ptr": graph.rows.row_ptr, "column": graph.rows.column, "weight": graph.rows.weight}
    return replace(graph, rows=Rows(**{**parts, **changes}))

"""Pruning and scores of circuit-tracer's `Graph`: its masks and numbers to the last bit, in less time.

All sums are circuit-tracer's, operation by operation: shares, influence, and the sums behind thresholds. The time goes
down without its sort of every entry of the matrix, zeros included, and without its copies of the matrix.

circuit-tracer's own functions prune and score a graph on a GPU, of another dtype than torch's default, with a
gradient, with an entry that is not finite or with a negative weight; they also get thresholds that they reject.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .generations import library

_LEAST_SUM = 1e-10  # circuit-tracer divides a row by no less


def original(module: str, name: str) -> Callable[..., Any]:
    """circuit-tracer's own function, replaced or not."""
    return inspect.unwrap(getattr(library(module), name))


def prune_graph(graph: Any, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Any:
    """Nodes and edges that carry these shares of the influence, as circuit-tracer's `PruneResult`."""
    in_range = all(0 <= threshold <= 1 for threshold in (node_threshold, edge_threshold))
    if not in_range or not is_plain(graph):
        return original("graph", "prune_graph")(graph, node_threshold, edge_threshold)
    matrix, weights = graph.adjacency_matrix, target_weights(graph)
    shares = _shares(matrix.abs())
    influence = library("graph").compute_influence(shares, weights)
    nodes = influence >= library("graph").find_threshold(influence, node_threshold)
    ends = len(matrix) - len(graph.logit_targets) - len(graph.input_tokens)
    nodes[ends:] = True
    edges = _prune_edges(matrix, nodes, weights, edge_threshold, shares, (ends, len(graph.selected_features)))
    return library("graph").PruneResult(nodes, edges, _cumulative(influence))


def compute_node_influence(adjacency_matrix: Tensor, logit_weights: Tensor) -> Tensor:
    """Influence of every node on the targets: [nodes]."""
    if adjacency_matrix.requires_grad or adjacency_matrix.ndim != 2:
        return original("graph", "compute_node_influence")(adjacency_matrix, logit_weights)
    return library("graph").compute_influence(_shares(adjacency_matrix.abs()), logit_weights)


def compute_graph_scores(graph: Any) -> tuple[float, float]:
    """(replacement, completeness): the share of the influence that runs through features rather than errors."""
    influence = _influence_by_layer(graph) if is_plain(graph) else None
    if influence is None:
        return original("graph", "compute_graph_scores")(graph)
    first_error = len(graph.selected_features)
    first_token = first_error + len(graph.input_tokens) * graph.cfg.n_layers
    errors = influence[first_error:first_token].sum()
    tokens = influence[first_token : first_token + len(graph.input_tokens)].sum()
    # Every node's share of error input times the node's influence, over all nodes, is what arrives at the errors.
    reaching = (influence + target_weights(graph)).sum()
    return (tokens / (tokens + errors)).item(), (1 - errors / reaching).item()


def is_plain(graph: Any) -> bool:
    """True for a graph for which this module computes the numbers of circuit-tracer's functions."""
    matrix, weights = graph.adjacency_matrix, graph.logit_probabilities
    return (
        matrix.device.type == weights.device.type == "cpu"
        and matrix.dtype == torch.get_default_dtype()
        and matrix.dtype in (torch.float32, torch.float64)
        and matrix.ndim == 2
        and matrix.is_contiguous()
        and not matrix.requires_grad
        and not weights.requires_grad
        and bool((weights >= 0).all())
        and bool(matrix.sum().isfinite())
    )


def target_weights(graph: Any) -> Tensor:
    """Weights of the targets, zero elsewhere: [nodes]."""
    weights = torch.zeros(len(graph.adjacency_matrix))
    weights[-len(graph.logit_targets) :] = graph.logit_probabilities
    return weights


def _shares(magnitudes: Tensor) -> Tensor:
    """Divide rows by their sums, in place. magnitudes: [rows, nodes], none negative."""
    return magnitudes.div_(magnitudes.sum(1, keepdim=True).clamp_(min=_LEAST_SUM))


def _prune_edges(
    matrix: Tensor, nodes: Tensor, weights: Tensor, threshold: float, scratch: Tensor, ends: tuple[int, int]
) -> Tensor:
    """Mask of the strong edges on no dead end: [nodes, nodes]; nodes on dead ends are removed from `nodes`.

    scratch: [nodes, nodes], overwritten. ends: the nodes below ends[0] need an output, those below ends[1] an input.
    """
    remaining = nodes.nonzero()[:, 0]
    block = _shares(matrix.index_select(0, remaining).masked_fill_(~nodes, 0).abs_())
    # Sums of float32 depend on the positions of zeros, so influence runs through a matrix of circuit-tracer's shape.
    scratch.zero_().index_copy_(0, remaining, block)
    influence = library("graph").compute_influence(scratch, weights)
    influence += weights
    scores = block.index_select(1, remaining).mul_(influence[remaining, None])
    cutoff = _edge_threshold(scores, threshold, scratch.view(-1))
    if not cutoff > 0:  # every edge is as strong, those that are zero too
        return torch.ones_like(matrix, dtype=torch.bool)
    strong = scores >= cutoff
    nodes[remaining] = _drop_dead_ends(strong, remaining < ends[0], remaining < ends[1])
    rows, edges = torch.zeros(block.shape, dtype=torch.bool), torch.zeros(matrix.shape, dtype=torch.bool)
    return edges.index_copy_(0, remaining, rows.index_copy_(1, remaining, strong))


def _edge_threshold(scores: Tensor, threshold: float, scratch: Tensor) -> Tensor:
    """circuit-tracer's threshold of all entries, of which only those in `scores` are not zero, none negative.

    scratch: as long as all entries, overwritten; the positions of zeros decide the order of torch's sums.
    """
    values = scores.numpy().ravel()
    ordered = torch.from_numpy(np.sort(values[values > 0])[::-1].copy())
    scratch.zero_()[: len(ordered)] = ordered
    cumulative = torch.cumsum(ordered, dim=0) / torch.sum(scratch)
    return scratch[min(int(torch.searchsorted(cumulative, threshold)), len(scratch) - 1)]


def _drop_dead_ends(edges: Tensor, needs_output: Tensor, needs_input: Tensor) -> Tensor:
    """Remove edges of dead ends, in place, until there are none; return the remaining nodes: [nodes]."""
    alive = torch.ones(len(edges), dtype=torch.bool)
    while True:
        connected = alive & (edges.any(0) | ~needs_output) & (edges.any(1) | ~needs_input)
        if torch.equal(connected, alive):
            return alive
        alive = connected
        edges[~alive] = False
        edges[:, ~alive] = False


def _cumulative(influence: Tensor) -> Tensor:
    """Share of all influence in nodes at least as influential as each: [nodes]."""
    ordered, nodes = torch.sort(influence, descending=True)
    out = torch.empty_like(influence)
    out[nodes] = torch.cumsum(ordered, dim=0) / torch.sum(ordered)
    return out


def _influence_by_layer(graph: Any) -> Tensor | None:
    """Influence of every node in one pass from the targets down: [nodes]; None if a row feeds one passed before."""
    matrix, count, targets = graph.adjacency_matrix, len(graph.adjacency_matrix), len(graph.logit_targets)
    layer = torch.full((count,), -1)
    features = graph.active_features[graph.selected_features]
    layer[: len(features)] = features[:, 0]
    layer[count - targets :] = graph.cfg.n_layers
    entering, passed = target_weights(graph), torch.zeros(count, dtype=torch.bool)
    influence = torch.zeros_like(entering)
    for depth in range(graph.cfg.n_layers, -2, -1):
        passed |= layer == depth
        rows = ((layer == depth) & (entering > 0)).nonzero()[:, 0]
        block = matrix[rows].abs_()
        arriving = (entering[rows] / block.sum(1).clamp_(min=_LEAST_SUM)) @ block
        if arriving[passed].any():
            return None
        entering += arriving
        influence += arriving
    return influence

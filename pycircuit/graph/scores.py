"""Replacement and completeness scores: the shares of the computation that features explain and errors do not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import influence
from .csr import index_below

if TYPE_CHECKING:
    from .graph import Graph


class Scores(NamedTuple):
    """Replacement and completeness scores, both from 0 to 1; NaN if no influence reaches anything.

    replacement: of the influence that starts at tokens or errors, the share that starts at tokens.
    completeness: the share of each node's input that is no error, averaged by the nodes' influence; a node without a
    row counts as explained.
    """

    replacement: float
    completeness: float


def scores(graph: Graph) -> Scores:
    """Compute the scores of a graph."""
    return _scores(graph, np.ones(graph.first_error, bool))


def subgraph_scores(graph: Graph, nodes: Iterable[int]) -> Scores:
    """Compute the scores of a graph whose features count as errors unless they are among the nodes."""
    selected = np.zeros(graph.nodes, bool)
    selected[[index_below("Graph.subgraph_scores", "nodes", node, graph.nodes) for node in nodes]] = True
    return _scores(graph, selected[: graph.first_error])


def _scores(graph: Graph, selected: np.ndarray) -> Scores:
    """Scores with the selected features as features and all others as errors. selected: [features]."""
    scale, row_node = influence.scales(graph.rows), graph.row_node.numpy()
    inner = row_node < graph.first_error
    scale[inner] *= selected[row_node[inner]]  # an error hands no influence on
    node_influence = influence.propagate(graph, graph.rows, scale)
    tokens = float(node_influence[graph.first_token : graph.first_target].sum())
    # Every node's share of error input times the node's influence, over all nodes, is what arrives at the errors.
    errors = float(node_influence[graph.first_error : graph.first_token].sum())
    errors += float(node_influence[: graph.first_error][~selected].sum())
    reaching = float(node_influence.sum() + graph.targets.weights.sum())
    return Scores(_ratio(tokens, tokens + errors), 1 - _ratio(errors, reaching))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float(np.nan)

"""Replacement and completeness scores: the shares of the computation that features explain and errors do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import influence

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
    node_influence = influence.node_influence(graph)
    tokens = float(node_influence[graph.first_token : graph.first_target].sum())
    # Every node's share of error input times the node's influence, over all nodes, is what arrives at the errors.
    errors = float(node_influence[graph.first_error : graph.first_token].sum())
    reaching = float(node_influence.sum() + graph.targets.weights.sum())
    return Scores(_ratio(tokens, tokens + errors), 1 - _ratio(errors, reaching))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else float(np.nan)

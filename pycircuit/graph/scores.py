"""How much of the computation the features explain, and how much is left to errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import influence

if TYPE_CHECKING:
    from .graph import Graph


class Scores(NamedTuple):
    """replacement: of the influence that starts at tokens or errors, the part that starts at tokens.

    completeness: the part of each node's input that is no error, averaged by the nodes' influence; a node without a
    row counts as explained. Both from 0 to 1, NaN where no influence reaches anything.
    """

    replacement: float
    completeness: float


def scores(graph: Graph) -> Scores:
    found = influence.of_nodes(graph)
    tokens = float(found[graph.first_token : graph.first_target].sum())
    # Every node's share of error input times the node's influence, over all nodes, is what arrives at the errors.
    errors = float(found[graph.first_error : graph.first_token].sum())
    reaching = float(found.sum() + graph.targets.weights.sum())
    return Scores(_part(tokens, tokens + errors), 1 - _part(errors, reaching))


def _part(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float(np.nan)

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
    share = influence.shares(graph.rows)
    found = influence.spread(graph, share)
    tokens = float(found[graph.first_token : graph.first_target].sum())
    errors = float(found[graph.first_error : graph.first_token].sum())
    reaching = found + influence.target_weights(graph)
    column = graph.rows.column.numpy()
    from_errors = graph.rows.sums(share * ((column >= graph.first_error) & (column < graph.first_token)))
    unexplained = float((from_errors * reaching[graph.row_node.numpy()]).sum())
    return Scores(_part(tokens, tokens + errors), 1 - _part(unexplained, float(reaching.sum())))


def _part(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float(np.nan)

"""Changes that a graph foretells for an intervention: along edges, and along all paths through features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pycircuit.graph import Graph
from pycircuit.interventions.graph_effects import edges_of, through_features

_NOISE = 1e-5  # of the largest change: less is rounding


def foretold_changes(graph: Graph, values: Mapping[int, float], follow_features: bool) -> np.ndarray:
    """Return the change of every row's pre-activation when features get other activations: [rows] float64.

    values: the new activation of each changed feature, by its node. follow_features: features between pass their own
    change on, and none falls below zero; a changed feature keeps the value it was given. Features without a row
    do not move.
    """
    nodes = list(values)
    activation = graph.values.numpy().astype(np.float64)[nodes]
    change = np.array([values[node] for node in nodes]) - activation
    factor = np.divide(change, activation, out=np.zeros_like(change), where=activation != 0)
    direct = np.asarray(edges_of(graph, nodes) @ factor)
    if not follow_features:
        return direct
    changed = np.isin(graph.row_node.numpy(), nodes)
    return through_features(graph, direct[:, None], changed[:, None], floor=True)[:, 0]


def agreement(measured: np.ndarray, foretold: np.ndarray) -> dict[str, float | None]:
    """Return the correlation of measured with foretold changes, and the share whose sign is as foretold."""
    usable = np.isfinite(measured) & np.isfinite(foretold)
    a, b = measured[usable], foretold[usable]
    size = np.maximum(np.abs(a), np.abs(b))
    moving = size > _NOISE * size.max(initial=0.0)
    sign = float((np.sign(a) == np.sign(b))[moving].mean()) if moving.any() else None
    centred = [x - x.mean() for x in (a, b)] if len(a) > 1 else [np.zeros(1), np.zeros(1)]
    norms = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return {"correlation": float(centred[0] @ centred[1]) / norms if norms > 0 else None, "sign": sign}

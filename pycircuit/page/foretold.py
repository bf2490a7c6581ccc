"""Changes that a graph foretells for an intervention: along edges, and along all paths through features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pycircuit.graph import Graph
from pycircuit.graph.influence import layer_groups

_NOISE = 1e-5  # of the largest change: less is rounding


def foretold_changes(graph: Graph, values: Mapping[int, float], through_features: bool) -> np.ndarray:
    """Return the change of every row's pre-activation when features get other activations: [rows] float64.

    values: the new activation of each changed feature, by its node. through_features: features between pass their own
    change on, and none falls below zero; a changed feature keeps the value it was given. Features without a row
    do not move.
    """
    activation = graph.values.numpy().astype(np.float64)
    factor = np.zeros(graph.nodes)  # change of each source over its activation
    changed = np.fromiter(values, np.int64, len(values))
    targets = np.fromiter(values.values(), np.float64, len(values))
    factor[changed] = _over(targets - activation[changed], activation[changed])
    moved = np.ones(graph.nodes, bool)
    moved[changed] = False
    out = np.zeros(graph.rows.count)
    node, column, weight = graph.row_node.numpy(), graph.rows.column.numpy(), graph.rows.weight.numpy()
    for group in reversed(layer_groups(graph)):
        for block in graph.rows.blocks(group):
            terms = block.gather(weight).astype(np.float64) * factor[block.gather(column)]
            out[block.rows] = block.reduce(np.add, terms)
        if through_features:
            inner = group[(node[group] < graph.first_error) & moved[node[group]]]
            own = activation[node[inner]]
            factor[node[inner]] = _over(np.maximum(out[inner], -own), own)
    return out


def _over(change: np.ndarray, activation: np.ndarray) -> np.ndarray:
    return np.divide(change, activation, out=np.zeros_like(change), where=activation != 0)


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

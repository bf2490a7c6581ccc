"""Influence of nodes and edges on the targets: one pass over CSR rows, from the highest layer down.

A row passes its node's influence on to its columns by shares, |weight| over the sum of the row's |weight|. Shares are
never stored: they are computed from the weights again, a block at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .csr import STEP, Rows

if TYPE_CHECKING:
    from .graph import Graph


def scales(rows: Rows) -> np.ndarray:
    """Factors that turn |weight| into a share of its row: [rows]; zero for a row without mass."""
    total = rows.masses()
    # One over a subnormal number is infinite.
    return np.divide(1.0, total, out=np.zeros_like(total), where=total >= np.finfo(np.float64).tiny)


def target_weights(graph: Graph) -> np.ndarray:
    """Weights of the targets, zero elsewhere: [nodes] float64."""
    out = np.zeros(graph.nodes)
    out[graph.first_target :] = graph.targets.weights.numpy()
    return out


def layer_groups(graph: Graph) -> list[np.ndarray]:
    """Row indices by layer, targets first, then from the highest layer down: no row feeds an earlier one."""
    node = graph.row_node.numpy()
    layer = np.full(len(node), graph.layers)
    inner = node < graph.first_error
    layer[inner] = graph.features[:, 0].numpy()[node[inner]]
    order = np.argsort(-layer, kind="stable")
    return [group for group in np.split(order, np.flatnonzero(np.diff(layer[order])) + 1) if len(group)]


def propagate(graph: Graph, rows: Rows, scale: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Influence of every node through `rows`, a selection of the graph's entries: [nodes] float64.

    weights: of the targets, zero elsewhere: [nodes]; None: the graph's own.
    """
    entering = target_weights(graph) if weights is None else weights
    total = np.zeros(graph.nodes)
    node, column, weight = graph.row_node.numpy(), rows.column.numpy(), rows.weight.numpy()
    for group in layer_groups(graph):
        for block in rows.blocks(group, max(STEP, graph.nodes)):
            source = node[block.rows]
            arriving = np.abs(block.gather(weight)).astype(np.float64)
            arriving *= block.repeat((entering[source] + total[source]) * scale[block.rows])
            total += np.bincount(block.gather(column), arriving, minlength=graph.nodes)
    return total


def node_influence(graph: Graph) -> np.ndarray:
    """Influence of every node on the targets: [nodes] float64."""
    return propagate(graph, graph.rows, scales(graph.rows))


class EdgeInfluence:
    """Influence of every entry of `rows`, its share times its row's node's influence: float64, in the order of entries.

    An iterator over chunks, which are computed anew each time rather than stored.
    """

    def __init__(self, graph: Graph, rows: Rows, weights: np.ndarray | None = None) -> None:
        scale = scales(rows)
        weights = target_weights(graph) if weights is None else weights
        entering = propagate(graph, rows, scale, weights) + weights
        self.rows = rows
        self.factor = entering[graph.row_node.numpy()] * scale

    def __iter__(self) -> Iterator[np.ndarray]:
        weight = self.rows.weight.numpy()
        for block in self.rows.blocks():
            scores = np.abs(block.gather(weight)).astype(np.float64)
            scores *= block.repeat(self.factor[block.rows])
            yield scores

    def at_least(self, cutoff: float) -> np.ndarray:
        """Mask of the entries with at least this influence: [entries]."""
        out = np.zeros(self.rows.entries, bool)
        offset = 0
        for scores in self:
            np.greater_equal(scores, cutoff, out=out[offset : offset + len(scores)])
            offset += len(scores)
        return out

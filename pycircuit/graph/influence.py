"""Influence through CSR rows in one pass: layers from the top down, each row's shares times what enters it.

A row's share of an entry is |weight| over the sum of the row's |weight|. Shares are never stored: they are found
again from the weights, a block at a time, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .csr import STEP, Rows

if TYPE_CHECKING:
    from .graph import Graph


def scales(rows: Rows) -> np.ndarray:
    """What turns |weight| into a share, for each row: [rows]; zero where there is nothing to share."""
    total = rows.masses()
    # One over a subnormal number is infinite.
    return np.divide(1.0, total, out=np.zeros_like(total), where=total >= np.finfo(np.float64).tiny)


def target_weights(graph: Graph) -> np.ndarray:
    """[nodes] float64: the weights of the targets, zero elsewhere."""
    out = np.zeros(graph.nodes)
    out[graph.first_target :] = graph.targets.weights.numpy()
    return out


def layer_groups(graph: Graph) -> list[np.ndarray]:
    """Row numbers, targets first, then those of each layer from the highest down: no row feeds an earlier one."""
    node = graph.row_node.numpy()
    layer = np.full(len(node), graph.layers)
    inner = node < graph.first_error
    layer[inner] = graph.features[:, 0].numpy()[node[inner]]
    order = np.argsort(-layer, kind="stable")
    return [group for group in np.split(order, np.flatnonzero(np.diff(layer[order])) + 1) if len(group)]


def spread(graph: Graph, rows: Rows, scale: np.ndarray) -> np.ndarray:
    """Influence of every node when it runs through `rows`, entries of the graph's own: [nodes] float64."""
    entering, total = target_weights(graph), np.zeros(graph.nodes)
    node, column, weight = graph.row_node.numpy(), rows.column.numpy(), rows.weight.numpy()
    for group in layer_groups(graph):
        for block in rows.blocks(group, max(STEP, graph.nodes)):
            source = node[block.rows]
            given = np.abs(block.take(weight)).astype(np.float64)
            given *= block.repeat((entering[source] + total[source]) * scale[block.rows])
            total += np.bincount(block.take(column), given, minlength=graph.nodes)
    return total


def of_nodes(graph: Graph) -> np.ndarray:
    """Influence of every node on the targets: [nodes] float64."""
    return spread(graph, graph.rows, scales(graph.rows))


class EdgeInfluence:
    """Influence of every entry of `rows`, its share of what its row's node has: float64, in the order of entries.

    Goes through them in parts, found anew each time rather than held.
    """

    def __init__(self, graph: Graph, rows: Rows) -> None:
        scale = scales(rows)
        entering = spread(graph, rows, scale) + target_weights(graph)
        self.rows, self.factor = rows, entering[graph.row_node.numpy()] * scale

    def __iter__(self) -> Iterator[np.ndarray]:
        weight = self.rows.weight.numpy()
        for block in self.rows.blocks():
            part = np.abs(block.take(weight)).astype(np.float64)
            part *= block.repeat(self.factor[block.rows])
            yield part

    def at_least(self, cutoff: float) -> np.ndarray:
        """Which entries have no less: [entries]."""
        out, at = np.zeros(self.rows.entries, bool), 0
        for part in self:
            np.greater_equal(part, cutoff, out=out[at : at + len(part)])
            at += len(part)
        return out

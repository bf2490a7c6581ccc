"""Influence through CSR rows in one pass: layers from the top down, each row's shares times what enters it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .rows import Rows

if TYPE_CHECKING:
    from .graph import Graph


def shares(rows: Rows, keep: np.ndarray | None = None) -> np.ndarray:
    """|weight| of every entry over the sum of its row: [entries] float64; zero where `keep` is false."""
    size = rows.magnitudes(keep)
    total = rows.sums(size)
    scale = np.divide(1.0, total, out=np.zeros_like(total), where=total > 0)
    return size * np.repeat(scale, rows.lengths())


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


def entries_of(rows: Rows, which: np.ndarray) -> np.ndarray | slice:
    """Where the entries of these rows lie; a slice where the rows follow one another."""
    starts = rows.row_ptr.numpy()
    if len(which) and (np.diff(which) == 1).all():
        return slice(int(starts[which[0]]), int(starts[which[-1] + 1]))
    return np.concatenate([np.arange(starts[r], starts[r + 1]) for r in which] or [np.zeros(0, np.int64)])


def spread(graph: Graph, share: np.ndarray) -> np.ndarray:
    """Influence of every node when row r hands on share[entries of r]: [nodes] float64."""
    entering, lengths = target_weights(graph), graph.rows.lengths()
    node, column = graph.row_node.numpy(), graph.rows.column.numpy()
    total = np.zeros(graph.nodes)
    for group in layer_groups(graph):
        where = entries_of(graph.rows, group)
        given = np.repeat(entering[node[group]] + total[node[group]], lengths[group]) * share[where]
        total += np.bincount(column[where], given, minlength=graph.nodes)
    return total


def of_nodes(graph: Graph) -> np.ndarray:
    """Influence of every node on the targets: [nodes] float64."""
    return spread(graph, shares(graph.rows))

"""Groups of features by structure: alike in what they read, what they write and where they are.

1. Similarity of two features, from 0 to 1: the mean of the cosine of what they read, the cosine of what they write,
   whether they share a position, how near their layers are, and, with decoders, the cosine of these.
2. The pairs of a graph fall into alike and unlike ones, and Otsu's threshold (1979) separates them with the largest
   variance between the two. That of a small graph is uncertain, so the threshold is the mean of it and of USUAL. The
   number of groups is whatever this threshold leaves.
3. Groups join by average similarity, the most alike first, while that is above the threshold, and never so that a
   path leaves a group and enters it again: the graph of groups has no cycle.

No label is read and nothing is random.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import influence
from .layer_order import GroupOrder

if TYPE_CHECKING:
    from .prune import Pruned

USUAL = 0.65  # threshold; chosen on other prompts of the demo model than those of benchmarks/grouping.py
_BINS = 4096  # of similarities: a threshold's resolution
_APART = 4.0  # taken from the similarity of two groups that may not join, until one of them changes


def structural_groups(
    pruned: Pruned, fixed: list[np.ndarray], decoders: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(features of the pruned graph that are in no fixed group, the group of each).

    fixed: nodes of each group that stays as it is. decoders: [features of the original graph, width].
    """
    first_error = pruned.original.first_error
    is_free = pruned.node_mask.numpy()[:first_error].copy()
    for nodes in fixed:
        is_free[nodes[nodes < first_error]] = False
    free = np.flatnonzero(is_free)
    similarity = similarities(pruned, free, None if decoders is None else decoders[free])
    order = GroupOrder(pruned, free, fixed)
    return free, join_alike(similarity, alike_threshold(similarity), order)


def similarities(pruned: Pruned, nodes: np.ndarray, decoders: np.ndarray | None = None) -> np.ndarray:
    """Similarity of each two of these features: [n, n] float32, from 0 to 1."""
    graph = pruned.original
    reads, writes = _profiles(pruned, nodes)
    layer, position = (graph.features[:, i].numpy()[nodes] for i in (0, 1))
    total = _cosines(reads)
    total += _cosines(writes)
    total += position[:, None] == position
    total += (1 - np.abs(layer[:, None] - layer) / max(1, graph.layers - 1)).astype(np.float32)
    if decoders is not None:
        total += np.maximum(_cosines(decoders.astype(np.float32)), 0)
    # Products of other libraries and thread counts differ in the last digits, which must not decide.
    return np.asarray(np.round(total / np.float32(4 + (decoders is not None)), 5), np.float32)


def _profiles(pruned: Pruned, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of what these features read and write, among the remaining nodes: [n, sources], [n, rows] float32.

    An entry that is read is |weight|; one that is written is its share of the row, by the root of the row's influence.
    """
    graph = pruned.original
    remaining, rows = pruned.node_mask.numpy(), graph.rows
    index = np.full(graph.nodes, -1)
    index[nodes] = np.arange(len(nodes))
    source_index = np.cumsum(remaining) - 1
    node, column, weight = graph.row_node.numpy(), rows.column.numpy(), rows.weight.numpy()
    used = np.flatnonzero(remaining[node])
    row_index = np.full(rows.count, -1)
    row_index[used] = np.arange(len(used))
    entering = pruned.influence.numpy() + influence.target_weights(graph)
    factor = influence.scales(rows) * np.sqrt(entering[node])
    reads = np.zeros((len(nodes), int(remaining.sum())), np.float32)
    writes = np.zeros((len(nodes), len(used)), np.float32)
    for block in rows.blocks(used):
        source, target = block.gather(column), block.repeat(block.rows)
        size = np.abs(block.gather(weight)).astype(np.float64)
        read = (index[node[target]] >= 0) & remaining[source]
        reads[index[node[target[read]]], source_index[source[read]]] = size[read]
        written = index[source] >= 0
        writes[index[source[written]], row_index[target[written]]] = (size * factor[target])[written]
    return reads, writes


def _cosines(profiles: np.ndarray) -> np.ndarray:
    """Cosine of each two profiles, zero for one without entries: [n, n]."""
    size = np.abs(profiles).max(1, keepdims=True, initial=0)
    scaled = np.divide(profiles, size, out=np.zeros_like(profiles), where=size > 0)
    norm = np.linalg.norm(scaled, axis=1, keepdims=True)
    unit = np.divide(scaled, norm, out=scaled, where=norm > 0)
    return np.asarray(unit @ unit.T)


def alike_threshold(similarity: np.ndarray) -> float:
    """Threshold between unlike and alike pairs: the mean of Otsu's and the usual one."""
    count = np.zeros(_BINS + 1)
    for i in range(1, len(similarity)):
        count += np.bincount((similarity[i, :i] * _BINS).round().astype(np.int64), minlength=_BINS + 1)
    filled = np.flatnonzero(count)
    if len(filled) < 2:
        return USUAL  # no pair, or all equally alike
    count, level = count[filled], filled / _BINS
    below, mass = count.cumsum()[:-1], (count * level).cumsum()
    above = count.sum() - below
    between = below * above * (mass[:-1] / below - (mass[-1] - mass[:-1]) / above) ** 2
    chosen = int(between.argmax())
    otsu = float(level[chosen] + level[chosen + 1]) / 2
    return (otsu + USUAL) / 2


def join_alike(similarity: np.ndarray, threshold: float, order: GroupOrder) -> np.ndarray:
    """Join groups by average similarity down to the threshold, where `order` allows it; the group of each: [n].

    A group is called by the lowest index in it. Of equals the pair of the lowest indices joins first.
    """
    average, count = similarity.copy(), len(similarity)
    np.fill_diagonal(average, -np.inf)
    group, size = np.arange(count), np.ones(count)
    if count < 2:
        return group
    best = average.argmax(1)
    value = average[group, best]
    while value.max() >= threshold:
        a = int(value.argmax())
        b = int(best[a])
        a, b = min(a, b), max(a, b)
        if order.may_join(a, b):
            order.join(a, b)
            group[group == b] = a
            _join(average, size, a, b)
            stale = (best == a) | (best == b) | (average[a] > value)
            stale[a] = True
        else:
            average[a, b] -= _APART
            average[b, a] -= _APART
            stale = np.zeros(count, bool)
            stale[[a, b]] = True
        changed = np.flatnonzero(stale)
        best[changed] = average[changed].argmax(1)
        value[changed] = average[changed, best[changed]]
    return group


def _join(average: np.ndarray, size: np.ndarray, a: int, b: int) -> None:
    """Replace groups a and b by their union, at a, in the matrix of average similarities."""
    rows = np.where(average[[a, b]] < -1, average[[a, b]] + np.float32(_APART), average[[a, b]])
    joined = (size[a] * rows[0] + size[b] * rows[1]) / (size[a] + size[b])
    joined[[a, b]] = -np.inf
    average[a] = average[:, a] = joined
    average[b] = average[:, b] = -np.inf
    size[a] += size[b]

"""The order of groups along the edges of a pruned graph: which may join without a path that leaves and returns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .prune import Pruned


class GroupOrder:
    """Ancestors and descendants of groups: free nodes, one group each at first, and groups that are fixed.

    below, above: [groups, bytes], the groups that a group is reached from, or reaches, as bits. A group that joined
    another keeps its bit, which is set wherever the other's is.
    """

    def __init__(self, pruned: Pruned, free: np.ndarray, fixed: list[np.ndarray]) -> None:
        graph = pruned.original
        index = np.full(graph.nodes, -1)
        index[free] = np.arange(len(free))
        for i, nodes in enumerate(fixed):
            index[nodes] = len(free) + i
        count = len(free) + len(fixed)
        self._bytes = -(-count // 8)
        self.members = np.packbits(np.eye(count, self._bytes * 8, dtype=bool), axis=1)
        self._current = np.ones(count, bool)
        self.below = np.zeros((count, self._bytes), np.uint8)
        self.above = np.zeros((count, self._bytes), np.uint8)
        source, target = _edges(pruned, index)
        self._connect(source, target)

    def _connect(self, source: np.ndarray, target: np.ndarray) -> None:
        """Fill below and above from the edges, until nothing changes: twice where layers ascend with the index."""
        matrix = np.zeros((len(self.below), self._bytes * 8), bool)
        matrix[target, source] = True
        direct = np.packbits(matrix, axis=1)
        sources = [np.flatnonzero(row) for row in matrix]
        self.below = direct
        before = np.zeros_like(direct)
        while not np.array_equal(before, self.below):
            before = self.below.copy()
            for i, reached in enumerate(sources):
                if len(reached):
                    self.below[i] |= np.bitwise_or.reduce(self.below[reached], axis=0)
        reach = np.unpackbits(self.below, axis=1)[:, : len(self.below)]
        self.above[:] = np.packbits(np.pad(reach.T, ((0, 0), (0, self._bytes * 8 - len(reach)))), axis=1)

    def may_join(self, a: int, b: int) -> bool:
        """True unless a path from one of the groups to the other runs through a third."""
        between = (self.above[a] & self.below[b]) | (self.above[b] & self.below[a])
        return not (between & ~(self.members[a] | self.members[b])).any()

    def join(self, a: int, b: int) -> None:
        """Make groups a and b one, called a."""
        self.members[a] |= self.members[b]
        self._current[b] = False
        inside = self.members[a]
        below = (self.below[a] | self.below[b]) & ~inside
        above = (self.above[a] | self.above[b]) & ~inside
        self.below[a], self.above[a] = below, above
        self.below[self._indices(above)] |= below | inside
        self.above[self._indices(below)] |= above | inside

    def _indices(self, bits: np.ndarray) -> np.ndarray:
        """Groups among these that have joined no other."""
        return np.flatnonzero(np.unpackbits(bits)[: len(self.below)] & self._current)


def _edges(pruned: Pruned, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) groups of the remaining edges between different groups. index: the group of a node, or -1."""
    graph = pruned.original
    entries = np.flatnonzero(pruned.edge_mask.numpy())
    row = np.searchsorted(graph.rows.row_ptr.numpy(), entries, side="right") - 1
    source = index[graph.rows.column.numpy()[entries]]
    target = index[graph.row_node.numpy()[row]]
    inner = (source >= 0) & (target >= 0) & (source != target)
    return source[inner], target[inner]

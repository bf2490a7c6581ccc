"""The strongest paths between two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pycircuit.ops import checks

from . import influence
from .csr import largest

if TYPE_CHECKING:
    from .graph import Graph


class Path(NamedTuple):
    """A path from a source to a target.

    nodes: from source to target; weights: of the edges between them; strength: the share of the target that arrives
    along this path, the product over the edges of |weight| / sum of |weights| of the edge's row.
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    strength: float


class _Best(NamedTuple):
    """The best paths from the source to one node, best first: [paths] each."""

    strength: np.ndarray
    entry: np.ndarray  # the last edge, an entry of the rows; -1 for the empty path
    rank: np.ndarray  # of the path that this edge extends, among the best paths to the edge's source


def paths(graph: Graph, source: int, target: int, k: int) -> list[Path]:
    """Up to k paths, strongest first; of equals, the one whose last differing node has the lower index is first."""
    for name, node in (("source", source), ("target", target)):
        if checks.whole("paths", name, node, 0) >= graph.nodes:
            raise ValueError(f"paths: {name} must be a node below {graph.nodes}, got {node}")
    checks.whole("paths", "k", k, 1)
    best = {source: _Best(np.ones(1), np.full(1, -1), np.zeros(1, np.int64))}
    first = np.zeros(graph.nodes)  # strength of the best path to each node reached
    first[source] = 1
    row_node, scale = graph.row_node.numpy(), influence.scales(graph.rows)
    for r in _rows_below(graph, target):
        if row_node[r] != source and (extended := _extend(graph, r, scale[r], first, best, k)) is not None:
            best[int(row_node[r])], first[row_node[r]] = extended, extended.strength[0]
    if target not in best:
        return []
    return [_follow(graph, best, target, rank) for rank in range(len(best[target].strength))]


def _rows_below(graph: Graph, target: int) -> list[int]:
    """Rows that a path to `target` may run through, each after all that feed it, the target's own last."""
    node = graph.row_node.numpy()
    own = np.flatnonzero(node == target)
    groups = influence.layer_groups(graph)
    while groups and not np.isin(own, groups[0]).any():
        groups.pop(0)
    return [*np.concatenate(groups[:0:-1] or [own[:0]]).tolist(), *own.tolist()]


def _extend(graph: Graph, r: int, scale: float, first: np.ndarray, best: dict[int, _Best], k: int) -> _Best | None:
    """The k best paths that end in row r's node, each a best path to a source extended by one edge of the row."""
    begin, end = graph.rows.row_ptr[r : r + 2].tolist()
    column = graph.rows.column[begin:end].numpy()
    edges = np.flatnonzero(first.take(column) > 0)
    if not len(edges):
        return None
    share = np.abs(graph.rows.weight[begin:end].numpy()[edges]).astype(np.float64) * scale
    strength = share * first[column[edges]]
    if k < len(edges):
        # No other edge ends one of the k best paths: the best path over each of these edges beats all over the others.
        strongest = largest(strength, k)
        edges, share, strength = edges[strongest], share[strongest], strength[strongest]
    edges, share = edges[strength > 0], share[strength > 0]
    if not len(edges):
        return None
    strengths = [best[c].strength for c in column[edges].tolist()]
    counts = [len(strength) for strength in strengths]
    candidates = np.concatenate(strengths) * np.repeat(share, counts)
    # Candidates are in the order of (source, rank); a stable sort keeps equals in it.
    chosen = np.argsort(-candidates, kind="stable")[:k]
    rank = np.concatenate([np.arange(n) for n in counts])
    return _Best(candidates[chosen], np.repeat(begin + edges, counts)[chosen], rank[chosen])


def _follow(graph: Graph, best: dict[int, _Best], node: int, rank: int) -> Path:
    """Trace the best path of this rank back from a node to the source."""
    strength = float(best[node].strength[rank])
    nodes, weights = [node], []
    while (entry := int(best[node].entry[rank])) >= 0:
        rank = int(best[node].rank[rank])
        node = int(graph.rows.column[entry])
        nodes.append(node)
        weights.append(float(graph.rows.weight[entry]))
    return Path(tuple(reversed(nodes)), tuple(reversed(weights)), strength)

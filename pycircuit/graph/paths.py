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
    """nodes: from source to target; weights: of the edges between; strength: the product over the edges of

    |weight| / sum of |weights| of the row it lies in, the share of the target that arrives along this path.
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    strength: float


class _Best(NamedTuple):
    """The best paths from the source to one node, best first: [found] each."""

    strength: np.ndarray
    entry: np.ndarray  # the last edge, an entry of the rows; -1 for the path that has not left the source
    rank: np.ndarray  # which of the best paths to that edge's source it goes on from


def paths(graph: Graph, source: int, target: int, k: int) -> list[Path]:
    """Up to k paths, strongest first. Of equals, the one whose last differing node has the lower number is first."""
    for name, end in (("source", source), ("target", target)):
        if checks.whole_number("paths", name, end, 0) >= graph.nodes:
            raise ValueError(f"paths: {name} must be a node below {graph.nodes}, got {end}")
    checks.whole_number("paths", "k", k, 1)
    best = {source: _Best(np.ones(1), np.full(1, -1), np.zeros(1, np.int64))}
    first = np.zeros(graph.nodes)  # strength of the best path to each node reached
    first[source] = 1
    node, scale = graph.row_node.numpy(), influence.scales(graph.rows)
    for r in _below(graph, target):
        if node[r] != source and (found := _extend(graph, r, scale[r], first, best, k)) is not None:
            best[int(node[r])], first[node[r]] = found, found.strength[0]
    if target not in best:
        return []
    return [_follow(graph, best, target, rank) for rank in range(len(best[target].strength))]


def _below(graph: Graph, target: int) -> list[int]:
    """The rows that a path to `target` may run through, each after all that feed it, the target's own last."""
    node = graph.row_node.numpy()
    own = np.flatnonzero(node == target)
    groups = influence.layer_groups(graph)
    while groups and not np.isin(own, groups[0]).any():
        groups.pop(0)
    return [*np.concatenate(groups[:0:-1] or [own[:0]]).tolist(), *own.tolist()]


def _extend(graph: Graph, r: int, scale: float, first: np.ndarray, best: dict[int, _Best], k: int) -> _Best | None:
    """The k best paths that end in row r's node: every edge of the row after every best path to its source."""
    begin, end = graph.rows.row_ptr[r : r + 2].tolist()
    column = graph.rows.column[begin:end].numpy()
    edges = np.flatnonzero(first.take(column) > 0)
    if not len(edges):
        return None
    share = np.abs(graph.rows.weight[begin:end].numpy()[edges]).astype(np.float64) * scale
    strength = share * first[column[edges]]
    if k < len(edges):
        # No other edge ends a k best path: the first path over each of these k comes before all over another.
        few = largest(strength, k)
        edges, share, strength = edges[few], share[few], strength[few]
    edges, share = edges[strength > 0], share[strength > 0]
    if not len(edges):
        return None
    before = [best[c].strength for c in column[edges].tolist()]
    counts = [len(b) for b in before]
    candidates = np.concatenate(before) * np.repeat(share, counts)
    # Candidates lie in the order of (source, rank); a stable sort leaves equals so.
    chosen = np.argsort(-candidates, kind="stable")[:k]
    rank = np.concatenate([np.arange(n) for n in counts])
    return _Best(candidates[chosen], np.repeat(begin + edges, counts)[chosen], rank[chosen])


def _follow(graph: Graph, best: dict[int, _Best], node: int, rank: int) -> Path:
    strength, nodes, weights = float(best[node].strength[rank]), [node], []
    while (entry := int(best[node].entry[rank])) >= 0:
        rank = int(best[node].rank[rank])
        node = int(graph.rows.column[entry])
        nodes.append(node)
        weights.append(float(graph.rows.weight[entry]))
    return Path(tuple(reversed(nodes)), tuple(reversed(weights)), strength)

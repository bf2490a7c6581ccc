"""The strongest paths between two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pycircuit.ops import checks

from . import influence

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
        if checks.whole("paths", name, end, 0) >= graph.nodes:
            raise ValueError(f"paths: {name} must be a node below {graph.nodes}, got {end}")
    checks.whole("paths", "k", k, 1)
    best = {source: _Best(np.ones(1), np.full(1, -1), np.zeros(1, np.int64))}
    share, node = influence.shares(graph.rows), graph.row_node.numpy()
    for group in reversed(influence.layer_groups(graph)):
        for r in group.tolist():
            if node[r] != source and (found := _extend(graph, r, share, best, k)) is not None:
                best[int(node[r])] = found
    if target not in best:
        return []
    return [_follow(graph, best, target, rank) for rank in range(len(best[target].strength))]


def _extend(graph: Graph, r: int, share: np.ndarray, best: dict[int, _Best], k: int) -> _Best | None:
    """The k best paths that end in row r's node: every edge of the row after every best path to its source."""
    columns = graph.rows.row(r)[0].numpy()
    begin = int(graph.rows.row_ptr[r])
    reached = np.array(sorted(best), dtype=np.int64)
    place = np.searchsorted(columns, reached)
    place = place[np.isin(reached, columns)]
    entries = [begin + a for a in place.tolist() if share[begin + a] > 0]
    if not entries:
        return None
    before = [best[int(graph.rows.column[e])] for e in entries]
    strength = np.concatenate([share[e] * b.strength for e, b in zip(entries, before, strict=True)])
    # Candidates lie in the order of (source, rank); a stable sort leaves equals so.
    chosen = np.argsort(-strength, kind="stable")[:k]
    counts = [len(b.strength) for b in before]
    rank = np.concatenate([np.arange(n) for n in counts])
    return _Best(strength[chosen], np.repeat(entries, counts)[chosen], rank[chosen])


def _follow(graph: Graph, best: dict[int, _Best], node: int, rank: int) -> Path:
    strength, nodes, weights = float(best[node].strength[rank]), [node], []
    while (entry := int(best[node].entry[rank])) >= 0:
        rank = int(best[node].rank[rank])
        node = int(graph.rows.column[entry])
        nodes.append(node)
        weights.append(float(graph.rows.weight[entry]))
    return Path(tuple(reversed(nodes)), tuple(reversed(weights)), strength)

"""The strongest paths between two nodes, and the strongest from a token to a target.

A path is a chain, and a chain is as strong as its weakest link. A link's share is its |weight| over the sum of
|weights| of its row, what one edge brings of all that enters. The strength of a path is

    (sum over links of share^-8)^(-1/8),

the weakest link's share, a little less where other links are nearly as weak: n links of equal share s are as strong as
0.82 s for n = 5 and 0.67 s for n = 25. A product of shares, s^n, would be 0.01 of s for five links of a third: it
ranks any short cut before any circuit. A mean of shares would let strong links hide a weak one. Sums of share^-8 only
grow along a path, so the best paths to a node extend best paths to its sources, and one pass finds them.

The sign of a path is the product of its links' signs: +1 supports the target, -1 opposes it (an inhibitor of an
inhibitor supports). Supporting and opposing paths are ranked apart; a strong link of the wrong sign helps no path.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from pycircuit.ops import checks

from . import influence
from .csr import Block, largest

if TYPE_CHECKING:
    from .graph import Graph

Sign = Literal[-1, 1]
_LEAST = 0.1  # strength of a path worth a mark, relative to the share of the target's strongest input
_OWN = 2.0  # a path from the target's own position is preferred if it is stronger than every other by this factor


class Path(NamedTuple):
    """A path from a source to a target.

    nodes: from source to target; weights: of the edges between them; strength: from 0 to 1, nearly the share of the
    weakest edge in its row, |weight| / sum of |weights|: (sum of share^-8)^(-1/8). `sign`: 1 if it supports the target,
    -1 if it opposes it.
    """

    nodes: tuple[int, ...]
    weights: tuple[float, ...]
    strength: float

    @property
    def sign(self) -> Sign:
        """Product of the signs of the weights."""
        return -1 if sum(weight < 0 for weight in self.weights) % 2 else 1


class _Best(NamedTuple):
    """The best paths of one sign from the source to one node, best first: [paths] each."""

    cost: np.ndarray  # sum of share^-8
    entry: np.ndarray  # the last edge, an entry of the rows; -1 for the empty path
    rank: np.ndarray  # of the path that this edge extends, among the best paths to the edge's source


def paths(graph: Graph, source: int, target: int, k: int, sign: Sign | None = None) -> list[Path]:
    """Up to k paths, strongest first; of equals, the one whose last differing node has the lower index is first.

    sign: 1 for paths that support the target, -1 for those that oppose it, None for both.
    """
    for name, node in (("source", source), ("target", target)):
        if checks.whole_number("paths", name, node, 0) >= graph.nodes:
            raise ValueError(f"paths: {name} must be a node below {graph.nodes}, got {node}")
    checks.whole_number("paths", "k", k, 1)
    if sign is not None and checks.whole_number("paths", "sign", sign, -1) not in (-1, 1):
        raise ValueError(f"paths: sign must be 1, -1 or None, got {sign}")
    best = {(0, source): _Best(np.zeros(1), np.full(1, -1), np.zeros(1, np.int64))}
    first = np.full((2, graph.nodes), np.inf)  # cost of the best path of each sign to each node
    first[0, source] = 0
    row_node, scale = graph.row_node.numpy(), influence.scales(graph.rows)
    for r in _rows_below(graph, target):
        node = int(row_node[r])
        if node == source:
            continue
        for parity, extended in enumerate(_extend(graph, r, scale[r], first, best, k)):
            if extended is not None:
                best[parity, node], first[parity, node] = extended, extended.cost[0]
    parities = (0, 1) if sign is None else (int(sign < 0),)
    ranked = [(p, rank) for p in parities if (p, target) in best for rank in range(len(best[p, target].cost))]
    ranked.sort(key=lambda pair: best[pair[0], target].cost[pair[1]])
    return [_follow(graph, best, target, parity, rank) for parity, rank in ranked[:k]]


def _strength(cost: float) -> float:
    return float(cost ** (-1 / 8)) if cost > 0 else 1.0


def _costs(share: np.ndarray) -> np.ndarray:
    """share^-8, infinite for a link too weak for a float64."""
    with np.errstate(divide="ignore", over="ignore"):
        squared = 1 / (share * share)
        squared *= squared
        squared *= squared
    return squared


def _rows_below(graph: Graph, target: int) -> list[int]:
    """Rows that a path to `target` may run through, each after all that feed it, the target's own last."""
    node = graph.row_node.numpy()
    own = np.flatnonzero(node == target)
    groups = influence.layer_groups(graph)
    while groups and not np.isin(own, groups[0]).any():
        groups.pop(0)
    return [*np.concatenate(groups[:0:-1] or [own[:0]]).tolist(), *own.tolist()]


def _extend(
    graph: Graph, r: int, scale: float, first: np.ndarray, best: dict[tuple[int, int], _Best], k: int
) -> list[_Best | None]:
    """The k best paths of each sign that end in row r's node, best paths to its sources extended by one edge."""
    begin, end = graph.rows.row_ptr[r : r + 2].tolist()
    column = graph.rows.column[begin:end].numpy()
    edges = np.flatnonzero(np.isfinite(first.take(column, axis=1)).any(0))
    if not len(edges):
        return [None, None]
    weight = graph.rows.weight[begin:end].numpy()[edges].astype(np.float64)
    link, negative, column = _costs(np.abs(weight) * scale), (weight < 0).astype(np.int64), column[edges]
    return [_best_of(begin + edges, column, link, negative ^ parity, first, best, k) for parity in (0, 1)]


def _best_of(
    entry: np.ndarray, column: np.ndarray, link: np.ndarray, before: np.ndarray, first: np.ndarray,
    best: dict[tuple[int, int], _Best], k: int,
) -> _Best | None:  # fmt: skip
    """The k best paths over edges that extend paths of the sign `before`."""
    cost = first[before, column] + link
    # No other edge ends one of the k best paths: the best path over each of these edges beats all over the others.
    chosen = largest(-cost, k) if k < len(cost) else np.arange(len(cost))
    chosen = chosen[np.isfinite(cost[chosen])]
    if not len(chosen):
        return None
    costs = [best[p, c].cost for p, c in zip(before[chosen].tolist(), column[chosen].tolist(), strict=True)]
    counts = [len(c) for c in costs]
    candidates = np.concatenate(costs) + np.repeat(link[chosen], counts)
    # Candidates are in the order of (source, rank); a stable sort keeps equals in it.
    order = np.argsort(candidates, kind="stable")[:k]
    rank = np.concatenate([np.arange(n) for n in counts])
    return _Best(candidates[order], np.repeat(entry[chosen], counts)[order], rank[order])


def _follow(graph: Graph, best: dict[tuple[int, int], _Best], node: int, parity: int, rank: int) -> Path:
    """Trace the best path of this sign and rank back from a node to the source."""
    strength = _strength(float(best[parity, node].cost[rank]))
    nodes, weights = [node], []
    while (entry := int(best[parity, node].entry[rank])) >= 0:
        rank = int(best[parity, node].rank[rank])
        node, weight = int(graph.rows.column[entry]), float(graph.rows.weight[entry])
        parity ^= weight < 0
        nodes.append(node)
        weights.append(weight)
    return Path(tuple(reversed(nodes)), tuple(reversed(weights)), strength)


def strongest_path(graph: Graph, target: int = 0, least: float = _LEAST) -> Path | None:
    """The strongest path from a token that supports a target, or None if it is weak.

    least: the least strength, relative to the share of the target's strongest input that is no error. The opening token
    counts only if it is the only one. The token at the target's own position is always there, so its path is chosen
    only if it is twice as strong as any from an earlier token.
    """
    node, row_node = graph.target_node(target), graph.row_node.numpy()
    own = np.flatnonzero(row_node == node)
    scale = influence.scales(graph.rows)
    if not len(own) or scale[own[0]] == 0:
        return None
    cutoff = least * _strongest_share(graph, int(own[0]), scale[own[0]])
    cost, entry = _toward(graph, int(own[0]), scale, cutoff)
    last = int(graph.targets.positions[target])
    tokens = graph.first_token + np.arange(min(1, graph.positions - 1), last + 1)
    token_cost = cost[0, tokens]
    if len(tokens) > 1 and token_cost[:-1].min() <= token_cost[-1] * _OWN**8:
        token_cost = token_cost[:-1]
    if not len(token_cost) or not np.isfinite(token_cost.min()):
        return None
    path = _descend(graph, entry, int(tokens[token_cost.argmin()]), node, float(token_cost.min()))
    return path if path.strength >= cutoff else None


def _strongest_share(graph: Graph, r: int, scale: float) -> float:
    """Share of row r's strongest input that is no error."""
    columns, weights = (t.numpy() for t in graph.rows.row(r))
    inner = (columns < graph.first_error) | (columns >= graph.first_token)
    return float(np.abs(weights[inner]).max(initial=0)) * scale


def _toward(graph: Graph, own: int, scale: np.ndarray, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Best path of each sign from every node to row `own`'s node: (costs, first edges), [2, nodes] each.

    cutoff: least share of a link. One pass over the rows, from the target down.
    """
    row_node, count = graph.row_node.numpy(), graph.nodes
    cost, entry = np.full((2, count), np.inf), np.full((2, count), -1)
    cost[0, row_node[own]] = 0
    for group in influence.layer_groups(graph):
        for block in graph.rows.blocks(group[np.isfinite(cost[:, row_node[group]]).any(0)]):
            _relax(graph, block, scale, cutoff, cost, entry)
    return cost, entry


def _relax(graph: Graph, block: Block, scale: np.ndarray, cutoff: float, cost: np.ndarray, entry: np.ndarray) -> None:
    """Lower the costs of the sources of a block of rows, in place."""
    weight, factor = block.gather(graph.rows.weight.numpy()), scale[block.rows]
    least = np.divide(cutoff, factor, out=np.full_like(factor, np.inf), where=factor > 0).astype(weight.dtype)
    links = np.flatnonzero(np.abs(weight) >= block.repeat(least))
    if not len(links):
        return
    row = block.repeat(block.rows)[links]
    entries = np.concatenate([np.arange(chunk.start, chunk.stop) for chunk in block.slices])[links]
    weight = weight[links].astype(np.float64)
    link, column = _costs(np.abs(weight) * scale[row]), graph.rows.column.numpy()[entries].astype(np.int64)
    negative, node = weight < 0, graph.row_node.numpy()[row]
    arriving = np.concatenate([cost[0, node] + link, cost[1, node] + link])
    state = np.concatenate([column + negative * graph.nodes, column + ~negative * graph.nodes])
    order = np.lexsort((arriving, state))
    order = order[np.diff(state[order], prepend=-1) > 0]  # the best of each state
    best, state = arriving[order], state[order]
    better = best < cost.reshape(-1)[state]
    cost.reshape(-1)[state[better]] = best[better]
    entry.reshape(-1)[state[better]] = np.tile(entries, 2)[order[better]]


def _descend(graph: Graph, entry: np.ndarray, node: int, target: int, cost: float) -> Path:
    """The supporting path that leads from a node along these edges to the target."""
    nodes, weights, parity = [node], [], 0
    starts = graph.rows.row_ptr.numpy()
    while node != target:
        edge = int(entry[parity, node])
        weight = float(graph.rows.weight[edge])
        parity ^= weight < 0
        node = int(graph.row_node[int(np.searchsorted(starts, edge, side="right")) - 1])
        nodes.append(node)
        weights.append(weight)
    return Path(tuple(nodes), tuple(weights), _strength(cost))

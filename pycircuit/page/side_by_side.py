"""Comparison of two graphs: nodes and edges of the one, of the other, and of both."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np

from pycircuit.graph import Graph

from .graph_index import KINDS, GraphIndex, significant

OP = "page"
ALIGNMENTS = ("position", "feature")
LIMIT = 500  # nodes in a list
EDGE_LIMIT = 200


def compare(a: GraphIndex, b: GraphIndex, align: str, thresholds: tuple[float, float]) -> dict[str, Any]:
    """Return what pruning keeps of A alone, of B alone, and of both with the change from A to B.

    align: "position", nodes of one kind, layer, feature and position are the same; "feature", at any position, whose
    influences and edges are summed. Targets are the same by their text. active_in_other: a node that pruning kept in
    one graph alone is there in the other, with less influence.
    """
    if align not in ALIGNMENTS:
        raise ValueError(f"{OP}: align must be one of {', '.join(ALIGNMENTS)}, got {align[:40]!r}")
    sides = [_Side(index, align, thresholds) for index in (a, b)]
    only = [_only(sides[i], sides[1 - i]) for i in (0, 1)]
    both = _both(*sides)
    edges = _edges(*sides)
    return {
        "align": align,
        "only_a": only[0][:LIMIT],
        "only_b": only[1][:LIMIT],
        "both": both[:LIMIT],
        "edges": edges,
        "summary": {
            "only_a": len(only[0]), "only_b": len(only[1]), "both": len(both),
            "same_tokens": list(a.graph.tokens.text) == list(b.graph.tokens.text),
            "layers": [a.graph.layers, b.graph.layers],
            "scores": [a.scores, b.scores],
            "influence_in_both": [_share_in(sides[i], sides[1 - i]) for i in (0, 1)],
        },
    }  # fmt: skip


class _Side:
    """One graph: its nodes by their key, and what pruning keeps of it."""

    def __init__(self, index: GraphIndex, align: str, thresholds: tuple[float, float]) -> None:
        self.index, self.graph = index, index.graph
        self.pruned = index.pruned(*thresholds)
        self.keys = _keys(index.graph, align)
        self.influence: dict[Hashable, float] = {}
        for key, influence in zip(self.keys, index.influence.tolist(), strict=True):
            self.influence[key] = self.influence.get(key, 0.0) + influence
        self.shown: dict[Hashable, int] = {}  # the most influential node of each key that pruning keeps
        for node in np.flatnonzero(self.pruned.node_mask.numpy()).tolist():
            key = self.keys[node]
            if key not in self.shown or index.influence[node] > index.influence[self.shown[key]]:
                self.shown[key] = node

    def strongest(self, keys: set[Hashable]) -> list[Hashable]:
        """Return keys from the most influential down."""
        return sorted(keys, key=lambda key: (-self.influence[key], self.shown[key]))


def _keys(graph: Graph, align: str) -> list[Hashable]:
    """Key of every node; nodes of one key are the same."""
    by_position = align == "position"
    features = [
        (KINDS[0], layer, feature, position if by_position else -1)
        for layer, position, feature in graph.features.tolist()
    ]
    places = [divmod(i, graph.positions) for i in range(graph.layers * graph.positions)]
    errors = [(KINDS[1], layer, -1, position if by_position else -1) for layer, position in places]
    texts = graph.tokens.text
    tokens = [(KINDS[2], texts[position], position if by_position else -1) for position in range(graph.positions)]
    targets = [(KINDS[3], label.strip()) for label in graph.targets.labels]
    return [*features, *errors, *tokens, *targets]


def _only(own: _Side, other: _Side) -> list[dict[str, Any]]:
    keys = own.strongest(own.shown.keys() - other.shown.keys())
    described = own.index.describe([own.shown[key] for key in keys])
    return [
        {"node": node, "influence": _short(own.influence[key]), "active_in_other": key in other.influence}
        for key, node in zip(keys, described, strict=True)
    ]


def _both(a: _Side, b: _Side) -> list[dict[str, Any]]:
    """Nodes of both, those whose influence changes most first."""
    keys = list(a.shown.keys() & b.shown.keys())
    keys.sort(key=lambda key: (-abs(b.influence[key] - a.influence[key]), a.shown[key]))
    nodes = [side.index.describe([side.shown[key] for key in keys]) for side in (a, b)]
    return [
        {"a": first, "b": second, "influence_change": _short(b.influence[key] - a.influence[key])}
        for key, first, second in zip(keys, *nodes, strict=True)
    ]


def _share_in(own: _Side, other: _Side) -> float:
    """Share of a graph's influence, targets aside, in nodes that pruning keeps in both."""
    own_nodes = {key for key in own.shown if own.shown[key] < own.graph.first_target}
    total = sum(own.influence[key] for key in own_nodes)
    return _short(sum(own.influence[key] for key in own_nodes if key in other.shown) / total) if total else 0.0


def _edges(a: _Side, b: _Side) -> dict[str, Any]:
    """Numbers of edges of one graph and of both, and those of both that change most."""
    weights = [_edge_weights(side) for side in (a, b)]
    shared = list(weights[0].keys() & weights[1].keys())
    shared.sort(key=lambda ends: -abs(weights[1][ends] - weights[0][ends]))
    changed = [
        {
            "source": a.index.describe([a.shown[source]])[0]["id"],
            "target": a.index.describe([a.shown[target]])[0]["id"],
            "a": _short(weights[0][source, target]),
            "b": _short(weights[1][source, target]),
        }
        for source, target in shared[:EDGE_LIMIT]
    ]
    counts = [len(weights[i].keys() - weights[1 - i].keys()) for i in (0, 1)]
    return {"only_a": counts[0], "only_b": counts[1], "both": len(shared), "changed": changed}


def _edge_weights(side: _Side) -> dict[tuple[Hashable, Hashable], float]:
    """Sums of the weights of the edges that pruning keeps, by the keys of their ends."""
    rows, entries = side.graph.rows, np.flatnonzero(side.pruned.edge_mask.numpy())
    row = np.searchsorted(rows.row_ptr.numpy(), entries, side="right") - 1
    source, target = rows.column.numpy()[entries].tolist(), side.graph.row_node.numpy()[row].tolist()
    sums: dict[tuple[Hashable, Hashable], float] = {}
    for s, t, weight in zip(source, target, rows.weight.numpy()[entries].tolist(), strict=True):
        ends = (side.keys[s], side.keys[t])
        sums[ends] = sums.get(ends, 0.0) + weight
    return sums


def _short(value: float) -> float:
    return float(significant(np.array([value]))[0])

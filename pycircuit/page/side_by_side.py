"""The page's comparison of two graphs: pc.compare, with nodes as the page draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from pycircuit.graph import compare as compare_graphs
from pycircuit.graph.comparison import Alignment

from .graph_index import GraphIndex, significant

LIMIT = 500  # nodes in a list
EDGE_LIMIT = 200


def compare(a: GraphIndex, b: GraphIndex, align: str, thresholds: tuple[float, float]) -> dict[str, Any]:
    """Return the nodes of A alone, of B alone, and of both with the change from A to B; edges by the names of ends.

    Of several nodes that count as one, the most influential is described.
    """
    node_threshold, edge_threshold = thresholds
    result = compare_graphs(
        a.graph,
        b.graph,
        align=cast(Alignment, align),
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
    )
    both = result.both[:LIMIT]
    pairs = zip(both, _described(a, [node.a for node in both]), _described(b, [node.b for node in both]), strict=True)
    return {
        "align": align,
        "only_a": _alone(a, [(node.a, node.influence_a) for node in result.only_a[:LIMIT]]),
        "only_b": _alone(b, [(node.b, node.influence_b) for node in result.only_b[:LIMIT]]),
        "both": [{"a": in_a, "b": in_b, "influence_change": _short(node.change)} for node, in_a, in_b in pairs],
        "edges": {
            "only_a": len(result.edges_only_a), "only_b": len(result.edges_only_b), "both": len(result.edges),
            "changed": [
                {"source": edge.source, "target": edge.target, "a": _short(edge.weight_a), "b": _short(edge.weight_b)}
                for edge in result.edges[:EDGE_LIMIT]
            ],
        },
        "summary": {
            "only_a": len(result.only_a), "only_b": len(result.only_b), "both": len(result.both),
            "similarity": _short(result.similarity),
            "same_tokens": list(a.graph.tokens.text) == list(b.graph.tokens.text),
            "layers": [a.graph.layers, b.graph.layers],
            "scores": [a.scores, b.scores],
        },
    }  # fmt: skip


def _described(index: GraphIndex, nodes: Sequence[tuple[int, ...]]) -> list[dict[str, Any]]:
    """Describe the most influential of each of these sets of nodes."""
    return index.describe([max(group, key=lambda node: (index.influence[node], -node)) for group in nodes])


def _alone(index: GraphIndex, nodes: Sequence[tuple[tuple[int, ...], float]]) -> list[dict[str, Any]]:
    described = _described(index, [group for group, _ in nodes])
    return [
        {"node": node, "influence": _short(influence)} for node, (_, influence) in zip(described, nodes, strict=True)
    ]


def _short(value: float) -> float:
    return float(significant(np.array([value]))[0])

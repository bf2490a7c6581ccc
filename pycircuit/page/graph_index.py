"""Facts of a graph that every answer of the page needs, computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np

from pycircuit.graph import Graph, Pruned
from pycircuit.graph.identifiers import identifiers
from pycircuit.graph.influence import node_influence
from pycircuit.graph.threshold import cumulative

DIGITS = 6  # of a number in an answer
KINDS = ("feature", "error", "token", "target")


def significant(values: np.ndarray) -> np.ndarray:
    """Round to a few significant digits, so that numbers are short as text: float64, of the same shape."""
    values = values.astype(np.float64)
    size = np.abs(values)
    with np.errstate(all="ignore"):
        scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(size)))
        rounded = np.round(values * scale) / scale
    return np.where(np.isfinite(rounded) & (scale > 0), rounded, values)


def finite(value: float) -> float | None:
    """Return a number for JSON: None for NaN and infinities."""
    return float(value) if isfinite(value) else None


@dataclass(frozen=True, eq=False)
class GraphIndex:
    """A graph with its influence, shares and names at hand. density: of a feature by layer and index, where known."""

    graph: Graph
    density: Callable[[int, int], float | None] = lambda layer, feature: None
    _prunings: dict[tuple[float, float], Pruned] = field(default_factory=dict)

    @cached_property
    def influence(self) -> np.ndarray:
        """Influence of every node on the targets: [nodes] float64; a target's is its weight."""
        out = node_influence(self.graph)
        out[self.graph.first_target :] = self.graph.targets.weights.numpy()
        return out

    @cached_property
    def cumulative(self) -> np.ndarray:
        """Share of all influence in nodes at least as influential as each: [nodes], targets 0."""
        out = np.zeros(self.graph.nodes)
        inner = self.influence[: self.graph.first_target]
        out[: self.graph.first_target] = cumulative(inner, np.arange(len(inner)))
        return out

    @cached_property
    def masses(self) -> np.ndarray:
        """Sum of the absolute weights of each row: [rows]."""
        return self.graph.rows.masses()

    @cached_property
    def row_of(self) -> np.ndarray:
        """Row of every node, -1 where it has none: [nodes]."""
        out = np.full(self.graph.nodes, -1)
        out[self.graph.row_node.numpy()] = np.arange(self.graph.rows.count)
        return out

    @cached_property
    def scores(self) -> dict[str, float | None]:
        """Replacement and completeness of the graph."""
        scores = self.graph.scores()
        return {"replacement": finite(scores.replacement), "completeness": finite(scores.completeness)}

    @cached_property
    def certificate(self) -> float | None:
        """Largest violation of the conservation law; None where it is not known."""
        return finite(self.graph.certificate)

    def pruned(self, node_threshold: float, edge_threshold: float) -> Pruned:
        """Prune the graph; the last pruning is kept."""
        key = (node_threshold, edge_threshold)
        known = self._prunings.get(key)
        if known is None:
            known = self.graph.prune(node_threshold, edge_threshold)
            self._prunings.clear()
            self._prunings[key] = known
        return known

    def shares(self, entries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Share of each entry in the mass of its row: [entries]. rows: the row of each."""
        mass = self.masses[rows]
        size = np.abs(self.graph.rows.weight.numpy()[entries]).astype(np.float64)
        return np.divide(size, mass, out=np.zeros_like(size), where=mass > 0)

    def describe(self, nodes: np.ndarray | Sequence[int]) -> list[dict[str, Any]]:
        """Describe nodes as the page draws them: [n]."""
        nodes = np.asarray(nodes, np.int64)
        influence = significant(self.influence[nodes]).tolist()
        share = significant(self.cumulative[nodes]).tolist()
        return [
            {"id": name, **self._fields(node), "influence": i, "cumulative": c}
            for name, node, i, c in zip(
                identifiers(self.graph, nodes.tolist()), nodes.tolist(), influence, share, strict=True
            )
        ]

    def _fields(self, node: int) -> dict[str, Any]:
        graph = self.graph
        out: dict[str, Any] = {"feature": None, "value": None, "label": "", "automatic": False, "density": None}
        out["weight"] = None
        if node < graph.first_error:
            layer, position, feature = graph.features[node].tolist()
            label, automatic = graph.label(layer, feature)
            value = finite(float(f"{float(graph.values[node]):.{DIGITS}g}"))
            return out | {
                "kind": KINDS[0], "layer": layer, "position": position, "feature": feature, "value": value,
                "label": label, "automatic": automatic, "density": self.density(layer, feature),
            }  # fmt: skip
        if node < graph.first_token:
            layer, position = divmod(node - graph.first_error, graph.positions)
            return out | {"kind": KINDS[1], "layer": layer, "position": position}
        if node < graph.first_target:
            position = node - graph.first_token
            return out | {"kind": KINDS[2], "layer": -1, "position": position, "label": graph.tokens.text[position]}
        target = node - graph.first_target
        return out | {
            "kind": KINDS[3],
            "layer": graph.layers,
            "position": int(graph.targets.positions[target]),
            "label": graph.targets.labels[target],
            "weight": finite(float(graph.targets.weights[target])),
        }

"""Comparison of two graphs: nodes and edges of one alone, and of both with the change from the first to the second."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from .graph import Graph
from .identifiers import identifier
from .prune import Pruned

OP = "compare"
Alignment = Literal["position", "feature", "label"]
ALIGNMENTS: tuple[Alignment, ...] = get_args(Alignment)
Key = tuple[str, int, int, int]  # kind, and the numbers that name a node in both graphs
ANY = -1  # a number of a key that does not tell nodes apart
LABEL = -2  # in place of a feature's index: the key's first number is that of its label
_SHOWN = 8  # rows of each table in a repr


class ComparedNode(NamedTuple):
    """A node of one graph or of both.

    a, b: its nodes in the graphs, several if positions are not compared; influence_a, influence_b: their influence,
    as a share of the targets' weight; 0 where a graph has no such node.
    """

    name: str
    kind: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    influence_a: float
    influence_b: float

    @property
    def change(self) -> float:
        """Influence in the second graph less that in the first."""
        return self.influence_b - self.influence_a


class ComparedEdge(NamedTuple):
    """An edge of one graph or of both. weight_a, weight_b: sums of its weights, 0 where a graph has none."""

    source: str
    target: str
    weight_a: float
    weight_b: float

    @property
    def change(self) -> float:
        """Weight in the second graph less that in the first."""
        return self.weight_b - self.weight_a


@dataclass(frozen=True, eq=False)
class Comparison:
    """Nodes and edges that pruning keeps in either graph, compared over both whole graphs.

    only_a, only_b: nodes that the other graph does not have, the most influential first; both: nodes of both, the
    largest change of influence first. edges: between nodes of both, the largest change of weight first; edges_only_a,
    edges_only_b: those with an end that the other graph does not have, the largest weight first.
    """

    align: Alignment
    only_a: list[ComparedNode]
    only_b: list[ComparedNode]
    both: list[ComparedNode]
    edges: list[ComparedEdge]
    edges_only_a: list[ComparedEdge]
    edges_only_b: list[ComparedEdge]

    @property
    def similarity(self) -> float:
        """Influence that the graphs share, over that of either: sum of minima over sum of maxima, from 0 to 1."""
        nodes = [*self.only_a, *self.only_b, *self.both]
        larger = sum(max(n.influence_a, n.influence_b) for n in nodes)
        return sum(min(n.influence_a, n.influence_b) for n in nodes) / larger if larger > 0 else 1.0

    def tables(self) -> dict[str, list[list[str]]]:
        """Tables by title, the first row of each its header."""
        header = ["node", "influence in A", "influence in B", "change"]
        nodes = {"only in A": self.only_a, "only in B": self.only_b, "in both": self.both}
        out = {title: [header, *map(_node_line, entries)] for title, entries in nodes.items()}
        edge_header = ["from", "to", "weight in A", "weight in B", "change"]
        edges = {
            "edges only in A": self.edges_only_a,
            "edges only in B": self.edges_only_b,
            "edges in both": self.edges,
        }
        return out | {title: [edge_header, *map(_edge_line, entries)] for title, entries in edges.items()}

    def as_dict(self, limit: int | None = None) -> dict[str, Any]:
        """Tables as plain values, for JSON. limit: entries of each."""
        node_lists = {"only_a": self.only_a, "only_b": self.only_b, "both": self.both}
        edge_lists = {"edges": self.edges, "edges_only_a": self.edges_only_a, "edges_only_b": self.edges_only_b}
        lists: dict[str, Sequence[ComparedNode | ComparedEdge]] = {**node_lists, **edge_lists}
        tables = {
            name: [{**entry._asdict(), "change": entry.change} for entry in entries[:limit]]
            for name, entries in lists.items()
        }
        counts = {name: len(entries) for name, entries in lists.items()}
        return {"align": self.align, "similarity": self.similarity, "counts": counts, **tables}

    def __repr__(self) -> str:
        lines = [f"Comparison(align={self.align!r}, similarity={self.similarity:.3f})"]
        for title, (header, *rows) in self.tables().items():
            lines.append(f"{title}: {len(rows)}")
            shown = [header, *rows[:_SHOWN]] if rows else []
            widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
            lines += ["  " + "  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)).rstrip() for r in shown]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        blocks = [f"<p>Similarity {self.similarity:.3f}, nodes aligned by {self.align}</p>"]
        for title, (header, *rows) in self.tables().items():
            head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
            cells = ("".join(f"<td>{html.escape(text)}</td>" for text in row) for row in rows[:_SHOWN])
            body = "".join(f"<tr>{row}</tr>" for row in cells)
            blocks.append(f"<table><caption>{title}: {len(rows)}</caption><tr>{head}</tr>{body}</table>")
        return "".join(blocks)


def _node_line(node: ComparedNode) -> list[str]:
    return [node.name, f"{node.influence_a:.4f}", f"{node.influence_b:.4f}", f"{node.change:+.4f}"]


def _edge_line(edge: ComparedEdge) -> list[str]:
    return [edge.source, edge.target, f"{edge.weight_a:.4g}", f"{edge.weight_b:.4g}", f"{edge.change:+.4g}"]


def compare(
    a: Graph,
    b: Graph,
    *,
    align: Alignment = "position",
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> Comparison:
    """Compare two graphs: what is in one alone, and what changes from the first to the second.

    align: "position", a feature is itself at one position, an error at one layer and position, a token at its position
    if it is the same token; "feature", at all positions together, as errors of a layer and tokens of one text are;
    "label", features of one label at one position are one, in whatever layer, and so are errors at one position: for
    two models, or two sets of transcoders. Graphs that name different ones (`graph.provenance`) are compared by label
    alone. Targets are aligned by their labels. The nodes and edges compared are those that either graph keeps when
    pruned at these thresholds; their influence and weights are those of the whole graphs.
    """
    for name, graph in (("a", a), ("b", b)):
        if not isinstance(graph, Graph):
            raise TypeError(f"{OP}: {name} must be a pc.Graph, got {type(graph).__name__}")
    if align not in ALIGNMENTS:
        raise ValueError(f"{OP}: align must be one of {', '.join(ALIGNMENTS)}, got {align!r}")
    if align != "label":
        _require_same_features(a, b, align)
    texts: dict[object, int] = {}
    left, right = (_Side(graph, align, texts, graph.prune(node_threshold, edge_threshold)) for graph in (a, b))
    keys = sorted({*left.kept_nodes, *right.kept_nodes})
    nodes = [_compared(key, left, right) for key in keys]
    only_a, only_b = ([n for n in nodes if not (n.b if side else n.a)] for side in (1, 0))
    edges = _compared_edges(left, right)
    return Comparison(
        align,
        sorted(only_a, key=lambda n: -n.influence_a),
        sorted(only_b, key=lambda n: -n.influence_b),
        sorted((n for n in nodes if n.a and n.b), key=lambda n: -abs(n.change)),
        *edges,
    )


def _require_same_features(a: Graph, b: Graph, align: Alignment) -> None:
    """Raise where the graphs name different models or transcoders, whose features have no indices in common."""
    for name in ("model", "transcoders"):
        values = [graph.provenance.get(name) for graph in (a, b)]
        if None not in values and values[0] != values[1]:
            raise ValueError(
                f"{OP}: a and b must be graphs of one model and one set of transcoders with align={align!r}, "
                f"got {name} {values[0]} and {values[1]}; use align='label'"
            )


class _Side:
    """One graph of a comparison: its nodes and kept edges by key."""

    def __init__(self, graph: Graph, align: Alignment, texts: dict[object, int], pruned: Pruned) -> None:
        self.graph = graph
        self.keys = _node_keys(graph, align, texts)
        self.nodes: dict[Key, list[int]] = {}
        for node, key in enumerate(self.keys):
            self.nodes.setdefault(key, []).append(node)
        total = float(graph.targets.weights.sum())
        self.influence = pruned.influence.numpy() / (total if total > 0 else 1.0)
        remaining = pruned.node_mask.numpy().copy()
        tokens = slice(graph.first_token, graph.first_target)
        remaining[tokens] &= self.influence[tokens] > 0
        self.kept_nodes = {self.keys[node] for node in np.flatnonzero(remaining).tolist()}
        self.row = graph.rows.row_of_entry()
        entries = np.flatnonzero(pruned.edge_mask.numpy())
        sources, targets = self._ends(entries)
        self.kept_edges = {(self.keys[s], self.keys[t]) for s, t in zip(sources, targets, strict=True)}

    def _ends(self, entries: np.ndarray) -> tuple[list[int], list[int]]:
        graph = self.graph
        return graph.rows.column.numpy()[entries].tolist(), graph.row_node.numpy()[self.row[entries]].tolist()

    def weights(self, edges: set[tuple[Key, Key]]) -> dict[tuple[Key, Key], float]:
        """Sum of the weights of each of these edges, in the whole graph."""
        graph = self.graph
        ends = [np.zeros(graph.nodes, bool) for _ in range(2)]
        for edge in edges:
            for mask, key in zip(ends, edge, strict=True):
                mask[self.nodes.get(key, [])] = True
        column, row_node = graph.rows.column.numpy(), graph.row_node.numpy()
        entries = np.flatnonzero(ends[0][column] & ends[1][row_node[self.row]])
        out = dict.fromkeys(edges, 0.0)
        sources, targets = self._ends(entries)
        for s, t, weight in zip(sources, targets, graph.rows.weight.numpy()[entries].tolist(), strict=True):
            edge = (self.keys[s], self.keys[t])
            if edge in out:
                out[edge] += weight
        return out

    def name(self, key: Key) -> str:
        """Label of a node and its identifier, with * for what does not tell it from others."""
        kind, first, second, third = key
        label = str(self.graph.describe(self.nodes[key][0]).get("label", ""))
        numbers = ["*" if number == ANY else str(number) for number in (first, second, third)]
        place = "/".join(numbers)
        if kind == "error":
            place = "/".join(["error", *numbers[:2]])
        elif kind != "feature":
            place = kind if second == ANY else f"{kind}/{second}"
        elif third == LABEL:
            return f"{label} at {second}" if label else identifier(self.graph, self.nodes[key][0])
        return f"{label} {place}".strip()


def _node_keys(graph: Graph, align: Alignment, texts: dict[object, int]) -> list[Key]:
    """Key of every node. texts: numbers of labels, and of the texts of tokens and targets, shared by both graphs."""

    def number(text: object) -> int:
        return texts.setdefault(text, len(texts))

    def feature_key(layer: int, position: int, feature: int) -> Key:
        if align != "label":
            return ("feature", layer, ANY if align == "feature" else position, feature)
        label, _ = graph.label(layer, feature)
        return ("feature", number(("label", label) if label else (id(graph), layer, feature)), position, LABEL)

    features = [feature_key(*indices) for indices in graph.features.tolist()]
    errors: list[Key] = [
        ("error", ANY if align == "label" else layer, ANY if align == "feature" else position, 0)
        for layer in range(graph.layers)
        for position in range(graph.positions)
    ]
    tokens: list[Key] = [
        ("token", number(text), ANY if align == "feature" else position, 0)
        for position, text in enumerate(graph.tokens.text)
    ]
    counts: dict[str, int] = {}
    targets: list[Key] = []
    for label in map(str.strip, graph.targets.labels):  # of targets with one label, the first with the first
        counts[label] = counts.get(label, -1) + 1
        targets.append(("target", number(label), ANY, counts[label]))
    return [*features, *errors, *tokens, *targets]


def _compared(key: Key, left: _Side, right: _Side) -> ComparedNode:
    a, b = (tuple(side.nodes.get(key, ())) for side in (left, right))
    influence = [float(side.influence[list(nodes)].sum()) for side, nodes in ((left, a), (right, b))]
    return ComparedNode((left if a else right).name(key), key[0], a, b, *influence)


def _compared_edges(left: _Side, right: _Side) -> list[list[ComparedEdge]]:
    """Edges between nodes of both graphs, edges of the first alone, and of the second alone."""
    edges = left.kept_edges | right.kept_edges
    weight_a, weight_b = left.weights(edges), right.weights(edges)
    out: list[list[ComparedEdge]] = [[], [], []]
    for edge in sorted(edges):
        in_a, in_b = (all(key in side.nodes for key in edge) for side in (left, right))
        names = [(left if in_a else right).name(key) for key in edge]
        kind = 0 if in_a and in_b else 1 if in_a else 2
        out[kind].append(ComparedEdge(names[0], names[1], weight_a[edge], weight_b[edge]))
    return [sorted(entries, key=lambda e: -abs(e.change)) for entries in out]

"""Views of a graph in a notebook: its picture above its facts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pycircuit.graph.identifiers import identifier

from .html_table import Cell, html_table
from .node_names import label, percent, plain
from .plot import plot

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph
    from pycircuit.graph.prune import Pruned


def graph_html(graph: Graph) -> str:
    """The picture of a graph pruned as by default, its sizes and its certificate."""
    return _picture(graph.prune(), _facts(graph))


def pruned_html(pruned: Pruned) -> str:
    """The picture of what remains, how much it is, and the features of most influence."""
    nodes, edges = int(pruned.node_mask.sum()), int(pruned.edge_mask.sum())
    caption = f"{nodes} of {len(pruned.node_mask)} nodes, {edges} of {len(pruned.edge_mask)} edges"
    header = ("influence", "feature", "label", "token", "activation")
    return _picture(pruned, html_table(header, strongest_features(pruned), caption))


def strongest_features(pruned: Pruned, count: int = 10) -> list[tuple[Cell, ...]]:
    """Features of most influence, most first: (influence, identifier, label, token, activation)."""
    graph = pruned.original
    influence = pruned.influence.numpy()[: graph.first_error]
    best = np.argsort(-influence, kind="stable")[:count].tolist()
    return [
        (
            percent(float(influence[node])),
            identifier(graph, node),
            label(graph, node),
            plain(graph.tokens.text[int(graph.features[node, 1])]),
            float(graph.values[node]),
        )
        for node in best
    ]


def _picture(pruned: Pruned, below: str) -> str:
    return f"{plot(pruned).svg}\n{below}" if len(pruned.original.targets) else below


def _facts(graph: Graph) -> str:
    facts: list[tuple[str, Cell]] = [
        ("features", len(graph.features)), ("layers", graph.layers), ("positions", graph.positions),
        ("targets", len(graph.targets)), ("rows", graph.rows.count), ("edges", graph.rows.entries),
        ("certificate", float(graph.certificate)),
    ]  # fmt: skip
    return html_table([name for name, _ in facts], [[value for _, value in facts]], graph.prompt[:500])

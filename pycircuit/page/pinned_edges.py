"""Edges among the nodes of the page's subgraph, in the complete graph: a group's edges are their sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .graph_index import GraphIndex, significant
from .node_ids import present_nodes

MOST_NODES = 5000


def pinned_edges(index: GraphIndex, identifiers: Sequence[str]) -> dict[str, Any]:
    """Return the nodes that the graph has of these, and the edges among them in columns."""
    nodes = present_nodes(index.graph, identifiers[:MOST_NODES])
    graph, place = index.graph, np.full(index.graph.nodes, -1)
    place[nodes] = np.arange(len(nodes))
    columns: dict[str, list[Any]] = {"source": [], "target": [], "weight": [], "share": []}
    for target, node in enumerate(nodes):
        row = int(index.row_of[node])
        if row < 0:
            continue
        begin, end = graph.rows.row_ptr[row : row + 2].tolist()
        source = place[graph.rows.column.numpy()[begin:end]]
        entries = begin + np.flatnonzero(source >= 0)
        columns["source"] += source[source >= 0].tolist()
        columns["target"] += [target] * len(entries)
        columns["weight"] += significant(graph.rows.weight.numpy()[entries]).tolist()
        columns["share"] += significant(index.shares(entries, np.full(len(entries), row))).tolist()
    return {"nodes": index.describe(nodes), "edges": columns}

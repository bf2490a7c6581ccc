"""Views of a graph for the page: the pruned graph, a node's inputs and outputs, paths and search, as plain values."""

from __future__ import annotations

from typing import Any

import numpy as np

from pycircuit.graph import Graph
from pycircuit.graph.csr import largest
from pycircuit.graph.prune import Pruned

from .graph_index import GraphIndex, finite, significant
from .node_ids import node_of

MAX_NODES, MAX_EDGES = 2000, 50_000
LEGIBLE = 80  # features that can be told apart on a screen
_NODE_THRESHOLDS = tuple(percent / 100 for percent in range(80, 0, -1))
_EDGE_THRESHOLD, _FEWER_EDGES = 0.98, 0.8


def first_thresholds(index: GraphIndex) -> tuple[float, float]:
    """Node and edge thresholds at which a graph can be read: fewer nodes, and edges among them, of a large one."""
    shares = index.cumulative[: index.graph.first_error]
    legible = [t for t in _NODE_THRESHOLDS if np.count_nonzero(shares <= t) <= LEGIBLE]
    node = legible[0] if legible else _NODE_THRESHOLDS[-1]
    return node, _EDGE_THRESHOLD if node == _NODE_THRESHOLDS[0] else _FEWER_EDGES


def view(
    graph: Graph,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_nodes: int = MAX_NODES,
    *,
    max_edges: int = MAX_EDGES,
    index: GraphIndex | None = None,
) -> dict[str, Any]:
    """Return the pruned graph as the page draws it: nodes, and edges in columns.

    The whole graph is pruned at these thresholds; of what remains, all targets and tokens are shown, and the most
    influential features and errors up to max_nodes, with their max_edges strongest edges.
    """
    index = GraphIndex(graph) if index is None else index
    pruned = index.pruned(node_threshold, edge_threshold)
    nodes = _shown(index, pruned, max_nodes)
    return {
        "prompt": graph.prompt,
        "tokens": list(graph.tokens.text),
        "layers": graph.layers,
        "certificate": index.certificate,
        "provenance": _plain(graph.provenance),
        "thresholds": {"node": node_threshold, "edge": edge_threshold},
        "first_thresholds": dict(zip(("node", "edge"), first_thresholds(index), strict=True)),
        "total": {"nodes": graph.nodes, "features": len(graph.features), "edges": graph.rows.entries},
        "pruned": {
            "nodes": int(np.count_nonzero(pruned.node_mask.numpy())),
            "edges": int(np.count_nonzero(pruned.edge_mask.numpy())),
        },
        "scores": index.scores,
        "nodes": index.describe(nodes),
        "edges": _edges(index, np.flatnonzero(pruned.edge_mask.numpy()), nodes, max_edges),
    }


def _plain(provenance: dict[str, Any]) -> dict[str, Any]:
    """Entries of the provenance that are numbers and texts."""
    return {
        name: value
        for name, value in provenance.items()
        if isinstance(value, str | bool | int) or (isinstance(value, float) and finite(value) is not None)
    }


def _shown(index: GraphIndex, pruned: Pruned, max_nodes: int) -> np.ndarray:
    """Nodes to draw, ascending."""
    mask, graph = pruned.node_mask.numpy(), index.graph
    inner = np.flatnonzero(mask[: graph.first_token])
    count = max(0, max_nodes - (graph.nodes - graph.first_token))
    if len(inner) > count:
        inner = inner[largest(index.influence[inner], count)]
    return np.concatenate([inner, np.arange(graph.first_token, graph.nodes)])


def _edges(index: GraphIndex, entries: np.ndarray, nodes: np.ndarray, max_edges: int) -> dict[str, list[Any]]:
    """Columns of the edges between the nodes. entries: of the rows, ascending."""
    rows, place = index.graph.rows, np.full(index.graph.nodes, -1)
    place[nodes] = np.arange(len(nodes))
    source = place[rows.column.numpy()[entries]]
    entries, source = entries[source >= 0], source[source >= 0]
    row = np.searchsorted(rows.row_ptr.numpy(), entries, side="right") - 1
    target = place[index.graph.row_node.numpy()[row]]
    drawn = target >= 0
    entries, source, target, row = entries[drawn], source[drawn], target[drawn], row[drawn]
    share = index.shares(entries, row)
    if len(entries) > max_edges:
        strongest = largest(share * index.influence[nodes[target]], max_edges)
        entries, source, target, share = entries[strongest], source[strongest], target[strongest], share[strongest]
    return {
        "source": source.tolist(),
        "target": target.tolist(),
        "weight": significant(rows.weight.numpy()[entries]).tolist(),
        "share": significant(share).tolist(),
    }


def node_details(index: GraphIndex, identifier: str, limit: int = 50) -> dict[str, Any]:
    """Return a node with its strongest inputs and outputs in the whole graph, and their totals."""
    graph = index.graph
    node = node_of(graph, identifier)
    inputs, outputs = _input_entries(index, node), np.flatnonzero(graph.rows.column.numpy() == node)
    output_rows = np.searchsorted(graph.rows.row_ptr.numpy(), outputs, side="right") - 1
    input_rows = np.full(len(inputs), index.row_of[node])
    return {
        "node": index.describe([node])[0],
        "inputs": _strongest(index, inputs, input_rows, graph.rows.column.numpy()[inputs], limit),
        "outputs": _strongest(index, outputs, output_rows, graph.row_node.numpy()[output_rows], limit),
        "totals": {**_input_totals(index, node, inputs), "outputs": len(outputs)},
    }


def _input_entries(index: GraphIndex, node: int) -> np.ndarray:
    row = int(index.row_of[node])
    begin, end = (0, 0) if row < 0 else index.graph.rows.row_ptr[row : row + 2].tolist()
    return np.arange(begin, end)


def _strongest(
    index: GraphIndex, entries: np.ndarray, rows: np.ndarray, nodes: np.ndarray, limit: int
) -> list[dict[str, Any]]:
    """Describe the edges of the largest shares, the largest first. nodes: the other end of each."""
    share = index.shares(entries, rows)
    order = np.argsort(-share, kind="stable")[:limit]
    order = order[share[order] > 0]
    weight = significant(index.graph.rows.weight.numpy()[entries[order]]).tolist()
    columns = zip(index.describe(nodes[order]), weight, significant(share[order]).tolist(), strict=True)
    return [{"node": node, "weight": w, "share": s} for node, w, s in columns]


def _input_totals(index: GraphIndex, node: int, entries: np.ndarray) -> dict[str, Any]:
    """Sums of a node's row; None where it has no row."""
    graph, row = index.graph, int(index.row_of[node])
    names = ("positive", "negative", "bias", "dropped", "preactivation")
    if row < 0:
        return {"inputs": 0, "explained": False, **dict.fromkeys(names)}
    weight = graph.rows.weight.numpy()[entries].astype(np.float64)
    sums = (
        weight[weight > 0].sum(), weight[weight < 0].sum(), graph.bias[row], graph.dropped[row],  # type: ignore[index]
        graph.preactivation[row],
    )  # fmt: skip
    values = significant(np.array([float(value) for value in sums])).tolist()
    return {"inputs": len(entries), "explained": True, **dict(zip(names, map(finite, values), strict=True))}


def strongest_paths(index: GraphIndex, source: str, target: str, k: int) -> dict[str, Any]:
    """Return the k strongest paths between two nodes; sign: that of the product of the weights."""
    graph = index.graph
    paths = graph.paths(node_of(graph, source), node_of(graph, target), k)
    return {
        "paths": [
            {
                "nodes": index.describe(path.nodes),
                "weights": significant(np.array(path.weights)).tolist(),
                "strength": float(significant(np.array([path.strength]))[0]),
                "sign": int(np.prod(np.sign(path.weights))),
            }
            for path in paths
        ]
    }

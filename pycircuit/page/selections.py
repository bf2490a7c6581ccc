"""Scores of a selection of nodes, and groups for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pycircuit.graph import Graph, Pruned
from pycircuit.graph.identifiers import identifiers
from pycircuit.graph.supernodes import GROUPINGS, Grouping, supernodes

from .edit_document import MOST, node_list, short_text
from .graph_index import GraphIndex, finite
from .node_ids import present_nodes

OP = "page"


def selection_scores(index: GraphIndex, body: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the scores of the graph with the features that are not selected counted as errors."""
    scores = index.graph.subgraph_scores(_nodes(index.graph, body.get("nodes", [])))
    return {"replacement": finite(scores.replacement), "completeness": finite(scores.completeness)}


def selection_groups(index: GraphIndex, body: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Return groups of the selected features, or of all that pruning keeps; fixed groups stay as they are."""
    graph = index.graph
    method = body.get("method") or "structure"
    if method not in GROUPINGS:
        raise ValueError(f"{OP}: method must be one of {', '.join(GROUPINGS)}, got {str(method)[:40]!r}")
    fixed = body.get("fixed") or {}
    if not isinstance(fixed, dict) or len(fixed) > MOST["groups"]:
        raise ValueError(f"{OP}: fixed must be an object from names to nodes, {MOST['groups']} at most")
    owned = {short_text("a group's name", name): _nodes(graph, nodes) for name, nodes in fixed.items()}
    groups = supernodes(_selection(index, body, owned), _grouping(method), {n: m for n, m in owned.items() if m})
    return {"groups": [{"name": group.name, "nodes": list(identifiers(graph, group.nodes))} for group in groups]}


def _grouping(method: str) -> Grouping:
    return "structure" if method == "structure" else "label"


def _selection(index: GraphIndex, body: Mapping[str, Any], owned: Mapping[str, list[int]]) -> Pruned:
    """Pruning that keeps the nodes of a body with the edges among them, or that of the default thresholds."""
    graph = index.graph
    if body.get("nodes") is None:
        return index.pruned(0.8, 0.98)
    mask = np.zeros(graph.nodes, bool)
    mask[_nodes(graph, body["nodes"])] = True
    mask[[node for nodes in owned.values() for node in nodes]] = True
    mask[graph.first_token :] = True
    rows = graph.rows
    target = graph.row_node.numpy()[rows.row_of_entry()]
    edges = mask[rows.column.numpy()] & mask[target]
    return Pruned(graph, torch.from_numpy(mask), torch.from_numpy(edges), torch.from_numpy(index.influence))


def _nodes(graph: Graph, identifiers: object) -> list[int]:
    return present_nodes(graph, node_list("nodes", identifiers))

"""Nodes of identifiers, and identifiers of nodes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from pycircuit.graph import identifiers

from .node_id_form import FORM, is_node_id

if TYPE_CHECKING:
    from pycircuit.graph import Graph

OP = "page"


def node_of(graph: Graph, text: str) -> int:
    """Return the node of an identifier; ValueError for a wrong form, KeyError for a node that the graph lacks."""
    if not is_node_id(text):
        raise ValueError(f"{OP}: a node must be {FORM}, got {str(text)[:80]!r}")
    try:
        return identifiers.node_of(graph, text, OP)
    except ValueError as error:
        raise KeyError(str(error)) from None


def present_nodes(graph: Graph, identifiers: Iterable[str]) -> list[int]:
    """Return the nodes that the graph has of these: an edit may name nodes of an earlier state of its file."""
    nodes = []
    for identifier in identifiers:
        with suppress(KeyError):
            nodes.append(node_of(graph, identifier))
    return nodes


def node_ids(graph: Graph, nodes: np.ndarray) -> list[str]:
    """Return the identifiers of nodes: [n]."""
    features = graph.features.numpy()
    ids = []
    for node in nodes.tolist():
        if node < graph.first_error:
            layer, position, feature = features[node].tolist()
            ids.append(f"{layer}/{position}/{feature}")
        elif node < graph.first_token:
            layer, position = divmod(node - graph.first_error, graph.positions)
            ids.append(f"error/{layer}/{position}")
        elif node < graph.first_target:
            ids.append(f"token/{node - graph.first_token}")
        else:
            ids.append(f"target/{node - graph.first_target}")
    return ids

"""Nodes of the identifiers that a page sends."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from pycircuit.graph import identifiers
from pycircuit.graph.identifiers import FORM, is_identifier

if TYPE_CHECKING:
    from pycircuit.graph import Graph

OP = "page"


def node_of(graph: Graph, text: str) -> int:
    """Return the node of an identifier; ValueError for a wrong form, KeyError for a node that the graph lacks."""
    if not is_identifier(text):
        raise ValueError(f"{OP}: a node must be {FORM}, got {str(text)[:80]!r}")
    try:
        return identifiers.node_of(graph, text, OP)
    except ValueError as error:
        raise KeyError(str(error)) from None


def present_nodes(graph: Graph, texts: Iterable[str]) -> list[int]:
    """Return the nodes that the graph has of these: an edit may name nodes of an earlier state of its file."""
    nodes = []
    for text in texts:
        with suppress(KeyError):
            nodes.append(node_of(graph, text))
    return nodes

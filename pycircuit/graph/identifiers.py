"""Identifiers of nodes: 0/7/347 (layer, position, feature), error/2/7, token/7, target/0."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph

_FORM = re.compile(
    r"(?:(error)/(\d{1,9})/(\d{1,9})|(token|target)/(\d{1,9})|(\d{1,9})/(-?\d{1,9})/(\d{1,12}))", re.ASCII
)


def identifier(graph: Graph, node: int) -> str:
    """Return the identifier of a node."""
    if node < graph.first_error:
        return "/".join(map(str, graph.features[node].tolist()))
    if node < graph.first_token:
        return "error/{}/{}".format(*divmod(node - graph.first_error, graph.positions))
    if node < graph.first_target:
        return f"token/{node - graph.first_token}"
    return f"target/{node - graph.first_target}"


def node_of(graph: Graph, text: str, op: str = "node_of") -> int:
    """Return the node of an identifier; a feature's position may count from the end. ValueError if there is none.

    op: the function or option that the user called, which the error names.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{op}: a node must be LAYER/POSITION/FEATURE, error/LAYER/POSITION, token/POSITION or target/N, got "
            f"{text[:80]!r}"
        )
    error, error_layer, error_position, end, number, layer, position, feature = match.groups()
    try:
        if error:
            return graph.error_node(int(error_layer), int(error_position))
        if end:
            return graph.token_node(int(number)) if end == "token" else graph.target_node(int(number))
        from_start = int(position) + (graph.positions if int(position) < 0 else 0)
        return graph.feature_node(int(layer), from_start, int(feature))
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"{op}: a node must be in the graph, got {text}") from None

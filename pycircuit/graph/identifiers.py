"""Identifiers of nodes: 0/7/20 (layer, position, feature), error/2/7, token/7, target/0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .graph import Graph

FORM = "LAYER/POSITION/FEATURE, error/LAYER/POSITION, token/POSITION or target/N"
_PARTS = re.compile(
    r"(?:(error)/(\d{1,9})/(\d{1,9})|(token|target)/(\d{1,9})|(\d{1,9})/(-?\d{1,9})/(\d{1,12}))", re.ASCII
)
_NUMBER = r"(?:0|[1-9]\d{0,8})"
_PLAIN = re.compile(rf"{_NUMBER}/{_NUMBER}/{_NUMBER}|error/{_NUMBER}/{_NUMBER}|(?:token|target)/{_NUMBER}", re.ASCII)


def identifier(graph: Graph, node: int) -> str:
    """Return the identifier of a node."""
    return next(identifiers(graph, [node]))


def identifiers(graph: Graph, nodes: Iterable[int]) -> Iterator[str]:
    """Yield the identifiers of nodes."""
    features = graph.features.numpy()
    for node in nodes:
        if node < graph.first_error:
            layer, position, feature = features[node].tolist()
            yield f"{layer}/{position}/{feature}"
        elif node < graph.first_token:
            layer, position = divmod(node - graph.first_error, graph.positions)
            yield f"error/{layer}/{position}"
        elif node < graph.first_target:
            yield f"token/{node - graph.first_token}"
        else:
            yield f"target/{node - graph.first_target}"


def is_identifier(text: object) -> bool:
    """Return True for what `identifiers` could have written, whether a graph has the node or not."""
    return isinstance(text, str) and _PLAIN.fullmatch(text) is not None


def node_of(graph: Graph, text: str, op: str = "node_of") -> int:
    """Return the node of an identifier; a feature's position may count from the end. ValueError if there is none.

    op: the function or option that the user called, which the error names.
    """
    match = _PARTS.fullmatch(text)
    if match is None:
        raise ValueError(f"{op}: a node must be {FORM}, got {text[:80]!r}")
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

"""Identifiers of nodes as people type them: 0/7/347, error/3/2, token/4, target/0."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pycircuit.graph import Graph

FORM = "LAYER/POSITION/FEATURE, error/LAYER/POSITION, token/POSITION or target/N"
_NUMBER = r"(0|[1-9]\d{0,8})"
_FEATURE = re.compile(rf"{_NUMBER}/{_NUMBER}/{_NUMBER}", re.ASCII)
_ERROR = re.compile(rf"error/{_NUMBER}/{_NUMBER}", re.ASCII)
_END = re.compile(rf"(token|target)/{_NUMBER}", re.ASCII)


def is_node_id(text: object) -> bool:
    """Return True for an identifier in the right form, whether a graph has the node or not."""
    return isinstance(text, str) and any(form.fullmatch(text) for form in (_FEATURE, _ERROR, _END))


def node_of(graph: Graph, identifier: str) -> int:
    """Return the node of an identifier; ValueError for a wrong form, KeyError for a node that the graph lacks."""
    if match := _FEATURE.fullmatch(identifier):
        return graph.feature_node(*map(int, match.groups()))
    if match := _ERROR.fullmatch(identifier):
        layer, position = map(int, match.groups())
        return _present(identifier, lambda: graph.error_node(layer, position))
    if match := _END.fullmatch(identifier):
        kind, number = match.groups()
        find = graph.token_node if kind == "token" else graph.target_node
        return _present(identifier, lambda: find(int(number)))
    raise ValueError(f"page: a node must be {FORM}, got {identifier[:80]!r}")


def _present(identifier: str, find: Callable[[], int]) -> int:
    try:
        return find()
    except ValueError:
        raise KeyError(f"page: a node must be in the graph, got {identifier}") from None


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

"""Search of a whole graph over labels, tokens and identifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pycircuit.graph.identifiers import identifiers

from .graph_index import GraphIndex

LIMIT = 100  # nodes in an answer


def search(index: GraphIndex, text: str, labels: Mapping[str, str]) -> dict[str, Any]:
    """Return the nodes that a text names, the most influential first, and their number.

    The text is looked for in labels and tokens, whatever its case; with a slash in it, in identifiers, where 3/412 also
    means feature 412 of layer 3 at any position. labels: the user's own, by "layer/feature".
    """
    wanted = text.strip().casefold()
    if not wanted:
        return {"nodes": [], "total": 0}
    matches = _by_text(index, wanted, labels)
    if any(character.isdigit() for character in wanted):
        matches |= _by_identifier(index, wanted)
    nodes = np.flatnonzero(matches)
    order = nodes[np.argsort(-index.influence[nodes], kind="stable")]
    return {"nodes": index.describe(order[:LIMIT]), "total": len(nodes)}


def _by_text(index: GraphIndex, wanted: str, labels: Mapping[str, str]) -> np.ndarray:
    """Mask of nodes whose label or token has the text: [nodes]."""
    graph = index.graph
    out = np.zeros(graph.nodes, bool)
    names = {f"{layer}/{feature}": label for (layer, feature), label in graph.labels.items()} | dict(labels)
    named = {name for name, label in names.items() if wanted in label.casefold()}
    if named:
        features = graph.features[:, [0, 2]].tolist()
        out[: graph.first_error] = [f"{layer}/{feature}" in named for layer, feature in features]
    out[graph.first_token : graph.first_target] = [wanted in token.casefold() for token in graph.tokens.text]
    out[graph.first_target :] = [wanted in label.casefold() for label in graph.targets.labels]
    return out


def _by_identifier(index: GraphIndex, wanted: str) -> np.ndarray:
    """Mask of nodes whose identifier begins with the text, or whose layer and feature are it: [nodes]."""
    graph = index.graph
    out = np.zeros(graph.nodes, bool)
    if "/" not in wanted:
        if wanted.isdecimal() and len(wanted) < 10:
            out[: graph.first_error] = graph.features[:, 2].numpy() == int(wanted)
        return out
    ids = list(identifiers(graph, range(graph.nodes)))
    out[:] = [identifier.startswith(wanted) for identifier in ids]
    parts = wanted.split("/")
    if len(parts) == 2 and all(number.isdecimal() and len(number) < 10 for number in parts):
        layer, feature = map(int, parts)
        columns = graph.features.numpy()
        out[: graph.first_error] |= (columns[:, 0] == layer) & (columns[:, 2] == feature)
    return out

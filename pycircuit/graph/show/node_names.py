"""Names of nodes for people: identifiers, labels, and units of nodes that are shown as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pycircuit.graph.identifiers import identifier
from pycircuit.graph.supernodes import key

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

LABEL_WIDTH, TOKEN_WIDTH = 24, 14  # characters of a label and of a token in a name
AUTOMATIC = "~"  # stands before a label that no person gave


def plain(text: str) -> str:
    """Replace control characters, so that the text is on one line."""
    return "".join(c if c.isprintable() else "·" for c in text.strip(" ")) or "␣"


def label(graph: Graph, node: int) -> str:
    """Label of a node on one line, "" without one; `~` stands before an automatic one."""
    description = graph.describe(node)
    text = description.get("label") or ""
    if not text and node < graph.first_token:
        return ""
    return (AUTOMATIC if description.get("automatic") else "") + plain(text)


def name(graph: Graph, nodes: Sequence[int]) -> str:
    """Name a node or several shown as one: `Texas 0/7/347 @Dallas`, `Texas ×3 0/7/347 +2 @Dallas`, `“Dallas” token/7`.

    The first of several lends its label and identifier.
    """
    node = nodes[0]
    text = _cut(label(graph, node), LABEL_WIDTH)
    if node >= graph.first_target:
        return text
    if node >= graph.first_token:
        return f"“{_cut(text, TOKEN_WIDTH)}” {identifier(graph, node)}"
    place = "@" + _cut(plain(graph.tokens.text[graph.describe(node)["position"]]), TOKEN_WIDTH)
    words = [text, identifier(graph, node), place]
    if len(nodes) > 1:
        words[1:2] = [f"×{len(nodes)}", words[1], f"+{len(nodes) - 1}"]
    return " ".join(word for word in words if word)


def percent(share: float) -> str:
    """A share as a percentage with two significant digits: `11%`, `4.1%`, `0.041%`."""
    value = 100 * share
    if value >= 9.95:
        return f"{value:.0f}%"
    return f"{value:.1f}%" if value >= 0.95 else f"{value:.2g}%" if value >= 1e-4 else "0%"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def units(graph: Graph, group: bool) -> tuple[np.ndarray, dict[int, list[int]]]:
    """(unit of every node, [nodes], the lowest of the nodes shown as one; nodes of each unit of several).

    Features of one label, by hand, at one position are a unit; every other node is its own.
    """
    unit = np.arange(graph.nodes)
    members: dict[int, list[int]] = {}
    if not (group and graph.labels):
        return unit, members
    layer, feature = graph.features[:, 0].numpy(), graph.features[:, 2].numpy()
    named = np.array([pair for pair, text in graph.labels.items() if text], np.int64).reshape(-1, 2)
    span = max(int(feature.max(initial=0)), int(named[:, 1].max(initial=0))) + 1
    labelled = np.flatnonzero(np.isin(layer * span + feature, named[:, 0] * span + named[:, 1]))
    groups: dict[tuple[str, int], list[int]] = {}
    for node in labelled.tolist():
        groups.setdefault(key(graph, node), []).append(node)
    for nodes in groups.values():
        if len(nodes) > 1:
            unit[nodes] = nodes[0]
            members[nodes[0]] = nodes
    return unit, members

"""Names of nodes for people: identifiers, labels, and units of nodes that are shown as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pycircuit.graph.identifiers import identifier
from pycircuit.graph.supernodes import Supernode, key

if TYPE_CHECKING:
    from pycircuit.graph.graph import Graph

LABEL_WIDTH, TOKEN_WIDTH = 32, 14  # characters of a label and of a token in a name
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


def name(graph: Graph, nodes: Sequence[int], group_name: str | None = None) -> str:
    """Name a node or several shown as one: `Texas 0/7/20 @Dallas`, `Texas ×3 0/7/20 +2 @Dallas`, `“Dallas” token/7`.

    The first of several lends its identifier, and its label where the group has no name.
    """
    node = nodes[0]
    text = _cut(label(graph, node) if group_name is None else plain(group_name), LABEL_WIDTH)
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


Grouping = bool | Sequence[Supernode]  # True: by label; or these groups


class Units(NamedTuple):
    """Nodes shown as one.

    unit: [nodes], the lowest node of the unit that each node is in; members: the nodes of units of several; names:
    of units that a caller named.
    """

    unit: np.ndarray
    members: dict[int, list[int]]
    names: dict[int, str]

    def nodes(self, unit: int) -> list[int]:
        """Nodes of a unit, ascending."""
        return self.members.get(unit, [unit])


def units(op: str, graph: Graph, group: Grouping) -> Units:
    """Units of a graph: features of one label, by hand, at one position, or the groups of a caller."""
    out = Units(np.arange(graph.nodes), {}, {})
    groups: list[tuple[str | None, list[int]]] = []
    if not isinstance(group, bool):
        groups = _checked(op, graph, group)
    elif group and graph.labels:
        groups = [(None, nodes) for nodes in _labelled(graph)]
    for text, nodes in groups:
        if len(nodes) > 1:
            out.unit[nodes] = nodes[0]
            out.members[nodes[0]] = nodes
        if text is not None:
            out.names[nodes[0]] = text
    return out


def _labelled(graph: Graph) -> list[list[int]]:
    """Features of one label at one position."""
    layer, feature = graph.features[:, 0].numpy(), graph.features[:, 2].numpy()
    named = np.array([pair for pair, text in graph.labels.items() if text], np.int64).reshape(-1, 2)
    span = max(int(feature.max(initial=0)), int(named[:, 1].max(initial=0))) + 1
    labelled = np.flatnonzero(np.isin(layer * span + feature, named[:, 0] * span + named[:, 1]))
    groups: dict[tuple[str, int], list[int]] = {}
    for node in labelled.tolist():
        groups.setdefault(key(graph, node), []).append(node)
    return list(groups.values())


def _checked(op: str, graph: Graph, group: Sequence[Supernode]) -> list[tuple[str | None, list[int]]]:
    """Groups of a caller: no node in two of them, all of them features."""
    if not isinstance(group, Sequence) or not all(isinstance(entry, Supernode) for entry in group):
        raise TypeError(f"{op}: group must be True, False or a list of supernodes, got {type(group).__name__}")
    nodes = [node for entry in group for node in entry.nodes]
    wrong = [node for node in nodes if not 0 <= node < graph.first_error]
    if wrong or not all(entry.nodes for entry in group):
        got = f"node {wrong[0]}" if wrong else "a group without nodes"
        raise ValueError(f"{op}: group must hold features, nodes below {graph.first_error}, got {got}")
    if len(set(nodes)) < len(nodes):
        twice = next(node for node in nodes if nodes.count(node) > 1)
        raise ValueError(f"{op}: group must hold a node once, got node {twice} more often")
    return [(entry.name, sorted(entry.nodes)) for entry in group]
